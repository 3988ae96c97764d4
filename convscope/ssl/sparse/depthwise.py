"""Depthwise convolution of visible units by the whole map, with a weight gradient of its own."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from convscope.ssl.sparse.geometry import Geometry
from convscope.ssl.sparse.units import VisibleUnits, read_places, to_map, to_rows

IMAGE_COST = 4  # of a value in a map as large as an image against one in a unit, in the weight's gradient


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, units: VisibleUnits) -> Tensor:
    """Convolve units (B*K, C, b, b), stride 1 and as many outputs as inputs -> rows (B*K*b*b, C)."""
    side = x.shape[-1]
    in_units = _prefer_units(geometry, side, units)
    window = units.window(side, *geometry.halo(side), unit_last=True) if in_units else None
    units.rows(side)  # made here: torch.compile takes no new table from inside of an autograd function
    return _Depthwise.apply(x, weight, bias, geometry, units, window)  # type: ignore[no-any-return]


class _Depthwise(torch.autograd.Function):
    """On the whole map; the weight's gradient has a form of its own, several times faster than the library's."""

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
    wide = read_places(x, read).view(height, width, len(x), -1)
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
