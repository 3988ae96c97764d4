"""Time of a linear probe's whole grid of heads against that of one head.

On features: SGD steps of `fit_heads` with 50 settings and with one, on the same features, in turns. On images: a
training step of the protocol dinov2 with all its heads and with one.

    python benchmarks/linear_probe.py
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from convscope.core.backbone import create_backbone
from convscope.eval.augmented_probe import DINOV2_LRS
from convscope.eval.linear_heads import LRS, LinearProbeConfig, fit_heads
from convscope.eval.probe_inputs import ProbeInputs, block_inputs
from convscope.eval.probe_objective import FrozenProbe, LinearHeads

PAIRS = 7
GRID = [(lr, decay) for lr in LRS for decay in (0.0, 1e-5, 1e-4, 1e-3, 1e-2)]


def paired(first: Callable[[], object], second: Callable[[], object], pairs: int) -> dict[str, float]:
    """Median seconds of both, run in turns after one warm-up each, and the median of their ratios."""
    first(), second()
    times: list[tuple[float, float]] = []
    for _ in range(pairs):
        row = []
        for function in (first, second):
            start = time.perf_counter()
            function()
            row.append(time.perf_counter() - start)
        times.append((row[0], row[1]))
    many, one = (statistics.median(row[i] for row in times) for i in (0, 1))
    return {"many": many, "one": one, "ratio": statistics.median(row[0] / row[1] for row in times)}


def on_features(width: int, classes: int, steps: int, pairs: int) -> dict[str, float]:
    """Seconds a step of 1024 features."""
    count = 4 * 1024
    x, y = torch.randn(count, width), torch.randint(classes, (count,))
    config = LinearProbeConfig(epochs=1, min_steps=steps)
    found = paired(
        lambda: fit_heads(x, y, classes, GRID, config), lambda: fit_heads(x, y, classes, GRID[:1], config), pairs
    )
    return {"many": found["many"] / steps, "one": found["one"] / steps, "ratio": found["ratio"]}


def on_images(arch: str, classes: int, batch: int, pairs: int) -> dict[str, float]:
    """Seconds of forward and backward of one batch."""
    images = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(classes, (batch,))
    backbone = create_backbone(arch, seed=0).eval().to(memory_format=torch.channels_last)
    known = torch.arange(classes)

    def probe(inputs: ProbeInputs, lrs: tuple[float, ...]) -> Callable[[], object]:
        widths = inputs.widths(backbone)
        heads = LinearHeads(widths, classes, len(lrs), "normal")
        objective = FrozenProbe(backbone, inputs, heads, known, torch.tensor(lrs).repeat(len(widths)))

        def step() -> None:
            objective({"image": images, "label": labels}).loss.backward()
            objective.zero_grad()

        return step

    whole = block_inputs(backbone)
    single = ProbeInputs(dict(list(whole.inputs.items())[:1]))
    return paired(probe(whole, DINOV2_LRS), probe(single, (0.1,)), pairs)


def main() -> None:
    """Print one JSON line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["features", "images"])
    parser.add_argument("--pairs", type=int, default=PAIRS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.only != "images":
        for width in (512, 2048):
            for classes in (10, 1000):
                steps = 100 if classes == 10 else 4
                found = on_features(width, classes, steps, arguments.pairs)
                print(json.dumps({"what": "features", "width": width, "classes": classes, **found}), flush=True)
    if arguments.only != "features":
        for arch, batch in (("vit_small_patch16_224", 16), ("resnet50", 16)):
            for classes in (10, 1000):
                found = on_images(arch, classes, batch, arguments.pairs)
                print(json.dumps({"what": "images", "arch": arch, "classes": classes, **found}), flush=True)


if __name__ == "__main__":
    main()
