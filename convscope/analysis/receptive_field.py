"""Theoretical receptive field of a token: how far it can see, and how far it sees with uniform kernels.

Luo et al. 2016 (section 2): with uniform kernels every layer spreads the field by a box's variance, and the layers of
a stack add up to a Gaussian of sigma = sqrt(sum_l jump_l^2 d_l^2 (k_l^2 - 1) / 12), jump_l being the spacing in pixels
of the map that layer l reads and d_l its dilation. Branches that run in parallel make a mixture, whose variance lies
between those of its paths.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

# Operations that mix positions by other means than a kernel of known size.
GLOBAL = {
    "BmmBackward0": "attention mixes positions as it has learned to",
    "AdaptiveAvgPool2DBackward0": "it pools over the whole map on the way",
    "FftR2CBackward0": "a Fourier transform sees the whole map",
}
WINDOWS = ("ConvolutionBackward0", "MaxPool2DWithIndicesBackward0", "AvgPool2DBackward0")


@dataclass(frozen=True)
class AxisField:
    """What one token sees along an axis, in pixels."""

    reach: int  # pixels from the first to the last that the token can depend on, beyond the image's edge too
    sigma: tuple[float, float]  # with uniform kernels, along the path that spreads least and the one that spreads most


@dataclass(frozen=True)
class ReceptiveField:
    """Of one token, along both axes; without them there is a reason why they cannot be computed."""

    y: AxisField | None = None
    x: AxisField | None = None
    reason: str = ""


@dataclass(frozen=True)
class _Span:
    """Positions of one map that the token can depend on, and how they are spread, in that map's spacing."""

    reach: int = 1
    least: float = 0.0  # variances
    most: float = 0.0

    def through(self, kernel: int, stride: int, dilation: int) -> "_Span":
        """The span in the input of a window operation."""
        own = dilation**2 * (kernel**2 - 1) / 12
        reach = (self.reach - 1) * stride + dilation * (kernel - 1) + 1
        return _Span(reach, self.least * stride**2 + own, self.most * stride**2 + own)

    def joined(self, other: "_Span") -> "_Span":
        return _Span(max(self.reach, other.reach), min(self.least, other.least), max(self.most, other.most))


def uniform_sigma(layers: int, kernel: int) -> float:
    """Sigma in pixels of the field of `layers` uniform kernel x kernel layers: sqrt(n (k^2 - 1) / 12)."""
    return math.sqrt(layers * (kernel**2 - 1) / 12)


def receptive_field(feature_map: Tensor, images: Tensor) -> ReceptiveField:
    """Follow the operations that autograd recorded from a map back to the images.

    Args:
        feature_map: (B, C, h, w), computed from `images` with gradients enabled.
        images: (B, 3, H, W), a leaf that requires a gradient.
    """
    spans: dict[Any, tuple[_Span, _Span]] = {feature_map.grad_fn: (_Span(), _Span())}
    for node in _from_the_end(feature_map.grad_fn):
        if getattr(node, "variable", None) is images:
            rows, columns = (AxisField(s.reach, (math.sqrt(s.least), math.sqrt(s.most))) for s in spans[node])
            return ReceptiveField(rows, columns)
        try:
            given = _input_spans(node, spans[node])
        except _UnknownError as error:
            return ReceptiveField(reason=str(error))
        for before, _ in node.next_functions:
            if before is not None:
                known = spans.get(before, given)
                spans[before] = (known[0].joined(given[0]), known[1].joined(given[1]))
    return ReceptiveField(reason="autograd does not lead back to the images")


def beyond(field: ReceptiveField, rows: tuple[int, int], columns: tuple[int, int], centre: tuple[float, float]) -> bool:
    """Whether pixels outside of the field contribute, so that something other than its windows mixes positions.

    Args:
        field: of the token.
        rows: the first and the last row with a contribution.
        columns: likewise.
        centre: pixel (y, x) of the field's centre.
    """
    for axis, (first, last), middle in ((field.y, rows, centre[0]), (field.x, columns, centre[1])):
        if axis is not None and max(middle - first, last - middle) > axis.reach / 2 + 1:  # padding may be uneven
            return True
    return False


def refused(field: ReceptiveField) -> ReceptiveField:
    """Without its figures, for a network that mixes positions in other ways."""
    return replace(field, y=None, x=None, reason="pixels beyond the reach of its convolutions contribute")


class _UnknownError(Exception):
    """An operation whose window is not known."""


def _from_the_end(end: Any) -> Iterator[Any]:
    """Nodes of the graph, each after all that use it."""
    users: dict[Any, int] = {end: 0}
    stack = [end]
    while stack:
        for before, _ in stack.pop().next_functions:
            if before is not None:
                if before not in users:
                    stack.append(before)
                users[before] = users.get(before, 0) + 1
    ready = [end]
    while ready:
        node = ready.pop()
        yield node
        for before, _ in node.next_functions:
            if before is not None:
                users[before] -= 1
                if users[before] == 0:
                    ready.append(before)


def _input_spans(node: Any, spans: tuple[_Span, _Span]) -> tuple[_Span, _Span]:
    name = node.name()
    if name in GLOBAL:
        raise _UnknownError(GLOBAL[name])
    if name.startswith("ScaledDotProduct") or "Attention" in name:
        raise _UnknownError(GLOBAL["BmmBackward0"])
    if name.startswith("MeanBackward") and _over_positions(node):
        raise _UnknownError(GLOBAL["AdaptiveAvgPool2DBackward0"])
    if name.startswith("Upsample") or getattr(node, "_saved_transposed", False):
        raise _UnknownError("upsampling has no window of one size")
    if name not in WINDOWS:
        return spans
    stride, dilation = node._saved_stride, getattr(node, "_saved_dilation", (1, 1))
    kernel = node._saved_weight.shape[2:] if name == "ConvolutionBackward0" else node._saved_kernel_size
    if len(kernel) != 2:
        raise _UnknownError("a convolution over a sequence mixes positions by their order")
    sizes = [_pair(each) for each in (kernel, stride or kernel, dilation)]
    down, across = ([size[axis] for size in sizes] for axis in (0, 1))
    return spans[0].through(*down), spans[1].through(*across)


def _over_positions(node: Any) -> bool:
    """Whether a mean is taken over height or width of (B, C, H, W); over channels it mixes no positions."""
    sizes = node._saved_self_sym_sizes
    dims = getattr(node, "_saved_dim", None) or ()
    return len(sizes) == 4 and any(int(dim) % 2**64 % 4 in (2, 3) for dim in dims)


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(int(each) for each in value) if isinstance(value, (tuple, list)) else (int(value),)
    return (values[0], values[-1])
