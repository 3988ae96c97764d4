"""How long a SparK step takes: the published way, visible units with either decoder, the dense encoder alone.

    python benchmarks/spark_step.py
    python benchmarks/spark_step.py --official PATH    # a checkout of github.com/keyu-tian/SparK, whose own code then
                                                       # runs in turns with the others

Each way of a row lives in a process of its own, so that its memory is its own, and takes turns with ours (A B A B ...).
The table has the median of each one's seconds, and the median over the turns of its ratio to ours.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from convscope.core.backbone import create_backbone
from convscope.core.memory import keep_freed_memory
from convscope.ssl.objectives.spark import Spark, SparkConfig, hierarchy
from convscope.ssl.objectives.spark_decoders import UpSample

Step = Callable[[], Tensor]

# name: what runs, and whether its process keeps freed memory as `convscope pretrain` does
ENCODER = {
    "ours": ("units", True),
    "published": ("published", False),
    "published, memory kept": ("published", True),
    "dense encoder": ("dense", True),
}
STEP = {
    "ours, unet": ("unet", True),
    "ours, light": ("light", True),
    "published": ("published", False),
    "published, memory kept": ("published", True),
    "dense encoder": ("dense", True),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    archs: tuple[str, ...] = ("resnet50", "convnext_tiny", "convnext_small")
    precisions: tuple[str, ...] = ("fp32", "bf16")
    parts: tuple[str, ...] = ("encoder", "step")
    size: int = 224
    batch_size: int = 16
    rounds: int = 7
    device: str = "cpu"
    official: Path | None = None
    shared_mask: bool = False
    """Add our unet step with one mask for the batch."""


@dataclass(frozen=True)
class Case:
    """One way of computing one row."""

    arch: str
    precision: str
    part: str
    way: str
    keep: bool


def main(settings: Settings) -> None:
    """Measure every row; a line of JSON for each."""
    for arch, precision, part in itertools.product(settings.archs, settings.precisions, settings.parts):
        ways = dict(ENCODER if part == "encoder" else STEP)
        if settings.official:
            ways["official"] = ("official", False)
        if settings.shared_mask and part == "step":
            ways["ours, unet, shared mask"] = ("shared", True)
        cases = {name: Case(arch, precision, part, way, keep) for name, (way, keep) in ways.items()}
        print(
            json.dumps({"arch": arch, "precision": precision, "part": part, "ways": row(cases, settings)}), flush=True
        )


def row(cases: dict[str, Case], settings: Settings) -> dict[str, dict[str, float]]:
    """Seconds, ratio to the first way, FLOPs, memory of each way."""
    first, *others = cases
    ours = Way(cases[first], settings)
    facts: dict[str, dict[str, float]] = {}
    for name in others:  # one beside ours at a time: all at once would not fit into memory
        way = Way(cases[name], settings)
        turns = [(way.step(), ours.step()) for _ in range(settings.rounds)]
        ours.seconds += [base for _, base in turns]
        way.seconds = [value for value, _ in turns]
        facts[name] = way.end() | {"of ours": round(statistics.median(value / base for value, base in turns), 2)}
    return {first: ours.end() | {"of ours": 1.0}, **facts}


class Way:
    """A process that has one way of computing a row, built and warm."""

    def __init__(self, case: Case, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.settings, self.seconds = settings, list[float]()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, case, settings), daemon=True)
        self.process.start()
        theirs.close()  # so that a process that dies ends the wait for it
        self.facts: dict[str, float] = self.pipe.recv()

    def step(self) -> float:
        """Seconds of one."""
        self.pipe.send("step")
        return float(self.pipe.recv())

    def end(self) -> dict[str, float]:
        """Its figures; the process is gone."""
        self.pipe.send("end")
        peak = self.pipe.recv()
        self.process.join()
        median = statistics.median(self.seconds)
        return self.facts | {
            "peak MB": peak,
            "seconds": round(median, 3),
            "images/s": round(self.settings.batch_size / median, 1),
            "share of peak": round(self.facts["GFLOP"] / median / self.facts["peak GFLOP/s"], 2),
        }


def serve(pipe: Connection, case: Case, settings: Settings) -> None:
    """Build one way, then run a step whenever asked."""
    if case.keep:
        keep_freed_memory()
    device = torch.device(settings.device)
    forward, module = build(case, settings, device)

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=case.precision == "bf16"):
            loss = forward()
        loss.backward()
        module.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    pipe.send(
        {
            "GFLOP": round(count_flops(step) / 1e9, 1),
            "saved MB": round(saved_bytes(forward, module, case, device) / 2**20),
            "peak GFLOP/s": round(peak_flops(device, case.precision) / 1e9),
        }
    )
    step()
    while pipe.recv() == "step":
        pipe.send(step())
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * usage()
    pipe.send(round(peak / 2**20))


def usage() -> int:
    """The most memory that this process has held, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def build(case: Case, settings: Settings, device: torch.device) -> tuple[Step, nn.Module]:
    """The forward pass to a scalar, and the module that it runs."""
    images = torch.randn(settings.batch_size, 3, settings.size, settings.size, device=device)
    if case.way == "official":
        assert settings.official is not None
        return build_official(case, settings.official, images)
    last = torch.contiguous_format if case.way == "published" else torch.channels_last  # as the published code runs
    images = images.contiguous(memory_format=last)
    backbone = create_backbone(case.arch, {}, seed=0)
    if case.way == "dense":
        backbone = backbone.to(device=device, memory_format=last).train()  # type: ignore[call-overload]
        names = [backbone.stages[i].name for i in hierarchy(backbone)]
        return lambda: total(list(backbone.feature_maps(images, names).values())), backbone
    config = SparkConfig(
        size=settings.size,
        decoder="light" if case.way == "light" else "unet",
        reference=case.way == "published",
        shared_mask=case.way == "shared",
    )
    objective: Spark = config.build(backbone).to(device=device, memory_format=last).train()  # type: ignore[call-overload]
    if case.way == "published":
        for layer in objective.modules():
            if isinstance(layer, UpSample):
                layer.__class__ = nn.ConvTranspose2d  # its stock self
    if case.part == "encoder":
        return lambda: total(objective.encode(images, objective.draw_units(images))), objective
    return lambda: objective({"image": images}).loss, objective


def build_official(case: Case, path: Path, images: Tensor) -> tuple[Step, nn.Module]:
    """The same from SparK's own code."""
    import timm
    import timm.layers

    sys.modules.setdefault("timm.models.layers", timm.layers)  # its old name
    sys.path.insert(0, str(path / "pretrain"))
    import decoder
    import encoder
    import models.convnext
    import spark

    with contextlib.redirect_stdout(io.StringIO()):
        if case.arch.startswith("convnext"):  # its own class, which today's timm.create_model cannot build
            network = getattr(models.convnext, case.arch)(sparse=True, num_classes=0, global_pool="")
        else:
            network = timm.create_model(case.arch, num_classes=0, global_pool="")
        sparse = encoder.SparseEncoder(network, input_size=images.shape[-1], sbn=False)
        dense = decoder.LightDecoder(sparse.downsample_raito, sbn=False)
        norm = "ln" if case.arch.startswith("convnext") else "bn"
        whole: Any = spark.SparK(sparse, dense, densify_norm=norm).to(images.device).train()

    def encode() -> Tensor:
        active = whole.mask(len(images), images.device)
        encoder._cur_active = active
        ratio = whole.downsample_raito
        return total(whole.sparse_encoder(images * active.repeat_interleave(ratio, 2).repeat_interleave(ratio, 3)))

    return (encode if case.part == "encoder" else lambda: whole(images)), whole


def total(maps: list[Tensor]) -> Tensor:
    """A scalar that depends on every feature map."""
    return torch.stack([feature_map.float().mean() for feature_map in maps]).sum()


def count_flops(step: Callable[[], float]) -> int:
    """Multiplications and additions of convolutions and matrix products, forward and backward."""
    grouped = {torch.ops.aten.convolution_backward: backward_flops}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter:
        step()
    return counter.get_total_flops()


def backward_flops(*shapes: Any, **_: Any) -> int:
    """As many for each of the two gradients as forward takes; torch counts that of grouped weights as dense."""
    of_out, of_x, of_weight, *_, transposed, _padding, _groups, needed = shapes[:11]
    return conv_flop_count(of_x, of_weight, of_out, transposed=transposed) * sum(map(bool, needed[:2]))


def saved_bytes(forward: Step, module: nn.Module, case: Case, device: torch.device) -> int:
    """What the forward pass keeps for the backward pass, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    sizes: dict[int, int] = {}
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast(device.type, dtype=torch.bfloat16, enabled=case.precision == "bf16"):
        loss = forward()
    del loss
    return sum(sizes.values())


def peak_flops(device: torch.device, precision: str) -> float:
    """What this machine reaches in one large matrix product, the best of ten."""
    matrix = torch.randn(4096, 4096, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 4096**3 / best


if __name__ == "__main__":
    main(tyro.cli(Settings))
