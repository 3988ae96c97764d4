"""A contrastive step beside open_clip's: the same towers, the same batch, and how memory grows with the batch.

    python benchmarks/clip_step.py                     # time, paired; then time and memory over batch size

Both ways have a ResNet-50 at 224 px and CLIP's text transformer (width 512, 12 layers), AdamW, forward, loss,
backward and update. open_clip's way is its own model (CustomTextCLIP, timm tower) and its own ClipLoss; ours is the
objective that `pretrain clip` trains. Every way is a process of its own, and ways take turns.
"""

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import tyro
from torch import Tensor, nn

from convscope.core.backbone import create_backbone
from convscope.core.memory import keep_freed_memory
from convscope.core.pairs.tokenizers import ClipTokenizer
from convscope.core.results import bootstrap
from convscope.ssl.objectives.clip import ClipConfig

DIM, WIDTH, HEADS, LAYERS, CONTEXT = 1024, 512, 8, 12, 77


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    arch: str = "resnet50"
    size: int = 224
    batch: int = 16
    """Pairs of a step whose time is measured."""
    precision: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    rounds: int = 7
    steps: int = 2
    """Steps of a round that count, after one that does not."""
    batches: tuple[int, ...] = (8, 16, 32, 64)
    """Batch sizes of the memory curve."""
    part: int = 8
    """Pairs encoded at a time on that curve."""
    parts: tuple[Literal["time", "memory"], ...] = ("time", "memory")


Step = Callable[[Tensor, Tensor], Tensor]  # images, tokens -> loss


def ours(settings: Settings, parts: int = 1) -> tuple[nn.Module, Step]:
    """The objective of `pretrain clip`."""
    config = ClipConfig(
        size=settings.size,
        embed_dim=DIM,
        tokenizer="clip",
        text_width=WIDTH,
        text_heads=HEADS,
        text_layers=LAYERS,
        context_length=CONTEXT,
    )
    objective = config.build(create_backbone(settings.arch, seed=0), ClipTokenizer(CONTEXT))
    objective.takes_whole_batch(parts)
    return objective, lambda images, tokens: objective({"image": images, "text": tokens}).loss


def theirs(settings: Settings) -> tuple[nn.Module, Step]:
    """open_clip's model and loss."""
    vision = {"timm_model_name": settings.arch, "timm_pool": "", "timm_proj": "linear", "image_size": settings.size}
    text = {"context_length": CONTEXT, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
    model = open_clip.model.CustomTextCLIP(DIM, open_clip.model.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))
    loss = open_clip.ClipLoss()
    return model, lambda images, tokens: loss(*model(images, tokens))


WAYS: dict[str, Callable[..., tuple[nn.Module, Step]]] = {"ours": ours, "open_clip": theirs}


def serve(pipe: Connection, way: str, settings: Settings, precision: str, batch: int, parts: int) -> None:
    """Seconds of a step whenever asked; the last answer is the largest memory in MB."""
    keep_freed_memory()
    torch.manual_seed(0)
    model, step = ours(settings, parts) if way == "ours" else theirs(settings)
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(batch, 3, settings.size, settings.size).contiguous(memory_format=torch.channels_last)
    tokens = ClipTokenizer(CONTEXT)([f"a photo of number {i}" for i in range(batch)])
    pipe.send(None)
    while (count := pipe.recv()) is not None:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = step(images, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
        pipe.send(times)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


class Way:
    """A way in a process of its own."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, *arguments))
        self.process.start()
        self.pipe.recv()

    def step(self, count: int) -> list[float]:
        """Seconds of `count` steps."""
        self.pipe.send(count)
        return self.pipe.recv()

    def close(self) -> float:
        """Its largest memory in MB."""
        self.pipe.send(None)
        memory: float = self.pipe.recv()
        self.process.join()
        return memory


def timed(settings: Settings, precision: str) -> dict[str, Any]:
    """Medians of both ways; the mean of their ratio over the rounds, its 95 % interval and its range."""
    ways = {name: Way(name, settings, precision, settings.batch, 1) for name in WAYS}
    for way in ways.values():
        way.step(1)
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(settings.rounds):
        for name, way in ways.items():
            rounds[name].append(statistics.median(way.step(settings.steps + 1)[1:]))
    memory = {name: round(way.close()) for name, way in ways.items()}
    seconds = {name: round(statistics.median(values), 3) for name, values in rounds.items()}
    ratios = np.array(rounds["open_clip"]) / np.array(rounds["ours"])  # of the same round, minutes apart otherwise
    ratio = bootstrap(ratios)
    spread = {
        "mean": round(ratio.value, 3),
        "interval": [round(float(end or 0), 3) for end in (ratio.low, ratio.high)],
        "range": [round(float(end), 3) for end in (ratios.min(), ratios.max())],
    }
    return {"precision": precision, "seconds": seconds, "open_clip / ours": spread, "peak MB": memory}


def curve(settings: Settings) -> Iterator[dict[str, Any]]:
    """Seconds of a step and peak memory of the whole process by batch size; `in parts` is GradCache's way."""
    for batch in settings.batches:
        row: dict[str, Any] = {"batch": batch}
        for name, way, parts in (
            ("open_clip", "open_clip", 1),
            ("ours", "ours", 1),
            ("in parts", "ours", batch // settings.part),
        ):
            one = Way(way, settings, "fp32", batch, parts)
            seconds = statistics.median(one.step(settings.steps + 1)[1:])
            row[name] = {"seconds": round(seconds, 3), "peak MB": round(one.close())}
        yield row


def main(settings: Settings) -> None:
    """Measure, a line of JSON for each row."""
    if "time" in settings.parts:
        for precision in settings.precision:
            print(json.dumps(timed(settings, precision)), flush=True)
    if "memory" in settings.parts:
        for row in curve(settings):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
