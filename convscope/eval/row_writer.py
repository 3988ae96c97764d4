"""Writing rows of features at their places, and marking those that are safe on disk."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convscope.core.errors import UserError

FLUSH_SECONDS = 20.0  # of work that a kill can cost


class UnkeptError(UserError):
    """Rows that cannot be kept, because the disk refuses or they are no numbers; what was begun is of no use."""


class RowWriter:
    """Writes rows at their places; used as a context manager. An UnkeptError leaves the last rows unmarked."""

    def __init__(self, files: Mapping[str, tuple[Path, Path]]) -> None:
        self._files, self._pending, self._flushed = files, list[NDArray[np.int64]](), time.monotonic()

    def __enter__(self) -> "RowWriter":
        self._rows: dict[str, int] = {}
        self._marks: dict[str, int] = {}
        self._start: dict[str, int] = {}
        try:
            for layer, (part, done) in self._files.items():
                self._start[layer] = np.load(part, mmap_mode="r").offset
                self._rows[layer] = os.open(part, os.O_WRONLY)
                self._marks[layer] = os.open(done, os.O_WRONLY)
        except OSError as error:
            self._close()
            raise UserError(f"cannot open {part}: {error.strerror}; processes must share the cache folder") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not isinstance(error, UnkeptError):
                self.flush()
        finally:
            self._close()

    def write(self, index: NDArray[np.int64], rows: Mapping[str, NDArray[Any]]) -> None:
        """Put rows (B, D) of every layer at `index` (B,).

        Raises:
            UnkeptError: the disk refused.
        """
        runs = np.split(np.arange(len(index)), np.flatnonzero(np.diff(index) != 1) + 1)
        for layer, values in rows.items():
            size = values.shape[1] * values.itemsize
            for run in runs:
                self._put(layer, values[run], self._start[layer] + int(index[run[0]]) * size)
        self._pending.append(index)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring the rows to disk, and only then mark them as done.

        Raises:
            UnkeptError: the disk refused.
        """
        index = np.concatenate([np.empty(0, np.int64), *self._pending])
        try:
            for layer, descriptor in self._rows.items():
                os.fsync(descriptor)
                for run in np.split(index, np.flatnonzero(np.diff(index) != 1) + 1):
                    if len(run):
                        os.pwrite(self._marks[layer], b"\1" * len(run), int(run[0]))
                os.fsync(self._marks[layer])
        except OSError as error:
            raise self._failed(layer, error) from error
        self._pending, self._flushed = [], time.monotonic()

    def _put(self, layer: str, values: NDArray[Any], offset: int) -> None:
        left = memoryview(values.tobytes())
        try:
            while left:
                written = os.pwrite(self._rows[layer], left, offset)
                left, offset = left[written:], offset + written
        except OSError as error:
            raise self._failed(layer, error) from error

    def _failed(self, layer: str, error: OSError) -> UnkeptError:
        return UnkeptError(f"cannot write {self._files[layer][0]}: {error.strerror or error}")

    def _close(self) -> None:
        for descriptor in (*self._rows.values(), *self._marks.values()):
            os.close(descriptor)
