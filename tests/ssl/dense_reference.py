"""SparK written the slow, obvious way: every layer runs on the whole map and its output is multiplied by the mask.

Nothing here is shared with the package: norms and statistics are computed from the definition, position by position.
"""

import functools

import torch
from timm.layers import EcaModule, SEModule
from timm.layers.grn import GlobalResponseNorm
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from convscope.backbones.tvconv import TVConv

SE = (SEModule, SqueezeExcite)


class DenseMasked:
    """Runs a timm network on masked images with every layer's output masked and statistics over visible positions."""

    def __init__(self, network: nn.Module) -> None:
        self.mask = torch.empty(0)
        inside: list[str] = []
        for name, module in network.named_modules():
            if any(name.startswith(f"{outer}.") for outer in inside):
                continue
            if isinstance(module, (*SE, EcaModule, TVConv)):
                inside.append(name)
            forward = self._forward_of(module)
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]

    def __call__(self, backbone: nn.Module, images: Tensor, mask: Tensor, names: list[str]) -> list[Tensor]:
        self.mask = mask[:, None]
        maps = backbone.feature_maps(images * self._at(images), names)
        return [maps[name] * self._at(maps[name]) for name in names]

    def _at(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(self.mask.to(x.dtype), size=x.shape[-2:])

    def _forward_of(self, module: nn.Module):
        if isinstance(module, nn.BatchNorm2d):
            return functools.partial(self._batch_norm, module)
        if isinstance(module, nn.GroupNorm):
            return functools.partial(self._group_norm, module)
        if isinstance(module, GlobalResponseNorm):
            return functools.partial(self._grn, module)
        if isinstance(module, SE):
            return functools.partial(self._squeeze_excite, module)
        if isinstance(module, EcaModule):
            return functools.partial(self._eca, module)
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, TVConv)):
            stock = module.forward
            return lambda x: self._masked(stock(x))
        if isinstance(module, nn.Linear):
            stock_linear = module.forward
            return lambda x: self._masked_last(stock_linear(x)) if x.ndim == 4 else stock_linear(x)
        if isinstance(module, nn.LayerNorm):
            stock_norm = module.forward
            channels_first = type(module).__name__.endswith("2d")
            return lambda x: self._masked(stock_norm(x)) if channels_first else self._masked_last(stock_norm(x))
        return None

    def _masked(self, x: Tensor) -> Tensor:
        return x * self._at(x)

    def _masked_last(self, x: Tensor) -> Tensor:
        return self._masked(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _visible_mean(self, x: Tensor) -> Tensor:
        mask = self._at(x)
        return (x * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True)

    def _batch_norm(self, module: nn.BatchNorm2d, x: Tensor) -> Tensor:
        mask = self._at(x).bool()[:, 0]
        rows = x.permute(0, 2, 3, 1)[mask]  # visible positions of the whole batch, (n, C)
        out = nn.functional.batch_norm(
            rows, module.running_mean, module.running_var, module.weight, module.bias, module.training, 0.1, module.eps
        )
        full = torch.zeros_like(x).permute(0, 2, 3, 1).masked_scatter(mask[..., None], out).permute(0, 3, 1, 2)
        return self._masked(module.act(full)) if hasattr(module, "act") else full

    def _group_norm(self, module: nn.GroupNorm, x: Tensor) -> Tensor:
        mask = self._at(x)
        out = torch.zeros_like(x)
        for group in torch.arange(x.shape[1]).chunk(module.num_groups):
            for image in range(len(x)):
                values = x[image, group][:, mask[image, 0].bool()]
                mean, var = values.mean(), values.var(correction=0)
                normed = (x[image, group] - mean) / (var + module.eps).sqrt()
                out[image, group] = normed * module.weight[group, None, None] + module.bias[group, None, None]
        out = module.act(out) if hasattr(module, "act") else out
        return out * mask

    def _grn(self, module: GlobalResponseNorm, x: Tensor) -> Tensor:
        first = x.permute(0, 3, 1, 2) if module.channel_dim == -1 else x
        norm = (first * self._at(first)).square().sum((2, 3), keepdim=True).sqrt()
        scaled = first * norm / (norm.mean(1, keepdim=True) + module.eps)
        weight, bias = module.weight.view(1, -1, 1, 1), module.bias.view(1, -1, 1, 1)
        out = self._masked(first + weight * scaled + bias)
        return out.permute(0, 2, 3, 1) if module.channel_dim == -1 else out

    def _squeeze_excite(self, module: nn.Module, x: Tensor) -> Tensor:
        pooled = self._visible_mean(x)
        if isinstance(module, SEModule):
            gate = module.fc2(module.act(module.bn(module.fc1(pooled))))
        else:
            gate = module.conv_expand(module.act1(module.conv_reduce(pooled)))
        return self._masked(x * module.gate(gate))

    def _eca(self, module: EcaModule, x: Tensor) -> Tensor:
        pooled = self._visible_mean(x)[:, :, 0, 0]
        return self._masked(x * module.gate(module.conv(pooled[:, None])).view(len(x), -1, 1, 1))
