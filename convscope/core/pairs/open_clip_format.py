"""open_clip's models as pairs, and pairs in open_clip's own format."""

import copy
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from timm.models import model_entrypoint
from torch import Tensor
from torch.nn import functional as F

from convscope.core.backbone import Preprocessing
from convscope.core.backbone_loading import OPEN_CLIP_CONFIG as CONFIG
from convscope.core.backbone_loading import open_clip_preprocessing
from convscope.core.errors import UserError
from convscope.core.files import write_bytes
from convscope.core.pairs.model import ImageText
from convscope.core.pairs.pair import Pair
from convscope.core.pairs.tokenizers import EOS, PAD, CaptionTokenizer

WEIGHTS = "open_clip_model.safetensors"
HEAD, TEXT_HEAD, TEXT_ENCODER = "image_head.weight", "text_head.weight", "text.encoder."
TOLERANCE = 1e-4  # of a vector's entries, once loaded by open_clip
PROBE = ("a photo of a cat", "two dogs, and a very long sentence that is cut where the context of the tower ends " * 9)


class OpenClipPair(Pair):
    """A model of open_clip, with the interface of ImageText.

    Args:
        model: what open_clip makes.
        tokenizer: its own.
        name: as `load_open_clip` takes it.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        super().__init__()
        self.model, self.name, self.tokenizer = model, name, lambda texts: tokenizer(list(texts))
        self.logit_scale = model.logit_scale
        self._preprocessing = open_clip_preprocessing(model.visual.preprocess_cfg)

    @property
    def preprocessing(self) -> Preprocessing:
        """How pixels become what `encode_image` takes."""
        return self._preprocessing

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> unit vectors (B, D), float32."""
        return F.normalize(self.model.encode_image(images).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) int64 -> unit vectors (B, D), float32."""
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def untrained(self, seed: int = 0) -> "OpenClipPair":
        """The same pair with an image tower at its initial values."""
        twin = copy.deepcopy(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = open_clip.create_model(_arguments(self.name)["model_name"], load_weights=False)
        twin.model.visual = fresh.visual
        return twin.to(self.logit_scale.device).eval()


def load_open_clip(name: str) -> OpenClipPair:
    """A model by `NAME/PRETRAINED` (a tag of open_clip's or a weights file), or a folder in open_clip's format.

    Raises:
        UserError: open_clip knows no such model, or cannot fetch or load its weights.
    """
    model = create_open_clip(name)
    try:
        tokenizer = open_clip.get_tokenizer(_arguments(name)["model_name"])
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise UserError(f"open_clip:{name}: {str(error).splitlines()[0]}") from error
    return OpenClipPair(model, tokenizer, name)


def create_open_clip(name: str) -> Any:
    """The same as open_clip makes it, in evaluation mode, without its tokenizer."""
    arguments = _arguments(name)
    try:
        model, _, _ = open_clip.create_model_and_transforms(**arguments)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise UserError(f"open_clip:{name}: {str(error).splitlines()[0]}") from error
    return model.eval()


def _arguments(name: str) -> dict[str, Any]:
    if Path(name).is_dir():
        return {"model_name": f"local-dir:{name}"}
    model_name, _, pretrained = name.partition("/")
    if model_name not in open_clip.list_models():
        raise UserError(f"open_clip:{name}: open_clip has no model {model_name!r}, and there is no such folder")
    known = open_clip.list_pretrained_tags_by_model(model_name)
    if not pretrained or (pretrained not in known and not Path(pretrained).is_file()):
        raise UserError(f"open_clip:{name}: name weights after a slash, a file or one of {', '.join(known) or '-'}")
    return {"model_name": model_name, "pretrained": pretrained}


def export_open_clip(pair: ImageText, folder: Path) -> None:
    """Write a folder that open_clip.create_model_and_transforms("local-dir:FOLDER") loads, once that was tried.

    Raises:
        UserError: a tower that it cannot write in this format, or the folder exists or cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; give another --output")
    _require_expressible(pair)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        temporary = Path(scratch) / folder.name
        temporary.mkdir(mode=0o755)
        write_bytes(temporary / CONFIG, (json.dumps(_config(pair), indent=2) + "\n").encode())
        save_file(_weights(pair), temporary / WEIGHTS, {"format": "pt"})
        if isinstance(pair.tokenizer, CaptionTokenizer):
            _save_tokenizer(pair.tokenizer, temporary)
        _verify(pair, temporary)
        temporary.rename(folder)


def _require_expressible(pair: ImageText) -> None:
    text, backbone = pair.text.config, pair.backbone
    custom = {key: value for key, value in backbone.model_args.items() if key != "drop_path_rate"}
    if text.hugging_face:
        raise UserError("this export writes open_clip's own text transformer only, not a Hugging Face encoder")
    if text.pooling != "eos":
        raise UserError(f"this export writes text towers with eos pooling only, not {text.pooling}")
    if pair.space.projection != "linear":
        raise UserError("this export writes linear projections only, not ConVIRT's")
    if custom:
        raise UserError(f"open_clip builds {backbone.arch} by its name alone, not with {custom}")
    if not model_entrypoint(backbone.arch).__module__.startswith("timm."):
        raise UserError(f"{backbone.arch} is an architecture of convscope's own, which open_clip cannot build")


def _config(pair: ImageText) -> dict[str, Any]:
    text, preprocessing = pair.text.config, pair.backbone.preprocessing
    tower = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "pool_type": "eos",
        "eos_id": text.eos,
        "pad_id": text.pad,
    }
    if isinstance(pair.tokenizer, CaptionTokenizer):
        tower["hf_tokenizer_name"] = "."  # any name: for a folder, open_clip looks into the folder itself
    model = {
        "embed_dim": pair.space.embed_dim,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": pair.backbone.arch,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": list(preprocessing.size),
        },
        "text_cfg": tower,
    }
    if pair.logit_bias is not None:
        model["init_logit_bias"] = pair.space.logit_bias
    shown = {
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "interpolation": preprocessing.interpolation,
        "resize_mode": "squash" if preprocessing.crop_mode == "squash" else "shortest",
    }
    return {"model_cfg": model, "preprocess_cfg": shown}


def _weights(pair: ImageText) -> dict[str, Tensor]:
    weights = {f"visual.trunk.{key}": value for key, value in pair.backbone.model.state_dict().items()}
    weights |= {f"text.{key}": value for key, value in pair.text.encoder.state_dict().items()}
    weights |= {"visual.head.proj.weight": pair.image_head.weight, "text.text_projection": pair.text_head.weight.T}
    weights["logit_scale"] = pair.logit_scale
    if pair.logit_bias is not None:
        weights["logit_bias"] = pair.logit_bias
    return {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()}


def _save_tokenizer(tokenizer: CaptionTokenizer, folder: Path) -> None:
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise UserError("open_clip reads such a tokenizer with transformers: pip install transformers") from error
    fast: Any = PreTrainedTokenizerFast
    fast(
        tokenizer_object=tokenizer.encoder,
        pad_token=tokenizer.encoder.id_to_token(tokenizer.pad) or PAD,
        eos_token=tokenizer.encoder.id_to_token(tokenizer.eos) or EOS,
        split_special_tokens=True,
    ).save_pretrained(str(folder))


def _verify(pair: ImageText, folder: Path) -> None:
    """Load the folder as any user of open_clip would, and compare what both make of some images and texts."""
    logging.getLogger().setLevel(max(logging.getLogger().level, logging.WARNING))
    theirs = load_open_clip(str(folder)).cpu()
    ours = pair.cpu().eval()
    images = torch.randn(2, 3, *ours.backbone.preprocessing.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        worst = max(
            float((ours.encode_image(images) - theirs.encode_image(images)).abs().max()),
            float((ours.encode_text(ours.tokenizer(PROBE)) - theirs.encode_text(theirs.tokenizer(PROBE))).abs().max()),
        )
    if not worst <= TOLERANCE:
        raise UserError(f"open_clip computes other vectors from this export (largest difference {worst:.2g})")
