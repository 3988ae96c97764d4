"""Convolution of visible units, exact: y = conv(x) * M (SparK sec. 3.2), computed where M is 1 and nowhere else.

A unit needs its neighbours' borders. *halo* reads them, zero where masked, and convolves without padding; *taps* reads
every output's inputs side by side and makes the convolution one matrix product, which pays for small units. Both read
in backward too: the gradient of an input is a gather of the outputs that read it, not a sum over scattered rows.
*depthwise* and *dense* put the units back into a map, where neighbours already lie side by side. *patch* is for
kernels as large as their stride: a unit needs no neighbour, and the convolution is one matrix product.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from convscope.ssl.sparse.units import Reads, VisibleUnits, to_map, to_rows, with_border

Form = Literal["dense", "halo", "taps", "depthwise", "patch"]
IMAGE_COST = 4  # of a value in a map as large as an image against one in a unit, in the depthwise weight gradient

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
    def aligned(self) -> bool:
        """Whether every output reads exactly the inputs of its own place."""
        return self.kernel == self.stride and self.padding == 0 and self.dilation == 1

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

    def readers(self, side: int) -> list[tuple[slice, Reads]]:
        """For each phase p the taps that reach a unit's inputs p, p + stride, ..., and the outputs these belong to."""
        step = self.stride // math.gcd(self.stride, self.dilation)
        found: list[tuple[slice, Reads]] = []
        for phase in range(self.stride):
            taps = [t for t in range(self.kernel) if (phase + self.padding - t * self.dilation) % self.stride == 0]
            first = [(phase + self.padding - t * self.dilation) // self.stride for t in taps]
            chosen = slice(taps[0], taps[-1] + 1, step) if taps else slice(0)
            found.append((chosen, tuple(tuple(o + f for f in first) for o in range(side // self.stride))))
        return found


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
    def padding(self) -> tuple[int, int]:
        """Of both axes."""
        return self.y.padding, self.x.padding

    @property
    def dilation(self) -> tuple[int, int]:
        """Of both axes."""
        return self.y.dilation, self.x.dilation

    def halo(self, side: int) -> tuple[Reads, Reads]:
        """A unit with the inputs around it that its outputs read, place by place."""
        return border(self.y.halo(side), side), border(self.x.halo(side), side)

    def wide(self, side: int) -> tuple[int, int]:
        """Height and width of that."""
        return side + sum(self.y.halo(side)), side + sum(self.x.halo(side))

    def output_halo(self, side: int) -> tuple[Reads, Reads]:
        """The outputs of a unit with those around them that read its inputs, place by place."""
        small = side // self.stride
        return border(self.y.output_halo(side), small), border(self.x.output_halo(side), small)

    @property
    def patch(self) -> bool:
        """Whether inputs fall into blocks, one for each output."""
        return self.y.aligned and self.x.aligned

    @property
    def same(self) -> bool:
        """Whether inputs and outputs lie one upon the other, with as many before as behind."""
        return all(axis.stride == 1 == axis.dilation and axis.reach == 2 * axis.padding for axis in (self.y, self.x))


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
    taps = (geometry.y.reach + 1) * (geometry.x.reach + 1)
    return "depthwise" if geometry.depthwise and geometry.same and taps > 9 and x.device.type == "cpu" else "dense"


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
        in_units = _prefer_units(geometry, side, units)
        window = units.window(side, *geometry.halo(side), unit_last=True) if in_units else None
        units.rows(side)
        return _map_of(_Depthwise.apply(x, weight, bias, geometry, units, window), x, geometry)


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


def _read(x: Tensor, index: Tensor) -> Tensor:
    """Rows of units (B*K, C, b, b) at the places of a window: (places, C), zero where masked or outside."""
    return with_border(to_rows(x)).index_select(0, index)


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
        wide = to_map(_read(x, read), len(x), *geometry.wide(x.shape[-1]))
        return functional.conv2d(wide, weight, bias, geometry.stride, 0, geometry.dilation, geometry.groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None, None]:
        x, weight, read, write = ctx.saved_tensors
        write = read if write is None else write
        geometry, side = ctx.geometry, x.shape[-1]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = _halo_input_gradient(gradient, weight, geometry, write, side) if ctx.needs_input_grad[0] else None
        wide = to_map(_read(x, read), len(x), *geometry.wide(side))
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
    wide = to_map(_read(gradient, write), len(gradient), *sizes)
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
        columns = _read(x, read).view(len(x) * side * side, -1)  # (outputs, kernel y * kernel x * C)
        return functional.linear(columns, weight.permute(0, 2, 3, 1).flatten(1), bias)

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, read, *phases = ctx.saved_tensors
        of_x = _taps_input_gradient(rows, weight, ctx.geometry, phases, x) if ctx.needs_input_grad[0] else None
        flat = rows.t() @ _read(x, read).view(len(rows), -1)
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


class _Depthwise(torch.autograd.Function):
    """Stride 1, as many outputs as inputs: on the whole map, but for the weight's gradient, whose form of its own is
    several times faster than the library's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        units: VisibleUnits,
        read: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, read)
        ctx.geometry, ctx.units, ctx.has_bias = geometry, units, bias is not None
        dense = functional.conv2d(units.scatter(x), weight, bias, 1, geometry.padding, groups=geometry.groups)
        return to_rows(dense).index_select(0, units.rows(x.shape[-1]))

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, read = ctx.saved_tensors
        geometry, units = ctx.geometry, ctx.units
        gradient = to_map(rows, len(x), *x.shape[-2:])
        of_x = None
        if ctx.needs_input_grad[0]:
            dense = units.scatter(gradient)
            of_x = units.gather(
                functional.conv2d(dense, weight.flip(2, 3), None, 1, geometry.padding, groups=geometry.groups)
            )
        of_bias = rows.sum(0) if ctx.has_bias else None
        if read is None:
            of_weight = _weight_gradient_in_images(x, gradient, geometry, units)
        else:
            of_weight = _weight_gradient_in_units(x, gradient, geometry, read)
        return of_x, of_weight.to(weight.dtype), of_bias, None, None, None


def _prefer_units(geometry: Geometry, side: int, units: VisibleUnits) -> bool:
    """Whether units with their halos are fewer values than images with theirs, give or take what a larger map costs."""
    y, x = (axis.reach for axis in (geometry.y, geometry.x))
    height, width = (n * side for n in units.grid)
    return units.count * (side + y) * (side + x) < IMAGE_COST * (height + y) * (width + x)


def _weight_gradient_in_units(x: Tensor, gradient: Tensor, geometry: Geometry, read: Tensor) -> Tensor:
    """Correlate every unit, with its halo, with its gradient."""
    height, width = geometry.wide(x.shape[-1])
    wide = _read(x, read).view(height, width, len(x), -1)
    return _correlate(wide, gradient.permute(2, 3, 0, 1).contiguous())


def _weight_gradient_in_images(x: Tensor, gradient: Tensor, geometry: Geometry, units: VisibleUnits) -> Tensor:
    """Correlate every image, zero where masked and around it, with its gradient: for small units and large kernels."""
    side = x.shape[-1]
    height, width = (n * side for n in units.grid)
    rows = units.rows(side)
    image, y, x_place = rows // (height * width), rows // width % height, rows % width

    def spread(part: Tensor, top: int, left: int) -> Tensor:
        canvas = part.new_zeros((height + 2 * top) * (width + 2 * left) * units.batch, part.shape[1])
        place = ((y + top) * (width + 2 * left) + x_place + left) * units.batch + image
        canvas.index_copy_(0, place, to_rows(part))
        return canvas.view(height + 2 * top, width + 2 * left, units.batch, -1)

    return _correlate(spread(x, geometry.y.padding, geometry.x.padding), spread(gradient, 0, 0))


def _correlate(wide: Tensor, gradient: Tensor) -> Tensor:
    """(height + reach, width + reach, N, C), (height, width, N, C) -> (C, 1, reach + 1, reach + 1), summed over N.

    One depthwise convolution: each of the N parts of each channel is a channel of its own, and its gradient the kernel.
    """
    count, channels = wide.shape[2:]
    maps = wide.flatten(2)[None].permute(0, 3, 1, 2)
    kernels = gradient.flatten(2)[None].permute(3, 0, 1, 2)
    out = functional.conv2d(maps, kernels, groups=count * channels)  # (1, N*C, reach + 1, reach + 1)
    size = out.shape[-2:]
    wider = torch.promote_types(wide.dtype, torch.float32)
    summed = out.permute(0, 2, 3, 1).reshape(-1, count, channels).sum(1, dtype=wider)
    return summed.t().reshape(channels, 1, *size)


def max_pool(x: Tensor, kernel: int, stride: int, padding: int, units: VisibleUnits) -> Tensor:
    """Max-pool units (B*K, C, b, b) -> (B*K, C, b/stride, b/stride), exact: masked neighbours count as zeros."""
    axis = Axis(kernel, stride, padding, 1)
    reads = border(axis.halo(x.shape[-1]), x.shape[-1])
    return _MaxPool.apply(x, axis, units.window(x.shape[-1], reads, reads))  # type: ignore[no-any-return]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, read: Tensor) -> Tensor:
        wide = x.shape[-1] + sum(axis.halo(x.shape[-1]))
        rows = with_border(to_rows(x), outside=float("-inf")).index_select(0, read)
        maps = to_map(rows, len(x), wide, wide)
        out, chosen = functional.max_pool2d_with_indices(maps, [axis.kernel] * 2, [axis.stride] * 2)
        ctx.save_for_backward(chosen, read)
        ctx.axis, ctx.wide, ctx.shape = axis, wide, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        chosen, read = ctx.saved_tensors
        (count, channels, side, _), axis, wide = ctx.shape, ctx.axis, ctx.wide
        empty = to_map(gradient.new_empty(count * wide * wide, channels), count, wide, wide)
        spread = torch.ops.aten.max_pool2d_with_indices_backward(
            gradient, empty, [axis.kernel] * 2, [axis.stride] * 2, [0, 0], [1, 1], False, chosen
        )
        before = axis.halo(side)[0]
        inner = spread[..., before : before + side, before : before + side]
        total = with_border(to_rows(inner))  # what neighbours read goes back to them, what nobody has to the border
        around = _around(side, before, wide, read.device)
        rows = to_rows(spread).view(count, wide * wide, channels).index_select(1, around)
        total.index_add_(0, read.view(count, -1).index_select(1, around).flatten(), rows.flatten(0, 1))
        return to_map(total[:-2], count, side, side), None, None


@functools.lru_cache(maxsize=64)
def _around(side: int, before: int, wide: int, device: torch.device) -> Tensor:
    """Numbers of the places of a unit with its halo that are not the unit's own."""
    own = range(before, before + side)
    places = [y * wide + x for y in range(wide) for x in range(wide) if not (y in own and x in own)]
    return torch.tensor(places, dtype=torch.int64, device=device)
