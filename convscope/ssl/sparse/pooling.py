"""Max-pooling of visible units, exact: y = pool(x) * M, where masked neighbours count as zeros."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from convscope.ssl.sparse.geometry import Axis, border
from convscope.ssl.sparse.units import VisibleUnits, to_map, to_rows, with_border


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
