"""ViT with a Gaussian-mixture mask on its attention (GMM, arXiv:2309.05015), for small images.

Scores are multiplied, before the softmax, by a mixture of Gaussians of the distance between two patches: sum over k of
alpha_k exp(-d^2 / (2 sigma_k^2)), with K widths and weights for each head of each block. So attention is local where
the data want it to be, at almost no parameters. No class token: the mean of all patches is classified.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from convscope.backbones.registration import config, create, refuse, register_model, renamed

EPSILON = 1e-5  # added to sigma^2
# timm's arguments of layers that are others here, or of tokens that have no place in the mask
UNUSED = (
    *("qkv_bias", "qk_norm", "proj_bias", "scale_attn_norm", "attn_layer"),
    *("reg_tokens", "patch_drop_rate", "dynamic_img_size", "dynamic_img_pad"),
)


class GaussianMixtureMask(nn.Module):
    """The factor of every pair of patches.

    Args:
        heads: of the attention.
        kernels: Gaussians in a mixture.
        grid: rows and columns of patches.
    """

    squared_distance: Tensor  # (N, N)

    def __init__(self, heads: int, kernels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        # Wide and all together one: attention starts almost as a plain ViT's. Different, so that they can part.
        widths = torch.linspace(0.5, 1.5, kernels) * max(grid)
        self.sigma = nn.Parameter(widths.view(-1, 1, 1, 1).repeat(1, heads, 1, 1))
        self.alpha = nn.Parameter(torch.full((kernels, heads, 1, 1), 1 / kernels))
        self.set_grid(grid)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """For another number of patches; distances stay in patches."""
        sides = [torch.arange(side, device=self.sigma.device, dtype=torch.float32) for side in grid]
        places = torch.cartesian_prod(*sides)
        squared = (places[:, None] - places).square().sum(2)
        self.register_buffer("squared_distance", squared, persistent=False)

    def forward(self) -> Tensor:
        """(heads, N, N)."""
        width = self.sigma.square() + EPSILON
        return (self.alpha * torch.exp(-self.squared_distance / (2 * width))).sum(0)


class MaskedAttention(nn.Module):
    """Multi-head attention whose scores are multiplied by a mask before the softmax."""

    def __init__(
        self, dim: int, heads: int, kernels: int, grid: tuple[int, int], attn_drop: float, drop: float
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.mask = GaussianMixtureMask(heads, kernels, grid)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (query * self.scale) @ key.transpose(-2, -1) * self.mask()
        out = self.attn_drop(scores.softmax(-1)) @ value
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, width)))  # type: ignore[no-any-return]


class GaussianMixtureViT(VisionTransformer):  # type: ignore[misc]
    """timm's ViT without a class token, with the mask in every block.

    Args:
        kernels: Gaussians in a mixture.
        kwargs: timm's own of a VisionTransformer.
    """

    def __init__(self, kernels: int = 5, **kwargs: Any) -> None:
        refuse(type(self), kwargs, UNUSED)
        super().__init__(class_token=False, global_pool="avg", **{"norm_layer": nn.LayerNorm, **kwargs})  # eps 1e-5
        drops = {"attn_drop": kwargs.get("attn_drop_rate", 0.0), "drop": kwargs.get("proj_drop_rate", 0.0)}
        heads = kwargs["num_heads"]
        for block in self.blocks:
            block.attn = MaskedAttention(self.embed_dim, heads, kernels, self.patch_embed.grid_size, **drops)
            for linear in (block.attn.qkv, block.attn.proj):
                nn.init.trunc_normal_(linear.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.attn.proj.bias)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Another size of image: position embeddings are resampled, the masks computed anew."""
        super().set_input_size(img_size, patch_size)
        for block in self.blocks:
            block.attn.mask.set_grid(self.patch_embed.grid_size)


# the authors' keys -> timm's
NAMES = (
    (r"^pos_embedding$", "pos_embed"),
    (r"^to_patch_embedding\.1\.", "patch_embed.proj."),
    (r"^transformer\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.norm1."),
    (r"^transformer\.layers\.(\d+)\.1\.norm\.", r"blocks.\1.norm2."),
    (r"^transformer\.layers\.(\d+)\.0\.fn\.to_qkv\.", r"blocks.\1.attn.qkv."),
    (r"^transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"^transformer\.layers\.(\d+)\.0\.fn\.mask\.", r"blocks.\1.attn.mask."),
    (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.3\.", r"blocks.\1.mlp.fc2."),
    (r"^mlp_head\.0\.", "fc_norm."),
    (r"^mlp_head\.1\.", "head."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """The authors' checkpoint with timm's keys; their masks of distances are constants, which are not kept."""
    if "pos_embedding" not in state_dict:
        return dict(state_dict)
    converted = {}
    for key, value in state_dict.items():
        if re.search(r"(^|\.)mask$", key):
            continue
        key = renamed(key, NAMES)
        if key == "patch_embed.proj.weight":  # of flattened patches (row, column, colour)
            out, colours, height, width = model.patch_embed.proj.weight.shape
            value = value.view(out, height, width, colours).permute(0, 3, 1, 2)
        converted[key] = value
    return converted


def _config(size: int) -> dict[str, Any]:
    return config(
        input_size=(3, size, size), fixed_input_size=True, pool_size=None, crop_pct=1.0, first_conv="patch_embed.proj"
    )


default_cfgs = generate_default_cfgs(
    {"vit_tiny_patch4_32_gmm.untrained": _config(32), "vit_tiny_patch8_64_gmm.untrained": _config(64)}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> GaussianMixtureViT:
    settings = {"embed_dim": 192, "depth": 9, "num_heads": 12, "mlp_ratio": 2.0, **kwargs}
    return create(GaussianMixtureViT, variant, pretrained, checkpoint_filter_fn, 3, **settings)


@register_model
def vit_tiny_patch4_32_gmm(pretrained: bool = False, **kwargs: Any) -> GaussianMixtureViT:
    """ViT-Tiny with 2.7 M parameters for 32-pixel images, Gaussian-mixture masks in its nine blocks."""
    return _create("vit_tiny_patch4_32_gmm", pretrained, **{"img_size": 32, "patch_size": 4, **kwargs})


@register_model
def vit_tiny_patch8_64_gmm(pretrained: bool = False, **kwargs: Any) -> GaussianMixtureViT:
    """The same for 64-pixel images."""
    return _create("vit_tiny_patch8_64_gmm", pretrained, **{"img_size": 64, "patch_size": 8, **kwargs})
