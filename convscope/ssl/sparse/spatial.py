"""Convolution of visible units, exact: y = conv(x) * M (SparK sec. 3.2), computed where M is 1 and nowhere else.

A unit needs its neighbours' borders. *halo* reads them, zero where masked, and convolves without padding; *taps* reads
every output's inputs side by side and makes the convolution one matrix product, which pays for small units. Both read
in backward too: the gradient of an input is a gather of the outputs that read it, never a sum over scattered rows.
*depthwise* and *dense* put the units back into a map, where neighbours already lie side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from convscope.ssl.sparse.units import Reads, VisibleUnits, to_map, to_rows

Form = Literal["dense", "halo", "taps", "depthwise"]
Chooser = Callable[["Geometry", Tensor, VisibleUnits], Form]


@dataclass(frozen=True)
class Axis:
    """A convolution along one axis: output o reads the inputs o * stride - padding + t * dilation, t < kernel."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def reach(self) -> int:
        """Distance from an output's first input to its last."""
        return (self.kernel - 1) * self.dilation

    @property
    def keeps_grid(self) -> bool:
        """Whether n * stride inputs give n outputs, whatever n."""
        return 0 <= self.reach - 2 * self.padding < self.stride

    def halo(self, side: int) -> tuple[int, int]:
        """How many inputs before and after a unit of side `side` its outputs read."""
        return self.padding, max((side // self.stride - 1) * self.stride + self.reach - self.padding - (side - 1), 0)

    def output_halo(self, side: int) -> tuple[int, int]:
        """How many outputs before and after a unit's own read its inputs."""
        return (self.reach - self.padding) // self.stride, (
            side - 1 + self.padding
        ) // self.stride - side // self.stride + 1

    def reads(self, side: int) -> Reads:
        """For each output of a unit, the inputs it reads."""
        outputs = range(side // self.stride)
        return tuple(
            tuple(o * self.stride - self.padding + t * self.dilation for t in range(self.kernel)) for o in outputs
        )

    def readers(self, side: int, phase: int) -> tuple[list[int], Reads]:
        """The taps that reach the inputs phase, phase + stride, ... of a unit, and the outputs that these belong to."""
        taps = [t for t in range(self.kernel) if (phase + self.padding - t * self.dilation) % self.stride == 0]
        first = [(phase + self.padding - t * self.dilation) // self.stride for t in taps]
        return taps, tuple(tuple(o + f for f in first) for o in range(side // self.stride))


def border(halo: tuple[int, int], side: int) -> Reads:
    """A unit with its halo, place by place."""
    return tuple((place,) for place in range(-halo[0], side + halo[1]))


@dataclass(frozen=True)
class Geometry:
    """What a convolution reads, along both axes."""

    y: Axis
    x: Axis
    groups: int
    depthwise: bool  # a filter of its own for each channel

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Geometry | None":
        """The geometry of a layer, None where it is not plain enough for anything but the dense form."""
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        y, x = (Axis(*values) for values in zip(conv.kernel_size, conv.stride, conv.padding, conv.dilation))
        plain = y.keeps_grid and x.keeps_grid and y.stride == x.stride
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        return cls(y, x, conv.groups, depthwise) if plain else None

    @property
    def stride(self) -> int:
        """Of both axes."""
        return self.y.stride

    @property
    def same(self) -> bool:
        """Whether inputs and outputs lie one upon the other, with as many before as behind."""
        return all(axis.stride == 1 == axis.dilation and axis.reach == 2 * axis.padding for axis in (self.y, self.x))


def choose_form(geometry: Geometry, x: Tensor, units: VisibleUnits) -> Form:
    """The form that was fastest for such a layer on units x (B*K, C, b, b); see benchmarks/spark_step.md."""
    side = x.shape[-1]
    if geometry.groups > 1:
        return "depthwise" if geometry.depthwise and geometry.same else "dense"
    return "halo" if side > 16 or (side > 4 and geometry.stride == 1) else "taps"


def compute_dtype(x: Tensor, groups: int) -> torch.dtype:
    """What a convolution computes in: autocast's type, but fp32 for grouped ones on a CPU, where bf16 is slower."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.float32 if groups > 1 and x.device.type == "cpu" else torch.get_autocast_dtype(x.device.type)


def convolve(
    form: Form, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, units: VisibleUnits
) -> Tensor:
    """Convolve units (B*K, C, b, b) -> (B*K, C', b/stride, b/stride); all forms give the same."""
    if form == "dense":
        return _dense(x, weight, bias, geometry, units)
    function = {"halo": _Halo, "taps": _Taps, "depthwise": _Depthwise}[form]
    return function.apply(x, weight, bias, geometry, units)  # type: ignore[no-any-return]


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, units: VisibleUnits) -> Tensor:
    padding, dilation = ((getattr(geometry.y, n), getattr(geometry.x, n)) for n in ("padding", "dilation"))
    dense = functional.conv2d(units.scatter(x), weight, bias, geometry.stride, padding, dilation, geometry.groups)
    return units.gather(dense)


def _with_halo(x: Tensor, y_halo: tuple[int, int], x_halo: tuple[int, int], units: VisibleUnits) -> Tensor:
    """(B*K, C, b, b) -> (B*K, C, b + halo, b + halo), zero where masked or beyond the image."""
    side = x.shape[-1]
    window = units.window(side, border(y_halo, side), border(x_halo, side))
    return to_map(window.read(to_rows(x)), len(x), side + sum(y_halo), side + sum(x_halo))


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, units: VisibleUnits
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.units, ctx.has_bias = geometry, units, bias is not None
        wide = _with_halo(x, geometry.y.halo(x.shape[-1]), geometry.x.halo(x.shape[-1]), units)
        dilation = (geometry.y.dilation, geometry.x.dilation)
        return functional.conv2d(wide, weight, bias, geometry.stride, 0, dilation, geometry.groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        geometry, units, side = ctx.geometry, ctx.units, x.shape[-1]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = _halo_input_gradient(gradient, weight, geometry, units, side) if ctx.needs_input_grad[0] else None
        wide = _with_halo(x, geometry.y.halo(side), geometry.x.halo(side), units)
        stride, dilation = [geometry.stride] * 2, [geometry.y.dilation, geometry.x.dilation]
        _, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient,
            wide,
            weight,
            [len(weight)],
            stride,
            [0, 0],
            dilation,
            False,
            [0, 0],
            geometry.groups,
            [False, True, ctx.has_bias],
        )
        return of_x, of_weight, of_bias, None, None


def _halo_input_gradient(
    gradient: Tensor, weight: Tensor, geometry: Geometry, units: VisibleUnits, side: int
) -> Tensor:
    """The transposed convolution of all outputs that read a unit, cut to the unit."""
    y_halo, x_halo = geometry.y.output_halo(side), geometry.x.output_halo(side)
    wide = _with_halo(gradient, y_halo, x_halo, units)
    cut = [halo[0] * geometry.stride + axis.padding for halo, axis in ((y_halo, geometry.y), (x_halo, geometry.x))]
    sizes = zip(wide.shape[-2:], (geometry.y, geometry.x), cut)
    extra = [max(side - ((size - 1) * axis.stride + axis.reach + 1 - 2 * c), 0) for size, axis, c in sizes]
    dilation = (geometry.y.dilation, geometry.x.dilation)
    out = functional.conv_transpose2d(
        wide, weight, None, geometry.stride, tuple(cut), tuple(extra), geometry.groups, dilation
    )
    return out[..., :side, :side]


class _Taps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, units: VisibleUnits
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.units, ctx.has_bias = geometry, units, bias is not None
        columns = _columns(x, geometry, units)
        out = functional.linear(columns, weight.permute(0, 2, 3, 1).flatten(1), bias)
        return to_map(out, len(x), *([x.shape[-1] // geometry.stride] * 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        geometry, units = ctx.geometry, ctx.units
        rows = to_rows(gradient)
        of_x = _taps_input_gradient(rows, weight, geometry, units, x) if ctx.needs_input_grad[0] else None
        flat = rows.t() @ _columns(x, geometry, units)
        of_weight = flat.view(len(weight), *weight.shape[2:], weight.shape[1]).permute(0, 3, 1, 2)
        return of_x, of_weight, rows.sum(0) if ctx.has_bias else None, None, None


def _columns(x: Tensor, geometry: Geometry, units: VisibleUnits) -> Tensor:
    """The inputs of every output side by side: (outputs, kernel y * kernel x * C)."""
    side = x.shape[-1]
    outputs = len(x) * (side // geometry.stride) ** 2
    return units.window(side, geometry.y.reads(side), geometry.x.reads(side)).read(to_rows(x)).view(outputs, -1)


def _taps_input_gradient(rows: Tensor, weight: Tensor, geometry: Geometry, units: VisibleUnits, x: Tensor) -> Tensor:
    """Inputs of one phase modulo the stride are all read by the same taps: one matrix product for each phase."""
    stride, (count, channels, side, _) = geometry.stride, x.shape
    small = side // stride
    out = rows.new_empty(count, small, stride, small, stride, channels)
    for i in range(stride):
        y_taps, ys = geometry.y.readers(side, i)
        for j in range(stride):
            x_taps, xs = geometry.x.readers(side, j)
            if not (y_taps and x_taps):
                out[:, :, i, :, j] = 0
                continue
            chosen = weight[:, :, y_taps][:, :, :, x_taps].permute(2, 3, 0, 1).reshape(-1, channels)
            columns = units.window(small, ys, xs).read(rows).view(count * small * small, -1)
            out[:, :, i, :, j] = (columns @ chosen).view(count, small, small, channels)
    return to_map(out.view(-1, channels), count, side, side)


class _Depthwise(torch.autograd.Function):
    """Stride 1, as many outputs as inputs: on the whole map, but for the weight's gradient.

    There each (unit, channel) is a channel of its own and the gradient its kernel: one depthwise convolution whose
    output, as large as the kernel, is summed over the units. The library's own is several times slower.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, units: VisibleUnits
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.units, ctx.has_bias = geometry, units, bias is not None
        padding = (geometry.y.padding, geometry.x.padding)
        return units.gather(functional.conv2d(units.scatter(x), weight, bias, 1, padding, groups=geometry.groups))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        geometry, units = ctx.geometry, ctx.units
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = None
        if ctx.needs_input_grad[0]:
            padding = (geometry.y.padding, geometry.x.padding)
            dense = functional.conv2d(
                units.scatter(gradient), weight.flip(2, 3), None, 1, padding, groups=geometry.groups
            )
            of_x = units.gather(dense)
        of_weight = _depthwise_weight_gradient(x, gradient, geometry, units).to(weight.dtype)
        return of_x, of_weight, to_rows(gradient).sum(0) if ctx.has_bias else None, None, None


def _depthwise_weight_gradient(x: Tensor, gradient: Tensor, geometry: Geometry, units: VisibleUnits) -> Tensor:
    count, channels, side, _ = x.shape
    wide = _with_halo(x, geometry.y.halo(side), geometry.x.halo(side), units)
    height, width = wide.shape[-2:]
    kernel = gradient.permute(2, 3, 0, 1).reshape(side, side, 1, count * channels).permute(3, 2, 0, 1)
    flat = wide.permute(2, 3, 0, 1).reshape(1, height, width, count * channels).permute(0, 3, 1, 2)
    out = functional.conv2d(flat, kernel, groups=count * channels)  # (1, B*K*C, kernel y, kernel x)
    size = out.shape[-2:]
    summed = (
        out.permute(0, 2, 3, 1).reshape(-1, count, channels).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    )
    return summed.t().reshape(channels, 1, *size)
