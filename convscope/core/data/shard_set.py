"""One split of a data set: shards on disk, any sample of which can be read at once."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from convscope.core.data.decode import is_image
from convscope.core.data.remote import RemoteShard, is_remote, shard_cache
from convscope.core.data.shard_index import Sample, index_path, load_index, parse_sample, read_sample, scan_sound
from convscope.core.data.shard_listing import ShardListing, read_listing
from convscope.core.errors import UserError
from convscope.core.files import read_json, write_bytes

__all__ = ["Sample", "ShardSet", "label_of", "open_shards"]

MAX_OPEN = 256  # shards kept open in one process; systems allow as few as 1024 files
PRINTED, PRINTED_BYTES = 16, 4096  # samples of a shard made elsewhere whose first bytes enter its fingerprint
OPENERS = 16  # shards opened at once; on a network file system each takes milliseconds


class ShardSet:
    """Samples of one split by index, in the order of the shards.

    Attributes:
        shards: files, or shards that lie elsewhere.
        fingerprint: changes when the bytes of the shards do; of shards made elsewhere, when names, sizes, or the bytes
            of samples spread over each shard do; of shards that are fetched, when names or the places of samples do.
        classes: names in label order, if known.
        source: what the user asked for.
        split: the split's name.

    It can be pickled and used by forked processes and several threads at once. Reading raises IndexError for an index
    out of range, and UserError if a shard is gone, truncated, or other than its index says.
    """

    def __init__(
        self,
        shards: Sequence[Path | RemoteShard],
        starts: Sequence[NDArray[np.int64]],
        *,
        fingerprint: str,
        classes: list[str] | None,
        source: str,
        split: str,
    ) -> None:
        self.shards, self.fingerprint, self.classes = list(shards), fingerprint, classes
        self.source, self.split = source, split
        self._starts = list(starts)
        self._first = np.cumsum([0, *(len(offsets) - 1 for offsets in starts)])  # index of each shard's first sample
        self._open: dict[int, _Descriptor] = {}
        self._parts: tuple[ShardSet, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence["ShardSet"]) -> "ShardSet":
        """All samples of several sets, one set after the other."""
        if len(parts) == 1:
            return parts[0]
        whole = cls(
            [shard for part in parts for shard in part.shards],
            [offsets for part in parts for offsets in part._starts],
            fingerprint=hashlib.sha256(" ".join(part.fingerprint for part in parts).encode()).hexdigest(),
            classes=parts[0].classes if all(part.classes == parts[0].classes for part in parts) else None,
            source=" + ".join(part.source for part in parts),
            split=parts[0].split,
        )
        whole._parts = tuple(parts)
        return whole

    @property
    def parts(self) -> "tuple[ShardSet, ...]":
        """The sets that were joined into this one."""
        return self._parts or (self,)

    @property
    def sizes(self) -> list[int]:
        """Samples in each shard."""
        return [len(offsets) - 1 for offsets in self._starts]

    def counts(self, indices: NDArray[np.int64]) -> list[int]:
        """How many of `indices` lie in each shard."""
        counts: list[int] = np.histogram(indices, self._first)[0].tolist()
        return counts

    @property
    def is_remote(self) -> bool:
        """Whether some of its shards have to be fetched."""
        return any(isinstance(shard, RemoteShard) for shard in self.shards)

    def prefetch(self, indices: NDArray[np.int64]) -> None:
        """Fetch the shards of the samples at `indices`, those out of range aside, in the background."""
        inside = indices[(indices >= 0) & (indices < len(self))]
        for number in np.unique(np.searchsorted(self._first, inside, "right") - 1).tolist():
            shard = self.shards[number]
            if isinstance(shard, RemoteShard):
                shard.cache.prefetch([shard.url])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Sample:
        return self._read(index, None)

    def without_image(self, index: int) -> Sample:
        """The sample's labels, captions and fields; the image's bytes stay on disk."""
        return self._read(index, lambda suffix: not is_image(suffix))

    def shard_of(self, index: int) -> Path | RemoteShard:
        """Where a sample lies."""
        return self.shards[self._number(index)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def _number(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, "right")) - 1

    def _read(self, index: int, keep: Callable[[str], bool] | None) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = self._number(index)
        row = index - int(self._first[shard])
        start, stop = (int(offset) for offset in self._starts[shard][row : row + 2])
        place = self.shards[shard]
        try:
            descriptor = self._descriptor(shard)  # one that cannot be fetched says so itself
            try:
                if keep is not None:
                    return read_sample(lambda at, count: descriptor.read(start + at, count), stop - start, keep)
                return parse_sample(descriptor.read(start, stop - start))
            except UserError as error:
                if isinstance(place, RemoteShard):
                    raise place.replaced() from error
                raise UserError(
                    f"{place}: bytes {start} to {stop} are {error}; the index is stale or the shard damaged: "
                    f"see shards check"
                ) from error
        except OSError as error:
            raise UserError(f"cannot read {place}: {error.strerror or error}") from error

    def _descriptor(self, shard: int) -> "_Descriptor":
        descriptor = self._open.get(shard)
        if descriptor is None:
            if len(self._open) >= MAX_OPEN:
                self._open = {}  # a reader in another thread keeps the one it uses alive
            descriptor = self._open[shard] = _Descriptor(self.shards[shard])
        return descriptor


class _Descriptor:
    """An open file, closed when nobody refers to it. `pread` has no position to share, so forks may share it."""

    def __init__(self, shard: Path | RemoteShard) -> None:
        self.number = shard.open() if isinstance(shard, RemoteShard) else os.open(shard, os.O_RDONLY)

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self.number, count, offset)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def open_shards(source: str, split: str) -> ShardSet:
    """Open one split.

    Args:
        source: a folder with one folder per split; `builtin:shapes`; or, whatever `split` is, a folder of tars, one
            tar, or a brace pattern such as `data/train-{000000..000009}.tar`.
        split: "train", "test", ...

    Raises:
        UserError: nothing there, no such split, an unfinished build, a damaged shard, a stale index.
    """
    if source == "builtin:shapes":
        from convscope.core.data.shapes import cached

        return _open_folder(cached() / split, source, split)
    if source.startswith("builtin:"):
        raise UserError(f"there is no data set {source}; there is builtin:shapes")
    if is_remote(source):
        return _open_remote(source, split)
    path = Path(source).expanduser()
    if not path.is_dir():
        paths = _expand(path)
        return _open_all(paths, source, path.absolute().parent.name, _classes(path.parent))
    if _tars(path) and not _tars(path / split):
        return _open_folder(path, source, path.absolute().name)
    return _open_folder(path / split, source, split)


def field_of(sample: Sample, field: str) -> Any:
    """Member `field` as bytes, or that field of the json member as JSON has it.

    Raises:
        UserError: neither is there.
    """
    where = f"sample {sample['__key__']!s}"
    value: Any = sample.get(field)
    if value is None and "json" in sample:
        try:
            fields = json.loads(sample["json"])
        except ValueError as error:
            raise UserError(f"{where}: its .json is not valid JSON: {error}") from error
        value = fields.get(field) if isinstance(fields, dict) else None
    if value is None:
        members = ", ".join(name for name in sample if name != "__key__")
        raise UserError(f"{where} has no label {field!r}, neither as a member ({members}) nor as a field of its json")
    return value


def label_of(sample: Sample, field: str = "cls") -> int:
    """The integer in member `field`, or in that field of the json member.

    Raises:
        UserError: neither is there, or it is no integer.
    """
    value = field_of(sample, field)
    try:
        if isinstance(value, (float, bool, list, dict)):
            raise ValueError
        return int(value)
    except ValueError:
        value = value.decode(errors="replace") if isinstance(value, bytes) else value
        raise UserError(f"sample {sample['__key__']!s}: its label {field!r} is {value!r}, not an integer") from None


def _open_remote(source: str, split: str) -> ShardSet:
    cache = shard_cache()
    return _open_all([RemoteShard(url, cache) for url in _braces(source)], source, split, None)


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError as error:  # unbalanced braces
        raise UserError(f"{pattern}: {error}") from error


def _expand(pattern: Path) -> list[Path]:
    paths = [Path(name) for name in _braces(str(pattern))]
    if missing := [path for path in paths if not path.is_file()]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]} does not exist{more}; give a folder of shards, a .tar, or builtin:shapes")
    if other := [path for path in paths if path.suffix != ".tar"]:
        raise UserError(
            f"{other[0]} is no plain .tar; unpack a compressed one (it allows no random access), pack other files "
            f"with convscope shards build"
        )
    return paths


def _open_folder(folder: Path, source: str, split: str) -> ShardSet:
    if not folder.is_dir():
        splits = sorted(path.name for path in folder.parent.iterdir() if path.is_dir() and _tars(path))
        has = f"it has {', '.join(splits)}" if splits else "it holds no shards; see convscope shards build"
        raise UserError(f"{source} has no split {split!r}; {has}")
    classes = _classes(folder)
    if listing := read_listing(folder):
        return _open_listed(folder, listing, source, split, classes)
    if (folder / ".build.json").exists():
        raise UserError(f"{folder} is not finished; run convscope shards build again")
    if not (paths := _tars(folder)):
        raise UserError(f"{folder} holds no .tar files")
    return _open_all(paths, source, split, classes)


def _open_listed(folder: Path, listing: ShardListing, source: str, split: str, classes: list[str] | None) -> ShardSet:
    sizes = {folder / record.file: record.bytes for record in listing.shards}
    for path, size in sizes.items():
        found = path.stat().st_size if path.exists() else 0
        if found != size:
            state = f"{'truncated' if found < size else 'too long'}: {found} of {size} bytes"
            raise UserError(f"{path} is {state if found else 'missing'}; build or fetch it again")
    if extra := [path for path in _tars(folder) if path not in sizes]:
        raise UserError(f"{extra[0]} is not in {folder / 'shards.json'}; delete it, or shards.json")
    shards = _open_all(list(sizes), source, split, classes, listing.fingerprint)
    if len(shards) != listing.samples:
        raise UserError(f"{folder} holds {len(shards)} samples, {listing.samples} in shards.json; see shards check")
    return shards


def _open_all(
    shards: Sequence[Path | RemoteShard],
    source: str,
    split: str,
    classes: list[str] | None,
    fingerprint: str | None = None,
) -> ShardSet:
    with ThreadPoolExecutor(OPENERS) as pool:
        starts = list(pool.map(_starts, shards))
    if sum(len(offsets) - 1 for offsets in starts) == 0:
        raise UserError(f"{source}: the shards of split {split!r} hold no samples")
    fingerprint = fingerprint or _fingerprint(shards, starts)
    return ShardSet(shards, starts, fingerprint=fingerprint, classes=classes, source=source, split=split)


def _starts(shard: Path | RemoteShard) -> NDArray[np.int64]:
    """Sample offsets from the sidecar; a shard made elsewhere has none, and gets one if its folder can be written."""
    if isinstance(shard, RemoteShard):
        return shard.starts()
    if index_path(shard).exists():
        return load_index(shard)
    starts = scan_sound(shard)
    with suppress(UserError):  # a read-only folder
        write_bytes(index_path(shard), starts.astype("<u8").tobytes())
    return starts


def _fingerprint(shards: Sequence[Path | RemoteShard], starts: Sequence[NDArray[np.int64]]) -> str:
    with ThreadPoolExecutor(OPENERS) as pool:
        return hashlib.sha256(b"".join(pool.map(_fingerprint_of, shards, starts))).hexdigest()


def _fingerprint_of(shard: Path | RemoteShard, offsets: NDArray[np.int64]) -> bytes:
    name = shard.url if isinstance(shard, RemoteShard) else f"{shard.name}:{shard.stat().st_size}"
    digest = hashlib.sha256(f"{name}:{len(offsets)}\n".encode())
    digest.update(offsets.astype("<u8").tobytes())
    if isinstance(shard, RemoteShard):  # its bytes are far away
        return digest.digest()
    spread = np.linspace(0, len(offsets) - 2, min(PRINTED, len(offsets) - 1)).astype(int)
    with open(shard, "rb", buffering=0) as file:  # samples of equal size leave offsets alone
        for start, stop in zip(offsets[spread].tolist(), offsets[spread + 1].tolist()):
            digest.update(os.pread(file.fileno(), min(stop - start, PRINTED_BYTES), start))
    return digest.digest()


def _classes(folder: Path) -> list[str] | None:
    """Names beside the shards or one folder up, where `shards build` puts them."""
    path = next(
        (place / "classes.json" for place in (folder, folder.parent) if (place / "classes.json").exists()), None
    )
    if path is None:
        return None
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is not a list of class names")
    return names


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
