"""Which form of each kind of convolution is fastest on visible units, and which one the rule picks.

    python benchmarks/spark_forms.py

Forward and backward of one layer at 224 px, batch 16, 20 of 49 units; the forms of a layer run in turns.
"""

import itertools
import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

from convscope.ssl.sparse.geometry import Geometry
from convscope.ssl.sparse.spatial import Form, choose_form, convolve
from convscope.ssl.sparse.units import VisibleUnits

LAYERS = {  # name: (convolution, side of a unit before it)
    "7x7 stride 2, 3 to 64": (nn.Conv2d(3, 64, 7, 2, 3, bias=False), 32),
    "4x4 patches, 3 to 96": (nn.Conv2d(3, 96, 4, 4), 32),
    "2x2 patches, 96 to 192": (nn.Conv2d(96, 192, 2, 2), 8),
    "2x2 patches, 384 to 768": (nn.Conv2d(384, 768, 2, 2), 2),
    "3x3, 64": (nn.Conv2d(64, 64, 3, 1, 1, bias=False), 8),
    "3x3, 128": (nn.Conv2d(128, 128, 3, 1, 1, bias=False), 4),
    "3x3, 256": (nn.Conv2d(256, 256, 3, 1, 1, bias=False), 2),
    "3x3, 512": (nn.Conv2d(512, 512, 3, 1, 1, bias=False), 1),
    "3x3 stride 2, 128": (nn.Conv2d(128, 128, 3, 2, 1, bias=False), 8),
    "3x3 stride 2, 256": (nn.Conv2d(256, 256, 3, 2, 1, bias=False), 4),
    "3x3 stride 2, 512": (nn.Conv2d(512, 512, 3, 2, 1, bias=False), 2),
    "3x3 in groups of 16, 64": (nn.Conv2d(64, 64, 3, 1, 1, groups=4, bias=False), 8),
    "3x3 in groups of 16, 256": (nn.Conv2d(256, 256, 3, 1, 1, groups=16, bias=False), 2),
    "3x3 depthwise, 96": (nn.Conv2d(96, 96, 3, 1, 1, groups=96, bias=False), 8),
    "3x3 depthwise stride 2, 96": (nn.Conv2d(96, 96, 3, 2, 1, groups=96, bias=False), 8),
    "3x3 depthwise, 384": (nn.Conv2d(384, 384, 3, 1, 1, groups=384, bias=False), 2),
    "1x11 depthwise, 96": (nn.Conv2d(96, 96, (1, 11), 1, (0, 5), groups=96), 8),
    "7x7 depthwise, 96": (nn.Conv2d(96, 96, 7, 1, 3, groups=96), 8),
    "7x7 depthwise, 192": (nn.Conv2d(192, 192, 7, 1, 3, groups=192), 4),
    "7x7 depthwise, 384": (nn.Conv2d(384, 384, 7, 1, 3, groups=384), 2),
    "7x7 depthwise, 768": (nn.Conv2d(768, 768, 7, 1, 3, groups=768), 1),
    "13x13 depthwise, 80": (nn.Conv2d(80, 80, 13, 1, 6, groups=80), 8),
    "13x13 depthwise, 320": (nn.Conv2d(320, 320, 13, 1, 6, groups=320), 2),
    "13x13 depthwise, 640": (nn.Conv2d(640, 640, 13, 1, 6, groups=640), 1),
    "31x31 depthwise, 128": (nn.Conv2d(128, 128, 31, 1, 15, groups=128), 8),
    "29x29 depthwise, 256": (nn.Conv2d(256, 256, 29, 1, 14, groups=256), 4),
    "27x27 depthwise, 512": (nn.Conv2d(512, 512, 27, 1, 13, groups=512), 2),
    "13x13 depthwise, 1024": (nn.Conv2d(1024, 1024, 13, 1, 6, groups=1024), 1),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    batch_size: int = 16
    rounds: int = 7
    device: str = "cpu"
    precisions: tuple[str, ...] = ("fp32", "bf16")
    only: str = ""
    """Layers whose name has this in it."""


def main(settings: Settings) -> None:
    """A line for each layer and precision: milliseconds by form, the rule's choice marked with a star."""
    units = VisibleUnits.draw(settings.batch_size, (7, 7), 0.6, device=settings.device)
    for (name, (layer, side)), precision in itertools.product(LAYERS.items(), settings.precisions):
        if settings.only not in name:
            continue
        layer = layer.to(device=settings.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        geometry = Geometry.of(layer)
        assert geometry is not None
        x = torch.randn(units.batch * units.count, layer.in_channels, side, side, device=settings.device)
        x = x.contiguous(memory_format=torch.channels_last)
        times = measure(layer, geometry, x, units, precision == "bf16", settings.rounds)
        chosen = choose_form(geometry, x, units)
        shown = "  ".join(f"{form}{'*' if form == chosen else ''} {value:.1f}" for form, value in times.items())
        print(f"{name:28} b={side:<2} {precision}  {shown}", flush=True)


def forms(geometry: Geometry, side: int) -> list[Form]:
    """Those that can compute such a layer in reasonable memory."""
    found: list[Form] = ["dense", "halo"]
    if geometry.groups == 1 and not geometry.patch and side < 32:
        found.append("taps")
    if geometry.patch:
        found.append("patch")
    if geometry.depthwise and geometry.same:
        found.append("depthwise")
        if geometry.y == geometry.x and geometry.taps >= 13**2:
            found.append("fft")
    return found


def measure(
    layer: nn.Conv2d, geometry: Geometry, x: Tensor, units: VisibleUnits, bf16: bool, rounds: int
) -> dict[Form, float]:
    """Median milliseconds of each form, forward and backward, after one round to warm up."""
    found: dict[Form, list[float]] = {form: [] for form in forms(geometry, x.shape[-1])}
    needs = layer.in_channels > 3  # pixels need no gradient
    for turn in range(rounds + 1):
        for form, values in found.items():
            leaf = x.detach().requires_grad_(needs)
            start = time.perf_counter()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                out = convolve(form, leaf, layer.weight, layer.bias, geometry, units)
            out.backward(out.detach())
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                values.append(1000 * (time.perf_counter() - start))
    return {form: statistics.median(values) for form, values in found.items()}


if __name__ == "__main__":
    main(tyro.cli(Settings))
