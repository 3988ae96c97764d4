"""Images with names and labels, wherever they lie: class folders, a zip of them, shards."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from convscope.core.data.decode import DecodeError, decode
from convscope.core.data.shard_index import Sample
from convscope.core.data.shard_set import ShardSet, field_of, label_of, open_shards
from convscope.core.data.sources import FolderSource, Item, ZipSource
from convscope.core.data.stream import Transform
from convscope.core.errors import UserError

THREADS = 4  # that decode; Pillow releases the interpreter's lock


@dataclass(frozen=True)
class ImageFiles:
    """Named images.

    Attributes:
        names: file names with their folders, or keys of samples.
        labels: names of classes where they are known, else their numbers; "" without one.
        source: what the user asked for.
        fingerprint: changes when names or sizes of files do, or a set of shards.
        read: the image at a place, RGB.
    """

    names: list[str]
    labels: list[str]
    source: str
    fingerprint: str
    read: Callable[[int], Image] = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, transform: Transform, batch_size: int, places: Sequence[int] | None = None) -> Iterator[Tensor]:
        """The images at `places`, or all, in batches (B, 3, H, W) uint8.

        Raises:
            UserError: an image cannot be read, or differs in size from the others after the transform.
        """
        wanted = list(range(len(self))) if places is None else list(places)
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(wanted), batch_size):
                part = wanted[start : start + batch_size]
                pixels = list(pool.map(lambda place: transform(self.read(place)), part))
                odd = next((i for i, one in enumerate(pixels) if one.shape != pixels[0].shape), None)
                if odd is not None:
                    sides = [" x ".join(str(side) for side in one.shape[1:]) for one in (pixels[0], pixels[odd])]
                    first, other = (self.names[part[i]] for i in (0, odd))
                    raise UserError(
                        f"{self.source}: {first} has {sides[0]} pixels, {other} {sides[1]}; all have to be alike"
                    )
                yield torch.stack(pixels)


def open_images(source: str, split: str = "test", label: str = "cls") -> ImageFiles:
    """Open class folders, a zip of them, or shards.

    Args:
        source: the folder, the zip, or whatever `open_shards` takes.
        split: of shards.
        label: of shards, the member or json field with the class.

    Raises:
        UserError: nothing there, or nothing that holds images.
    """
    path = Path(source)
    if path.suffix == ".zip" and path.is_file():
        return _of_files(ZipSource(path), source)
    if path.is_dir() and not _holds_shards(path, split):
        return _of_files(FolderSource(path), source)
    return _of_shards(open_shards(source, split), label)


def _holds_shards(path: Path, split: str) -> bool:
    return (path / "shards.json").exists() or any(path.glob("*.tar")) or any((path / split).glob("*.tar"))


def _of_files(files: FolderSource | ZipSource, source: str) -> ImageFiles:
    items = [item for part in files.listing().splits.values() for item in part]

    def read(place: int) -> Image:
        item: Item = items[place]
        image = files.read(item)
        return decode({"__key__": item.name, image.suffix: image.data})

    listed = "\n".join(f"{item.name}:{item.size}" for item in items)
    fingerprint = hashlib.sha256(listed.encode("utf-8", "backslashreplace")).hexdigest()
    names, labels = [item.name for item in items], [item.label or "" for item in items]
    return ImageFiles(names, labels, source, fingerprint, read)


def _of_shards(shards: ShardSet, label: str) -> ImageFiles:
    names, labels = [], []
    for index in range(len(shards)):
        sample = shards.without_image(index)
        named = _field(sample, "file")  # as shards build notes it
        names.append(str(named or sample["__key__"]))
        labels.append(_class_of(sample, label, shards.classes or []))

    def read(place: int) -> Image:
        try:
            return decode(shards[place])
        except DecodeError as error:
            raise UserError(f"{shards.source}: {error}") from error

    return ImageFiles(names, labels, shards.source, shards.fingerprint, read)


def _field(sample: Sample, name: str) -> Any:
    try:
        return field_of(sample, name)
    except UserError:
        return None


def _class_of(sample: Sample, label: str, classes: Sequence[str]) -> str:
    if _field(sample, label) is None:
        return ""
    number = label_of(sample, label)
    return classes[number] if 0 <= number < len(classes) else str(number)
