"""The image tower of an open_clip model as a backbone, where timm has an equal architecture."""

from pathlib import Path
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer
from timm import get_pretrained_cfg, is_model
from torch import Tensor

from convscope.core.backbone import Backbone, ModelArgs, Origin
from convscope.core.backbone_loading import fit, open_clip_preprocessing, parts
from convscope.core.errors import UserError
from convscope.core.pairs.open_clip_format import create_open_clip

TOLERANCE = 1e-3  # of the largest feature, between what open_clip and timm compute from the same weights

# timm's names by width and depth.
TRANSFORMERS = {
    (384, 12): "xsmall",
    (512, 12): "medium",
    (640, 12): "betwixt",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
    (1408, 40): "giant",
    (1664, 48): "gigantic",
}
RESNETS = {
    (64, 3, 4, 6, 3): "resnet50_clip",
    (64, 3, 4, 23, 3): "resnet101_clip",
    (80, 4, 6, 10, 6): "resnet50x4_clip",
    (96, 6, 8, 18, 8): "resnet50x16_clip",
    (128, 3, 15, 36, 10): "resnet50x64_clip",
}


def load_tower(name: str, model_args: ModelArgs | None = None) -> Backbone:
    """The image tower of `NAME/PRETRAINED` or of a folder in open_clip's format, without its projection.

    Before it is returned, an image goes through both networks: they have to compute the same features.

    Raises:
        UserError: open_clip has no such model, or timm no equal architecture.
    """
    visual = create_open_clip(name).visual.float()
    architecture, arguments = _architecture(visual, name)
    state = {f"visual.{key}": value for key, value in visual.state_dict().items()}
    backbone, match, _ = fit(state, architecture, {**arguments, **(model_args or {})})
    if not match.complete:
        raise UserError(f"open_clip:{name} is no {architecture} of timm's: {match.problems()}")
    backbone.model.load_state_dict(match.weights, strict=False)
    if not match.resampled:
        _verify(visual, backbone, name)
    backbone.source = f"open_clip:{name}"
    prepared_by = f"timm's for {backbone.arch}"
    # Of a mere file open_clip assumes CLIP's means, which are not SigLIP's.
    if "siglip" not in backbone.arch or not Path(name.partition("/")[2]).is_file():
        prepared_by, size = "open_clip's preprocess_cfg", _size(visual)
        if match.resampled:
            size = backbone.preprocessing.size
        backbone.preprocessing = open_clip_preprocessing({**visual.preprocess_cfg, "size": size}, size)
    backbone.origin = Origin(
        layout=match.layout.name,
        said_by="open_clip's configuration",
        dropped=tuple(dict.fromkeys([*parts(match.dropped), "text tower"])),
        resampled=tuple(match.resampled),
        preprocessing=prepared_by,
    )
    return backbone


def _size(visual: Any) -> tuple[int, int]:
    """Height and width of the images that a tower takes."""
    size = visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _architecture(visual: Any, name: str) -> tuple[str, dict[str, Any]]:
    """timm's architecture with the shapes and the arithmetic of a tower; a wrong one does not outlive `_verify`."""
    if isinstance(visual, TimmModel):
        return str(visual.trunk.pretrained_cfg["architecture"]), {}
    if isinstance(visual, VisionTransformer):
        return _transformer(visual)
    if isinstance(visual, ModifiedResNet):
        depths = (len(layer) for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4))
        if architecture := RESNETS.get((visual.conv3.out_channels, *depths)):
            size = _size(visual)
            return architecture, {} if size == get_pretrained_cfg(architecture).input_size[1:] else {"img_size": size}
    raise UserError(f"open_clip:{name}: timm has no architecture like its image tower ({type(visual).__name__})")


def _transformer(visual: Any) -> tuple[str, dict[str, Any]]:
    blocks = visual.transformer.resblocks
    width, size, patch = visual.conv1.out_channels, _size(visual), visual.patch_size
    activation = "quickgelu_" if isinstance(blocks[0].mlp.gelu, QuickGELU) else ""
    pooling = {"global_pool": "avg", "fc_norm": False} if visual.pool_type == "avg" else {}
    known = TRANSFORMERS.get((width, len(blocks)))
    architecture = f"vit_{known}_patch{patch[0]}_clip_{activation}{size[0]}"
    if is_model(architecture):
        return architecture, pooling
    arguments = {
        **pooling,
        "img_size": size,
        "patch_size": patch[0],
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": blocks[0].attn.num_heads,
        "mlp_ratio": blocks[0].mlp.c_fc.out_features / width,
    }
    return f"vit_base_patch32_clip_{activation}224", arguments


@torch.inference_mode()
def _verify(visual: Any, backbone: Backbone, name: str) -> None:
    images = torch.randn(2, 3, *_size(visual), generator=torch.Generator().manual_seed(0))
    ours = backbone.eval()
    if isinstance(visual, TimmModel):
        expected, found = visual.trunk.forward_features(images), ours.model.forward_features(images)
    else:
        expected, found = visual(images), _projected(visual, ours(images))
    worst = float((found - expected).abs().max() / expected.abs().max())
    if not worst <= TOLERANCE:
        raise UserError(
            f"open_clip:{name}: {backbone.arch} computes other features from its weights (off by {worst:.2g}), "
            "so timm has no equal architecture"
        )


def _projected(visual: Any, features: Tensor) -> Tensor:
    """A tower's own last matrix, which a backbone leaves out."""
    if isinstance(visual, ModifiedResNet):
        projected: Tensor = visual.attnpool.c_proj(features)
        return projected
    return features if visual.proj is None else features @ visual.proj
