"""Who wrote these weights? One entry for each way of naming them.

A layout says where in a file the backbone lies, what of the rest only training used, and how the names and shapes
become timm's. All of them are tried, and the one that matches most of the network is taken (core/weights_match.py),
so none has to prove whose file it is.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from convscope.core.torchvision_names import convnext_names, swin_names, vit_names
from convscope.core.weights_file import State

NOTHING = r"(?!)"


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """How the authors of a layout prepare images; None: as timm does for the architecture."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str | None = None
    crop_pct: float | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a backbone lies in a file."""

    name: str
    prefix: str = ""  # of the backbone's keys
    training: str = NOTHING  # expression for the start of keys that only training, or another tower, uses
    needs: str = ""  # a key that there must be
    lacks: str = ""  # a prefix that no key may have
    rename: Callable[[State], State] = dict  # to timm's names, or to those that timm's own conversion knows
    timm_reads: tuple[str, ...] = ()  # training parts by which timm's conversion knows the layout, and which it drops
    preprocessing: Normalisation | None = None

    def select(self, state: State) -> tuple[State, list[str], list[str]]:
        """The backbone's tensors, the keys that the layout knows to be of no use, and those it does not know."""
        if self.needs and self.needs not in state:
            return {}, [], []
        if self.lacks and any(key.startswith(self.lacks) for key in state):
            return {}, [], []
        dropped = [key for key in state if re.match(self.training, key)]
        known = set(dropped) - set(self.timm_reads)
        inside = {
            key.removeprefix(self.prefix): value
            for key, value in state.items()
            if key.startswith(self.prefix) and key not in known
        }
        unknown = [
            key
            for key, value in state.items()
            if not key.startswith(self.prefix) and key not in known and value.is_floating_point()
        ]
        return self.rename(inside), dropped, unknown


def _dense_names(state: State) -> State:
    """MinkowskiEngine's sparse layers as dense ones.

    A convolution's `kernel` is (k * k, in, out), a depthwise one's (k * k, channels), and the first of the two
    spatial axes runs fastest in k * k. Biases are (1, C); norms and linear layers hide in `ln` and `linear`.
    """
    dense: State = {}
    for key, value in state.items():
        if key.endswith(".kernel"):
            key, value = key.removesuffix("kernel") + "weight", _dense_kernel(value)
        elif key.endswith(".bias"):
            value = value.flatten()
        dense[re.sub(r"\.(ln|linear)\.(weight|bias)$", r".\2", key)] = value
    return dense


def _dense_kernel(kernel: Tensor) -> Tensor:
    side = math.isqrt(kernel.shape[0])
    grid = kernel.reshape(side, side, *kernel.shape[1:])  # (column, row, ...)
    if grid.ndim == 3:
        return grid.permute(2, 1, 0).unsqueeze(1).contiguous()
    return grid.permute(3, 2, 1, 0).contiguous()


def _without_chunks(state: State) -> State:
    """DINOv2 trains its blocks in chunks: blocks.CHUNK.BLOCK, where BLOCK counts through all of them."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}


TORCHVISION = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
LIGHTLY = {"0": "conv1", "1": "bn1", "2": "layer1", "3": "layer2", "4": "layer3", "5": "layer4"}


def _resnet_children(state: State) -> State:
    """`nn.Sequential(*resnet.children())`, of torchvision's ResNet or of lightly's (which has no max-pool to count)."""
    names = LIGHTLY if "2.0.conv1.weight" in state else TORCHVISION
    renamed: State = {}
    for key, value in state.items():
        index, _, rest = key.partition(".")
        renamed[f"{names.get(index, index)}.{rest.replace('shortcut.', 'downsample.')}"] = value
    return renamed


def _words(*words: str) -> str:
    """Keys whose first part has one of the words: projector.0.weight, momentum_projector.0.weight, queue."""
    return rf"(\w*_)?({'|'.join(words)})(_\w*)?(\.|$)"


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = Normalisation(mean=IMAGENET_MEAN, std=IMAGENET_STD)
BICUBIC_256 = Normalisation(mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bicubic", crop_pct=0.875)
BILINEAR_256 = Normalisation(mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bilinear", crop_pct=0.875)
CLIP = Normalisation(mean=CLIP_MEAN, std=CLIP_STD, interpolation="bicubic", crop_pct=1.0)

FCMAE_TRAINING = r"(decoder|proj|pred)\.|mask_token$"
DINO_HEADS = r"(dino_|ibot_)?head\."
CLIP_TEXT = r"text\.|transformer\.|token_embedding\.|ln_final\.|(positional_embedding|text_projection|logit_\w+)$"

# What the modules of training code are called, beside the backbone that they hold.
BESIDE = _words(
    *("projector", "projection", "proj", "predictor", "prediction", "pred", "head", "heads", "classifier", "decoder"),
    *("momentum", "teacher", "student", "target", "ema", "online", "queue", "prototypes", "mask", "mask_token"),
    *("criterion", "loss", "center", "metrics", "linear", "fc", "text", "logit"),
)
HOLDERS = ("backbone.", "encoder.", "model.", "model.backbone.", "net.", "network.")  # by the attribute's usual names

LAYOUTS: tuple[Layout, ...] = (
    # timm's keys, which are torchvision's for ResNets. Of open_clip's towers timm would take the image tower, and lose
    # all others without a word.
    Layout(name="plain", lacks="visual."),
    Layout(name="torchvision ViT", needs="encoder.pos_embedding", rename=vit_names, preprocessing=BILINEAR_256),
    Layout(name="torchvision ConvNeXt", needs="features.1.0.layer_scale", rename=convnext_names),
    Layout(name="torchvision Swin", needs="features.1.0.attn.relative_position_bias_table", rename=swin_names),
    Layout(name="convscope", prefix="backbone.model.", training=r"(?!backbone\.model\.)"),
    Layout(
        name="SparK",
        prefix="sparse_encoder.sp_cnn.",
        training=r"dense_decoder\.|densify_\w+\.|mask_tokens?(\.|$)|imn_[ms]$|norm_black$",
        preprocessing=IMAGENET,
    ),
    Layout(
        name="FCMAE",
        prefix="encoder.",
        training=FCMAE_TRAINING,
        needs="encoder.downsample_layers.0.0.weight",
        rename=_dense_names,
        preprocessing=BICUBIC_256,
    ),
    Layout(
        name="FCMAE encoder",
        training=FCMAE_TRAINING,
        needs="downsample_layers.0.0.weight",
        rename=_dense_names,
        preprocessing=BICUBIC_256,
    ),
    Layout(
        name="DINOv2",
        training=r"mask_token$",
        needs="mask_token",
        rename=_without_chunks,
        timm_reads=("mask_token",),
        preprocessing=IMAGENET,
    ),
    Layout(
        name="MAE",
        training=r"decoder_|mask_token$",
        needs="decoder_pos_embed",
        preprocessing=BICUBIC_256,
    ),
    Layout(
        name="DINOv2 teacher",
        prefix="teacher.backbone.",
        training=rf"student\.|teacher\.{DINO_HEADS}|(teacher\.backbone\.)?mask_token$|(dino|ibot|koleo)_\w*loss\.",
        rename=_without_chunks,
        timm_reads=("teacher.backbone.mask_token",),
        preprocessing=IMAGENET,
    ),
    Layout(
        name="DINOv2 backbone",
        prefix="backbone.",
        training=rf"{DINO_HEADS}|backbone\.mask_token$",
        needs="backbone.mask_token",
        rename=_without_chunks,
        timm_reads=("backbone.mask_token",),
        preprocessing=IMAGENET,
    ),
    Layout(
        name="DINO",
        prefix="backbone.",
        training=r"head\.",
        needs="head.last_layer.weight_v",
        preprocessing=BICUBIC_256,
    ),
    Layout(
        name="MoCo v3",
        prefix="base_encoder.",
        training=r"momentum_encoder\.|predictor\.|base_encoder\.(head|fc)\.",
        preprocessing=BILINEAR_256,
    ),
    Layout(
        name="MoCo",
        prefix="encoder_q.",
        training=r"encoder_k\.|encoder_q\.fc\.|queue(_ptr)?$",
        preprocessing=BILINEAR_256,
    ),
    Layout(
        name="open_clip, timm tower",
        prefix="visual.trunk.",
        training=rf"{CLIP_TEXT}|visual\.head\.",
        preprocessing=CLIP,
    ),
    Layout(  # timm's own conversion knows these names, under their prefix
        name="open_clip",
        training=rf"{CLIP_TEXT}|visual\.proj$|visual\.attnpool\.c_proj\.",
        needs="visual.conv1.weight",
        preprocessing=CLIP,
    ),
    Layout(name="solo-learn", prefix="backbone.", training=BESIDE, needs="classifier.weight"),
    Layout(name="solo-learn", prefix="encoder.", training=BESIDE, needs="classifier.weight"),
    *(
        Layout(
            name="lightly",
            prefix=prefix,
            training=BESIDE,
            needs=f"{prefix}0.weight",
            rename=_resnet_children,
            preprocessing=IMAGENET,
        )
        for prefix in ("backbone.", "model.backbone.", "")
    ),
    *(
        Layout(
            name="lightly",
            prefix="teacher_backbone.",
            training=rf"(?!teacher_backbone\.){BESIDE}",
            rename=rename,
            preprocessing=IMAGENET,
        )
        for rename in (dict, _resnet_children)
    ),
    *(
        Layout(name=f"module with a {holder.removesuffix('.')}", prefix=holder, training=rf"(model\.)?{BESIDE}")
        for holder in HOLDERS
    ),
)
