"""Two gloo processes agree with one process on the joined batch: losses, gradients, running statistics."""

import copy
from pathlib import Path

import torch
from timm.layers import BatchNormAct2d
from torch import nn

from convscope.core import distributed
from tests.processes import run_on_two

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), BatchNormAct2d(5), nn.Flatten(), nn.Linear(180, 2)
    )
    return layers.double()


def images() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    model = distributed.sync_batchnorm(network(), CPU)
    wrapped = distributed.wrap(model, CPU)
    loss = wrapped(images()[rank * 3 : rank * 3 + 3]).square().mean()
    loss.backward()
    return {
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
        "means": {"loss": torch.tensor(distributed.mean_over_ranks({"loss": loss})["loss"], dtype=torch.float64)},
    }


def test_sync_batchnorm_equals_one_process(tmp_path: Path) -> None:
    single = network()
    loss = single(images()).square().mean()
    loss.backward()
    for found in run_on_two(step, tmp_path):
        torch.testing.assert_close(found["means"]["loss"], loss.detach(), rtol=1e-12, atol=0)
        for name, parameter in single.named_parameters():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)
        for name, buffer in single.named_buffers():
            torch.testing.assert_close(found["buffers"][name], buffer, rtol=1e-12, atol=0, msg=name)


def collectives(rank: int) -> list[object]:
    return [
        distributed.rank(),
        distributed.world(),
        distributed.is_main(),
        distributed.broadcast({"from": rank}),
        distributed.sum_over_ranks(rank + 1),
        distributed.gather(f"rank {rank}"),
        distributed.mean_over_ranks({"a": torch.tensor(float(rank)), "b": torch.tensor(2.0)}),
    ]


def test_collectives(tmp_path: Path) -> None:
    shared = [{"from": 0}, 3, ["rank 0", "rank 1"], {"a": 0.5, "b": 2.0}]
    assert run_on_two(collectives, tmp_path) == [[0, 2, True, *shared], [1, 2, False, *shared]]


def test_alone_everything_is_local() -> None:
    model = network()
    assert distributed.wrap(model, CPU) is model
    assert distributed.sync_batchnorm(model, CPU) is model
    assert distributed.gather(3) == [3]
    assert distributed.broadcast("x") == "x"
    assert distributed.mean_over_ranks({"a": torch.tensor(1.5)}) == {"a": 1.5}


def test_evaluation_uses_running_statistics(tmp_path: Path) -> None:
    expected = copy.deepcopy(network()).eval()(images()).detach()
    for found in run_on_two(evaluate, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def evaluate(rank: int) -> torch.Tensor:
    return distributed.sync_batchnorm(network(), CPU).eval()(images()).detach()
