"""What a run is told: its budget and batch, its data, and who looks on."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from convscope.core.checkpoint import RunDirectory
from convscope.core.data.photometric import PhotometricConfig
from convscope.core.data.shard_set import ShardSet
from convscope.core.data.stream import Fields, Transform
from convscope.core.data.transforms import Normalize
from convscope.core.errors import UserError
from convscope.core.training.objective import Objective

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESUMABLE = frozenset(
    {"workers", "log_every", "checkpoint_every", "keep_checkpoints", "device", "track", "picture_every"}
    | {"eval_every", "eval_data", "eval_split", "eval_pairs"}
    | {"data", "output_dir"}  # either may have moved; the loop compares the data's fingerprint
    | {"max_skipped"}  # what a run that it stopped is told to raise
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Budget, batch and bookkeeping of a run."""

    epochs: float | None = None
    """Budget in passes over the data; give one of epochs, steps, samples."""
    steps: int | None = None
    """Budget in optimizer steps."""
    samples: int | None = None
    """Budget in images seen."""
    batch_size: int = 256
    """Images per optimizer step over all processes and accumulation rounds."""
    accumulate: int = 1
    """Forward and backward rounds per optimizer step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of autocast; weights stay fp32."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, and export that."""
    grad_checkpointing: bool = False
    """Recompute activations in backward to save memory."""
    compile: bool = False
    """Compile the objective with torch.compile."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    workers: int = 1
    """Data-loading processes; 0 loads in the training process."""
    seed: int = 0
    """Of weights, order, augmentation and masks."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints; default: an epoch, at least 50 and at most 2000 steps."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    decoding: Literal["fast", "exact"] = "fast"
    """fast: training crops straight from JPEG bytes, no larger than needed. exact: torchvision's, from whole images."""
    max_skipped: float = 1e-3
    """Stop when more than this share of the samples cannot be read, and five standard deviations more: at 0.001, 7
    of the first 1000, 151 of 100 000."""

    def __post_init__(self) -> None:
        if sum(budget is not None for budget in (self.epochs, self.steps, self.samples)) != 1:
            raise UserError("give exactly one of --epochs, --steps, --samples")
        budgets = ("epochs", "steps", "samples")
        for name in (*budgets, "batch_size", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"--ema-decay must lie between 0 and 1, got {self.ema_decay}")
        if not 0 <= self.max_skipped <= 1:
            raise UserError(f"--max-skipped is a share between 0 and 1, got {self.max_skipped}")
        for name in ("workers", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must be at least 0, got {getattr(self, name)}")

    def total_steps(self, dataset_size: int) -> int:
        """Optimizer steps in the whole run."""
        if self.steps is not None:
            return self.steps
        samples = self.samples if self.samples is not None else (self.epochs or 0) * dataset_size
        return max(1, math.ceil(samples / self.batch_size))


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """What a run reads: a split, its transform, and what is done to pixels on the device."""

    shards: ShardSet
    transform: Transform
    normalize: Normalize
    label: str | None = None  # the label field, for supervised objectives
    indices: NDArray[np.int64] | None = None  # a subset of the samples
    weights: tuple[float, ...] | None = None  # of the parts of `shards`
    fields: Fields | None = None  # further tensors of a sample
    photometric: PhotometricConfig | None = None  # colour changes, blur; before normalisation

    def __len__(self) -> int:
        return len(self.shards) if self.indices is None else len(self.indices)


@dataclass
class LoopState:
    """What hooks see after each step."""

    objective: Objective
    run: RunDirectory
    step: int  # finished optimizer steps
    total_steps: int
    device: torch.device
    normalize: Normalize
    logged: dict[str, float] = field(default_factory=dict)  # this step's line of metrics.jsonl, if it has one


class Hook:
    """Something that looks on: pictures, trackers."""

    def start(self, state: LoopState) -> None:
        """Called on the main process before the first step."""

    def after_step(self, state: LoopState) -> None:
        """Called on the main process after every optimizer step."""

    def finish(self, state: LoopState) -> None:
        """Called on the main process at the end of the run."""
