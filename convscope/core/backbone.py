"""A backbone: a timm network seen as named stages, with the preprocessing its weights expect."""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from convscope import backbones  # noqa: F401  (registers our architectures with timm)
from convscope.core.errors import UserError

ModelArgs = Mapping[str, Any]

# Arguments of timm.create_model that are not the architecture's own.
RESERVED_ARGS = {"num_classes", "pretrained", "features_only", "checkpoint_path", "scriptable", "exportable", "no_jit"}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How pixels become the tensor that the weights were trained on."""

    size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"  # squash: resize to the crop's shape, whatever the image's


@dataclass(frozen=True)
class Stage:
    """One level of the network: timm's module name, its width and its total stride in pixels."""

    name: str
    channels: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a backbone was recognised in what it was loaded from."""

    layout: str = "timm"  # see core/checkpoint_layouts.py
    container: str = ""  # entry of the checkpoint that was read, such as state_dict_ema
    said_by: str = ""  # what named the architecture, where nobody gave it
    dropped: tuple[str, ...] = ()  # parts of the file that only training, a classifier or another tower uses
    resampled: tuple[str, ...] = ()  # position embeddings fitted to another image size
    preprocessing: str = "timm's for the architecture"


class Backbone(nn.Module):
    """A timm network without its classifier.

    `model` holds the timm network itself, so `model.state_dict()` has timm's own keys.
    """

    model: Any  # timm is untyped

    def __init__(
        self,
        model: nn.Module,
        *,
        arch: str,
        preprocessing: Preprocessing,
        model_args: ModelArgs | None = None,
        source: str = "",
        matched: float = 1.0,
        absent: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.arch = arch
        self.model_args = dict(model_args or {})
        self.preprocessing = preprocessing
        self.source = source or f"timm:{arch}@random"
        self.matched = matched  # share of the backbone's weights that the checkpoint provided
        self.absent = tuple(absent)  # weights it rightly lacks, at their initial values: see weights_match
        self.origin = Origin()
        self.classifier: dict[str, Tensor] = {}  # what the file had beside the backbone, under timm's keys
        self.stages = tuple(
            Stage(info["module"], info["num_chs"], int(info["reduction"])) for info in _feature_info(model, arch)
        )

    @property
    def num_features(self) -> int:
        """Width of the pooled feature vector that `forward` returns."""
        return int(getattr(self.model, "head_hidden_size", None) or self.model.num_features)

    @property
    def stride(self) -> int:
        """Total stride of the last stage, in pixels."""
        return self.stages[-1].stride

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features before the classifier. images (B, 3, H, W) normalised -> (B, num_features)."""
        features: Tensor = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return features

    def feature_maps(self, images: Tensor, stages: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Maps (B, C, H, W) of the named stages (all of them by default), in network order.

        Raises:
            UserError: a stage name that the network does not have.
        """
        indices = sorted(self.stage_indices(stages))
        maps: list[Tensor] = self.model.forward_intermediates(images, indices=indices, intermediates_only=True)
        return {self.stages[i].name: feature_map for i, feature_map in zip(indices, maps)}

    def stage_indices(self, names: Sequence[str] | None = None) -> list[int]:
        """Positions in `stages` of the given names; `None` or `["all"]` means every stage, `"last"` the last."""
        known = [stage.name for stage in self.stages]
        if names is None or list(names) == ["all"]:
            return list(range(len(known)))
        wanted = [known[-1] if name == "last" else name for name in names]
        if unknown := [name for name in wanted if name not in known]:
            raise UserError(f"{self.arch} has no layer {', '.join(unknown)}; its layers are: {', '.join(known)}")
        return [known.index(name) for name in wanted]

    def at_size(self, size: int) -> "Backbone":
        """The backbone for images of `size` x `size` pixels; a copy with resampled positions where they are fixed.

        Raises:
            UserError: a size that the network does not take.
        """
        wanted = replace(self.preprocessing, size=(size, size))
        resized = copy.copy(self)
        if wanted.size != self.preprocessing.size and hasattr(self.model, "set_input_size"):
            resized = copy.deepcopy(self)
            try:
                resized.model.set_input_size(img_size=wanted.size)
            except (AssertionError, RuntimeError) as error:  # timm refuses, or no position is left to resample to
                raise UserError(f"{self.arch} does not take images of {size} px: {_first_line(error)}") from error
        resized.preprocessing = wanted
        return resized

    def weights_hash(self) -> str:
        """SHA-256 (first 16 hexadecimal digits) over architecture, keys, shapes and values."""
        described = json.dumps([self.arch, self.model_args], sort_keys=True, default=str)  # lists equal tuples here
        digest = hashlib.sha256(described.encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(f"{key}:{tuple(value.shape)}:{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def create_backbone(
    arch: str, model_args: ModelArgs | None = None, *, pretrained: bool = False, seed: int | None = None
) -> Backbone:
    """Build a timm architecture by name, randomly initialised (from `seed` if given) unless `pretrained`.

    Raises:
        UserError: no such architecture, arguments it does not take, or weights that cannot be fetched.
    """
    arguments = dict(model_args or {})
    name = arch.split(".")[0]
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8])
        raise UserError(f"timm knows no architecture {arch!r}" + (f"; near it: {close}" if close else ""))
    if reserved := sorted(RESERVED_ARGS & arguments.keys()):
        raise UserError(f"model arguments cannot set {', '.join(reserved)}")
    if pretrained and not timm.is_model_pretrained(arch):
        raise UserError(f"timm has no weights for {arch}; timm:{name}@random gives an untrained one")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            model = timm.create_model(arch, pretrained=pretrained, num_classes=0, **arguments)
        except OSError as error:
            raise UserError(f"cannot fetch the weights of {arch}: {_first_line(error)}") from error
        except (TypeError, ValueError, RuntimeError, AssertionError, LookupError, AttributeError) as error:
            raise UserError(f"cannot build {arch} with {arguments}: {_first_line(error)}") from error
    source = f"timm:{arch}" if pretrained else f"timm:{arch}@random" + (f"={seed}" if seed else "")
    preprocessing = preprocessing_of(model, arguments)
    return Backbone(model, arch=arch, model_args=arguments, preprocessing=preprocessing, source=source)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own flag back afterwards."""
    flags = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in flags.items():
            part.training = training


def preprocessing_of(model: nn.Module, model_args: ModelArgs | None = None) -> Preprocessing:
    """Preprocessing from a timm model's own pretrained configuration; an `img_size` argument overrides its size."""
    return preprocessing_from(timm.data.resolve_model_data_config(model), model_args)


def preprocessing_from(data: Mapping[str, Any], model_args: ModelArgs | None = None) -> Preprocessing:
    """The same from what timm's `resolve_data_config` returns."""
    size = (model_args or {}).get("img_size") or data["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocessing(
        size=(int(height), int(width)),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=str(data["interpolation"]),
        crop_pct=float(data["crop_pct"]),
        crop_mode=str(data["crop_mode"]),
    )


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Modules of a timm network that are its classifiers; two in networks trained by distillation."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _feature_info(model: nn.Module, arch: str) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", None)
    if info is None or not hasattr(model, "forward_intermediates"):
        raise UserError(f"{arch} cannot return intermediate features in timm {timm.__version__}")
    return list(info)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
