"""Optimizer, learning-rate schedule and weight-decay ramp, built on timm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from torch import nn

from convscope.core.errors import UserError
from convscope.core.training.layer_decay import lr_scales
from convscope.core.training.objective import Objective

LR_REFERENCE_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the weights are updated."""

    optimizer: Literal["lamb", "adamw", "adam", "sgd", "lars"] = "lamb"
    """Update rule, timm's."""
    lr: float = 2e-4
    """Peak learning rate for 256 samples; it is multiplied by batch_size/256."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of lamb, adamw and adam."""
    eps: float = 1e-6
    """Of lamb, adamw and adam."""
    momentum: float = 0.9
    """Of sgd and lars."""
    nesterov: bool = True
    """Nesterov's momentum, of sgd."""
    weight_decay: float = 0.04
    """At the start of the run; never on biases and 1-d parameters."""
    weight_decay_end: float | None = 0.2
    """At the end, reached by a cosine; default: as at the start."""
    clip: float | None = 5.0
    """Largest gradient norm."""
    warmup_epochs: float = 40.0
    """Linear warm-up."""
    warmup_steps: int | None = None
    """The same in optimizer steps; it takes the place of the epochs."""
    warmup_start: float = 0.005
    """First learning rate as a share of the peak."""
    lr_end: float = 0.001
    """Last learning rate as a share of the peak; of the cosine."""
    layer_decay: float | None = None
    """Factor of the learning rate from one layer to the next towards the input; the objective's own parts keep 1."""
    layer_blocks: tuple[int, ...] = ()
    """Blocks of each stage that share a layer, such as 3 3 3 3 for ConvNeXt; default: each is one."""
    milestones: tuple[float, ...] = ()
    """Epochs at which the learning rate falls, in place of the cosine."""
    lr_drop: float = 0.1
    """Factor by which it falls at each."""

    def __post_init__(self) -> None:
        if list(self.milestones) != sorted(set(self.milestones)) or any(epoch <= 0 for epoch in self.milestones):
            raise UserError(f"--milestones must be positive and ascend, got {' '.join(map(str, self.milestones))}")
        if self.lr <= 0:
            raise UserError(f"--lr must be positive, got {self.lr}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(f"--layer-decay must be above 0 and at most 1, got {self.layer_decay}")
        if any(blocks < 1 for blocks in self.layer_blocks):
            raise UserError(f"--layer-blocks must be at least 1, got {' '.join(map(str, self.layer_blocks))}")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"--clip must be positive, got {self.clip}")


def peak_lr(config: OptimizerConfig, batch_size: int) -> float:
    """The learning rate for this global batch size (linear scaling rule)."""
    return config.lr * batch_size / LR_REFERENCE_BATCH


def build_optimizer(objective: Objective, config: OptimizerConfig, batch_size: int) -> torch.optim.Optimizer:
    """timm's optimizer over two groups: decayed, and not decayed (1-d, biases, the objective's own list).

    With `layer_decay` each layer has two groups of its own.
    """
    groups = param_groups_weight_decay(objective, weight_decay=1.0, no_weight_decay_list=objective.no_weight_decay())
    groups = [{**group, "decay_scale": group["weight_decay"]} for group in groups if group["params"]]
    if config.layer_decay is not None:
        groups = _by_layer(groups, objective, config.layer_decay, config.layer_blocks)
    options: dict[str, Any] = {"lr": peak_lr(config, batch_size), "weight_decay": config.weight_decay}
    if config.optimizer in ("lamb", "adamw", "adam"):
        options |= {"betas": config.betas, "eps": config.eps}
    else:
        options |= {"momentum": config.momentum}
    if config.optimizer == "lars":  # without weight decay too, and never for biases
        groups = [{**group, "always_adapt": group["decay_scale"] > 0} for group in groups]
    if config.optimizer == "lamb":
        options |= {"max_grad_norm": None}  # the loop clips, for every optimizer alike
    name = "momentum" if config.optimizer == "sgd" and not config.nesterov else config.optimizer  # timm's word for it
    optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, opt=name, **options)
    return optimizer


def _by_layer(
    groups: list[dict[str, Any]], objective: Objective, decay: float, blocks: Sequence[int]
) -> list[dict[str, Any]]:
    """The groups, each parted by the learning rate of its parameters; timm's schedules multiply by `lr_scale`."""
    scales = lr_scales(objective.backbone, decay, blocks)
    scale_of = {id(p): scales[name] for name, p in objective.backbone.model.named_parameters() if name in scales}
    parted = []
    for group in groups:
        for scale in sorted({scale_of.get(id(p), 1.0) for p in group["params"]}):
            members = [p for p in group["params"] if scale_of.get(id(p), 1.0) == scale]
            parted.append({**group, "params": members, "lr_scale": scale})
    return parted


class Schedule:
    """Sets learning rate and weight decay as a pure function of the step (SparK's: warm-up, cosine, decay ramp).

    Args:
        steps: optimizer steps in the whole run; the last one, `steps - 1`, has exactly the floor values.
        warmup_steps: steps of linear warm-up.
        milestones: steps from which on the learning rate is lower by another factor; they replace the cosine.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        *,
        steps: int,
        warmup_steps: int,
        milestones: Sequence[int] = (),
    ) -> None:
        self.optimizer, self.config, self.steps = optimizer, config, steps
        peak = optimizer.param_groups[0]["lr"]
        warmup_steps = min(warmup_steps, steps - 1)
        warmup: dict[str, Any] = {
            "warmup_t": warmup_steps,
            "warmup_lr_init": config.warmup_start * peak,
            "t_in_epochs": False,
        }
        self._lr: Any
        if milestones:
            ends = [step + 1 for step in milestones]  # timm looks one step ahead
            self._lr = MultiStepLRScheduler(optimizer, decay_t=ends, decay_rate=config.lr_drop, **warmup)
        else:
            length, floor = max(steps - 1 - warmup_steps, 1), config.lr_end * peak
            self._lr = CosineLRScheduler(optimizer, t_initial=length, lr_min=floor, warmup_prefix=True, **warmup)

    def set(self, step: int) -> None:
        """Set every group's values for optimizer step `step`, counted from 0."""
        self._lr.step_update(step)
        start = self.config.weight_decay
        end = start if self.config.weight_decay_end is None else self.config.weight_decay_end
        share = step / max(self.steps - 1, 1)
        decay = end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))
        for group in self.optimizer.param_groups:
            group["weight_decay"] = decay * group["decay_scale"]

    def values(self) -> dict[str, float]:
        """The values in force, for the log."""
        groups = self.optimizer.param_groups
        return {
            "lr": float(max(group["lr"] for group in groups)),
            "weight_decay": float(max(group["weight_decay"] for group in groups)),
        }


def count_parameters(module: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
