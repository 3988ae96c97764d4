"""Visible mask units as the batch of an ordinary tensor.

An image is cut into an h x w grid of mask units, K of which are visible in every image. A feature map over the visible
units is stored as (B*K, C, b, b), where b is the side of a unit at that resolution. Every layer that works on one
position at a time is then exact as it stands, and BatchNorm over units is BatchNorm over visible positions.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Reads = tuple[
    tuple[int, ...], ...
]  # along one axis: for each output, the inputs it reads, counted from the unit's first


class VisibleUnits:
    """Which units of a batch are visible, and the moves between units and dense maps.

    Args:
        indices: (B, K) int64, the visible units of each image, row-major in the grid, ascending.
        grid: rows and columns of units.
    """

    def __init__(self, indices: Tensor, grid: tuple[int, int]) -> None:
        self.indices = indices
        self.grid = grid
        self.batch, self.count = indices.shape
        self._rows: dict[int, Tensor] = {}
        self._windows: dict[tuple[int, Reads, Reads], Window] = {}

    @classmethod
    def draw(
        cls, batch: int, grid: tuple[int, int], mask_ratio: float, *, device: torch.device | str = "cpu"
    ) -> "VisibleUnits":
        """Keep round(h*w*(1 - mask_ratio)) units of each image, uniformly at random (at least one, not all)."""
        total = grid[0] * grid[1]
        keep = min(max(round(total * (1 - mask_ratio)), 1), total - 1)
        noise = torch.rand(batch, total, device=device)
        return cls(noise.argsort(dim=1)[:, :keep].sort(dim=1).values, grid)

    @classmethod
    def from_mask(cls, visible: Tensor) -> "VisibleUnits":
        """From a bool mask (B, h, w), True where visible, with the same number of True in every image."""
        counts = visible.flatten(1).sum(1)
        if not bool((counts == counts[0]).all()):
            raise ValueError("every image needs the same number of visible units")
        indices = visible.flatten(1).nonzero()[:, 1].view(len(visible), int(counts[0]))
        return cls(indices, (visible.shape[1], visible.shape[2]))

    @cached_property
    def mask(self) -> Tensor:
        """(B, h, w) bool, True where visible."""
        flat = torch.zeros(self.batch, self.grid[0] * self.grid[1], dtype=torch.bool, device=self.indices.device)
        return flat.scatter_(1, self.indices, True).view(self.batch, *self.grid)

    @cached_property
    def hidden(self) -> "VisibleUnits":
        """The complement: the masked units, in the same form."""
        order = self.mask.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
        return VisibleUnits(order[:, : order.shape[1] - self.count], self.grid)

    def rows(self, side: int) -> Tensor:
        """Row numbers (B*K*side*side,) of these units' positions in a flattened (B, h*side, w*side) map."""
        if side not in self._rows:
            height, width = self.grid
            inside = torch.arange(side, device=self.indices.device)
            y = (self.indices // width)[:, :, None] * side + inside  # (B, K, side)
            x = (self.indices % width)[:, :, None] * side + inside
            first = torch.arange(self.batch, device=self.indices.device) * (height * width * side * side)
            rows = first[:, None, None, None] + y[:, :, :, None] * (width * side) + x[:, :, None, :]
            self._rows[side] = rows.flatten()
        return self._rows[side]

    @cached_property
    def _number(self) -> Tensor:
        """(B*h*w,) which of the visible units stands at each place of the grid, -1 where masked."""
        cells = self.grid[0] * self.grid[1]
        image = torch.arange(self.batch, device=self.indices.device)[:, None] * cells
        number = torch.full((self.batch * cells,), -1, device=self.indices.device)
        return number.index_copy_(0, (image + self.indices).flatten(), torch.arange(self.batch * self.count).to(number))

    def window(self, side: int, ys: Reads, xs: Reads) -> "Window":
        """Where the inputs of each unit's outputs stand, for units of side `side`.

        Args:
            side: of the units that are read.
            ys: rows that each output row reads; negative ones and those from `side` on belong to neighbouring units.
            xs: the same for columns.
        """
        key = (side, ys, xs)
        if key not in self._windows:
            self._windows[key] = self._window(side, ys, xs)
        return self._windows[key]

    def _window(self, side: int, ys: Reads, xs: Reads) -> "Window":
        height, width = self.grid
        device = self.indices.device
        unit = self.indices.flatten()
        image = torch.arange(self.batch, device=device).repeat_interleave(self.count) * (height * width)
        y = (unit // width * side)[:, None, None] + torch.tensor(ys, device=device)  # (B*K, outputs, reads)
        x = (unit % width * side)[:, None, None] + torch.tensor(xs, device=device)
        y_outside, x_outside = (y < 0) | (y >= height * side), (x < 0) | (x >= width * side)
        y, x = y.clamp(0, height * side - 1), x.clamp(0, width * side - 1)
        place_y = (image[:, None, None] + y // side * width)[:, :, None, :, None]  # (B*K, outputs, 1, reads, 1)
        place_x = (x // side)[:, None, :, None, :]
        number = self._number[place_y + place_x]  # (B*K, outputs y, outputs x, reads y, reads x)
        outside = y_outside[:, :, None, :, None] | x_outside[:, None, :, None, :]
        within = (y % side * side)[:, :, None, :, None] + (x % side)[:, None, :, None, :]
        missing = (outside | (number < 0)).flatten()
        return Window((number.clamp(min=0) * (side * side) + within).flatten(), missing)

    def gather(self, dense: Tensor) -> Tensor:
        """Take these units out of a dense map: (B, C, h*b, w*b) -> (B*K, C, b, b)."""
        side = dense.shape[-1] // self.grid[1]
        if dense.shape[-2:] != (self.grid[0] * side, self.grid[1] * side):
            raise ValueError(f"a map of {tuple(dense.shape[-2:])} cannot be cut into a grid of {self.grid} units")
        return to_map(_Gather.apply(to_rows(dense), self.rows(side)), self.batch * self.count, side, side)

    def scatter(self, units: Tensor, fill: Tensor | None = None) -> Tensor:
        """Put units back: (B*K, C, b, b) -> (B, C, h*b, w*b), elsewhere `fill` (1, C, 1, 1) or zero."""
        side, (height, width) = units.shape[-1], self.grid
        rows = to_rows(units)
        total = self.batch * height * width * side * side
        if fill is None:
            canvas = rows.new_zeros(total, rows.shape[1])
        else:
            canvas = fill.to(rows.dtype).view(1, -1).expand(total, -1)
        return to_map(canvas.index_copy(0, self.rows(side), rows), self.batch, height * side, width * side)


@dataclass(frozen=True)
class Window:
    """Row numbers in a table of visible positions; `missing` marks those that are masked or beyond the image."""

    index: Tensor  # (places,) int64
    missing: Tensor  # (places,) bool

    def read(self, rows: Tensor) -> Tensor:
        """(visible positions, C) -> (places, C), zero where missing."""
        return rows.index_select(0, self.index).masked_fill_(self.missing[:, None], 0)


class _Gather(torch.autograd.Function):
    """Select distinct rows. The rows are distinct, so the adjoint is a copy and not an atomic addition."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.total = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        zeros = gradient.new_zeros(ctx.total, gradient.shape[1])
        return zeros.index_copy_(0, index, gradient), None


def to_rows(maps: Tensor) -> Tensor:
    """(N, C, H, W) -> (N*H*W, C); no copy for a channels-last map."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def to_map(rows: Tensor, count: int, height: int, width: int) -> Tensor:
    """(N*H*W, C) -> (N, C, H, W), channels-last, no copy."""
    return rows.view(count, height, width, -1).permute(0, 3, 1, 2)
