"""Weights on disk, whoever wrote them: their tensors, unwrapped, and what the file says about itself."""

import argparse
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.models import clean_state_dict
from torch import Tensor

from convscope.core.checkpoint import load_checkpoint
from convscope.core.errors import UserError

State = dict[str, Tensor]

# Where training code puts the state dict. Moving averages first, as timm does; "teacher" is DINO's and DINOv2's.
WRAPPERS = ("state_dict_ema", "model_ema", "ema", "teacher", "state_dict", "model_state_dict", "model", "module")
COPIES = (*WRAPPERS, "student")  # further networks that may lie beside the one that is read


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A file's tensors and words."""

    path: Path
    state: State = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)  # of safetensors
    said: Mapping[str, Any] = field(default_factory=dict)  # plain values at the top of a checkpoint: settings, epoch
    container: str = ""  # the entry that held the state dict, such as "teacher"
    copies: tuple[str, ...] = ()  # entries beside it that hold networks too, such as "student"


def read_weights(path: Path) -> WeightsFile:
    """All tensors of a weights file, unwrapped, without the prefixes of DDP and torch.compile.

    Raises:
        UserError: unreadable, not a checkpoint, or without any weights.
    """
    _refuse_what_is_no_checkpoint(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is no readable safetensors file: {error}") from error
        weights = WeightsFile(path=path, state=_clean(state), metadata=metadata)
    else:
        loaded = _load_untrusted(path)
        state, container = unwrap(loaded)
        weights = WeightsFile(
            path=path,
            state=state,
            said={
                key: value
                for key, value in loaded.items()
                if not isinstance(value, Tensor) and not _holds_tensors(value)
            },
            container=container,
            copies=tuple(key for key in COPIES if key != container and _holds_tensors(loaded.get(key))),
        )
    if not weights.state:
        raise UserError(f"{path} holds no weights")
    return weights


def unwrap(loaded: Mapping[str, Any]) -> tuple[State, str]:
    """The state dict inside what training code saved, and the entry that held it ("" where nothing wrapped it).

    Entries that are no tensors (settings, counters) are left out.
    """
    for key in WRAPPERS:
        if isinstance(inner := loaded.get(key), Mapping) and (state := unwrap(inner)[0]):
            return state, key
    return _clean({key: value for key, value in loaded.items() if isinstance(value, Tensor)}), ""


def first_names(names: list[str], count: int = 3) -> str:
    """Some names for a message, with an ellipsis for the others."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _clean(state: State) -> State:
    cleaned: State = clean_state_dict(state)  # at the start of a key, in either order
    return {key.replace("._orig_mod.", "."): value for key, value in cleaned.items()}  # a compiled part


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values())


def _refuse_what_is_no_checkpoint(path: Path) -> None:
    """Files that downloads leave behind, told apart by how they start and end."""
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not path.stat().st_size:
        raise UserError(f"{path} is empty")
    if start.startswith(b"<"):
        raise UserError(f"{path} is a web page, not weights: its download failed; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS, not weights; fetch the file itself with git lfs pull")
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated: its end is missing; fetch it again")
    if start.startswith(b"PK") and _is_torchscript(path):
        raise UserError(
            f"{path} is a TorchScript program, not weights: save torch.jit.load({path.name!r}).state_dict() where you "
            "trust it, and pass that file"
        )


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _load_untrusted(path: Path) -> dict[str, Any]:
    # Published checkpoints often carry their command line as a Namespace, a plain bag of values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return load_checkpoint(path)
        except UserError as error:
            if not (blocked := _blocked_objects(path)):
                raise
            raise UserError(
                f"{path} holds Python objects that could run code when loaded ({first_names(blocked)}); "
                "save its state dict alone and pass that file"
            ) from error


def _blocked_objects(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a checkpoint at all: the error of reading it says so
        return []
