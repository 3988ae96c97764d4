"""An image tower and a text tower with one space for both, and the file that holds them."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from convscope.core.backbone import Backbone, Preprocessing, create_backbone
from convscope.core.checkpoint import latest_checkpoint, load_checkpoint
from convscope.core.config import from_dict, to_dict
from convscope.core.errors import UserError
from convscope.core.files import read_json, write_bytes, write_json
from convscope.core.models import untrained_twin
from convscope.core.pairs.pair import Pair
from convscope.core.pairs.text_tower import TextConfig, TextTower
from convscope.core.pairs.tokenizers import Tokenizer, restore_tokenizer
from convscope.core.weights_file import State, read_weights

Projection = Literal["linear", "mlp"]

EXPORT, DESCRIPTION = "image_text.safetensors", "image_text.json"
KEY = "image_text"  # of the description in a file's metadata


@dataclass(frozen=True, kw_only=True)
class SharedSpace:
    """How both towers' features come together."""

    embed_dim: int = 512
    projection: Projection = "linear"
    """linear: one matrix, as in CLIP. mlp: one hidden layer with ReLU, as in ConVIRT."""
    logit_scale: float = 0.0
    """Logarithm of the inverse temperature, at first."""
    logit_bias: float | None = None
    """Added to every similarity (SigLIP), at first; none: no such weight."""


class ImageText(Pair):
    """A backbone and a text tower, each with a projection into the space of both."""

    tokenizer: Tokenizer
    logit_bias: nn.Parameter | None

    def __init__(self, backbone: Backbone, text: TextTower, tokenizer: Tokenizer, space: SharedSpace) -> None:
        super().__init__()
        self.backbone, self.text, self.tokenizer, self.space = backbone, text, tokenizer, space
        self.image_head = _projection(backbone.num_features, space)
        self.text_head = _projection(text.width, space)
        self.logit_scale = nn.Parameter(torch.tensor(space.logit_scale))
        self.logit_bias = None if space.logit_bias is None else nn.Parameter(torch.tensor(space.logit_bias))

    @property
    def preprocessing(self) -> Preprocessing:
        """How pixels become what `encode_image` takes."""
        return self.backbone.preprocessing

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> unit vectors (B, D), float32."""
        return _unit(self.image_head(self.backbone(images)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) int64 -> unit vectors (B, D), float32."""
        return _unit(self.text_head(self.text(tokens)))

    def untrained(self, seed: int = 0) -> "ImageText":
        """The same pair with an image tower at its initial values, its projection too."""
        twin = copy.deepcopy(self)
        twin.backbone = untrained_twin(self.backbone, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            twin.image_head = _projection(twin.backbone.num_features, self.space)
        return twin.to(self.logit_scale.device).eval()

    def describe(self) -> dict[str, Any]:
        """Architecture and tokenizer as plain values."""
        image = {
            "architecture": self.backbone.arch,
            "model_args": self.backbone.model_args,
            "preprocessing": self.backbone.preprocessing,
        }
        parts = {"image": image, "text": self.text.config, "space": self.space, "tokenizer": self.tokenizer.describe()}
        described: dict[str, Any] = to_dict(parts)
        return described


def save_image_text(path: Path, pair: ImageText) -> None:
    """Write both towers with all that `load_image_text` needs.

    Raises:
        UserError: the file cannot be written.
    """
    # Clones, because safetensors refuses tensors that share memory, as tied weights do.
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in pair.state_dict().items()}
    write_bytes(path, save(weights, {"format": "pt", KEY: json.dumps(pair.describe())}))


def write_description(folder: Path, pair: ImageText) -> None:
    """What makes a run's checkpoints readable before the run has ended."""
    write_json(folder / DESCRIPTION, pair.describe())


def load_image_text(source: str) -> ImageText:
    """Both towers of a run (its newest complete checkpoint, if it has not ended) or of a file that it left.

    Raises:
        UserError: no such source, or one without a text tower.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"no model {source}: it is neither a run of pretrain clip nor a file {EXPORT}")
    if path.is_dir() and (path / EXPORT).is_file():
        path = path / EXPORT
    if path.is_dir():
        checkpoint, description = latest_checkpoint(path), path / DESCRIPTION
        if checkpoint is None or not description.is_file():
            raise UserError(f"{path} is no run of pretrain clip: it has neither {EXPORT} nor {DESCRIPTION}")
        saved = load_checkpoint(checkpoint)
        state, described = saved["ema"] or saved["model"], read_json(description)
    else:
        file = read_weights(path)
        if KEY not in file.metadata:
            raise UserError(f"{path} has no text tower; give a run of pretrain clip, or its {EXPORT}")
        state, described = file.state, json.loads(file.metadata[KEY])
    pair = _build(described, path)
    _fill(pair, state, path)
    pair.backbone.source = source
    return pair.eval()


def _build(described: Mapping[str, Any], path: Path) -> ImageText:
    try:
        image = described["image"]
        backbone = create_backbone(image["architecture"], image["model_args"], seed=0)
        backbone.preprocessing = from_dict(Preprocessing, image["preprocessing"], str(path))
        text = TextTower(from_dict(TextConfig, described["text"], str(path)))
        space = from_dict(SharedSpace, described["space"], str(path))
        return ImageText(backbone, text, restore_tokenizer(described["tokenizer"]), space)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: its description of both towers is not understood: {error!r}") from error


def _fill(pair: ImageText, state: State, path: Path) -> None:
    try:
        pair.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own description: {str(error).splitlines()[1].strip()}") from error
    if broken := [key for key, value in state.items() if not torch.isfinite(value).all()]:
        raise UserError(f"{path}: {len(broken)} weights hold NaN or infinity, the first is {broken[0]}")


def _unit(features: Tensor) -> Tensor:
    full = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    return F.normalize(full, dim=-1)


def _projection(width: int, space: SharedSpace) -> nn.Module:
    if space.projection == "mlp":
        return nn.Sequential(nn.Linear(width, space.embed_dim), nn.ReLU(), nn.Linear(space.embed_dim, space.embed_dim))
    matrix = nn.Linear(width, space.embed_dim, bias=False)
    nn.init.normal_(matrix.weight, std=width**-0.5)
    return matrix
