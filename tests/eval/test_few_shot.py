"""Few-shot accuracy: slow references of every classifier, nested draws, Student's interval."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from convscope.core.errors import UserError
from convscope.core.results import load_result
from convscope.eval.features import Features
from convscope.eval.few_shot import FewShotCommand, FewShotConfig, draw, few_shot, mean_over, run


def clusters(count: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    x = (centres[y] + 1.5 * torch.randn(count, 6, generator=generator)) * torch.rand(count, 1, generator=generator)
    return Features([str(i) for i in range(count)], x, y)


def slow(train: Features, test: Features, chosen: list[int], classifier: str) -> float:
    """Accuracy of one draw, an image at a time."""
    assert train.y is not None
    assert test.y is not None
    unit = [row / math.hypot(*row) for row in train.x.double().numpy()]
    hits = []
    if classifier == "logreg":
        model = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000)
        model.fit(np.stack([unit[i] for i in chosen]), train.y[chosen].numpy())
    for query, label in zip(test.x.double().numpy(), test.y.tolist()):
        query = query / math.hypot(*query)
        if classifier == "logreg":
            answer = int(model.predict(query[None])[0])
        elif classifier == "knn":
            nearest = sorted(chosen, key=lambda i: -float(unit[i] @ query))[:5]
            scores = [sum(math.exp(unit[i] @ query / 0.07) for i in nearest if train.y[i] == c) for c in range(4)]
            answer = int(np.argmax(scores))
        else:
            means = [np.mean([unit[i] for i in chosen if train.y[i] == c], axis=0) for c in range(4)]
            answer = int(np.argmax([mean @ query / math.hypot(*mean) for mean in means]))
        hits.append(answer == label)
    return sum(hits) / len(hits)


@pytest.mark.parametrize("classifier", ["nearest-centroid", "knn", "logreg"])
def test_equals_the_slow_classifier(classifier: Any) -> None:
    train, test = clusters(80, 0), clusters(48, 1)
    assert train.y is not None
    found = few_shot(train, test, FewShotConfig(shots=(5, 2), tries=3, classifier=classifier, device="cpu"))
    assert list(found) == [2, 5]
    for number in range(3):
        order = draw(train.y, 5, number)
        for n in (2, 5):
            assert found[n].accuracies[number] == pytest.approx(
                slow(train, test, order[:, :n].flatten().tolist(), classifier)
            )
    assert 0.3 < np.mean(found[5].accuracies) < 1
    assert found[5].hits.shape == (48,)
    assert set((3 * found[5].hits).round(decimals=9).tolist()) <= {0, 1, 2, 3}
    assert float(found[5].hits.mean()) == pytest.approx(np.mean(found[5].accuracies))


def test_draws_are_nested_seeded_and_of_their_class() -> None:
    y = torch.tensor([0, 1, 2] * 7 + [2, 2])
    most, fewer = draw(y, 6, 3), draw(y, 2, 3)
    assert torch.equal(most[:, :2], fewer)
    assert torch.equal(most, draw(y, 6, 3))
    assert not torch.equal(most, draw(y, 6, 4))
    assert torch.equal(y[most], torch.arange(3)[:, None].expand(3, 6))
    assert len(most.unique()) == 18


def test_students_interval() -> None:
    found = mean_over([0.4, 0.5, 0.6, 0.7])
    # mean 0.55, standard deviation 0.129099, t with 3 degrees of freedom 3.182446
    assert (found.value, found.low, found.high) == pytest.approx((0.55, 0.344574, 0.755426), abs=1e-6)
    assert found.n == 4
    assert mean_over([1.0, 0.9]).high == 1.0


def test_mistakes_are_told() -> None:
    train, test = clusters(20, 0), clusters(8, 1)
    with pytest.raises(UserError, match="class 0 of train has 5 images, fewer than --shots 10"):
        few_shot(train, test, FewShotConfig(device="cpu"))
    with pytest.raises(UserError, match="NaN"):
        few_shot(Features(train.keys, train.x / 0, train.y), test, FewShotConfig(shots=(1,), device="cpu"))
    for name, value in (("shots", ()), ("shots", (0,)), ("tries", 1), ("k", 0), ("c", 0.0)):
        with pytest.raises(UserError, match=name):
            FewShotConfig(**{name: value})


def test_command(small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "few-shot.json"
    shared: dict[str, Any] = {"model": "timm:resnet10t@random", "data": small_shards, "device": "cpu", "workers": 0}
    run(FewShotCommand(**shared, output=output, shots=(1, 4), tries=3, layers=("layer1", "pooled")))
    result = load_result(output)
    assert set(result.figures) == {f"{layer} top1 n={n}" for layer in ("layer1", "pooled") for n in (1, 4)}
    assert len(result.details["accuracies"]["pooled"]["4"]) == 3
    assert result.protocol.endswith("nearest-centroid")
    assert "4 a class" in capsys.readouterr().out
