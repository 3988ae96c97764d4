"""Images and their captions: CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023), ConVIRT (Zhang et al. 2020)."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2

from convscope.core import distributed
from convscope.core.backbone import Backbone
from convscope.core.data.photometric import PhotometricConfig
from convscope.core.data.stream import Transform
from convscope.core.data.transforms import crop_flip
from convscope.core.errors import UserError
from convscope.core.pairs.captions import Sampling
from convscope.core.pairs.model import ImageText, Projection, SharedSpace
from convscope.core.pairs.text_tower import Pooling, TextConfig, TextTower, hugging_face_weights
from convscope.core.pairs.tokenizers import Tokenizer
from convscope.core.training.objective import Batch, Objective, StepOutput
from convscope.ssl.contrastive import sigmoid_loss, softmax_loss
from convscope.ssl.objectives.rotation import no_colour_changes

LossName = Literal["clip", "siglip", "convirt"]

SCALE_LIMITS = (0.0, math.log(100.0))  # of the learned logarithm, as published for CLIP


@dataclass(frozen=True)
class LossDefaults:
    """What a loss is published with."""

    temperature: float
    learned: bool
    bias: float | None
    image_weight: float


LOSSES: dict[LossName, LossDefaults] = {
    "clip": LossDefaults(temperature=0.07, learned=True, bias=None, image_weight=0.5),
    "siglip": LossDefaults(temperature=0.1, learned=True, bias=-10.0, image_weight=0.5),
    "convirt": LossDefaults(temperature=0.1, learned=False, bias=None, image_weight=0.75),
}


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Settings of contrastive image-text training."""

    loss: LossName = "clip"
    """clip: softmax over the batch in both directions. siglip: a yes or no for each pair. convirt: clip's with a weight
    for each direction and a fixed temperature."""
    temperature: float | None = None
    """At first; default: the published one (0.07 clip, 0.1 siglip and convirt)."""
    learn_temperature: bool | None = None
    """Default: learned, but for convirt."""
    image_weight: float | None = None
    """Weight of the direction from images to texts (ConVIRT's lambda); default 0.5 (clip), 0.75 (convirt)."""
    embed_dim: int = 512
    """Dimensions of the space that both towers share."""
    projection: Projection = "linear"
    """What brings a tower there: linear: one matrix (CLIP); mlp: one hidden layer with ReLU (ConVIRT)."""
    lock_image: bool = False
    """Leave the image tower as it is (LiT); its projection is trained."""
    text_encoder: Path | None = None
    """Folder of a Hugging Face encoder with its tokenizer; default: a transformer trained from scratch."""
    freeze_text_layers: int = 0
    """Leave the text tower's embeddings and this many layers as they are."""
    text_width: int = 256
    """Of the transformer."""
    text_heads: int = 4
    """Of the transformer."""
    text_layers: int = 4
    """Of the transformer."""
    text_pooling: Pooling = "eos"
    """How a text becomes one vector: the state of the token at its end or at its start (cls), the mean or maximum over
    tokens, or NV-Embed's attention to learned latents."""
    text_latents: int = 512
    """Latents of the latent pooling."""
    tokenizer: Literal["own", "clip"] = "own"
    """own: a byte-level BPE trained on the data's captions. clip: that of CLIP. An encoder's folder has its own."""
    vocab_size: int = 8192
    """Tokens of one's own tokenizer, at most."""
    context_length: int = 32
    """Tokens of a text; what follows is cut."""
    captions: Sampling = "random"
    """Which of an image's captions a step reads: the first one, a random one, a random sentence."""
    caption_field: str | None = None
    """Member or json field of the captions; default: txt, text, caption, captions."""
    caption_lines: bool = False
    """Every line of a text is a caption of its own."""
    class_captions: bool = False
    """Make captions of class names ("a photo of the large dog."): for data with labels and without captions."""
    size: int | None = None
    """Side of the training crop in pixels; default: the backbone's own input size."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the random crop's area."""
    interpolation: str = "bicubic"
    """Resampling of the random crop."""
    flip: bool = False
    """Mirror images at random; captions may tell left from right."""
    affine: bool = False
    """Turn by up to 20 degrees, shift by up to 0.1, scale by 0.95 to 1.05 at random, as ConVIRT does."""
    photometric: tyro.conf.OmitArgPrefixes[PhotometricConfig] = field(default_factory=no_colour_changes)

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"--crop-scale must be 0 < low <= high <= 1, got {self.crop_scale}")
        if self.temperature is not None and self.temperature <= 0:
            raise UserError(f"--temperature must be positive, got {self.temperature}")
        if self.image_weight is not None and not 0 <= self.image_weight <= 1:
            raise UserError(f"--image-weight must lie between 0 and 1, got {self.image_weight}")
        if self.image_weight is not None and self.loss == "siglip":
            raise UserError("--image-weight has no meaning for siglip, whose loss is the same in both directions")
        for name in ("embed_dim", "text_width", "text_heads", "text_layers", "text_latents", "context_length"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.freeze_text_layers < 0:
            raise UserError(f"--freeze-text-layers must be at least 0, got {self.freeze_text_layers}")
        if self.text_encoder is None and self.freeze_text_layers > self.text_layers:
            raise UserError(
                f"the text encoder has {self.text_layers} layers: {self.freeze_text_layers} cannot be frozen; name the "
                "folder of a trained one with --text-encoder, or pass --freeze-text-layers 0"
            )
        lowest, highest = (math.exp(-limit) for limit in reversed(SCALE_LIMITS))
        if self.temperature is not None and self.learned and not lowest <= self.temperature <= highest:
            raise UserError(
                f"a learned --temperature stays between {lowest:g} and {highest:g}, got {self.temperature:g}; "
                "one that is fixed (--learn-temperature False) may lie beyond"
            )

    @property
    def learned(self) -> bool:
        """Whether the temperature is trained."""
        return LOSSES[self.loss].learned if self.learn_temperature is None else self.learn_temperature

    def build(self, backbone: Backbone, tokenizer: Tokenizer) -> "Clip":
        """The objective around `backbone` and a text tower for `tokenizer`.

        Raises:
            UserError: the text encoder cannot be loaded, or has fewer layers than are to be frozen.
        """
        return Clip(backbone, tokenizer, self)

    def transform(self, backbone: Backbone) -> Transform:
        """Random resized crop, and what else was asked for."""
        size = self.crop_size(backbone)
        affine = None
        if self.affine:
            bilinear = v2.InterpolationMode.BILINEAR
            affine = v2.RandomAffine(20, translate=(0.1, 0.1), scale=(0.95, 1.05), interpolation=bilinear)
        transform: Transform = crop_flip(
            size, scale=self.crop_scale, interpolation=self.interpolation, flip=self.flip, after=affine
        )
        return transform

    def crop_size(self, backbone: Backbone) -> tuple[int, int]:
        """Height and width of the training crop in pixels."""
        return backbone.preprocessing.size if self.size is None else (self.size, self.size)


class Clip(ImageText, Objective):
    """A contrastive loss on images and their captions; see ClipConfig."""

    def __init__(self, backbone: Backbone, tokenizer: Tokenizer, config: ClipConfig) -> None:
        defaults = LOSSES[config.loss]
        temperature = config.temperature or defaults.temperature
        space = SharedSpace(
            embed_dim=config.embed_dim,
            projection=config.projection,
            logit_scale=-math.log(temperature),
            logit_bias=defaults.bias,
        )
        backbone.preprocessing = replace(backbone.preprocessing, crop_pct=1.0)  # as open_clip shows images to a model
        super().__init__(backbone, _text_tower(tokenizer, config), tokenizer, space)
        self.logit_scale.requires_grad_(config.learned)
        self.image_weight = defaults.image_weight if config.image_weight is None else config.image_weight
        self.parts = 1
        self.locked = config.lock_image
        if self.locked:
            self.backbone.requires_grad_(False).eval()

    def forward(self, batch: Batch) -> StepOutput:
        """Loss on `image` (B, 3, H, W) and `text` (B, L), one caption an image.

        Raises:
            UserError: the processes have batches of different lengths.
        """
        _require_equal_batches(len(batch["image"]))
        image = self._in_parts(self.encode_image, batch["image"])
        text = self._in_parts(self.encode_text, batch["text"])
        metrics = {"logit_scale": self.logit_scale.detach().exp()}
        with torch.autocast(image.device.type, enabled=False):
            if self.logit_bias is not None:
                metrics["logit_bias"] = self.logit_bias.detach()
                return StepOutput(sigmoid_loss(image, text, self.logit_scale.exp(), self.logit_bias), metrics)
            loss, accuracy = softmax_loss(image, text, self.logit_scale.exp(), self.image_weight)
        return StepOutput(loss, {"accuracy": accuracy, **metrics})

    def takes_whole_batch(self, parts: int) -> bool:
        """Yes: every image meets every text of the step, and `parts` of them are encoded after one another."""
        self.parts = parts
        return True

    @torch.no_grad()
    def after_update(self) -> None:
        """Keep the temperature in its range."""
        if self.logit_scale.requires_grad:
            self.logit_scale.clamp_(*SCALE_LIMITS)

    def train(self, mode: bool = True) -> "Clip":
        """Set training mode; a locked tower stays as it is, its running statistics included."""
        super().train(mode)
        if self.locked:
            self.backbone.eval()
        return self

    def _in_parts(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Encode a part at a time and again in backward: exact gradients in the memory of one part.

        This is GradCache (Gao et al. 2021, sec. 3.2) as activation checkpointing: the only activations that outlive a
        part's first pass are its vectors. BatchNorm sees a part at a time.
        """
        if self.parts == 1 or not torch.is_grad_enabled():
            return encode(inputs)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _statistics_kept(self)

        parts = [
            checkpoint(encode, part, use_reentrant=False, context_fn=contexts) for part in inputs.chunk(self.parts)
        ]
        return torch.cat(parts)


def _require_equal_batches(rows: int) -> None:
    """Asked at every step, for a process that alone gave up would leave the others waiting for its vectors."""
    found = distributed.gather(rows)
    if min(found) != max(found):
        raise UserError(f"a contrastive batch needs as many pairs on every process, got {found}")


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Leave running statistics alone: a second pass over the same images must not count them twice."""
    norms = [one for one in module.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    kept = [dict(one.named_buffers(recurse=False)) for one in norms]
    for one, buffers in zip(norms, kept):
        for name, buffer in buffers.items():
            setattr(one, name, buffer.clone())
    try:
        yield
    finally:
        for one, buffers in zip(norms, kept):
            for name, buffer in buffers.items():
                setattr(one, name, buffer)


def _text_tower(tokenizer: Tokenizer, config: ClipConfig) -> TextTower:
    settings, encoder = hugging_face_weights(config.text_encoder) if config.text_encoder else ({}, None)
    tower = TextTower(
        TextConfig(
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.context_length,
            pad=tokenizer.pad,
            eos=tokenizer.eos,
            width=config.text_width,
            heads=config.text_heads,
            layers=config.text_layers,
            pooling=config.text_pooling,
            latents=config.text_latents,
            hugging_face=settings,
        )
    )
    if encoder is not None:
        tower.encoder.load_state_dict(encoder.state_dict())
        tower.require_context(config.text_encoder)
    tower.freeze(config.freeze_text_layers)
    return tower
