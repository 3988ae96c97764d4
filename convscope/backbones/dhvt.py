"""DHVT: a ViT for small sets of images (Lu et al. 2022, arXiv:2210.05958).

Three changes to a ViT: patches are embedded by overlapping convolutions (SOPE, sec. 3.2), the MLP mixes neighbours by
a depthwise convolution and scales the class token by what it saw (DAFF, sec. 3.3), and attention gets one more token
for each of its heads, made of that head's channels of all tokens (HI-MHSA, sec. 3.4). No position embedding.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from convscope.backbones.registration import config, create, refuse, register_model

SQUEEZE = 4  # reduction inside the class token's scaling
# timm's arguments of layers that are others here
UNUSED = (
    *("qkv_bias", "qk_norm", "proj_bias", "scale_attn_norm", "scale_mlp_norm", "attn_layer", "mlp_layer", "act_layer"),
    *("embed_layer", "reg_tokens", "patch_drop_rate"),
)


class Affine(nn.Module):
    """Scale and shift of every channel of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return x * self.alpha + self.beta


class OverlappingPatchEmbed(nn.Module):
    """3x3 convolutions of stride 2, as many as halve the resolution down to patches, their width doubling to `dim`.

    Args:
        img_size: of the images.
        patch_size: a power of 2.
        in_chans: channels of the images.
        dim: of a token.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.set_input_size(img_size)
        halvings = round(math.log2(patch_size))
        widths = [in_chans, *(dim >> (halvings - 1 - i) for i in range(halvings))]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(after)), nn.GELU()]
        # patches of 2 pixels keep the activation of their only convolution
        self.proj = nn.Sequential(*(layers if halvings == 1 else layers[:-1]))
        self.pre_affine = Affine(in_chans)
        self.post_affine = Affine(dim)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Of the images, which may differ from one call to the next."""
        assert patch_size in (None, self.patch_size), "its patches are made by convolutions and cannot be resized"
        self.img_size = to_2tuple(img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        rows, columns = (-(-side // patch) for side, patch in zip(img_size, self.patch_size))
        return rows, columns

    def feat_ratio(self) -> int:
        """Pixels from one patch to the next."""
        return int(self.patch_size[0])

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, N, dim).

        Raises:
            ValueError: images that are not square, which the later layers cannot tell from the number of tokens.
        """
        x = self.post_affine(self.proj(self.pre_affine(x)))
        if x.shape[2] != x.shape[3]:
            raise ValueError(f"DHVT takes square images, not a grid of {x.shape[2]}x{x.shape[3]} patches")
        return x.flatten(2).transpose(1, 2)


class HeadInteractedAttention(nn.Module):
    """Multi-head attention with a further token for each head, merged into the class token afterwards."""

    def __init__(self, dim: int, heads: int, attn_drop: float, drop: float) -> None:
        super().__init__()
        self.heads, width = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        self.ht_proj = nn.Linear(width, dim)
        self.ht_norm = nn.LayerNorm(width)
        self.act = nn.GELU()
        self.pos_embed = nn.Parameter(torch.empty(1, heads, dim))

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """(B, 1 + N, C), the class token first -> the same."""
        tokens = torch.cat((x, self._head_tokens(x)), dim=1)
        batch, count, width = tokens.shape
        query, key, value = self.qkv(tokens).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        rate = self.attn_drop if self.training else 0.0
        out = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=rate)
        out = self.proj(out.transpose(1, 2).reshape(batch, count, width))
        cls, patches, heads = out.split((1, count - 1 - self.heads, self.heads), dim=1)
        return self.proj_drop(torch.cat((cls + heads.mean(1, keepdim=True), patches), dim=1))  # type: ignore[no-any-return]

    def _head_tokens(self, x: Tensor) -> Tensor:
        """(B, heads, C): each from the mean over all tokens of its head's channels."""
        means = x.mean(1).view(len(x), self.heads, -1)
        spread = self.ht_proj(means).view(len(x), self.heads, self.heads, -1)
        return self.act(self.ht_norm(spread)).flatten(2) + self.pos_embed  # type: ignore[no-any-return]


class DynamicAggregation(nn.Module):
    """Feed-forward on the patches with a depthwise 3x3 convolution; their mean scales the class token."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, dim, 1)
        self.bn3 = nn.BatchNorm2d(dim)
        self.act = nn.GELU()
        self.compress = nn.Linear(dim, dim // SQUEEZE)
        self.excitation = nn.Linear(dim // SQUEEZE, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + N, C) with N a square number, the class token first -> the same."""
        cls, patches = x[:, :1], x[:, 1:]
        side = math.isqrt(patches.shape[1])
        maps = patches.transpose(1, 2).reshape(len(x), -1, side, side)
        maps = self.act(self.bn1(self.conv1(maps)))
        maps = maps + self.act(self.bn2(self.conv2(maps)))
        patches = self.bn3(self.conv3(maps)).flatten(2).transpose(1, 2)
        scale = self.excitation(self.act(self.compress(patches.mean(1, keepdim=True))))
        return torch.cat((cls * scale, patches), dim=1)


class DHVT(VisionTransformer):  # type: ignore[misc]
    """timm's ViT with DHVT's patches, attention and feed-forward.

    Args:
        patch_size: 2, 4 or 16 in the paper.
        mlp_ratio: width of the feed-forward over that of a token.
        kwargs: timm's own of a VisionTransformer.
    """

    patch_embed: Any

    def __init__(self, patch_size: int = 16, mlp_ratio: float = 4.0, **kwargs: Any) -> None:
        refuse(type(self), kwargs, UNUSED)
        super().__init__(patch_size=patch_size, pos_embed="none", mlp_ratio=1, **{"norm_layer": _norm, **kwargs})
        dim, heads = self.embed_dim, kwargs["num_heads"]
        self.patch_embed = OverlappingPatchEmbed(self.patch_embed.img_size, patch_size, self.in_chans, dim)
        drops = {"attn_drop": kwargs.get("attn_drop_rate", 0.0), "drop": kwargs.get("proj_drop_rate", 0.0)}
        for block in self.blocks:
            block.attn = HeadInteractedAttention(dim, heads, **drops)
            block.mlp = DynamicAggregation(dim, int(dim * mlp_ratio))
            nn.init.trunc_normal_(block.attn.pos_embed, std=0.02)
        self.apply(_init_weights)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def _pos_embed(self, x: Tensor) -> Tensor:
        return self.pos_drop(torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1))  # type: ignore[no-any-return]


def _norm(width: int, **kwargs: Any) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, **kwargs)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint; their keys are these."""
    return dict(state_dict.get("model", state_dict))


# name: side of the images, of the patches, width, heads
VARIANTS = {
    "dhvt_tiny_cifar_patch4": (32, 4, 192, 4),
    "dhvt_small_cifar_patch4": (32, 4, 384, 8),
    "dhvt_tiny_cifar_patch2": (32, 2, 192, 4),
    "dhvt_small_cifar_patch2": (32, 2, 384, 8),
    "dhvt_tiny_domain_patch16": (224, 16, 192, 4),
    "dhvt_small_domain_patch16": (224, 16, 384, 6),
    "dhvt_tiny_imagenet_patch16": (224, 16, 192, 3),
    "dhvt_small_imagenet_patch16": (224, 16, 384, 6),
}
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": config(
            input_size=(3, size, size),
            pool_size=None,
            crop_pct=0.9 if size == 224 else 1.0,
            first_conv="patch_embed.proj.0.0",
            license="apache-2.0",
        )
        for name, (size, *_) in VARIANTS.items()
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> DHVT:
    img_size, patch_size, embed_dim, num_heads = VARIANTS[variant]
    settings = {"img_size": img_size, "patch_size": patch_size, "embed_dim": embed_dim, "num_heads": num_heads}
    return create(DHVT, variant, pretrained, checkpoint_filter_fn, 3, **{**settings, **kwargs})


@register_model
def dhvt_tiny_cifar_patch4(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-T for 32-pixel images, patches of 4."""
    return _create("dhvt_tiny_cifar_patch4", pretrained, **kwargs)


@register_model
def dhvt_small_cifar_patch4(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-S for 32-pixel images, patches of 4."""
    return _create("dhvt_small_cifar_patch4", pretrained, **kwargs)


@register_model
def dhvt_tiny_cifar_patch2(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-T for 32-pixel images, patches of 2."""
    return _create("dhvt_tiny_cifar_patch2", pretrained, **kwargs)


@register_model
def dhvt_small_cifar_patch2(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-S for 32-pixel images, patches of 2."""
    return _create("dhvt_small_cifar_patch2", pretrained, **kwargs)


@register_model
def dhvt_tiny_domain_patch16(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-T for DomainNet, with four heads."""
    return _create("dhvt_tiny_domain_patch16", pretrained, **kwargs)


@register_model
def dhvt_small_domain_patch16(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-S for DomainNet."""
    return _create("dhvt_small_domain_patch16", pretrained, **kwargs)


@register_model
def dhvt_tiny_imagenet_patch16(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-T for ImageNet, 6.3 M parameters."""
    return _create("dhvt_tiny_imagenet_patch16", pretrained, **kwargs)


@register_model
def dhvt_small_imagenet_patch16(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-S for ImageNet, 24 M parameters."""
    return _create("dhvt_small_imagenet_patch16", pretrained, **kwargs)
