"""Where the samples of a webdataset tar lie, and how one is read without reading what precedes it.

A sample is the run of members whose names share a key, so one slice of the tar holds all of it. The sidecar `X.tar.idx`
has, as little-endian uint64, the offset of each sample's first header and then the end of the last sample.
"""

import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from convscope.core.errors import UserError
from convscope.core.files import write_bytes

Sample = dict[str, bytes | str]  # {"__key__": "00000042", "jpg": b"...", "cls": b"3"}
Read = Callable[[int, int], bytes]  # (offset, count) -> at most count bytes

BLOCK = 512
ZEROS = bytes(BLOCK)
PLAIN = struct.Struct("100s24x12s12x8sc188xc166x")  # name, size, checksum, type, start of the name's prefix
MODULUS = 65521  # of Adler-32
LOOKS = 64  # samples of a tar that is newer than its index
REGULAR = b"0\x007"  # member types that hold a file
EMPTY = b"123456"  # links, devices, folders: no data follow, whatever the length says
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # the key ends at the first dot of the base name
META = re.compile(r"__[^/]*__($|/)")  # webdataset keeps its own notes under such names


class _DamageError(Exception):
    """What is wrong with a tar, and at which byte."""


class _Member(NamedTuple):
    start: int  # of the first header that belongs to it
    data: int
    size: int
    end: int
    key: str  # empty for folders, links and files that belong to no sample
    suffix: str


def index_path(shard: Path) -> Path:
    """`X.tar.idx` of `X.tar`."""
    return shard.with_name(shard.name + ".idx")


def scan(path: Path) -> tuple[NDArray[np.int64], str | None]:
    """Walk the headers of a tar.

    Returns:
        Offsets of the samples and the end of the last one (samples + 1,), and what is wrong with the tar, if anything;
        the offsets then stop at the damage.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return scan_open(descriptor)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    finally:
        os.close(descriptor)


def scan_open(descriptor: int) -> tuple[NDArray[np.int64], str | None]:
    """`scan` of an open file."""
    return _scan(lambda offset, count: os.pread(descriptor, count, offset), os.fstat(descriptor).st_size)


def _scan(read: Read, size: int) -> tuple[NDArray[np.int64], str | None]:
    starts: list[int] = []
    end, key, suffixes, finished, error = 0, "", set[str](), set[str](), None
    try:
        for member in _members(read, size):
            if member.key and member.key != key:
                if member.key in finished:
                    raise _DamageError(f"the files of sample {member.key} are not together (byte {member.start})")
                starts.append(member.start)
                finished.add(member.key)
                key, suffixes = member.key, set()
            if member.key and member.suffix in suffixes:
                raise _DamageError(f"sample {key} has two .{member.suffix} files (byte {member.start})")
            suffixes.add(member.suffix)
            end = member.end
        _require_end(read, end, size)
    except _DamageError as damage:
        error = str(damage)
    return np.array([*starts, end], dtype=np.int64), error


def _require_end(read: Read, end: int, size: int) -> None:
    """A whole tar ends with two blocks of zeros; without them, members may be missing."""
    if end + BLOCK > size:
        raise _DamageError(f"truncated at byte {size}: the end-of-archive mark is missing")
    while end < size:
        rest = read(end, 1 << 20)
        if rest.strip(b"\0"):
            raise _DamageError(f"data follow the end of the archive near byte {end} (two tars in one file?)")
        end += len(rest) or size


def write_index(path: Path) -> NDArray[np.int64]:
    """Scan a tar and write its sidecar; returns what `scan` does.

    Raises:
        UserError: the tar is damaged or unreadable, or the sidecar cannot be written.
    """
    starts = scan_sound(path)
    write_bytes(index_path(path), starts.astype("<u8").tobytes())
    return starts


def scan_sound(path: Path) -> NDArray[np.int64]:
    """Offsets as by `scan`.

    Raises:
        UserError: the tar is damaged or unreadable.
    """
    starts, error = scan(path)
    if error is not None:
        raise UserError(f"{path} is damaged: {error}; build or fetch it again")
    return starts


def load_index(path: Path) -> NDArray[np.int64]:
    """Read the sidecar of shard `path`, with a look at the tar's end and at the first header of its last sample.

    Where the tar has been written after the sidecar, the headers of LOOKS samples are looked at.

    Raises:
        UserError: the sidecar or the tar is unreadable or too short, or they do not belong together.
    """
    try:
        starts = parse_index(index_path(path).read_bytes(), str(index_path(path)))
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size < starts[-1] + BLOCK:
                raise UserError(
                    f"{path} is truncated: {status.st_size} bytes, {int(starts[-1])} and an end mark in its index; "
                    f"build or fetch it again"
                )
            newer = status.st_mtime_ns > index_path(path).stat().st_mtime_ns
            sound = fits(file.fileno(), starts, LOOKS if newer else 1)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    if not sound:
        raise _stale(str(index_path(path)))
    return starts


def fits(descriptor: int, starts: NDArray[np.int64], looks: int) -> bool:
    """Whether a tar ends where its index says, and `looks` of the samples begin there: the last, others spread evenly.

    What this misses comes to light when a sample is read, for headers have checksums and names their key.
    """
    if os.pread(descriptor, BLOCK, int(starts[-1])) != ZEROS:
        return False
    try:
        for start in starts[np.linspace(len(starts) - 2, 0, min(looks, len(starts) - 1)).astype(int)].tolist():
            _header(os.pread(descriptor, BLOCK, start), start)
    except _DamageError:
        return False
    return True


def parse_index(stored: bytes, name: str) -> NDArray[np.int64]:
    """Offsets (samples + 1,) from the bytes of a sidecar called `name`.

    Raises:
        UserError: they are no sidecar's.
    """
    starts = np.frombuffer(stored[: len(stored) // 8 * 8], "<u8").astype(np.int64)
    if len(stored) % 8 or not len(starts) or starts[0] < 0 or (np.diff(starts) <= 0).any():
        raise _stale(name)
    return starts


def _stale(name: str) -> UserError:
    return UserError(f"{name} is stale, it does not fit its tar; write it anew with shards index")


def parse_sample(data: bytes) -> Sample:
    """The sample whose members fill the slice `data` of a tar.

    Raises:
        UserError: not the slice of exactly one sample.
    """
    plain = _plain_sample(data)
    return read_sample(lambda offset, count: data[offset : offset + count], len(data)) if plain is None else plain


def _plain_sample(data: bytes) -> Sample | None:
    """The sample where it is sound and made of files with short names, as nearly all are; three times as fast."""
    sample: Sample = {}
    offset = 0
    try:
        while offset < len(data):
            header = data[offset : offset + BLOCK]
            name, length, checksum, kind, prefixed = PLAIN.unpack(header)
            size, stored = int(length[:11], 8), int(checksum[:6], 8)
            start = offset + BLOCK
            offset = start + -(-size // BLOCK) * BLOCK
            key, suffix = _split_name(name.partition(b"\0")[0].decode())
            if (
                (stored - _sum(header) + _sum(checksum) - 8 * ord(" ")) % MODULUS
                or kind != b"0"
                or prefixed != b"\0"
                or not 0 <= size <= offset - start <= len(data) - start
                or not key
                or sample.setdefault("__key__", key) != key
            ):
                return None
            sample[suffix] = data[start : start + size]
    except (struct.error, ValueError):
        return None
    return sample or None


def read_sample(read: Read, size: int, keep: Callable[[str], bool] | None = None) -> Sample:
    """The sample in a slice of `size` bytes that `read` gives access to; only suffixes that `keep` accepts are read.

    Raises:
        UserError: not the slice of exactly one sample.
    """
    sample: Sample = {}
    try:
        for member in _members(read, size):
            if not member.key:
                continue
            if (key := sample.setdefault("__key__", member.key)) != member.key:
                raise _DamageError(f"sample {key!s} is followed by {member.key}")
            if keep is None or keep(member.suffix):
                sample[member.suffix] = read(member.data, member.size)
    except _DamageError as damage:
        raise UserError(f"not one sample: {damage}") from damage
    if not sample:
        raise UserError("not one sample: no files")
    return sample


def _members(read: Read, size: int) -> Iterator[_Member]:
    """Walk headers up to `size` or a block of zeros; long names are applied to the member they precede."""
    offset = start = 0
    extended: dict[str, str] = {}
    while offset < size:
        header = read(offset, BLOCK)
        if header == ZEROS:
            return
        kind, length = _header(header, offset)
        if kind not in b"xgLK":
            length = 0 if kind in EMPTY else int(extended.get("size", length))
        data = offset + BLOCK
        end = data + -(-length // BLOCK) * BLOCK
        if end > size:
            raise _DamageError(f"truncated at byte {size}: the file at byte {offset} ends at byte {end}")
        if kind == b"x":
            extended |= _pax_records(read(data, length), offset)
        elif kind == b"L":
            extended["path"] = _text(read(data, length))
        elif kind not in b"gK":
            key, suffix = _split_name(extended.get("path") or _name(header)) if kind in REGULAR else ("", "")
            yield _Member(start, data, length, end, key, suffix)
            start, extended = end, {}
        offset = end


def _header(header: bytes, offset: int) -> tuple[bytes, int]:
    """Type and length in bytes of the member that a header announces."""
    if len(header) < BLOCK:
        raise _DamageError(f"truncated at byte {offset + len(header)}: inside a header")
    checksum = header[148:156]
    try:
        stored, length = _number(checksum), _number(header[124:136])
    except ValueError:
        stored, length = -1, -1
    if length < 0 or (stored - _sum(header) + _sum(checksum) - 8 * ord(" ")) % MODULUS:
        raise _DamageError(f"bad header checksum at byte {offset}" + (" (not a tar?)" if offset == 0 else ""))
    if header[156:157] == b"S":
        raise _DamageError(f"sparse file at byte {offset}; pack it without --sparse")
    return header[156:157], length


def _sum(data: bytes) -> int:
    """Sum of bytes modulo MODULUS: the low half of Adler-32, ten times as fast as a sum in Python."""
    return zlib.adler32(data, 0) & 0xFFFF


def _number(field: bytes) -> int:
    """Octal digits, or for large values a marked big-endian number."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[345] and header[257:263] == b"ustar\0":
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(data: bytes, offset: int) -> dict[str, str]:
    """`path` and `size` among records `LENGTH KEY=VALUE\\n`, where LENGTH counts the whole record."""
    records = {}
    try:
        while data:
            length = int(data.split(b" ", 1)[0])
            key, value = data[:length].split(b" ", 1)[1].removesuffix(b"\n").split(b"=", 1)
            if key.startswith(b"GNU.sparse"):
                raise _DamageError(f"sparse file at byte {offset}; pack it without --sparse")
            if key == b"path":
                records["path"] = value.decode("utf-8", "surrogateescape")
            elif key == b"size":
                if int(value) < 0:
                    raise ValueError
                records["size"] = str(int(value))
            data = data[length:]
    except (ValueError, IndexError) as error:
        raise _DamageError(f"bad extended header at byte {offset}") from error
    return records


def _split_name(name: str) -> tuple[str, str]:
    """Key and lower-case suffix, split where webdataset does; hidden files and files without suffix have no key."""
    match = NAME.fullmatch(name)
    if match is None or ("__" in name and META.match(name)):
        return "", ""
    key, suffix = match.groups()
    return key, suffix.lower()
