"""Visible mask units as the batch of an ordinary tensor.

An image is cut into an h x w grid of mask units, K of which are visible in every image. A feature map over the visible
units is stored as (B*K, C, b, b), where b is the side of a unit at that resolution. Every layer that works on one
position at a time is then exact as it stands, and BatchNorm over units is BatchNorm over visible positions.
"""

import functools
from typing import Any

import torch
from torch import Tensor

# Along one axis: for each output of a unit the inputs it reads, counted from the unit's first; negative ones and those
# beyond the unit's side belong to its neighbours.
Reads = tuple[tuple[int, ...], ...]


MASKED, OUTSIDE = -1, -2  # in place of a unit's number


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
        cells, device = grid[0] * grid[1], indices.device
        flat = torch.zeros(self.batch, cells, dtype=torch.bool, device=device).scatter_(1, indices, True)
        self.mask = flat.view(self.batch, *grid)  # (B, h, w), True where visible
        numbers = torch.arange(self.batch * self.count, device=device).view(self.batch, self.count)
        of_cells = torch.full((self.batch, cells), MASKED, device=device).scatter_(1, indices, numbers)
        self._numbers = of_cells.view(self.batch, *grid)  # which of the B*K units stands at each place of the grid
        self._hidden: VisibleUnits | None = None
        self._rows: dict[int, Tensor] = {}
        self._windows: dict[tuple[int, Reads, Reads, bool], Tensor] = {}

    @classmethod
    def draw(
        cls,
        batch: int,
        grid: tuple[int, int],
        mask_ratio: float,
        *,
        device: torch.device | str = "cpu",
        shared: bool = False,
    ) -> "VisibleUnits":
        """Keep round(h*w*(1 - mask_ratio)) units of each image, uniformly at random (at least one, not all).

        `shared`: the same ones in every image.
        """
        total = grid[0] * grid[1]
        keep = min(max(round(total * (1 - mask_ratio)), 1), total - 1)
        noise = torch.rand(1 if shared else batch, total, device=device)
        return cls(noise.argsort(dim=1)[:, :keep].sort(dim=1).values.expand(batch, -1), grid)

    @classmethod
    def from_mask(cls, visible: Tensor) -> "VisibleUnits":
        """From a bool mask (B, h, w), True where visible, with the same number of True in every image."""
        counts = visible.flatten(1).sum(1)
        if not bool((counts == counts[0]).all()):
            raise ValueError("every image needs the same number of visible units")
        indices = visible.flatten(1).nonzero()[:, 1].view(len(visible), int(counts[0]))
        return cls(indices, (visible.shape[1], visible.shape[2]))

    @property
    def hidden(self) -> "VisibleUnits":
        """The complement: the masked units, in the same form."""
        if self._hidden is None:
            order = self.mask.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
            self._hidden = VisibleUnits(order[:, : order.shape[1] - self.count], self.grid)
        return self._hidden

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

    def window(self, side: int, ys: Reads, xs: Reads, *, unit_last: bool = False) -> Tensor:
        """Where the inputs of each unit's outputs stand among the rows of `with_border`, for units of side `side`.

        Args:
            side: of the units that are read.
            ys: rows that each output row reads.
            xs: columns that each output column reads.
            unit_last: order the places by (place in the unit, unit) and not by (unit, place in the unit).

        Returns:
            (B*K * outputs y * outputs x * reads y * reads x,) int64, in that order of dimensions or with B*K last.
        """
        key = (side, ys, xs, unit_last)
        if key not in self._windows:
            table = self._window(side, ys, xs)
            self._windows[key] = (table.t() if unit_last else table).flatten()
        return self._windows[key]

    def _window(self, side: int, ys: Reads, xs: Reads) -> Tensor:
        """(B*K, places of a unit)."""
        width = self.grid[1]
        (top, bottom), (left, right), neighbour, within = _template(side, ys, xs, self.indices.device)
        around = torch.nn.functional.pad(self._numbers, (left, right, top, bottom), value=OUTSIDE)
        down = torch.arange(top + bottom + 1, device=self.indices.device) * around.shape[2]
        across = torch.arange(left + right + 1, device=self.indices.device)
        image = torch.arange(self.batch, device=self.indices.device)[:, None] * around[0].numel()
        corner = (image + self.indices // width * around.shape[2] + self.indices % width).flatten()
        steps = (down[:, None] + across).flatten()
        near = around.flatten()[corner[:, None] + steps].index_select(1, neighbour)  # (B*K, places)
        rows = self.batch * self.count * side * side
        return torch.where(near < 0, rows - 1 - near, near * (side * side) + within)

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
            dense = rows.new_zeros(total, rows.shape[1]).index_copy_(0, self.rows(side), rows)
        else:
            dense = fill.to(rows.dtype).view(1, -1).expand(total, -1).index_copy(0, self.rows(side), rows)
        return to_map(dense, self.batch, height * side, width * side)


@functools.lru_cache(maxsize=1024)
def _template(
    side: int, ys: Reads, xs: Reads, device: torch.device
) -> tuple[tuple[int, int], tuple[int, int], Tensor, Tensor]:
    """What is the same for every unit: how many neighbours it reads on each side, which neighbour, where in it."""

    def axis(reads: Reads) -> tuple[tuple[int, int], Tensor, Tensor]:
        units = [[place // side for place in places] for places in reads]
        before, after = max(-min(map(min, units)), 0), max(*map(max, units), 0)
        return (before, after), torch.tensor(units) + before, torch.tensor(reads) % side

    (top, bottom), y, in_y = axis(ys)
    (left, right), x, in_x = axis(xs)
    neighbour = y[:, None, :, None] * (left + right + 1) + x[None, :, None, :]  # (outputs y, outputs x, reads y, x)
    within = in_y[:, None, :, None] * side + in_x[None, :, None, :]
    return (top, bottom), (left, right), neighbour.flatten().to(device), within.flatten().to(device)


def with_border(rows: Tensor, outside: float = 0.0) -> Tensor:
    """Append what `VisibleUnits.window` reads at masked places, zeros, and beyond the image, `outside`: two rows."""
    border = rows.new_zeros(2, rows.shape[1])
    if outside:
        border[1] = outside
    return torch.cat([rows, border])


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


def read_places(x: Tensor, index: Tensor) -> Tensor:
    """Rows of units (B*K, C, b, b) at the places of a window: (places, C), zero where masked or outside."""
    return with_border(to_rows(x)).index_select(0, index)
