"""Fine-tuning with BatchNorm as usual, frozen, and frozen and folded: seconds, and what is kept for backward.

    python benchmarks/conv_bn.py --arch resnet50 --batch-size 16

The three take turns in one process, 7 rounds; medians, and the median over the rounds of eval / tune.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor

from convscope.core.backbone import create_backbone
from convscope.core.memory import keep_freed_memory
from convscope.eval.classification import Classification, ClassificationConfig

Mode = Literal["train", "eval", "tune"]
MODES: tuple[Mode, ...] = ("train", "eval", "tune")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    arch: str = "resnet50"
    size: int = 224
    batch_size: int = 16
    rounds: int = 7
    precision: Literal["fp32", "bf16"] = "fp32"


def main(settings: Settings) -> None:
    """Measure and print a table."""
    keep_freed_memory()
    steps = {mode: build(mode, settings) for mode in MODES}
    kept = {mode: saved_bytes(step) / 2**20 for mode, step in steps.items()}
    seconds: dict[Mode, list[float]] = {mode: [] for mode in MODES}
    for _ in range(settings.rounds):
        for mode, step in steps.items():
            start = time.perf_counter()
            step().backward()
            seconds[mode].append(time.perf_counter() - start)
    print("| BatchNorm | seconds | kept for backward, MB |\n|---|---|---|")
    for mode in MODES:
        print(f"| {mode} | {statistics.median(seconds[mode]):.2f} | {kept[mode]:.0f} |")
    ratios = [one / other for one, other in zip(seconds["eval"], seconds["tune"])]
    print(f"eval / tune: {statistics.median(ratios):.2f} in time, {kept['eval'] / kept['tune']:.2f} in memory")


def build(mode: Mode, settings: Settings) -> Callable[[], Tensor]:
    """The forward pass to the loss."""
    backbone = create_backbone(settings.arch, seed=0)
    objective = Classification(backbone, 100, ClassificationConfig(convbn=mode))
    objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(settings.batch_size, 3, settings.size, settings.size).contiguous(
        memory_format=torch.channels_last
    )
    batch = {"image": images, "label": torch.arange(settings.batch_size)}

    def step() -> Tensor:
        objective.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
            return objective(batch).loss

    return step


def saved_bytes(step: Callable[[], Tensor]) -> int:
    """What the forward pass keeps."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # so that no address is used twice
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step()
    del loss
    return sum(sizes.values())


if __name__ == "__main__":
    main(tyro.cli(Settings))
