"""Writing one shard: a tar with fixed metadata, its index, and a record that says it is complete."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from convscope.core.data.decode import DecodeError, decode
from convscope.core.data.shard_index import index_path, write_index
from convscope.core.data.shard_listing import ShardRecord, read_listing
from convscope.core.data.sources import EncodedImage, Item, Source
from convscope.core.errors import UserError
from convscope.core.files import atomic_write, read_json, write_json
from convscope.core.log import info

LOSSLESS = {"png", "bmp", "gif", "tif", "tiff", "ppm", "pgm"}
JPEG_QUALITY = 95


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: the samples from position `first` of its split on."""

    path: Path
    first: int
    items: Sequence[Item]
    label_of: Mapping[str, int] = field(repr=False)

    @property
    def record_path(self) -> Path:
        """Where the record is kept until shards.json holds those of the whole split."""
        return self.path.with_name(f".{self.path.name}.json")


def finished(job: ShardJob) -> ShardRecord | None:
    """The record of a shard that an earlier build completed.

    A shard's record is written after the shard was fsynced and renamed, so its presence and the right size mean that
    the shard is whole; hashing everything again would cost as much as reading the whole data set.
    """
    if job.record_path.exists():
        record: ShardRecord | None = _own_record(job.record_path)
    else:
        listing = read_listing(job.path.parent)
        record = listing.by_file.get(job.path.name) if listing else None
    if record is None or not (
        job.path.exists() and index_path(job.path).exists() and job.path.stat().st_size == record.bytes
    ):
        return None
    return record


def _own_record(path: Path) -> ShardRecord:
    try:
        return ShardRecord.of(read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not what shards build writes: {error!r}") from error


def write_shard(source: Source, job: ShardJob, resize: int | None) -> ShardRecord:
    """Write the tar, its index, then its record; images that cannot be decoded for `resize` are named and left out.

    Raises:
        UserError: an image that cannot be read, or a disk that is full.
    """
    skipped: list[str] = []
    with atomic_write(job.path) as file:
        out = _Hashing(file)
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for position, item in enumerate(job.items, job.first):
                image = source.read(item)
                try:
                    image = image if resize is None else _resized(image, resize)
                except DecodeError as error:
                    skipped.append(f"{item.name} ({error.cause})")
                    continue
                for suffix, data in _members(item, image, job.label_of):
                    member = tarfile.TarInfo(f"{position:08d}.{suffix}")  # its defaults: time, user and group are 0
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    report_files("cannot decode", skipped)
    write_index(job.path)
    record = ShardRecord(job.path.name, len(job.items) - len(skipped), out.size, out.digest.hexdigest())
    write_json(job.record_path, asdict(record))
    return record


def _members(item: Item, image: EncodedImage, label_of: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    yield image
    if item.label is not None:
        yield "cls", str(label_of[item.label]).encode()
    if item.caption is not None:
        yield "txt", item.caption.encode()
    fields = json.dumps({"file": item.name, **item.fields}, ensure_ascii=False, default=str)
    yield "json", fields.encode("utf-8", "backslashreplace")  # names on disk may be no UTF-8


def _resized(image: EncodedImage, short_side: int) -> EncodedImage:
    """Shrink to the short side and encode as JPEG, or PNG where the original was lossless; never enlarges."""
    picture = decode({"__key__": "image", image.suffix: image.data})
    scale = short_side / min(picture.size)
    if scale >= 1:
        return image
    width, height = (max(short_side, round(side * scale)) for side in picture.size)
    encoded = io.BytesIO()
    lossless = image.suffix in LOSSLESS
    small = picture.resize((width, height), resample=3)  # bicubic
    small.save(encoded, "PNG" if lossless else "JPEG", **({} if lossless else {"quality": JPEG_QUALITY}))
    return EncodedImage("png" if lossless else "jpg", encoded.getvalue())


def report_files(what: str, names: Sequence[str]) -> None:
    """Say on the terminal that `names` were left out, naming the first five."""
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        info(f"{what} {len(names)} of the source's files: {', '.join(names[:5])}{more}")


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size
