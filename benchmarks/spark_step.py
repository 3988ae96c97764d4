"""How long a SparK step takes: published way (dense-masked), visible units with either decoder, dense encoder alone.

    python benchmarks/spark_step.py --archs resnet50 convnext_tiny convnext_small --precisions fp32 bf16

All variants of a row run in turns in one process (A B C A B C ...), so that a machine's moods hit them alike; the table
has medians of the ratios within a turn.
"""

import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

from convscope.core.backbone import create_backbone
from convscope.ssl.objectives.spark import Spark, SparkConfig, hierarchy


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    archs: tuple[str, ...] = ("resnet50", "convnext_tiny", "convnext_small")
    precisions: tuple[str, ...] = ("fp32", "bf16")
    size: int = 224
    batch_size: int = 16
    rounds: int = 7
    device: str = "cpu"
    threads: int = 0
    """0: as torch chooses."""
    parts: tuple[str, ...] = ("encoder", "step")


def main(settings: Settings) -> None:
    """Measure every row and print a table."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    for arch, precision, part in itertools.product(settings.archs, settings.precisions, settings.parts):
        seconds = measure(variants(arch, precision, part, settings), settings)
        base = seconds["units" if part == "encoder" else "unet"]
        row = {"arch": arch, "precision": precision, "part": part}
        row |= {f"{name} s": round(statistics.median(values), 3) for name, values in seconds.items()}
        for name, values in seconds.items():
            row[f"{name} / ours"] = round(statistics.median(v / b for v, b in zip(values, base)), 2)
        print(json.dumps(row), flush=True)


def variants(arch: str, precision: str, part: str, settings: Settings) -> dict[str, Callable[[], None]]:
    """Named steps, forward and backward, of one network."""
    device = torch.device(settings.device)
    images = torch.randn(settings.batch_size, 3, settings.size, settings.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    plain = images.contiguous()
    cast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    def built(**options: object) -> Spark:
        torch.manual_seed(0)
        objective = SparkConfig(size=settings.size, **options).build(create_backbone(arch, {}, seed=0))  # type: ignore[arg-type]
        layout = torch.contiguous_format if objective.reference else torch.channels_last  # as the published code runs
        return objective.to(device=device, memory_format=layout).train()  # type: ignore[call-overload,no-any-return]

    dense = create_backbone(arch, {}, seed=0).to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    names = [dense.stages[i].name for i in hierarchy(dense)]

    def dense_step() -> None:
        with cast:
            total = sum(feature_map.float().mean() for feature_map in dense.feature_maps(images, names).values())
        backward(total, dense)

    def layout(objective: Spark) -> Tensor:
        return plain if objective.reference else images

    def encoder_step(objective: Spark) -> Callable[[], None]:
        def step() -> None:
            with cast:
                features = objective.encode(layout(objective), objective.draw_units(images))
                total = sum(units.float().mean() for units in features)
            backward(total, objective)

        return step

    def whole_step(objective: Spark) -> Callable[[], None]:
        def step() -> None:
            with cast:
                loss = objective({"image": layout(objective)}).loss
            backward(loss, objective)

        return step

    def backward(loss: object, module: nn.Module) -> None:
        loss.backward()  # type: ignore[attr-defined]
        module.zero_grad(set_to_none=True)

    if part == "encoder":
        return {"published": encoder_step(built(reference=True)), "units": encoder_step(built()), "dense": dense_step}
    return {
        "published": whole_step(built(reference=True)),
        "unet": whole_step(built()),
        "light": whole_step(built(decoder="light")),
        "dense encoder": dense_step,
    }


def measure(steps: dict[str, Callable[[], None]], settings: Settings) -> dict[str, list[float]]:
    """Seconds of each step in each round, in turns, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(settings.rounds + 1):
        for name, step in steps.items():
            gc.collect()
            start = time.perf_counter()
            step()
            if settings.device != "cpu":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main(tyro.cli(Settings))
