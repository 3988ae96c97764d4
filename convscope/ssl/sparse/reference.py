"""SparK computed the published way: every layer sees the whole map, and what is masked is computed and thrown away.

Slow, and the same to the last digits as computation on visible units; `--reference` selects it.
"""

import torch
from torch import Tensor, nn

from convscope.ssl.sparse.rules import MIXING, PER_IMAGE, Converted, MaskContext, give_rule, outermost
from convscope.ssl.sparse.units import VisibleUnits

NORMS = (nn.BatchNorm2d, nn.LayerNorm)


class _Masked(Converted):
    """y = op(x) * M, on maps (B, C, H, W); of linear layers, which take (B, H, W, C), too."""

    def _on_units(self, x: Tensor, units: VisibleUnits) -> Tensor:
        out = self._stock(x)
        if isinstance(self, nn.Linear):
            return out * _mask(units, out.shape[1])[..., None] if out.ndim == 4 else out
        return out * _mask(units, out.shape[2])[:, None]


class _OnVisible(Converted):
    """Statistics of visible positions only: those of the batch in BatchNorm, of an image in per-image layers."""

    def _on_units(self, x: Tensor, units: VisibleUnits) -> Tensor:
        last = _channels_last(self)
        maps = x if last else x.permute(0, 2, 3, 1)  # (B, H, W, C)
        visible = _mask(units, maps.shape[1])
        rows = maps[visible]
        if isinstance(self, PER_IMAGE):
            rows = rows.view(units.batch, -1, 1, rows.shape[1])  # (B, positions, 1, C)
        elif not last:
            rows = rows[:, None, None, :]
        out = self._stock(rows) if last else self._stock(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        full = torch.zeros_like(maps, dtype=out.dtype)
        full[visible] = out.reshape(-1, out.shape[-1])
        return full if last else full.permute(0, 3, 1, 2)


def _mask(units: VisibleUnits, height: int) -> Tensor:
    """(B, H, W) bool at the resolution of a map of that height."""
    side = height // units.grid[0]
    return units.mask.repeat_interleave(side, 1).repeat_interleave(side, 2)


def _channels_last(module: nn.Module) -> bool:
    if isinstance(module, nn.LayerNorm):
        return "2d" not in type(module).__name__
    return getattr(module, "channel_dim", 1) == -1


def convert_reference(network: nn.Module) -> MaskContext:
    """Give every layer of a network that `rules.convert` accepts its dense-masked rule, in place."""
    context = MaskContext()
    for _, module in outermost(network):
        if isinstance(module, (*NORMS, *PER_IMAGE)):
            give_rule(module, _OnVisible, context)
        elif isinstance(module, (*MIXING, nn.Linear)):
            give_rule(module, _Masked, context)
    return context
