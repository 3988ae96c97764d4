"""Depthwise convolutions with large kernels: the way that convscope chooses against plain `nn.Conv2d`.

    OMP_NUM_THREADS=1 python benchmarks/large_kernels.py

The two take turns in one process, 7 rounds (plain, ours, plain, ours, ...); medians of the processor's time (which
other programs on the machine change less than the clock's), or of the clock's on a GPU, and the median over the rounds
of plain / ours.
"""

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

from convscope.backbones.large_depthwise import LargeDepthwise, fastest_way

# map side, channels, kernel sides: RepLKNet-31's and UniRepLKNet's stages at 224 pixels
SHAPES = ((56, 64, (13, 31)), (28, 128, (13, 29)), (14, 256, (13, 27)), (7, 512, (13,)))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    batch_size: int = 4
    rounds: int = 7
    device: str = "cpu"
    channels_last: bool = False


def main(settings: Settings) -> None:
    """Measure and print a table."""
    print("| map | channels | kernel | pass | way | plain, ms | ours, ms | plain / ours |")
    print("|---|---|---|---|---|---|---|---|")
    for side, channels, kernels in SHAPES:
        for kernel in kernels:
            for training in (False, True):
                compare(settings, side, channels, kernel, training)


def compare(settings: Settings, side: int, channels: int, kernel: int, training: bool) -> None:
    """One line of the table."""
    plain = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels).to(settings.device)
    ours = LargeDepthwise(channels, kernel).to(settings.device)
    ours.load_state_dict(plain.state_dict())
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    x = torch.randn(settings.batch_size, channels, side, side, device=settings.device).contiguous(memory_format=layout)
    seconds: dict[nn.Module, list[float]] = {plain: [], ours: []}
    for conv in seconds:
        once(conv, x, training)
    for _ in range(settings.rounds):
        for conv, spent in seconds.items():
            spent.append(once(conv, x, training))
    one, other = (1000 * statistics.median(spent) for spent in seconds.values())
    ratio = statistics.median(a / b for a, b in zip(*seconds.values()))
    way = fastest_way(kernel, settings.device, training)
    done = "forward and backward" if training else "forward"
    print(f"| {side} | {channels} | {kernel} | {done} | {way} | {one:.1f} | {other:.1f} | {ratio:.1f} |", flush=True)


def once(conv: nn.Module, x: Tensor, training: bool) -> float:
    """Seconds of one pass."""
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter
    x = x.detach().requires_grad_(training)
    start = clock()
    with torch.set_grad_enabled(training):
        out = conv(x)
        if training:
            out.backward(torch.ones_like(out))
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main(tyro.cli(Settings))
