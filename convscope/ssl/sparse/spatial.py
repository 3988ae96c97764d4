"""Convolution of visible units, exact: y = conv(x) * M (SparK sec. 3.2), computed where M is 1 and nowhere else.

A unit needs its neighbours' borders. *halo* reads them, zero where masked, and convolves without padding; *taps* reads
every output's inputs side by side and makes the convolution one matrix product, which pays for small units. Both read
in backward too: the gradient of an input is a gather of the outputs that read it, not a sum over scattered rows.
*depthwise*, *fft* and *dense* put the units back into a map, where neighbours already lie side by side. *patch* is for
kernels as large as their stride: a unit needs no neighbour, and the convolution is one matrix product.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from convscope.backbones.large_depthwise import fft_depthwise
from convscope.ssl.sparse.depthwise import depthwise
from convscope.ssl.sparse.geometry import Geometry
from convscope.ssl.sparse.units import VisibleUnits, read_places, to_map, to_rows, with_border

Form = Literal["dense", "halo", "taps", "depthwise", "fft", "patch"]

Chooser = Callable[[Geometry, Tensor, VisibleUnits], Form]


def choose_form(geometry: Geometry, x: Tensor, units: VisibleUnits) -> Form:
    """The form that was fastest for such a layer on units x (B*K, C, b, b); see benchmarks/spark_step.md."""
    side = x.shape[-1]
    if geometry.groups == 1:
        if geometry.patch:
            return "patch"
        return "halo" if side > 16 or (side > 4 and geometry.stride == 1) else "taps"
    height, width = geometry.wide(side)
    if units.count * height * width < units.grid[0] * units.grid[1] * side * side:  # fewer values than the whole map
        return "halo"
    if not geometry.depthwise or not geometry.same or geometry.taps <= 9 or x.device.type != "cpu":
        return "dense"
    return "fft" if geometry.y == geometry.x and geometry.taps > 13**2 and side > 4 else "depthwise"


def compute_dtype(x: Tensor, groups: int) -> torch.dtype:
    """What a convolution computes in: autocast's type, but fp32 for grouped ones on a CPU, where bf16 is slower."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.float32 if groups > 1 and x.device.type == "cpu" else torch.get_autocast_dtype(x.device.type)


def convolve(
    form: Form, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, units: VisibleUnits
) -> Tensor:
    """Convolve units (B*K, C, b, b) -> (B*K, C', b/stride, b/stride); all forms give the same."""
    side, dtype = x.shape[-1], compute_dtype(x, geometry.groups)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    # Index tables are looked up here: torch.compile takes no new ones from inside of an autograd function.
    with torch.autocast(x.device.type, enabled=False):
        if form == "dense":
            return _dense(x, weight, bias, geometry, units)
        if form == "fft":
            return units.gather(fft_depthwise(units.scatter(x), weight, bias))
        if form == "patch":
            return _patch(x, weight, bias, geometry.stride)
        if form == "halo":
            read = units.window(side, *geometry.halo(side))
            write: Tensor | None = units.window(side // geometry.stride, *geometry.output_halo(side))
            write = None if write is read else write  # torch.compile takes no tensor twice
            return _Halo.apply(x, weight, bias, geometry, read, write)  # type: ignore[no-any-return]
        if form == "taps":
            read = units.window(side, geometry.y.reads(side), geometry.x.reads(side))
            phases = [
                units.window(side // geometry.stride, ys, xs)
                for _, ys in geometry.y.readers(side)
                for _, xs in geometry.x.readers(side)
                if ys[0] and xs[0]
            ]
            return _map_of(_Taps.apply(x, weight, bias, geometry, read, *phases), x, geometry)
        return _map_of(depthwise(x, weight, bias, geometry, units), x, geometry)


def _map_of(rows: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Outputs as a map. Functions return rows: a view that they return must not be changed in place, as ReLUs do."""
    side = x.shape[-1] // geometry.stride
    return to_map(rows, len(x), side, side)


def _patch(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    count, channels, side, _ = x.shape
    small = side // stride
    blocks = to_rows(x).view(count, small, stride, small, stride, channels).transpose(2, 3)
    out = functional.linear(blocks.reshape(count * small * small, -1), weight.permute(0, 2, 3, 1).flatten(1), bias)
    return to_map(out, count, small, small)


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, units: VisibleUnits) -> Tensor:
    dense = functional.conv2d(
        units.scatter(x), weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )
    return units.gather(dense)


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        read: Tensor,
        write: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, read, write)
        ctx.geometry, ctx.has_bias = geometry, bias is not None
        wide = to_map(read_places(x, read), len(x), *geometry.wide(x.shape[-1]))
        return functional.conv2d(wide, weight, bias, geometry.stride, 0, geometry.dilation, geometry.groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None, None]:
        x, weight, read, write = ctx.saved_tensors
        write = read if write is None else write
        geometry, side = ctx.geometry, x.shape[-1]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = _halo_input_gradient(gradient, weight, geometry, write, side) if ctx.needs_input_grad[0] else None
        wide = to_map(read_places(x, read), len(x), *geometry.wide(side))
        sizes, strides = [len(weight)] if ctx.has_bias else None, [geometry.stride] * 2
        _, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient,
            wide,
            weight,
            sizes,
            strides,
            [0, 0],
            geometry.dilation,
            False,
            [0, 0],
            geometry.groups,
            [False, True, ctx.has_bias],
        )
        return of_x, of_weight, of_bias, None, None, None


def _halo_input_gradient(gradient: Tensor, weight: Tensor, geometry: Geometry, write: Tensor, side: int) -> Tensor:
    """The transposed convolution of all outputs that read a unit, cut to the unit."""
    axes = (geometry.y, geometry.x)
    halos = [axis.output_halo(side) for axis in axes]
    sizes = [side // geometry.stride + sum(halo) for halo in halos]
    wide = to_map(read_places(gradient, write), len(gradient), *sizes)
    cut = [halo[0] * axis.stride + axis.padding for halo, axis in zip(halos, axes)]
    whole = [(size - 1) * axis.stride + axis.reach + 1 - 2 * c for size, axis, c in zip(sizes, axes, cut)]
    extra = [max(side - size, 0) for size in whole]
    out = functional.conv_transpose2d(
        wide, weight, None, geometry.stride, tuple(cut), tuple(extra), geometry.groups, geometry.dilation
    )
    return out[..., :side, :side]


class _Taps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, read: Tensor, *phases: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, read, *phases)
        ctx.geometry, ctx.has_bias = geometry, bias is not None
        side = x.shape[-1] // geometry.stride
        columns = read_places(x, read).view(len(x) * side * side, -1)  # (outputs, kernel y * kernel x * C)
        return functional.linear(columns, weight.permute(0, 2, 3, 1).flatten(1), bias)

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, read, *phases = ctx.saved_tensors
        of_x = _taps_input_gradient(rows, weight, ctx.geometry, phases, x) if ctx.needs_input_grad[0] else None
        flat = rows.t() @ read_places(x, read).view(len(rows), -1)
        of_weight = flat.view(len(weight), *weight.shape[2:], weight.shape[1]).permute(0, 3, 1, 2)
        return of_x, of_weight, rows.sum(0) if ctx.has_bias else None, None, None, *(None for _ in phases)


def _taps_input_gradient(
    rows: Tensor, weight: Tensor, geometry: Geometry, phases: Sequence[Tensor], x: Tensor
) -> Tensor:
    """Inputs of one phase modulo the stride are all read by the same taps: one matrix product for each phase."""
    stride, (count, channels, side, _) = geometry.stride, x.shape
    small = side // stride
    rows = with_border(rows)
    out = rows.new_empty(count, small, stride, small, stride, channels)
    reads = iter(phases)
    for i, (y_taps, ys) in enumerate(geometry.y.readers(side)):
        for j, (x_taps, xs) in enumerate(geometry.x.readers(side)):
            if not (ys[0] and xs[0]):
                out[:, :, i, :, j] = 0
                continue
            chosen = weight[:, :, y_taps, x_taps].permute(2, 3, 0, 1).reshape(-1, channels)
            columns = rows.index_select(0, next(reads)).view(count * small * small, -1)
            out[:, :, i, :, j] = (columns @ chosen).view(count, small, small, channels)
    return to_map(out.view(-1, channels), count, side, side)
