"""Copies of a run's metrics for TensorBoard and Weights & Biases; metrics.jsonl stays the record."""

import io
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from convscope.core.errors import UserError
from convscope.core.files import write_bytes

TrackerName = Literal["tensorboard", "wandb"]


class Tracker(Protocol):
    """Where a run's numbers and pictures are shown."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars of one step."""

    def image(self, step: int, name: str, png: bytes) -> None:
        """Record one picture, given as the bytes of a PNG file."""

    def close(self) -> None:
        """Write what is pending."""


def open_trackers(names: Sequence[TrackerName], run_dir: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Open the named trackers for a run; call it in the main process only.

    Args:
        names: "tensorboard" writes `run_dir/tensorboard`; "wandb" logs in as the wandb library does, or stays on disk
            with `WANDB_MODE=offline`.
        run_dir: the run; its name is the tracked run's name, and a continued run continues there too.
        config: settings to show, as plain values.

    Raises:
        UserError: the library is not installed, or it refuses to start.
    """
    kinds: dict[TrackerName, type[_TensorBoard | _WandB]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
    opened: list[Tracker] = []
    try:
        for name in names:
            opened.append(kinds[name](run_dir, config))
    except ImportError as error:
        _close(opened)
        raise UserError(f"{name} is not installed; pip install 'convscope[tracking]'") from error
    except Exception:
        _close(opened)
        raise
    return opened


def _close(trackers: Sequence[Tracker]) -> None:
    for tracker in trackers:
        tracker.close()


class _TensorBoard:
    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"))
        rows = "\n".join(f"    {key}: {value}" for key, value in config.items())  # four spaces: shown as it stands
        self._writer.add_text("config", rows)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, png: bytes) -> None:
        with Image.open(io.BytesIO(png)) as picture:
            pixels = np.asarray(picture.convert("RGB"))  # (H, W, 3) uint8
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb: Any = wandb
        identity = run_dir / "wandb" / "run-id"  # a continued run is the same run there
        if not identity.exists():
            write_bytes(identity, secrets.token_hex(4).encode())
        try:
            self._run: Any = wandb.init(
                project="convscope",
                name=run_dir.name,
                id=identity.read_text(),
                resume="allow",
                dir=str(run_dir),
                config=dict(config),
            )
        except wandb.errors.Error as error:
            raise UserError(f"wandb does not start: {' '.join(str(error).split())}") from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, png: bytes) -> None:
        with Image.open(io.BytesIO(png)) as picture:
            self._run.log({name: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()
