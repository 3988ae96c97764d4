"""How each kind of layer works on visible units; a network is converted module by module.

Three kinds of layer exist. A *position-wise* layer (1x1 convolution, aligned patchify or pooling, BatchNorm,
LayerNorm, activation, linear) is exact on units as it stands. A *mixing* layer reads neighbours: the units are put back
into a map that is zero where masked, the stock layer runs, and its visible positions are taken out (y = op(x) * M,
SparK sec. 3.2). A *per-image* layer computes statistics over an image: it sees all visible positions as one image.
"""

from collections import Counter
from typing import Any

import torch
from timm.layers import (
    BlurPool2d,
    CecaModule,
    DropBlock2d,
    DropPath,
    EcaModule,
    EffectiveSEModule,
    GlobalContext,
    SEModule,
)
from timm.layers.grn import GlobalResponseNorm
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from convscope.backbones.tvconv import TVConv
from convscope.core.errors import UserError
from convscope.ssl.sparse.geometry import Axis, Geometry
from convscope.ssl.sparse.pooling import max_pool
from convscope.ssl.sparse.spatial import Chooser, choose_form, compute_dtype, convolve
from convscope.ssl.sparse.units import VisibleUnits, to_map, to_rows

MIXING = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, BlurPool2d, TVConv)
PER_IMAGE = (
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.Dropout2d,
    SEModule,
    SqueezeExcite,
    EffectiveSEModule,
    EcaModule,
    CecaModule,
    GlobalContext,
    GlobalResponseNorm,
)
REFUSED = (DropBlock2d,)  # drops neighbourhoods, in training only


class MaskContext:
    """Hands one network's layers the visible units of the batch in flight; `None` means an ordinary dense pass."""

    def __init__(self, choose: Chooser = choose_form) -> None:
        self.units: VisibleUnits | None = None
        self.choose = choose


class Converted(nn.Module):
    """A stock layer with a sparse rule in front of its own forward; its parameters and keys stay as they are."""

    mask_context: MaskContext

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The rule where units are visible, the stock layer otherwise."""
        units = self.mask_context.units
        if units is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        return self._on_units(x, units)

    def _stock(self, x: Tensor) -> Tensor:
        return super().forward(x)  # type: ignore[no-any-return]

    def _on_units(self, x: Tensor, units: VisibleUnits) -> Tensor:
        raise NotImplementedError


class _Pointwise(Converted, nn.Conv2d):  # type: ignore[misc]
    """A 1x1 convolution is a matrix product over positions; on small maps a library's convolution is not as fast."""

    def _on_units(self, x: Tensor, units: VisibleUnits) -> Tensor:
        stride, side = self.stride[0], x.shape[-1]
        rows = to_rows(x if stride == 1 else x[..., ::stride, ::stride])
        out = nn.functional.linear(rows, self.weight.flatten(1), self.bias)
        return to_map(out, len(x), side // stride, side // stride)


class _Convolution(Converted, nn.Conv2d):  # type: ignore[misc]
    """A convolution that reads neighbours, in the form that is fastest for its size."""

    geometry: Geometry

    def _on_units(self, x: Tensor, units: VisibleUnits) -> Tensor:
        form = self.mask_context.choose(self.geometry, x, units)
        return convolve(form, x, self.weight, self.bias, self.geometry, units)


class _MaxPool(Converted, nn.MaxPool2d):  # type: ignore[misc]
    def _on_units(self, x: Tensor, units: VisibleUnits) -> Tensor:
        kernel, stride, padding = (_pair(value)[0] for value in (self.kernel_size, self.stride, self.padding))
        return max_pool(x, kernel, stride, padding, units)


class _Mixing(Converted):
    """Any other layer that reads neighbours: put the units back into a map, run it there, take them out."""

    def _on_units(self, x: Tensor, units: VisibleUnits) -> Tensor:
        dtype = compute_dtype(x, getattr(self, "groups", 1))
        with torch.autocast(x.device.type, enabled=dtype != torch.float32):
            return units.gather(self._stock(units.scatter(x.to(dtype))))


class _PerImage(Converted):
    def _on_units(self, x: Tensor, units: VisibleUnits) -> Tensor:
        batch, count = units.batch, units.count
        if getattr(self, "channel_dim", 1) == -1:  # channels-last layers: (B*K, b, b, C) -> (B, K*b, b, C)
            return self._stock(x.reshape(batch, -1, *x.shape[2:])).reshape(x.shape)
        channels, height, width = x.shape[1:]
        joined = x.view(batch, count, channels, height, width).transpose(1, 2)
        out = self._stock(joined.reshape(batch, channels, count * height, width))
        return out.view(batch, channels, count, height, width).transpose(1, 2).reshape(x.shape)


class _PerSample(Converted):
    """Stochastic depth drops a branch for a whole image, all its units alike."""

    def _on_units(self, x: Tensor, units: VisibleUnits) -> Tensor:
        return self._stock(x.view(units.batch, units.count, *x.shape[1:])).flatten(0, 1)


def rule_for(module: nn.Module) -> type[Converted] | None:
    """The rule a module needs, or None if it is taken to be position-wise (`verify.py` proves that)."""
    if isinstance(module, DropPath):
        return _PerSample
    if isinstance(module, PER_IMAGE):
        return _PerImage
    if type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1 and _aligned(module):
        return _Pointwise
    if isinstance(module, nn.Conv2d) and Geometry.of(module) and not (_aligned(module) and module.groups > 1):
        return _Convolution
    if isinstance(module, MIXING) and not _aligned(module):
        return _MaxPool if _plain_max_pool(module) else _Mixing
    return None


def _plain_max_pool(module: nn.Module) -> bool:
    if type(module) is not nn.MaxPool2d or module.ceil_mode or module.return_indices:
        return False
    (kernel, *_), (stride, *_), (padding, *_) = pairs = [
        _pair(value) for value in (module.kernel_size, module.stride, module.padding)
    ]
    square = all(y == x for y, x in pairs) and _pair(module.dilation) == (1, 1)
    return square and Axis(kernel, stride, padding, 1).keeps_grid


def _aligned(module: nn.Module) -> bool:
    """Whether every output position reads only its own block of inputs, as 1x1 and patchify layers do."""
    if type(module) not in (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d):
        return False
    kernel, stride = _pair(module.kernel_size), _pair(module.stride)
    dilation = _pair(getattr(module, "dilation", 1))
    return _padding(module) == (0, 0) and dilation == (1, 1) and (kernel in (stride, (1, 1)))


def _padding(module: Any) -> tuple[int, int] | None:
    return None if isinstance(module.padding, str) else _pair(module.padding)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def convert(network: nn.Module, name: str, choose: Chooser = choose_form) -> MaskContext:
    """Give every layer of `network` its sparse rule, in place; parameters and state-dict keys do not change.

    Without visible units in the returned context the network computes what it did before.

    Args:
        network: a timm network.
        name: of its architecture, for messages.
        choose: picks the form of each convolution that reads neighbours.

    Raises:
        UserError: a layer that no rule can make exact, by its name.
    """
    context = MaskContext(choose)
    for path, module in outermost(network):
        if isinstance(module, REFUSED):
            raise refusal(name, path, module)
        rule = rule_for(module)
        if rule is not None:
            if rule is _Convolution:
                vars(module)["geometry"] = Geometry.of(module)  # type: ignore[arg-type]
            give_rule(module, rule, context)
    return context


def on_whole_maps(network: nn.Module) -> Counter[str]:
    """How many convolutions of each kind a converted network computes on the whole map, for want of a faster form."""
    return Counter(
        type(module).__name__
        for module in network.modules()
        if isinstance(module, _Mixing) and hasattr(module, "groups")
    )


def give_rule(module: nn.Module, rule: type[Converted], context: MaskContext) -> None:
    """Put a rule in front of a module's own forward."""
    stock = type(module)
    module.__class__ = type(stock.__name__, (rule, stock), {"__module__": stock.__module__})
    vars(module)["mask_context"] = context


def refusal(name: str, path: str, module: nn.Module) -> UserError:
    """The error for a layer without an exact sparse rule."""
    kind = type(module).__name__
    return UserError(
        f"SparK cannot train {name}: layer {path} ({kind}) mixes positions and has no exact sparse rule; "
        "choose a backbone without it"
    )


def outermost(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """All modules, but not those inside a per-image layer or one that makes its own weights: they never see units."""
    found = [(path, module)]
    if not isinstance(module, (*PER_IMAGE, TVConv)):
        for name, child in module.named_children():
            found += outermost(child, f"{path}.{name}" if path else name)
    return found
