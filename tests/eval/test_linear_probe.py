"""Linear probe: the grid against heads trained alone, choice on the held-out part, the command."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from convscope.core.backbone import create_backbone
from convscope.core.data.shard_set import open_shards
from convscope.core.errors import UserError
from convscope.core.results import Figure, load_result
from convscope.eval.features import Features
from convscope.eval.linear_heads import Heads, LinearProbeConfig, fit_heads, holdout_split, schedule, score_heads
from convscope.eval.linear_probe import LinearProbeCommand, evaluate, linear_probe, run

GRID = [(0.01, 0.0), (0.01, 0.1), (0.3, 0.0), (0.3, 1e-3), (1.0, 0.03)]


def clusters(count: int, classes: int = 4, seed: int = 0, noise: float = 1.0, width: int = 6) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    y = torch.arange(count) % classes
    x = 3 * (centres[y] + noise * torch.randn(count, width, generator=generator)) + 5
    return Features([str(i) for i in range(count)], x, y)


def config(**changes: object) -> LinearProbeConfig:
    values: dict[str, object] = {"epochs": 3, "min_steps": 20, "sgd_batch_size": 32, "device": "cpu", **changes}
    return LinearProbeConfig(**values)  # type: ignore[arg-type]


def plain_loop(x: Tensor, y: Tensor, classes: int, lr: float, weight_decay: float, steps: int) -> tuple[Tensor, Tensor]:
    """One head by autograd and torch.optim.SGD, all samples a step."""
    x = (x - x.mean(0)) / x.std(0, correction=0)
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    groups = [{"params": [weight], "weight_decay": weight_decay}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x @ weight + bias, y).backward()
        optimizer.step()
        schedule.step()
    return weight.detach(), bias.detach()


def test_every_head_equals_a_plain_loop() -> None:
    data = clusters(40)
    assert data.y is not None
    x = data.x.double()
    heads = fit_heads(x, data.y, 4, GRID, config(sgd_batch_size=1000, epochs=25))
    assert heads.logits(x).shape == (40, 4, len(GRID))
    for g, (lr, weight_decay) in enumerate(GRID):
        weight, bias = plain_loop(x, data.y, 4, lr, weight_decay, steps=25)
        torch.testing.assert_close(heads.weight[..., g], weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(heads.bias[..., g], bias, rtol=1e-9, atol=1e-12)


def test_batches_pass_over_the_samples_in_ever_new_order() -> None:
    steps = list(schedule(70, config(epochs=3, min_steps=5, sgd_batch_size=32)))
    assert len(steps) == 6
    epochs = [torch.cat([steps[i][0], steps[i + 1][0]]).tolist() for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 64 and set(epoch) <= set(range(70)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [factor for _, factor in steps] == pytest.approx([(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)])
    assert len(list(schedule(70, config(epochs=1, min_steps=5, sgd_batch_size=32)))) == 5
    assert len(next(schedule(7, config(sgd_batch_size=32)))[0]) == 7


def test_heads_do_not_know_of_one_another() -> None:
    data = clusters(70)
    assert data.y is not None
    x = data.x.double()
    together = fit_heads(x, data.y, 4, [*GRID, (1e5, 0.0), (1e300, 1e300)], config())  # the last ones diverge
    for g, setting in enumerate(GRID):
        alone, picked = fit_heads(x, data.y, 4, [setting], config()), together.only(g)
        torch.testing.assert_close(picked.weight, alone.weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(picked.logits(x), alone.logits(x), rtol=1e-9, atol=1e-12)
    assert score_heads(together, x, data.y)[-1] == (-math.inf, -math.inf)


def test_scores_are_accuracy_and_likelihood() -> None:
    data = clusters(50, noise=3.0)
    assert data.y is not None
    heads = fit_heads(data.x, data.y, 4, GRID, config())
    for g, (accuracy, likelihood) in enumerate(score_heads(heads, data.x, data.y)):
        logits = heads.logits(data.x)[..., g]
        assert accuracy == pytest.approx((logits.argmax(1) == data.y).double().mean().item())
        assert likelihood == pytest.approx(-torch.nn.functional.cross_entropy(logits, data.y).item(), rel=1e-5)


def test_constant_dimensions_do_no_harm() -> None:
    data = clusters(60)
    assert data.y is not None
    constant = torch.full((60, 2), 1234.567)
    constant[:, 1] = 0
    heads = fit_heads(torch.cat([data.x, constant], 1), data.y, 4, GRID[:3], config())
    plain = fit_heads(data.x, data.y, 4, GRID[:3], config())
    assert heads.weight.isfinite().all()
    torch.testing.assert_close(heads.weight[:6], plain.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sizes", [(100, 100, 100), (500, 37, 11, 3, 1), (5,) * 10, (10,)])
def test_holdout_is_a_stratified_tenth(sizes: Sequence[int]) -> None:
    y = torch.cat([torch.full((size,), c) for c, size in enumerate(sizes)])
    y = y[torch.randperm(len(y))]
    fitted, held = holdout_split(y, seed=0)
    assert sorted([*fitted.tolist(), *held.tolist()]) == list(range(len(y)))
    assert abs(len(held) - len(y) / 10) <= 0.5
    for c, size in enumerate(sizes):
        assert abs(int((y[held] == c).sum()) - size / 10) < 1
    assert torch.equal(held, holdout_split(y, seed=0)[1])
    assert len(y) == 10 or not torch.equal(held, holdout_split(y, seed=1)[1])


def test_the_held_out_part_alone_chooses() -> None:
    train, test = clusters(300, noise=2.0), clusters(200, seed=1, noise=2.0)
    settings = config(lrs=(1e-4, 0.1, 3.0), weight_decays=(0.0, 0.3))
    found = linear_probe(train, test, settings)
    assert train.y is not None
    fitted, held = holdout_split(train.y, 0)
    heads = fit_heads(train.x[fitted], train.y[fitted], 4, settings.grid, settings)
    best = max(score_heads(heads, train.x[held], train.y[held]))
    assert found.holdout == best
    index = score_heads(heads, train.x[held], train.y[held]).index(best)
    assert (found.details["lr"], found.details["weight_decay"]) == settings.grid[index]
    assert (found.details["holdout_top1"], found.details["holdout_count"]) == (best[0], 30)
    wrong = Features(test.keys, test.x, test.y.roll(1) if test.y is not None else None)
    other = linear_probe(train, wrong, settings)  # other test labels, same choice
    assert other.holdout == found.holdout
    assert other.figures["top1"].value < found.figures["top1"].value


@pytest.mark.parametrize("refit", [True, False])
def test_refit_sees_all_train_images(refit: bool) -> None:
    train, test = clusters(60, noise=2.0), clusters(400, seed=1, noise=2.0)
    settings = config(lrs=(0.1,), weight_decays=(0.0,), refit=refit)
    assert train.y is not None
    used = torch.arange(60) if refit else holdout_split(train.y, 0)[0]
    heads = fit_heads(train.x[used], train.y[used], 4, [(0.1, 0.0)], settings)
    expected = (heads.logits(test.x)[..., 0].argmax(1) == test.y).double().mean().item()
    found = linear_probe(train, test, settings).figures["top1"]
    assert found.value == pytest.approx(expected)
    assert found.low is not None
    assert found.low < found.value


def test_near_logistic_regression() -> None:
    train, test = clusters(600, 8, noise=1.2, width=10), clusters(600, 8, seed=1, noise=1.2, width=10)
    found = linear_probe(train, test, LinearProbeConfig(min_steps=300, epochs=10, device="cpu"))
    mean, std = train.x.mean(0), train.x.std(0)
    assert train.y is not None
    assert test.y is not None
    other = LogisticRegression(max_iter=500).fit(((train.x - mean) / std).numpy(), train.y.numpy())
    expected = other.score(((test.x - mean) / std).numpy(), test.y.numpy())
    assert 0.5 < expected < 0.95
    assert found.figures["top1"].value == pytest.approx(expected, abs=0.02)
    assert not found.details["lr_at_edge"]
    assert found.figures["top5"].value > found.figures["top1"].value


def test_top5_by_hand_and_class_numbers() -> None:
    train, test = clusters(240, 8, noise=3.0), clusters(80, 8, seed=1, noise=3.0)
    settings = config(lrs=(0.1,), weight_decays=(0.0,))
    found = linear_probe(train, test, settings)
    assert train.y is not None
    assert test.y is not None
    logits = fit_heads(train.x, train.y, 8, [(0.1, 0.0)], settings).logits(test.x)[..., 0]
    hits = [int(y) in row.topk(5).indices.tolist() for row, y in zip(logits, test.y)]
    assert found.figures["top5"].value == pytest.approx(sum(hits) / 80)
    renamed = linear_probe(
        Features(train.keys, train.x, train.y * 100 + 3), Features(test.keys, test.x, test.y * 100 + 3), settings
    )
    assert renamed.figures == found.figures
    assert set(linear_probe(clusters(50), clusters(20), settings).figures) == {"top1"}


def test_deterministic_by_seed() -> None:
    train, test = clusters(100, noise=2.0), clusters(50, seed=1, noise=2.0)
    one, same, other = (linear_probe(train, test, config(seed=seed)) for seed in (0, 0, 1))
    assert one == same
    assert one.holdout != other.holdout


def test_edges_of_the_grid_are_told() -> None:
    train, test = clusters(200), clusters(50, seed=1)
    low = linear_probe(train, test, config(lrs=(1e-9, 1e-8), weight_decays=(0.0,))).details
    assert low["lr_at_edge"]
    assert not low["weight_decay_at_edge"]  # no decay at all is no edge
    assert linear_probe(train, test, config(lrs=(0.1,), weight_decays=(1e-3, 1e-2))).details["weight_decay_at_edge"]


def test_what_cannot_be_probed_is_told() -> None:
    good = clusters(40)
    with pytest.raises(UserError, match="needs 10 or more, got 9"):
        linear_probe(clusters(9), good, config())
    with pytest.raises(UserError, match="such as 4, are not among the 4 train classes"):
        linear_probe(good, clusters(40, 5), config())
    with pytest.raises(UserError, match="diverged"):
        linear_probe(good, good, config(lrs=(1e30,), weight_decays=(1e30,)))


@pytest.mark.parametrize(
    ("name", "value"), [("lrs", ()), ("lrs", (0.0,)), ("weight_decays", (-1.0,)), ("epochs", 0), ("sgd_batch_size", 0)]
)
def test_settings_are_checked(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name.replace("_", "-")):
        config(**{name: value})


def test_a_head_that_is_no_number_hits_nothing() -> None:
    from convscope.eval.classes import rank_of_truth

    broken = Heads(torch.full((2, 3, 1), math.nan), torch.zeros(3, 1), torch.zeros(2), torch.ones(2))
    assert rank_of_truth(broken.logits(torch.ones(4, 2))[..., 0], torch.tensor([0, 1, 2, 0])).tolist() == [3] * 4


def command(data: str, **changes: object) -> LinearProbeCommand:
    values: dict[str, object] = {
        "model": "timm:resnet10t@random",
        "data": data,
        "device": "cpu",
        "workers": 0,
        "epochs": 2,
        "min_steps": 10,
        **changes,
    }
    return LinearProbeCommand(**values)  # type: ignore[arg-type]


def test_command(small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "probe.json"
    run(command(small_shards, layers=("all",), output=output))
    result = load_result(output)
    rows = result.details["layers"]
    assert list(rows) == ["act1", "layer1", "layer2", "layer3", "layer4", "pooled"]
    best = result.details["layer"]
    assert rows[best]["holdout_top1"] == max(row["holdout_top1"] for row in rows.values())
    assert Figure(**rows[best]["test"]["top1"]) == result.figures["top1"]
    assert result.protocol == "holdout/1"
    assert result.figures["top1"].n == 12
    assert (result.data["train"]["count"], result.data["label"]) == (32, "cls")
    assert result.preprocessing["size"]
    printed = capsys.readouterr().out
    assert f"{best} *" in printed
    assert all(layer in printed for layer in rows)


@pytest.mark.parametrize("protocol", ["holdout", "cached"])
@pytest.mark.parametrize(
    ("targets", "label", "figures", "setting"),
    [
        ("classes", "cls", {"top1"}, "lr"),
        ("multi-label", "tags", {"map"}, "lr"),
        ("regression", "numbers", {"r2", "mse", "mae"}, "penalty"),
    ],
)
def test_every_kind_of_target(
    protocol: str,
    targets: str,
    label: str,
    figures: set[str],
    setting: str,
    small_shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    layers = ("layer1+layer2", "layer1")
    run(command(small_shards, protocol=protocol, targets=targets, label=label, layers=layers))
    name = "linear-probe" if protocol == "holdout" else "linear-probe-cached"
    result = load_result(Path(f"results/resnet10t@random-{name}.json"))
    assert (result.task, result.protocol, result.data["targets"]) == ("linear-probe", f"{protocol}/1", targets)
    assert set(result.figures) == figures
    assert list(result.details["layers"]) == ["layer1", "layer1+layer2"]
    row = result.details["layers"]["layer1+layer2"]
    assert row["dimensions"] == 64 + 128
    measure = min(figures & {"top1", "map", "r2"})
    assert f"holdout_{measure}" in row
    assert ("every_setting" in row) == (protocol == "cached")
    assert result.figures[measure].value > 0.4  # colour tells all of them
    printed = capsys.readouterr().out
    assert all(word in printed for word in (setting, f"held-out {measure}", *figures))


def test_default_files(small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convscope.core.models import save_backbone

    monkeypatch.chdir(tmp_path)
    run(command(small_shards, label="parity"))
    assert load_result(Path("results/resnet10t@random-linear-probe.json")).data["label"] == "parity"
    backbone = create_backbone("resnet10t", seed=0)
    save_backbone(Path("run/backbone.safetensors"), backbone)
    run(command(small_shards, model="run"))
    run(command(small_shards, model="run/backbone.safetensors"))
    in_run, beside = Path("run/results/linear-probe.json"), Path("results/resnet10t-linear-probe.json")
    assert load_result(in_run).figures == load_result(beside).figures


def test_evaluate_takes_a_backbone_in_hand_and_refuses_one_split_twice(small_shards: str) -> None:
    backbone = create_backbone("resnet10t", seed=5)
    train, test = open_shards(small_shards, "train"), open_shards(small_shards, "test")
    result = evaluate(backbone, train, test, command(small_shards))
    assert result.model["weights_hash"] == backbone.weights_hash()
    with pytest.raises(UserError, match="are the same shards"):
        evaluate(backbone, train, open_shards(small_shards, "train"), command(small_shards))


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("workers", -1), ("min_steps", 0)])
def test_command_settings_are_checked(name: str, value: int) -> None:
    with pytest.raises(UserError, match=name.replace("_", "-")):
        command("data", **{name: value})
