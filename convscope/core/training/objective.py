"""What the training loop trains: a module that maps a batch to a loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convscope.core.backbone import Backbone

Batch = Mapping[str, Any]


@dataclass
class StepOutput:
    """What an objective hands the loop."""

    loss: Tensor  # scalar
    metrics: dict[str, Tensor] = field(default_factory=dict)  # scalars, averaged over the step and the ranks


class Objective(nn.Module):
    """A backbone, what the objective adds to it, and the loss over a batch."""

    backbone: Backbone

    def forward(self, batch: Batch) -> StepOutput:
        """Loss of one batch; `batch["image"]` is normalised (B, 3, H, W)."""
        raise NotImplementedError

    def takes_whole_batch(self, parts: int) -> bool:
        """Whether the loss is over all images of a step; such an objective computes `parts` of them at a time itself.

        Otherwise the loop hands over one part after the other and sums their gradients.
        """
        return False

    @torch.no_grad()
    def after_update(self) -> None:
        """Called after every optimizer step, such as to keep a weight in its range."""

    def no_weight_decay(self) -> set[str]:
        """Names of further parameters that weight decay leaves alone (1-d ones and biases always are)."""
        return set()
