"""A run directory: one writer at a time, checkpoints that are whole or absent, metrics that match them."""

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from convscope.core.config import load_yaml, save_yaml, to_dict
from convscope.core.errors import UserError
from convscope.core.files import atomic_write, whole_lines, write_bytes, write_json
from convscope.core.log import info

SUPERSEDED = 75  # exit code of an attempt that another one has replaced (EX_TEMPFAIL)


class RunDirectory:
    """The files of one run (docs/design.md); use it as a context manager to hold its lock.

    Only the process with `main=True` writes, but for skipped.jsonl; the others read the same checkpoint. Each start of
    the run takes a number, and one that is not the newest any more writes nothing and ends: on a cluster a process can
    outlive the attempt that it belongs to. There a lock that is still held is no reason to refuse.

    Args:
        path: the folder.
        main: whether this process writes.
        takes_over: go on although another process holds the lock.
    """

    def __init__(self, path: Path, *, main: bool = True, takes_over: bool = False) -> None:
        self.path = path
        self.main = main
        self.takes_over = takes_over
        self.attempt = 0
        self._started = 0.0
        self._lock: int | None = None

    def __enter__(self) -> "RunDirectory":
        if not self.main:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write to run directory {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it however the process ends
        except BlockingIOError:
            holder = (self.path / ".lock").read_text().strip()
            if not self.takes_over:
                os.close(self._lock)
                raise UserError(
                    f"another run is writing to {self.path} ({holder}); wait for it or choose another --output-dir"
                ) from None
            info(f"warning: an earlier attempt still holds {self.path} ({holder}); it ends when it next writes")
        except OSError as error:
            info(f"warning: {self.path} cannot be locked ({error.strerror}); see that no other run writes to it")
        for left in (*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")):  # by a kill in the middle of a write
            left.unlink(missing_ok=True)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def claim(self, config: Any, changeable: frozenset[str] = frozenset()) -> None:
        """Write config.yaml; where there is a checkpoint, check that it was trained with the same settings.

        Args:
            config: the resolved settings, a dataclass.
            changeable: names of settings that may differ when a run is continued.

        Raises:
            UserError: the directory holds a run with other settings, which are named.
        """
        if not self.main:
            return
        file = self.path / "config.yaml"
        if file.exists() and self.latest() is not None:
            before, now = _flatten(load_yaml(file)), _flatten(to_dict(config))
            differing = sorted(
                key
                for key in before.keys() | now.keys()
                if before.get(key) != now.get(key) and key.rsplit(".", 1)[-1] not in changeable
            )
            if differing:
                shown = ", ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in differing[:3])
                raise UserError(
                    f"{self.path} holds a run with other settings ({shown}); "
                    "use the same settings to continue it, or another --output-dir"
                )
        save_yaml(file, config)

    def start_attempt(self) -> None:
        """Take the next number; from now on earlier starts of this run write nothing."""
        if not self.main:
            return
        folder = self.path / "attempts"
        folder.mkdir(exist_ok=True)
        self.attempt = self._newest_attempt()
        while True:
            self.attempt += 1
            with suppress(FileExistsError):  # another start took the number at the same moment
                os.close(os.open(folder / f"{self.attempt:04d}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
                break
        self._started = time.time()
        self.describe_attempt({})

    def describe_attempt(self, record: Mapping[str, Any]) -> None:
        """Keep `record` (step, host, versions) in attempts/NNNN.json."""
        if self.main:
            write_json(self.path / "attempts" / f"{self.attempt:04d}.json", {"started": self._started, **record})

    def _newest_attempt(self) -> int:
        return max((int(file.stem) for file in (self.path / "attempts").glob("[0-9]*.json")), default=0)

    def _require_newest(self) -> None:
        if self.attempt and self._newest_attempt() != self.attempt:
            info(f"attempt {self.attempt} of {self.path} was superseded by a newer one and ends here")
            raise SystemExit(SUPERSEDED)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return latest_checkpoint(self.path)

    def save(self, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
        """Write checkpoints/step-NNNNNNNN.pt, move `latest` to it, and delete all but the `keep` newest."""
        folder = self.path / "checkpoints"
        file = folder / f"step-{step:08d}.pt"
        self._require_newest()
        with atomic_write(file) as stream:
            try:
                torch.save(dict(state), stream)
            except RuntimeError as error:  # how torch reports a full disk
                raise UserError(f"cannot write {file}: {str(error).splitlines()[0]}; is the disk full?") from error
        self._require_newest()
        write_bytes(folder / "latest", f"{file.name}\n".encode())
        others = [other for other in sorted(folder.glob("step-*.pt")) if other != file]
        earlier = [other for other in others if other.name < file.name]
        for old in set(others) - set(
            earlier[max(0, len(earlier) - keep + 1) :]
        ):  # later ones are of a run that was set back
            old.unlink(missing_ok=True)
        return file

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one object to metrics.jsonl."""
        self._append("metrics.jsonl", line)

    def append_skipped(self, line: Mapping[str, Any]) -> None:
        """Add one unreadable sample to skipped.jsonl."""
        self._append("skipped.jsonl", line)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        self._require_newest()
        try:
            with open(self.path / name, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path / name}: {error.strerror}") from error

    def rewind(self, step: int) -> None:
        """Drop the lines of metrics.jsonl and skipped.jsonl of steps after `step`: they are about to come again."""
        for name in ("metrics.jsonl", "skipped.jsonl"):
            file = self.path / name
            if self.main and file.exists():
                kept = [json.dumps(line) + "\n" for line in whole_lines(file) if line["step"] <= step]
                write_bytes(file, "".join(kept).encode())

    def skipped_by_cause(self) -> Counter[str]:
        """How many samples were skipped, for each cause."""
        return Counter(str(line["cause"]) for line in whole_lines(self.path / "skipped.jsonl"))


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run directory, or None.

    It is the one that `latest` names; where that is gone, the newest there is, for a checkpoint is whole or absent.
    """
    folder = run / "checkpoints"
    with suppress(OSError):
        file = folder / (folder / "latest").read_text().strip()
        if file.is_file():
            return file
    return max(folder.glob("step-*.pt"), default=None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, trusting nothing in it but tensors and plain values.

    Raises:
        UserError: missing, truncated, or not a checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except RuntimeError as error:
        raise UserError(f"{path} is no readable checkpoint: {(str(error).splitlines() or ['empty'])[0]}") from error
    except Exception as error:  # torch.load raises many kinds for a file of another kind, and says little with them
        raise UserError(f"{path} is no PyTorch checkpoint, or a damaged one") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
