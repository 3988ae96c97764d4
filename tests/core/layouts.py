"""The same small networks as different authors would save them."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

State = dict[str, Tensor]

RESNET = {"layers": (1, 1, 1, 1), "channels": (4, 8, 16, 32)}
VIT = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 32}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (4, 8, 12, 16)}
REGISTERS = {**VIT, "reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}


def network(arch: str, **model_args: Any) -> nn.Module:
    """A timm network in which every weight and statistic counts."""
    generator = torch.Generator().manual_seed(5)
    model = timm.create_model(arch, num_classes=0, **model_args).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator) * 0.2
            value.copy_(drawn.abs() + 0.5 if "running_var" in name or (value.ndim == 1 and "weight" in name) else drawn)
    return model


def save(folder: Path, value: Any, name: str = "weights.pth") -> str:
    torch.save(value, folder / name)
    return str(folder / name)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def other(state: State) -> State:
    """The same keys with other values: what must not be loaded."""
    return {key: value + 1 for key, value in state.items()}


def mlp(prefix: str, width: int) -> State:
    return {f"{prefix}.0.weight": torch.ones(3, width), f"{prefix}.1.running_mean": torch.ones(3)}


def facebook_convnext(state: State) -> State:
    """ConvNeXt's keys as its authors write them, GRN's (1, 1, 1, C) included; nothing follows the last stage."""
    named: State = {}
    for key, value in state.items():
        if key.startswith("head."):
            continue
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = key.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        if "mlp.grn" in key:
            key = key.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
            value = value[None, None, None]
        named[key] = value
    return named


def minkowski(state: State) -> State:
    """The same as sparse layers. The loops say what the shapes mean: the first spatial axis (rows) runs fastest."""
    sparse: State = {}
    for key, value in facebook_convnext(state).items():
        module, _, leaf = key.rpartition(".")
        if key.startswith("downsample_layers.0"):  # the stem stays dense
            sparse[key] = value
        elif "grn" in key:
            sparse[key] = value.reshape(1, -1)
        elif "pwconv" in key:
            sparse[f"{module}.linear.{leaf}"] = value
        elif ".norm" in key or re.match(r"downsample_layers\.\d\.0", key):
            sparse[f"{module}.ln.{leaf}"] = value
        elif leaf == "bias":
            sparse[key] = value[None]
        else:
            out, into, rows, columns = value.shape
            kernel = torch.zeros(rows * columns, into, out)
            for row in range(rows):
                for column in range(columns):
                    kernel[column * rows + row] = value[:, :, row, column].T
            sparse[f"{module}.kernel"] = kernel[:, 0] if into == 1 else kernel
    return sparse


FCMAE_DECODER = {
    "mask_token": torch.zeros(1, 8, 1, 1),
    "proj.weight": torch.ones(8, 16, 1, 1),
    "decoder.0.grn.gamma": torch.zeros(1, 1, 1, 32),
    "decoder.0.pwconv1.weight": torch.ones(32, 8),
    "pred.weight": torch.ones(3, 8, 1, 1),
}
MAE_DECODER = {
    "mask_token": torch.zeros(1, 1, 8),
    "decoder_pos_embed": torch.zeros(1, 5, 8),
    "decoder_embed.weight": torch.ones(8, 24),
    "decoder_blocks.0.norm1.weight": torch.ones(8),
    "decoder_norm.weight": torch.ones(8),
    "decoder_pred.weight": torch.ones(3, 8),
}


def moco(state: State) -> dict[str, Any]:
    head = "head" if "pos_embed" in state else "fc"
    base, momentum = state | mlp(head, 24), other(state) | mlp(head, 24)
    both = prefixed(base, "module.base_encoder.") | prefixed(momentum, "module.momentum_encoder.")
    return {"state_dict": both | mlp("module.predictor", 3), "epoch": 300}


def dino_full(state: State) -> dict[str, Any]:
    head = {"head.mlp.0.weight": torch.ones(3, 24), "head.last_layer.weight_v": torch.ones(3, 3)}
    return {
        "student": prefixed(prefixed(other(state), "backbone.") | head, "module."),
        "teacher": prefixed(state, "backbone.") | head,
        "dino_loss": {"center": torch.zeros(1, 3)},
        "args": argparse.Namespace(patch_size=16, lr=0.1),
    }


def chunked(state: State) -> State:
    """DINOv2's blocks.CHUNK.BLOCK with a mask token, and registers by their name of the hub."""
    named = {re.sub(r"^blocks\.(\d+)", r"blocks.\1.\1", key): value for key, value in state.items()}
    named["mask_token"] = torch.zeros(1, 24)
    if "reg_token" in named:  # timm keeps the class token's position inside the class token
        named["register_tokens"] = named.pop("reg_token")
        position = torch.full((1, 1, 24), 0.3)
        named["cls_token"] = named["cls_token"] - position
        named["pos_embed"] = torch.cat([position, named["pos_embed"]], 1)
    return named


def sequential(state: State, prefix: str) -> State:
    """`nn.Sequential(*resnet.children())` of torchvision."""
    names = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    return {f"{prefix}{names.index(key.split('.')[0])}.{key.partition('.')[2]}": v for key, v in state.items()}


def lightly_resnet(state: State) -> State:
    """The children of lightly's own ResNet, which calls its downsampling shortcut."""
    names = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    renamed = {f"backbone.{names.index(key.split('.')[0])}.{key.partition('.')[2]}": v for key, v in state.items()}
    return {key.replace("downsample", "shortcut"): value for key, value in renamed.items()}


def clip_text(state: State) -> State:
    text = {"positional_embedding": torch.ones(7, 5), "transformer.resblocks.0.ln_1.weight": torch.ones(5)}
    return state | text | {"logit_scale": torch.ones(()), "text_projection": torch.ones(5, 5)}


@dataclass(frozen=True)
class Case:
    """A network and what somebody saves of it."""

    arch: str
    model_args: dict[str, Any]
    save: Callable[[State], Any]
    layout: str
    dropped: set[str] = field(default_factory=set)


VITS, RESNETS, NEXT = "vit_small_patch16_224", "resnet50", "convnextv2_atto"
CASES = {
    "fcmae pretraining": Case(
        NEXT,
        CONVNEXT,
        lambda s: {"model": prefixed(minkowski(s), "encoder.") | FCMAE_DECODER, "epoch": 800},
        "FCMAE",
        {"mask_token", "proj", "decoder", "pred"},
    ),
    "fcmae encoder, sparse": Case(NEXT, CONVNEXT, lambda s: {"model": minkowski(s)}, "FCMAE encoder"),
    "fcmae encoder, dense": Case(NEXT, CONVNEXT, lambda s: {"model": facebook_convnext(s)}, "plain"),
    "mae pretraining": Case(
        VITS, VIT, lambda s: {"model": s | MAE_DECODER}, "MAE", {key.split(".")[0] for key in MAE_DECODER}
    ),
    "dino vit": Case(VITS, VIT, dino_full, "DINO", {"head.mlp", "head.last_layer", "student"}),
    "dino resnet": Case(RESNETS, RESNET, dino_full, "DINO", {"head.mlp", "head.last_layer", "student"}),
    "dinov2 hub": Case("vit_small_patch14_dinov2", VIT, chunked, "DINOv2", {"mask_token"}),
    "dinov2 hub, registers": Case("vit_small_patch14_reg4_dinov2", REGISTERS, chunked, "DINOv2", {"mask_token"}),
    "dinov2 teacher": Case(
        "vit_small_patch14_reg4_dinov2",
        REGISTERS,
        lambda s: {"teacher": prefixed(chunked(s), "backbone.") | mlp("dino_head.mlp", 24) | mlp("ibot_head.mlp", 24)},
        "DINOv2 backbone",
        {"mask_token", "dino_head", "ibot_head"},
    ),
    "dinov2 training": Case(
        "vit_small_patch14_dinov2",
        VIT,
        lambda s: {
            "model": prefixed(chunked(other(s)), "student.backbone.")
            | prefixed(chunked(s), "teacher.backbone.")
            | mlp("teacher.dino_head.mlp", 24)
        },
        "DINOv2 teacher",
        {"student.backbone", "mask_token", "teacher.dino_head"},
    ),
    "moco v3 vit": Case(
        "vit_base_patch16_224", VIT, moco, "MoCo v3", {"base_encoder.head", "momentum_encoder", "predictor"}
    ),
    "moco v3 resnet": Case(RESNETS, RESNET, moco, "MoCo v3", {"base_encoder.fc", "momentum_encoder", "predictor"}),
    "moco v2": Case(
        RESNETS,
        RESNET,
        lambda s: {
            "state_dict": prefixed(s | mlp("fc", 9), "module.encoder_q.")
            | prefixed(other(s) | mlp("fc", 9), "module.encoder_k.")
            | {"module.queue": torch.ones(3, 3)}
        },
        "MoCo",
        {"encoder_q.fc", "encoder_k", "queue"},
    ),
    "open_clip, timm tower": Case(
        VITS,
        VIT,
        lambda s: clip_text(prefixed(s, "visual.trunk.") | {"visual.head.proj.weight": torch.ones(5, 24)}),
        "open_clip, timm tower",
        {"visual.head", "positional_embedding", "transformer", "logit_scale", "text_projection"},
    ),
    "open_clip, convnext tower": Case(
        "convnext_atto",
        CONVNEXT,
        lambda s: {"state_dict": prefixed(clip_text(prefixed(s, "visual.trunk.")), "module.")},
        "open_clip, timm tower",
        {"positional_embedding", "transformer", "logit_scale", "text_projection"},
    ),
    "solo-learn": Case(
        RESNETS,
        RESNET,
        lambda s: {
            "state_dict": prefixed(s, "backbone.")
            | prefixed(other(s), "momentum_backbone.")
            | mlp("projector", 9)
            | mlp("momentum_projector", 9)
            | {"classifier.weight": torch.ones(3, 9), "queue": torch.ones(3), "prototypes.weight": torch.ones(3)}
        },
        "solo-learn",
        {"momentum_backbone", "projector", "momentum_projector", "classifier", "queue", "prototypes"},
    ),
    "solo-learn, before 1.0.4": Case(
        RESNETS,
        RESNET,
        lambda s: {"state_dict": prefixed(s, "encoder.") | {"classifier.weight": torch.ones(3, 9)}},
        "solo-learn",
        {"classifier"},
    ),
    "lightly": Case(
        RESNETS,
        RESNET,
        lambda s: {
            "state_dict": sequential(s, "backbone.")
            | sequential(other(s), "backbone_momentum.")
            | {"projection_head.layers.0.weight": torch.ones(3, 9)}
        },
        "lightly",
        {"backbone_momentum", "projection_head"},
    ),
    "lightly, dino": Case(
        RESNETS,
        RESNET,
        lambda s: {"state_dict": sequential(s, "teacher_backbone.") | sequential(other(s), "student_backbone.")},
        "lightly",
        {"student_backbone"},
    ),
    "lightly's own resnet": Case(
        "resnet18_cifar",
        {"layers": (1, 1, 1, 1)},
        lambda s: {"state_dict": lightly_resnet(s) | mlp("projection_head", 9)},
        "lightly",
        {"projection_head"},
    ),
    "bare children": Case(RESNETS, RESNET, lambda s: sequential(s, ""), "lightly"),
    "ddp around compile": Case(RESNETS, RESNET, lambda s: prefixed(s, "module._orig_mod."), "plain"),
    "module in a module": Case(
        RESNETS,
        RESNET,
        lambda s: {"state_dict": prefixed(s, "model.backbone.") | mlp("model.head", 9) | mlp("train_metrics", 3)},
        "module with a model.backbone",
        {"model.head", "train_metrics"},
    ),
    "compiled part": Case(
        RESNETS, RESNET, lambda s: {"state_dict": prefixed(s, "net._orig_mod.")}, "module with a net"
    ),
}
