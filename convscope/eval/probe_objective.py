"""Heads on a frozen backbone, for the training loop: many linear ones, or an attentive one."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from convscope.core.backbone import Backbone
from convscope.core.training.objective import Batch, Objective, StepOutput
from convscope.eval.probe_inputs import PositionInputs, ProbeInputs

Initial = Literal["normal", "truncated", "uniform"]

HEAD_STD = 0.01
QUERY_STD = 0.02
WIDTH_OF_ATTENTION = 64


class LinearHeads(nn.Module):
    """For each input, a linear classifier for each learning rate; all of one input are one matrix product.

    Args:
        widths: of the inputs.
        classes: number of classes C.
        rates: how many classifiers each input has.
        initial: of the weights: N(0, .01) or the same truncated, biases 0 (DINOv2, MAE); or torch's own (lightly).
        normed: standardise each input by BatchNorm without affine parameters, eps 1e-6 (MAE).
    """

    def __init__(self, widths: Sequence[int], classes: int, rates: int, initial: Initial, normed: bool = False) -> None:
        super().__init__()
        self.classes, self.rates = classes, rates
        self.weights = nn.ParameterList([_weight(rates * classes, width, initial) for width in widths])
        self.biases = nn.ParameterList([_bias(rates * classes, width, initial) for width in widths])
        # for maps, of one position: that kind is synchronised over processes on any device (core/distributed.py)
        norms = [nn.BatchNorm2d(width, affine=False, eps=1e-6) if normed else nn.Identity() for width in widths]
        self.norms = nn.ModuleList(norms)

    @property
    def count(self) -> int:
        """Number of classifiers H."""
        return len(self.weights) * self.rates

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """For each input (B, D) -> logits (B, H, C): of the first input by learning rate, then of the next."""
        logits = [
            nn.functional.linear(norm(x[:, :, None, None])[:, :, 0, 0], weight, bias)
            for x, norm, weight, bias in zip(inputs, self.norms, self.weights, self.biases)
        ]
        return torch.cat(logits, 1).view(len(inputs[0]), self.count, self.classes)


class AttentiveHead(nn.Module):
    """Learned queries attend to the positions of a map; a linear classifier reads what they found, side by side.

    Args:
        width: of a position.
        classes: number of classes C.
        queries: number of learned queries.
    """

    count = 1

    def __init__(self, width: int, classes: int, queries: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, queries, width), std=QUERY_STD))
        heads = math.gcd(width, max(1, width // WIDTH_OF_ATTENTION))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear = nn.Linear(queries * width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=HEAD_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """[positions (B, N, D)] -> logits (B, 1, C)."""
        positions = self.norm(inputs[0])
        found, _ = self.attention(self.queries.expand(len(positions), -1, -1), positions, positions, need_weights=False)
        logits: Tensor = self.linear(found.flatten(1))
        return logits[:, None]


class FrozenProbe(Objective):
    """Cross-entropy of heads on a backbone that stays in evaluation mode and learns nothing.

    A head's learning rate is a factor of its loss: without weight decay and clipping, momentum SGD is linear in the
    gradient, so that one optimizer with the largest rate trains every head at its own.

    Args:
        backbone: frozen here.
        inputs: what the heads see.
        heads: of all inputs.
        known: class labels (C,), ascending; class i is the i-th.
        rates: each head's learning rate (H,), as a share of the optimizer's.
    """

    known: Tensor
    rates: Tensor

    def __init__(
        self,
        backbone: Backbone,
        inputs: ProbeInputs | PositionInputs,
        heads: LinearHeads | AttentiveHead,
        known: Tensor,
        rates: Tensor,
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.inputs, self.heads = inputs, heads
        self.register_buffer("known", known)
        self.register_buffer("rates", rates)

    def train(self, mode: bool = True) -> "FrozenProbe":
        """As any module, but for the backbone."""
        super().train(mode)
        self.backbone.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Learned queries."""
        return {"heads.queries"}

    def vectors(self, images: Tensor) -> list[Tensor]:
        """What the heads see of images (B, 3, H, W)."""
        return self.inputs(self.backbone, images)

    def forward(self, batch: Batch) -> StepOutput:
        """Loss on `image` (B, 3, H, W) and `label` (B,); `accuracy` is the best head's."""
        vectors = self.vectors(batch["image"])
        truth = torch.searchsorted(self.known, batch["label"])
        with torch.autocast(batch["image"].device.type, enabled=False):
            logits = self.heads(vectors)
        repeated = truth[:, None].expand(-1, self.heads.count)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), repeated.flatten(), reduction="none")
        hits = (logits.detach().argmax(2) == repeated).float().mean(0)
        loss = (losses.view(len(truth), -1).mean(0) * self.rates).sum()
        return StepOutput(loss, {"accuracy": hits.max()})


def _weight(rows: int, width: int, initial: Initial) -> nn.Parameter:
    weight = torch.empty(rows, width)
    if initial == "normal":
        nn.init.normal_(weight, std=HEAD_STD)
    elif initial == "truncated":
        nn.init.trunc_normal_(weight, std=HEAD_STD)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return nn.Parameter(weight)


def _bias(rows: int, width: int, initial: Initial) -> nn.Parameter:
    bound = 1 / math.sqrt(width) if initial == "uniform" else 0.0
    return nn.Parameter(nn.init.uniform_(torch.empty(rows), -bound, bound))
