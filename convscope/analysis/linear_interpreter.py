"""What a network does to one image, as an affine function: F(x) = J x + sum over biases of (dF/db) b.

Exact for networks of convolutions, rectifiers, max pooling and BatchNorm in evaluation mode, which are affine around
every image. Elsewhere gates keep their value (`frozen_gates`): the function has the network's value at the image,
and its rows say what the image's pixels add to it, not how the network would change with them.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from convscope.analysis.frozen_gates import FrozenGates
from convscope.core.backbone import Backbone
from convscope.core.errors import UserError

POOLED = "pooled"
TOLERANCE = 1e-8  # of the identity in float64, relative to the value
# Last part of the names of what is added, not multiplied; all else is part of J.
ADDED = ("bias", "beta", "running_mean", "cls_token", "reg_token", "dist_token", "pos_embed", "pos_embed_win")


@dataclass(frozen=True)
class Parts:
    """The two sides of one output."""

    value: Tensor  # (B, ...) F(x)
    linear: Tensor  # (B, ...) J x
    bias: Tensor  # (B, ...) sum of (dF/db) b

    @property
    def error(self) -> float:
        """Largest departure of the sum from the value, relative to the largest value."""
        return float((self.linear + self.bias - self.value).abs().max() / self.value.abs().max().clamp_min(1e-300))

    @property
    def bias_share(self) -> Tensor:
        """(B,) length of the bias part over the sum of both lengths, 0 to 1."""
        linear: Tensor = self.linear.flatten(1).norm(dim=1)
        bias: Tensor = self.bias.flatten(1).norm(dim=1)
        return torch.div(bias, linear + bias)


class LinearInterpreter:
    """A backbone, in float64 and evaluation mode, taken apart at given images.

    Args:
        backbone: is changed to float64 and stays so.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone.double().eval()
        values = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
        self._added = {
            name: value.detach()
            for name, value in values.items()
            if name.rsplit(".", 1)[-1] in ADDED and value.is_floating_point()
        }
        self.frozen: set[str] = set()  # names of the functions whose gates were frozen so far

    def parts(self, images: Tensor) -> dict[str, Parts]:
        """Every stage's map and the pooled features, by two forward derivatives.

        Args:
            images: (B, 3, H, W) normalised, float64.

        Raises:
            UserError: the network has operations that cannot be frozen; they are named.
        """
        still = (images, self._added)
        nothing = {name: torch.zeros_like(value) for name, value in self._added.items()}
        with torch.no_grad():
            linear = _jvp(self._outputs, still, (images, nothing))
            bias = _jvp(self._outputs, still, (torch.zeros_like(images), self._added))
            value = _AllStages(self.backbone)(images)  # what the network gives, gates or not
        found = {name: Parts(value[name], linear[name], bias[name]) for name in value}
        worst = max(part.error for part in found.values())
        if not worst < TOLERANCE:
            raise UserError(
                f"linear: {self.backbone.source} cannot be taken apart ({worst:.1e} is missing): "
                f"it has {', '.join(sorted(self._unfrozen(images))) or 'an operation that is unknown'} between signals"
            )
        return found

    def rows(self, images: Tensor, outputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the pixels and biases add to single pooled features.

        Args:
            images: (B, 3, H, W).
            outputs: (B,) index of the feature for each image.

        Returns:
            rows of J (B, 3, H, W), and by bias its contribution (dF/db) b, summed over the images.
        """
        images = images.detach().requires_grad_()
        added = {name: value.clone().requires_grad_() for name, value in self._added.items()}
        value = self._outputs(images, added)[POOLED].gather(1, outputs[:, None]).sum()
        gradients = torch.autograd.grad(value, [images, *added.values()], allow_unused=True)
        shares = {
            name: (gradient * one.detach()).sum()
            for (name, one), gradient in zip(added.items(), gradients[1:])
            if gradient is not None
        }
        return gradients[0], shares

    def column(self, images: Tensor, square: tuple[int, int, int]) -> dict[str, Tensor]:
        """Maps (B, C, h, w) of how every stage answers to a unit step in all channels of a square of pixels.

        Args:
            images: (B, 3, H, W).
            square: row and column of its first pixel, and its side; a side of 1 gives a column of J.
        """
        top, left, side = square
        step = torch.zeros_like(images)
        step[:, :, top : top + side, left : left + side] = 1
        with torch.no_grad():
            return _jvp(lambda x: self._outputs(x, self._added), (images,), (step,))

    def _outputs(self, images: Tensor, added: dict[str, Tensor]) -> dict[str, Tensor]:
        with FrozenGates() as gates:
            found: dict[str, Tensor] = functional_call(_AllStages(self.backbone), _below("backbone", added), (images,))
        self.frozen |= gates.frozen
        return found

    def _unfrozen(self, images: Tensor) -> set[str]:
        with torch.enable_grad(), FrozenGates() as gates:
            _AllStages(self.backbone)(images.detach().requires_grad_())
        return {name.rsplit(".", 1)[-1].strip("_") for name in gates.unfrozen}


def _jvp(function: Callable[..., dict[str, Tensor]], at: tuple[Any, ...], along: tuple[Any, ...]) -> dict[str, Tensor]:
    """The forward derivative, without torch's warning about the torch.jit in it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        derivative: dict[str, Tensor] = torch.func.jvp(function, at, along)[1]
    return derivative


class _AllStages(torch.nn.Module):
    """A backbone that returns every stage's map and the pooled features."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        model: Any = self.backbone.model
        final, maps = model.forward_intermediates(images, indices=list(range(len(self.backbone.stages))))
        found = {stage.name: one for stage, one in zip(self.backbone.stages, maps)}
        found[POOLED] = model.forward_head(final, pre_logits=True)
        return found


def _below(prefix: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def strongest(features: Tensor, count: int) -> Tensor:
    """(B, count) indices of the pooled features that stand out most from their mean over the images."""
    return (features - features.mean(0)).abs().topk(min(count, features.shape[1]), dim=1).indices


def by_stage(contributions: dict[str, Tensor], stages: Sequence[str]) -> dict[str, float]:
    """Contributions of biases summed by the stage whose module they belong to, "other" for those outside."""
    found = dict.fromkeys([*stages, "other"], 0.0)
    for name, value in contributions.items():
        owner = next((stage for stage in stages if f".{stage}." in f".{name}."), "other")
        found[owner] += float(value)
    return found
