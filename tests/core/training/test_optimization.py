"""Learning rate, weight decay and parameter groups against the published formulas."""

import math

import pytest
import torch
from torch import nn

from convscope.core.errors import UserError
from convscope.core.training.objective import Objective
from convscope.core.training.optimization import OptimizerConfig, Schedule, build_optimizer, peak_lr


class Toy(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.mask_token = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"}


@pytest.mark.parametrize("name", ["lamb", "adamw", "sgd", "lars"])
def test_weight_decay_spares_biases_and_named_parameters(name: str) -> None:
    toy = Toy()
    optimizer = build_optimizer(toy, OptimizerConfig(optimizer=name), 256)
    Schedule(optimizer, OptimizerConfig(optimizer=name), steps=10, warmup_steps=2).set(0)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == pytest.approx({id(toy.layer.weight): 0.04, id(toy.layer.bias): 0.0, id(toy.mask_token): 0.0})


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_momentum_of_sgd(nesterov: bool) -> None:
    """Two steps of a constant gradient g: by hand, with Nesterov's look ahead and without."""
    toy = Toy()
    before = toy.layer.weight.detach().clone()
    config = OptimizerConfig(optimizer="sgd", lr=0.1, momentum=0.9, nesterov=nesterov)
    optimizer = build_optimizer(toy, config, 256)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for _ in range(2):
        toy.layer.weight.grad = torch.ones_like(before)
        optimizer.step()
    momenta = (1.0, 1.9)
    moved = sum(1 + 0.9 * momentum for momentum in momenta) if nesterov else sum(momenta)
    torch.testing.assert_close(toy.layer.weight.detach(), before - 0.1 * moved)


@pytest.mark.parametrize("weight_decay", [0.0, 0.04])
def test_lars_adapts_matrices_whatever_the_weight_decay_and_never_biases(weight_decay: float) -> None:
    torch.manual_seed(0)
    toy = Toy()
    weight, bias = toy.layer.weight.detach().clone(), toy.layer.bias.detach().clone()
    toy.layer.weight.grad, toy.layer.bias.grad = torch.randn(2, 3), torch.randn(2)
    config = OptimizerConfig(optimizer="lars", lr=0.1, weight_decay=weight_decay)
    optimizer = build_optimizer(toy, config, 256)
    Schedule(optimizer, config, steps=10, warmup_steps=0).set(0)
    optimizer.step()
    trust = 0.001 * weight.norm() / (toy.layer.weight.grad.norm() + weight_decay * weight.norm())
    step = trust * (toy.layer.weight.grad + weight_decay * weight)
    torch.testing.assert_close(toy.layer.weight.detach(), weight - 0.1 * step)
    torch.testing.assert_close(toy.layer.bias.detach(), bias - 0.1 * toy.layer.bias.grad)


def test_schedule_follows_the_official_formula() -> None:
    config = OptimizerConfig(lr=2e-4, weight_decay=0.04, weight_decay_end=0.2)
    steps, warmup, peak = 100, 10, peak_lr(config, 4096)
    assert peak == pytest.approx(2e-4 * 4096 / 256)
    schedule = Schedule(build_optimizer(Toy(), config, 4096), config, steps=steps, warmup_steps=warmup)
    for step in range(steps):
        if step < warmup:
            lr = 0.005 * peak + 0.995 * peak * step / warmup
        else:
            ratio = (step - warmup) / (steps - 1 - warmup)
            lr = 0.001 * peak + 0.999 * peak * (0.5 + 0.5 * math.cos(math.pi * ratio))
        decay = 0.2 + (0.04 - 0.2) * (0.5 + 0.5 * math.cos(math.pi * step / (steps - 1)))
        schedule.set(step)
        assert schedule.values() == pytest.approx({"lr": lr, "weight_decay": decay}, rel=1e-12)


def test_schedule_is_a_pure_function_of_the_step() -> None:
    config = OptimizerConfig()
    schedule = Schedule(build_optimizer(Toy(), config, 256), config, steps=50, warmup_steps=5)
    schedule.set(30)
    jumped = schedule.values()
    for step in range(31):
        schedule.set(step)
    assert schedule.values() == jumped


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 40), (2, 40), (5, 5)])
def test_short_runs_have_finite_schedules(steps: int, warmup: int) -> None:
    config = OptimizerConfig()
    schedule = Schedule(build_optimizer(Toy(), config, 256), config, steps=steps, warmup_steps=warmup)
    for step in range(steps):
        schedule.set(step)
        assert 0 < schedule.values()["lr"] <= config.lr


@pytest.mark.parametrize("values", [{"lr": 0.0}, {"clip": -1.0}])
def test_bad_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="must be positive"):
        OptimizerConfig(**values)
