"""Logistic regression: scikit-learn's optimum, the protocol around it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from convscope.core.errors import UserError
from convscope.core.results import load_result
from convscope.core.softmax_regression import softmax_regression
from convscope.eval.features import Features
from convscope.eval.logistic_regression import (
    LogRegCommand,
    LogRegConfig,
    holdout_split,
    logistic_regression,
    run,
)


def clusters(count: int, width: int, classes: int, distance: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features of a few scales that are not centred, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    mixed = torch.randn(width, width, generator=torch.Generator().manual_seed(8))
    scales = torch.logspace(0.5, -1, width)
    x = (distance * centres[y] + torch.randn(count, width, generator=generator)) * scales @ mixed
    return x / width**0.5 + 2, y


def objective(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, strength: float) -> float:
    """scikit-learn's objective over C N, where two classes share one vector."""
    weight, bias = torch.as_tensor(weight), torch.as_tensor(bias)
    total = 0.0
    for logits, label in zip((x.double() @ weight.T + bias).tolist(), y.tolist()):
        if len(bias) == 1:
            logits = [0.0, *logits]
        highest = max(logits)
        total += highest - logits[label] + math.log(sum(math.exp(one - highest) for one in logits))
    return total / len(x) + float(weight.square().sum()) / (2 * strength * len(x))


@pytest.mark.parametrize(
    ("count", "width", "classes", "distance"),
    [
        (200, 8, 3, 0.4),  # overlapping
        (150, 10, 5, 4.0),  # separable
        (60, 90, 4, 0.5),  # fewer samples than dimensions
        (200, 12, 2, 0.5),  # two classes, where scikit-learn has one vector
        (300, 30, 10, 0.6),
    ],
)
def test_meets_scikit_learns_optimum(count: int, width: int, classes: int, distance: float) -> None:
    x, y = clusters(count, width, classes, distance)
    strengths = [1e-6, 1e-3, 1.0, 1e2, 1e5]
    solutions = list(softmax_regression(x, y, classes, strengths))
    for strength, solution in zip(strengths, solutions):
        theirs = LogisticRegression(C=strength, tol=1e-12, max_iter=5000, solver="newton-cg")
        theirs.fit(x.double().numpy(), y.numpy())
        best = objective(theirs.coef_, theirs.intercept_, x, y, strength)
        weight, bias = solution.weight, solution.bias
        if classes == 2:
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
        assert solution.converged
        assert solution.loss == pytest.approx(objective(weight, bias, x, y, strength), rel=1e-9, abs=1e-12)
        assert abs(solution.loss - best) < 1e-6
        assert solution.loss < best + 1e-6 * max(best, 0.01)


def test_a_path_is_the_same_as_each_alone_and_does_not_need_many_gradients() -> None:
    x, y = clusters(400, 24, 6, 0.7)
    config = LogRegConfig()
    assert len(config.strengths) == 45
    assert config.strengths[0] == pytest.approx(1e-6)
    assert config.strengths[-1] == pytest.approx(1e5)
    path = list(softmax_regression(x, y, 6, config.strengths))
    alone = next(softmax_regression(x, y, 6, [config.strengths[30]]))
    assert abs(path[30].loss - alone.loss) < 1e-6
    assert path[30].evaluations < alone.evaluations
    assert sum(one.evaluations for one in path) < 45 * 20
    near = next(softmax_regression(x, y, 6, [config.strengths[30]], start=path[30]))
    assert near.evaluations < alone.evaluations
    assert abs(near.loss - alone.loss) < 1e-6


def test_gradient_equals_autograd_and_parts_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    from convscope.core.softmax_regression import _Problem

    x, y = clusters(130, 7, 3, 0.5)
    problem = _Problem(x, y, 3)
    theta = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    centred = x.double() - x.double().mean(0)
    logits = centred @ theta[:, :-1].T + theta[:, -1]
    loss = torch.nn.functional.cross_entropy(logits, y) + 0.15 * theta[:, :-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    for entries in (2**18, 192):  # all rows at once; 64 rows at a time
        monkeypatch.setattr("convscope.core.softmax_regression.ENTRIES", entries)
        point = problem.evaluate(theta.detach(), 0.3, torch.float64)
        assert point.loss == pytest.approx(float(loss.detach()), rel=1e-12)
        torch.testing.assert_close(point.gradient, gradient, rtol=1e-10, atol=1e-12)


def test_curvature_where_all_shares_are_equal_is_the_hessian() -> None:
    from convscope.core.softmax_regression import _Problem

    x, y = clusters(90, 5, 3, 0.5)
    problem = _Problem(x, y, 3)
    theta = torch.zeros(3, 6, dtype=torch.float64)

    def loss(flat: Tensor) -> Tensor:
        own = flat.view(3, 6)
        logits = problem.x[torch.float64] @ own[:, :-1].T + own[:, -1]
        return torch.nn.functional.cross_entropy(logits, y) + 0.1 * own[:, :-1].square().sum()

    hessian = torch.autograd.functional.hessian(loss, theta.flatten())
    step = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step -= step.mean(0)  # equal logits for all classes change nothing
    solved = problem.curvature(theta, 0.2).solve((hessian @ step.flatten()).view(3, 6))
    torch.testing.assert_close(solved, step, rtol=1e-4, atol=1e-5)


def test_loss_of_certain_samples_is_exact() -> None:
    from convscope.core.softmax_regression import _Problem

    x = torch.tensor([[1.0], [-1.0]])
    problem = _Problem(x, torch.tensor([1, 0]), 2)
    for slope in (20.0, -20.0, 60.0, -200.0):  # sure and right, sure and wrong
        theta = torch.tensor([[0.0, 0.0], [slope, 0.0]], dtype=torch.float64)
        for dtype in (torch.float32, torch.float64):
            expected = np.logaddexp(0, -slope)
            assert problem.evaluate(theta, 0.0, dtype).loss == pytest.approx(expected, rel=1e-6, abs=0)


def parts(count: int = 200, classes: int = 6) -> tuple[Features, Features]:
    x, y = clusters(count + 80, 10, classes, 0.8)
    names = [str(i) for i in range(count + 80)]
    return Features(names[:count], x[:count], y[:count]), Features(names[count:], x[count:], y[count:])


def test_protocol_equals_a_loop_over_scikit_learn() -> None:
    train, test = parts()
    assert train.y is not None
    assert test.y is not None
    config = LogRegConfig(log10_c=(-3, 2), c_count=6, device="cpu")
    found = logistic_regression(train, test, config)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    held, fitted = order[:20], order[20:]
    hits = []
    for strength in np.logspace(-3, 2, 6):
        model = LogisticRegression(C=strength, tol=1e-10, max_iter=5000).fit(train.x[fitted].double(), train.y[fitted])
        hits.append(model.score(train.x[held].double(), train.y[held]))
    assert found.details["holdout_top1_by_c"] == pytest.approx(hits)
    chosen = np.logspace(-3, 2, 6)[int(np.argmax(hits))]
    assert found.details["c"] == pytest.approx(chosen)
    model = LogisticRegression(C=chosen, tol=1e-10, max_iter=5000).fit(train.x.double(), train.y)
    assert found.figures["top1"].value == pytest.approx(model.score(test.x.double(), test.y))
    assert found.figures["top5"].value >= found.figures["top1"].value
    assert torch.equal(torch.cat(holdout_split(200, 0)[::-1]), order)


def test_a_class_that_is_held_out_whole() -> None:
    train, test = parts(100, 4)
    assert train.y is not None
    y = train.y.clone()
    y[holdout_split(100, 0)[1][0]] = 7  # its only sample chooses C and is then fitted
    found = logistic_regression(Features(train.keys, train.x, y), test, LogRegConfig(c_count=5, device="cpu"))
    assert found.details["classes"] == 5
    assert max(found.details["holdout_top1_by_c"]) < 1


def test_half_precision_features_are_computed_in_double() -> None:
    train, test = parts()
    config = LogRegConfig(c_count=4, device="cpu")
    half = [Features(one.keys, one.x.half(), one.y) for one in (train, test)]
    single = [Features(one.keys, one.x.half().float(), one.y) for one in (train, test)]
    assert logistic_regression(*half, config).details == logistic_regression(*single, config).details


def test_mistakes_are_told() -> None:
    train, test = parts()
    config = LogRegConfig(device="cpu")
    bad = train.x.clone()
    bad[3, 2] = math.nan
    with pytest.raises(UserError, match="NaN"):
        logistic_regression(Features(train.keys, bad, train.y), test, config)
    with pytest.raises(UserError, match="one class an image"):
        logistic_regression(Features(train.keys, train.x, torch.zeros(200, 3)), test, config)
    few = Features(train.keys[:8], train.x[:8], torch.arange(8) % 6)
    with pytest.raises(UserError, match="needs 10 or more, got 8"):
        logistic_regression(few, test, config)
    with pytest.raises(UserError, match="class 1 has no train sample"):
        softmax_regression(train.x, torch.full((200,), 0), 2, [1.0])
    for name, value in (("log10_c", (2.0, 1.0)), ("c_count", 0), ("tol", 0.0), ("max_steps", 0)):
        with pytest.raises(UserError, match=name.replace("_", "-")):
            LogRegConfig(**{name: value})  # type: ignore[arg-type]


def test_command(small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "logreg.json"
    shared = {"model": "timm:resnet10t@random", "data": small_shards, "device": "cpu", "workers": 0, "output": output}
    run(LogRegCommand(**shared, layers=("layer1", "pooled"), c_count=5))
    result = load_result(output)
    assert set(result.figures) == {"top1"}
    assert set(result.details["layers"]) == {"layer1", "pooled"}
    assert result.details["settings"]["c_count"] == 5
    assert result.details["layer"] in capsys.readouterr().out
    with pytest.raises(UserError, match="the same shards"):
        run(LogRegCommand(**shared, test_split="train"))
