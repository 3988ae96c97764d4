"""k-NN: the published vote, its edge cases, exact search."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convscope.core.errors import UserError
from convscope.core.neighbours import neighbours, search_faiss, search_torch
from convscope.core.results import load_result
from convscope.eval.features import Features
from convscope.eval.knn import KnnCommand, KnnConfig, knn, nearest, preset, run, vote_ranks

CPU = torch.device("cpu")


def features(x: Tensor, y: list[int] | Tensor | None, first: int = 0) -> Features:
    return Features([str(first + i) for i in range(len(x))], x, None if y is None else torch.as_tensor(y))


def clusters(count: int, classes: int, seed: int, noise: float = 1.0, width: int = 8) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    y = torch.arange(count) % classes
    return features(centres[y] + noise * torch.randn(count, width, generator=generator), y)


def slow_hits(
    train: Features, test: Features, k: int, max_k: int, temperature: float, top: int, own: bool
) -> list[bool]:
    """The rules of the vote, one query and one neighbour at a time, in double precision."""
    assert train.y is not None
    assert test.y is not None
    hits = []
    for q, query in enumerate(test.x.double().tolist()):
        found = []
        for i, row in enumerate(train.x.double().tolist()):
            if not (own and i == q):
                norm = math.hypot(*query) * math.hypot(*row)
                found.append((sum(a * b for a, b in zip(query, row)) / norm, int(train.y[i])))
        found = sorted(found, reverse=True)[:max_k]
        total = sum(math.exp((similarity - found[0][0]) / temperature) for similarity, _ in found)
        scores: dict[int, float] = {}
        for similarity, label in found[:k]:
            vote = math.exp((similarity - found[0][0]) / temperature) / total
            scores[label] = scores.get(label, 0.0) + vote
        best = sorted(scores, key=lambda label: (-scores[label], label))[:top]  # only classes somebody voted for
        hits.append(int(test.y[q]) in best)
    return hits


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_the_slow_vote(temperature: float) -> None:
    train, test = clusters(120, 9, 0, noise=2.0), clusters(45, 9, 1, noise=2.0)
    found = knn(train, test, KnnConfig(k=(3, 20, 50), temperature=(temperature,), device="cpu"))
    assert list(found.by_k) == [3, 20, 50]
    for k, row in found.by_k.items():
        for name, top in (("top1", 1), ("top5", 5)):
            hits = slow_hits(train, test, k, 50, temperature, top, own=False)
            assert 0 < sum(hits) < 45
            assert row[name].value == pytest.approx(sum(hits) / 45)
            assert row[name].n == 45


def test_leave_one_out_equals_the_slow_vote() -> None:
    train = clusters(60, 7, 0)
    found = knn(train, train, KnnConfig(k=(1, 5), skip_self=True, device="cpu"))
    assert found.by_k[1]["top1"].value == pytest.approx(sum(slow_hits(train, train, 1, 20, 0.07, 1, own=True)) / 60)
    assert found.by_k[5]["top5"].value == pytest.approx(sum(slow_hits(train, train, 5, 20, 0.07, 5, own=True)) / 60)
    assert knn(train, train, KnnConfig(k=(1,), device="cpu")).by_k[1]["top1"].value == 1.0


def test_leave_one_out_among_copies() -> None:
    x = torch.ones(6, 3)
    similarity, index = neighbours(x, x, 2, device=CPU, skip_self=True)
    assert similarity.shape == index.shape == (6, 2)
    assert all(i not in row for i, row in enumerate(index.tolist()))
    same = features(x, [0, 1, 0, 1, 0, 1])
    assert knn(same, same, KnnConfig(skip_self=True, device="cpu")).headline == 5
    with pytest.raises(UserError, match="skip-self"):
        knn(same, features(x, [0, 1, 0, 1, 0, 1], first=1), KnnConfig(skip_self=True, device="cpu"))


def test_faiss_and_torch_find_the_same() -> None:
    train, test = (torch.nn.functional.normalize(clusters(n, 5, n).x) for n in (700, 33))
    by_faiss = search_faiss(train, test, 40)
    assert by_faiss is not None
    similarity, index = search_torch(train, test, 40, CPU)
    torch.testing.assert_close(by_faiss[0], similarity, rtol=0, atol=1e-6)
    torch.testing.assert_close(train[by_faiss[1]].mul(test[:, None]).sum(-1), similarity, rtol=0, atol=1e-6)
    assert (by_faiss[1] == index).float().mean() > 0.99  # neighbours as near as rounding may swap


def test_search_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = clusters(50, 5, 0).x, clusters(11, 5, 1).x
    whole = search_torch(train, test, 4, CPU)
    monkeypatch.setattr("convscope.core.neighbours.SIMILARITIES", 120)  # two queries at a time
    monkeypatch.setattr("convscope.eval.knn.SCORES", 12)  # two queries at a time
    parts = search_torch(train, test, 4, CPU)
    assert torch.equal(whole[1], parts[1])
    labels, y = torch.randint(0, 6, (11, 4)), torch.randint(0, 6, (11,))
    in_parts = vote_ranks(whole[0], labels, y, 6, [2, 4], 0.07)
    monkeypatch.undo()
    at_once = vote_ranks(whole[0], labels, y, 6, [2, 4], 0.07)
    assert all(torch.equal(in_parts[k], at_once[k]) for k in (2, 4))


def test_top5_counts_only_classes_that_got_a_vote() -> None:
    ten = torch.ones(1, 10)
    ranks = vote_ranks(ten, torch.full((1, 10), 500), torch.tensor([500]), 1000, [10], 0.07)[10]
    assert ranks.tolist() == [0]
    for other in (0, 1, 3, 4, 999):
        assert vote_ranks(ten, torch.full((1, 10), 500), torch.tensor([other]), 1000, [10], 0.07)[10].item() >= 5


def test_far_neighbours_vote_in_half_precision_too() -> None:
    similarity = torch.tensor([[1.0, 0.9, -1.0]], dtype=torch.float16)
    labels = torch.tensor([[2, 2, 1]])
    for truth, rank in ((2, 0), (1, 1), (0, 3)):
        assert vote_ranks(similarity, labels, torch.tensor([truth]), 3, [3], 0.01)[3].item() == rank


def test_k_is_clamped_and_twenty_is_always_reported() -> None:
    train, test = clusters(30, 3, 0), clusters(4, 3, 1)  # fewer queries than a hundred
    found = knn(train, test, KnnConfig(k=(5, 100, 200), device="cpu"))
    assert (list(found.by_k), found.headline) == ([5, 20, 30], 20)
    assert set(found.figures) == {"top1", "top1 k=5", "top1 k=30"}  # no top5 with three classes
    assert found.figures["top1"] == found.by_k[20]["top1"]
    assert found.details["headline_k"] == 20
    assert knn(clusters(6, 3, 0), test, KnnConfig(device="cpu")).headline == 6


def test_length_and_class_numbers_do_not_matter() -> None:
    train, test = clusters(90, 6, 0), clusters(30, 6, 1)
    assert train.y is not None
    assert test.y is not None
    expected = knn(train, test, KnnConfig(device="cpu"))
    scaled = features(train.x * torch.rand(90, 1).add(0.1), train.y * 1000 + 7)
    assert knn(scaled, features(test.x * 50, test.y * 1000 + 7), KnnConfig(device="cpu")).by_k == expected.by_k
    zero = features(torch.zeros(2, 8), [0, 1])
    assert knn(train, zero, KnnConfig(device="cpu")).figures["top1"].n == 2  # a zero vector is similar to nothing


def test_labels_that_do_not_fit_are_told() -> None:
    train = clusters(20, 2, 0)
    wrong: list[tuple[Features, Features, str]] = [
        (features(train.x, None), train, "no labels"),
        (train, features(train.x, None), "no labels"),
        (train, features(train.x[:2], [0, 5]), "1 test labels, such as 5"),
        (features(train.x, torch.zeros(20, dtype=torch.int64)), train, "at least two classes"),
        (features(train.x[:2], [0, -1]), train, "label -1 is negative"),
        (train, features(train.x[:, :3], train.y), "do not fit"),
    ]
    for one, other, message in wrong:
        with pytest.raises(UserError, match=message):
            knn(one, other, KnnConfig(device="cpu"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", ()),
        ("k", (0, 3)),
        ("temperature", (0.1, 0.0)),
        ("temperature", (math.nan,)),
        ("distance", ()),
        ("headline_k", 0),
    ],
)
def test_settings_are_checked(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name.replace("_", "-")):
        KnnConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("own", [False, True])
def test_euclidean_vote_equals_the_slow_one(own: bool) -> None:
    train = clusters(60, 7, 0, noise=1.5)
    test = train if own else clusters(40, 7, 1, noise=1.5)
    assert train.y is not None
    assert test.y is not None
    found = knn(train, test, KnnConfig(k=(1, 10), distance=("euclidean",), skip_self=own, device="cpu"))
    for k in (1, 10, 20):
        hits = []
        for q, query in enumerate(test.x.double().tolist()):
            distances = sorted(
                (math.dist(query, row), int(train.y[i]))
                for i, row in enumerate(train.x.double().tolist())
                if not (own and i == q)
            )
            scores: dict[int, float] = {}
            for distance, label in distances[:k]:
                scores[label] = scores.get(label, 0.0) + 1 / (distance + 1e-5)
            hits.append(min(scores, key=lambda label: (-scores[label], label)) == int(test.y[q]))
        assert found.by_k[k]["top1"].value == pytest.approx(sum(hits) / len(hits))
    assert found.details["way"] == "euclidean"


def test_a_copy_is_at_distance_zero() -> None:
    x = 1000 + torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    weight, index = nearest(x, x, 1, device=CPU)
    assert index[:, 0].tolist() == list(range(30))
    torch.testing.assert_close(weight, torch.full((30, 1), 1e5))
    assert (nearest(x, x, 5, device=CPU, skip_self=True)[1] != torch.arange(30)[:, None]).all()


def test_several_ways_of_voting() -> None:
    train, test = clusters(120, 9, 0, noise=2.0), clusters(45, 9, 1, noise=2.0)
    config = KnnConfig(k=(5, 20), temperature=(0.07, 0.5), distance=("cosine", "euclidean"), device="cpu")
    found = knn(train, test, config)
    assert list(found.others) == ["T=0.5", "euclidean"]
    for way, alone in {
        "T=0.5": KnnConfig(k=(5, 20), temperature=(0.5,), device="cpu"),
        "euclidean": KnnConfig(k=(5, 20), distance=("euclidean",), device="cpu"),
    }.items():
        expected = knn(train, test, alone)
        assert found.others[way] == expected.by_k
        assert found.figures[f"top1 k=5 {way}"] == expected.figures["top1 k=5"]
    assert found.figures["top1"] == knn(train, test, KnnConfig(k=(5, 20), device="cpu")).figures["top1"]


def test_presets_are_flags_that_the_users_own_follow() -> None:
    from convscope.cli import _parse, _preset_flags

    def parsed(name: str, *flags: str) -> KnnCommand:
        from convscope.eval import knn as module

        words = ["timm:resnet10t", "--data", "d", *flags]
        config: KnnCommand = _parse(KnnCommand, _preset_flags(module, KnnCommand, name, words) + words, "knn", None)
        return config

    lightly = parsed("lightly")
    assert (lightly.k, lightly.temperature, lightly.headline_k) == ((200,), (0.1,), 200)
    solo = parsed("solo-learn", "--k", "3")
    assert (solo.k, len(solo.temperature), solo.distance) == ((3,), 8, ("cosine", "euclidean"))
    assert parsed("dinov2") == KnnCommand(model="timm:resnet10t", data="d")
    with pytest.raises(UserError, match="presets of knn: dinov2, lightly, solo-learn"):
        preset(KnnCommand, "dino", [])


def test_features_that_are_not_finite_are_told() -> None:
    train = clusters(20, 2, 0)
    with pytest.raises(UserError, match="NaN"):
        knn(train, features(train.x.log(), train.y), KnnConfig(device="cpu"))
    with pytest.raises(UserError, match="do not fit"):
        knn(train, features(train.x[:0], []), KnnConfig(device="cpu"))


def test_command(small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "knn.json"
    config = {"model": "timm:resnet10t@random", "data": small_shards, "device": "cpu", "workers": 0, "output": output}
    run(KnnCommand(**config, layers=("layer1", "pooled"), k=(3,)))
    result = load_result(output)
    assert set(result.figures) == {"layer1 top1", "layer1 top1 k=3", "pooled top1", "pooled top1 k=3"}
    assert result.model["weights_hash"]
    assert result.data["test"]["count"] == 12
    assert result.data["train"]["fingerprint"] != result.data["test"]["fingerprint"]
    assert not result.details["layers"]["pooled"]["skip_self"]
    printed = capsys.readouterr()
    assert all(word in printed.out for word in ("layer1", "pooled", "20 *"))
    assert "neighbours are more than" not in printed.err
    run(KnnCommand(**config, test_split="train"))
    assert "note: 200 neighbours are more than the 31 train images" in capsys.readouterr().err
    assert load_result(output).details["layers"]["pooled"]["skip_self"]
