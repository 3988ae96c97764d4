"""Features on disk: a memory map for each layer, filled row by row by any number of processes, resumed after a stop.

```
FOLDER/about.json      what the features depend on; a hash of it names the folder
FOLDER/keys.json       the samples, in order
FOLDER/LAYER.npy       (N, D), whole or absent
FOLDER/LAYER.part      the same file while rows are missing, and
FOLDER/LAYER.done      a byte for each row, 1 once the row is safe on disk
FOLDER/.lock           held while rows are computed
```
"""

import errno
import fcntl
import json
import mmap
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convscope.core.errors import UserError
from convscope.core.files import write_bytes, write_json
from convscope.core.log import info
from convscope.eval.row_writer import RowWriter, UnkeptError

Store = Literal["fp32", "fp16"]

DTYPES: Mapping[Store, Any] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}
USUAL = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")  # where the flag has this value
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if USUAL else 0)  # Python names it from 3.13 on


class FeatureStore:
    """The features of one network on one data set.

    Args:
        folder: made when something is written.
        count: samples N.
        store: numbers as they are kept.
    """

    def __init__(self, folder: Path, count: int, store: Store = "fp32") -> None:
        self.folder, self.count, self.dtype = folder, count, DTYPES[store]

    def missing(self, layers: Iterable[str]) -> list[str]:
        """Layers that are not there, or not whole; without the keys, all of them."""
        keys = self._keys()
        return [layer for layer in layers if keys is None or isinstance(self._mapped(layer), Exception)]

    def read(self, layer: str) -> Tensor:
        """A layer's features (N, D) as a map of the file.

        Pages are read when they are used and may be dropped again, so the file can be larger than memory. What is
        written into the tensor never reaches the file.

        Raises:
            UserError: they are not there, or not whole.
        """
        found = self._mapped(layer)
        if isinstance(found, Exception):
            raise UserError(f"cannot read features {self._file(layer, 'npy')}: {found}")
        return found

    def read_keys(self) -> list[str]:
        """Keys of the samples.

        Raises:
            UserError: they are not there, or not whole.
        """
        keys = self._keys()
        if keys is None:
            raise UserError(f"{self.folder / 'keys.json'} does not hold the keys of {self.count} samples")
        return keys

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other commands from computing the same features; wait while one of them does."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._refused(error) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it however we end
            except BlockingIOError:
                info("another command is computing these features; waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:  # a file system without locks: at worst two commands write the same numbers twice
                pass
            yield
        finally:
            os.close(descriptor)

    def begin(self, widths: Mapping[str, int], about: Mapping[str, Any]) -> None:
        """Make room on disk for layers of D columns each; rows of an earlier attempt stay.

        Raises:
            UnkeptError: no room, or the folder cannot be written.
        """
        try:
            write_json(self.folder / "about.json", about)
            for layer, width in widths.items():
                file, found = self._file(layer, "npy"), self._mapped(layer)
                if isinstance(found, Exception) and file.exists():
                    info(f"note: cached features {file} cannot be read ({found}); they are computed anew")
                try:
                    map_rows(self._file(layer, "part"), self.count, self.dtype, width)
                    self._done(layer)
                except (OSError, ValueError, EOFError):
                    self._allocate(layer, width)
        except OSError as error:
            size = sum(widths.values()) * self.count * self.dtype.itemsize
            raise self._refused(error, f" ({size / 1e9:.2g} GB are needed)") from error
        except UserError as error:
            raise UnkeptError(str(error)) from error

    def remaining(self, layers: Sequence[str]) -> NDArray[np.int64]:
        """Rows that at least one of the layers, all begun, still lacks, ascending."""
        return np.flatnonzero(~np.all([self._done(layer) for layer in layers], axis=0))

    def writer(self, layers: Sequence[str]) -> "RowWriter":
        """Opens begun layers for writing; every process has its own."""
        return RowWriter({layer: (self._file(layer, "part"), self._file(layer, "done")) for layer in layers})

    def finish(self, layers: Sequence[str], keys: Sequence[str]) -> None:
        """Give layers all rows of which are written their final names.

        Raises:
            UserError: rows are missing, or the folder cannot be written.
        """
        if absent := len(self.remaining(layers)):
            raise UserError(f"{absent} of {self.count} rows in {self.folder} are missing; run the command again")
        write_bytes(self.folder / "keys.json", json.dumps(list(keys)).encode())
        try:
            for layer in layers:
                os.replace(self._file(layer, "part"), self._file(layer, "npy"))
                self._file(layer, "done").unlink()
            _sync(self.folder)
        except OSError as error:
            raise self._refused(error) from error

    def discard(self, layers: Sequence[str]) -> None:
        """Remove what is unfinished."""
        for layer in layers:
            for suffix in ("done", "part"):
                with suppress(OSError):
                    self._file(layer, suffix).unlink()

    def _mapped(self, layer: str) -> Tensor | Exception:
        try:
            return map_rows(self._file(layer, "npy"), self.count, self.dtype)
        except (ValueError, OSError, EOFError) as error:
            return error

    def _keys(self) -> list[str] | None:
        try:
            keys = json.loads((self.folder / "keys.json").read_text())
        except (OSError, ValueError):
            return None
        return keys if isinstance(keys, list) and len(keys) == self.count else None

    def _file(self, layer: str, suffix: str) -> Path:
        return self.folder / f"{layer}.{suffix}"

    def _done(self, layer: str) -> NDArray[np.bool_]:
        done = np.fromfile(self._file(layer, "done"), np.bool_)
        if len(done) != self.count:
            raise ValueError("of another length")
        return done

    def _allocate(self, layer: str, width: int) -> None:
        """A file of the right size, whose room is taken at once: a full disk shows now and not after hours."""
        self.discard([layer])
        with open(self._file(layer, "part"), "wb") as file:
            header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count, width)}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            size = file.tell() + self.count * width * self.dtype.itemsize
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except (OSError, AttributeError) as error:  # a system or a file system without it
                if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                os.ftruncate(file.fileno(), size)
            os.fsync(file.fileno())
        write_bytes(self._file(layer, "done"), bytes(self.count))

    def _refused(self, error: OSError, more: str = "") -> UnkeptError:
        return UnkeptError(
            f"cannot keep features in {self.folder}: {error.strerror or error}{more}; "
            "$CONVSCOPE_CACHE names another place, --no-cache uses $TMPDIR"
        )


def map_rows(file: Path, count: int, dtype: Any, width: int | None = None) -> Tensor:
    """The matrix (count, width) in a .npy file as a private map: read when used, and never changed on disk.

    Raises:
        OSError, ValueError, EOFError: the file is missing, truncated, or holds something else.
    """
    found = np.load(file, mmap_mode="r")
    if not isinstance(found, np.memmap) or found.ndim != 2 or found.dtype != dtype or not found.flags.c_contiguous:
        raise ValueError("not a matrix of such numbers")
    if len(found) != count or width not in (None, found.shape[1]):
        raise ValueError(f"a matrix of {found.shape}, not of {count} rows")
    if file.stat().st_size != found.offset + found.nbytes:
        raise ValueError("not of its own length")
    with open(file, "rb") as opened:
        # Without a reservation: a private map that could be written to is else refused where it exceeds memory.
        flags = mmap.MAP_PRIVATE | NO_RESERVE
        memory = mmap.mmap(opened.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.from_numpy(np.ndarray(found.shape, dtype, buffer=memory, offset=found.offset))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
