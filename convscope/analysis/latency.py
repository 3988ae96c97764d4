"""How long forward passes take on this machine, and what its arithmetic and memory reach at most."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convscope.analysis.efficiency import ROOT, Machine, seconds_by_layer, watched

SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices that peak arithmetic is measured with
COPIED = {"cpu": 128 << 20, "cuda": 1 << 30}  # bytes, more than caches hold
TRIALS = 8  # of which the fastest counts


@torch.no_grad()
def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Peak arithmetic by a matrix product and bandwidth by a copy, which reads and writes; the best of a few trials."""
    side, copied = SIDE.get(device.type, SIDE["cpu"]), COPIED.get(device.type, COPIED["cpu"])
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = _fastest(lambda: a @ b, device)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _fastest(lambda: target.copy_(source), device)
    return Machine(peak=side**3 / product, bandwidth=2 * copied / copy)


def _fastest(work: Callable[[], Any], device: torch.device) -> float:
    times = [_seconds(work, device) for _ in range(TRIALS + 1)]
    return min(times[1:])


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def latencies(network: nn.Module, images: Tensor, *, repeats: int, warmup: int) -> NDArray[np.float64]:
    """(repeats,) seconds of a forward pass, as it is."""
    times = [_seconds(lambda: network(images), images.device) for _ in range(warmup + repeats)]
    return np.array(times[warmup:])


@torch.no_grad()
def layer_latencies(
    network: nn.Module, images: Tensor, *, repeats: int, warmup: int = 1
) -> dict[str, NDArray[np.float64]]:
    """(repeats,) seconds of each layer, less the layers inside it, by hooks, which take some time themselves.

    On a GPU, time between events on its queue: a layer that waits for the CPU to hand it work waits on its own time.
    """
    passes = [_marked_pass(network, images) for _ in range(warmup + repeats)][warmup:]
    names = dict.fromkeys(name for one in passes for name in one)
    return {name: np.array([one.get(name, 0.0) for one in passes]) for name in names}


def _marked_pass(network: nn.Module, images: Tensor) -> dict[str, float]:
    cuda = images.device.type == "cuda"
    stack = [ROOT]
    marks: list[tuple[Any, str]] = []

    def mark() -> None:
        if cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            marks.append((event, stack[-1]))
        else:
            marks.append((time.perf_counter(), stack[-1]))

    def enter(name: str) -> None:
        stack.append(name)
        mark()

    def leave(_: str) -> None:
        stack.pop()
        mark()

    _wait(images.device)
    with watched(network, enter, leave):
        network(images)
    _wait(images.device)
    if cuda:
        first = marks[0][0]
        marks = [(first.elapsed_time(event) / 1000, name) for event, name in marks]
    return dict(seconds_by_layer(marks))
