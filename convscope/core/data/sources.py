"""Where images to pack come from: folders, zips, tables, torchvision data sets, the embedded shapes."""

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from convscope.core.data import shapes_render
from convscope.core.data.decode import IMAGE_SUFFIXES
from convscope.core.errors import UserError

TABLE_SUFFIXES = {"csv", "tsv", "parquet"}
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing", "unlabeled", "extra"}
SYSTEM_FILES = {"__MACOSX", "Thumbs.db", "desktop.ini"}


@dataclass(frozen=True, slots=True)
class Item:
    """One image to pack: its name inside the source, and what is known of it without reading it."""

    name: str
    size: int = -1  # bytes; -1 where only reading tells
    label: str | None = None  # class name
    caption: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """All images of a source; the split is "" where the source has none of its own."""

    splits: dict[str, list[Item]]
    classes: list[str] | None = None  # in label order, where the source fixes that order itself
    ignored: list[str] = field(default_factory=list)  # empty files, files that are no images, unsafe names


class EncodedImage(NamedTuple):
    """An image file's bytes, and the extension that names its format: "jpg", "png", ..."""

    suffix: str
    data: bytes


class Source(Protocol):
    """What `shards build` reads; `read` is called from several threads at once."""

    def listing(self) -> Listing:
        """Name all images, sorted, without reading them."""

    def read(self, item: Item) -> EncodedImage:
        """Bytes of one image; UserError if they cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Column names of a table; None is found by the usual names."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None


def open_source(
    source: str, *, columns: Columns | None = None, split: str | None = None, data_root: Path | None = None
) -> Source:
    """Find out what `source` is.

    Args:
        source: a folder, zip or table, a Hugging Face data set on disk, `torchvision:NAME`, or `builtin:shapes`.
        columns: names of a table's columns.
        split: the only split wanted, for sources that fetch splits separately.
        data_root: where torchvision keeps its files.

    Raises:
        UserError: nothing of that name, or nothing that can be packed.
    """
    if source == "builtin:shapes":
        return ShapesSource()
    if source.startswith("torchvision:"):
        from convscope.core.data.torchvision_sets import TorchvisionSource

        return TorchvisionSource(source.partition(":")[2], split=split, root=data_root)
    path = Path(source)
    if path.suffix in (".arrow", ".parquet") or path.is_dir():
        from convscope.core.data.arrow_sets import ArrowSource, arrow_files, holds_images

        files = arrow_files(path) if path.exists() else []
        if files and holds_images(files[0]):
            return ArrowSource(path, columns or Columns())
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise UserError(f"{source} does not exist; give a folder, zip, csv, torchvision:NAME or builtin:shapes")
    if suffix_of(path.name) in TABLE_SUFFIXES:
        from convscope.core.data.tables import TableSource

        return TableSource(path, columns or Columns())
    if zipfile.is_zipfile(path):
        return ZipSource(path)
    raise UserError(f"{source} is neither a folder, a readable zip, nor a csv, tsv or parquet table")


def suffix_of(name: str) -> str:
    """The extension in lower case, `jpg` for `.JPEG`, "" without one."""
    suffix = PurePosixPath(name).suffix.lower().removeprefix(".")
    return "jpg" if suffix == "jpeg" else suffix


class FolderSource:
    """A folder of class folders, of split folders that hold those, or of images."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def listing(self) -> Listing:  # noqa: D102
        return arrange(self._files(), str(self.root))

    def _files(self) -> Iterator[tuple[str, int]]:
        walked: set[tuple[int, int]] = set()
        for folder, folders, names in os.walk(self.root, onerror=_refuse, followlinks=True):  # classes are often links
            status = os.stat(folder)
            if (place := (status.st_dev, status.st_ino)) in walked:
                raise UserError(f"{folder} is a link to a folder that is there already; images would be packed twice")
            walked.add(place)
            folders[:] = [name for name in folders if not _is_hidden([name])]
            for name in names:
                path = Path(folder, name)
                if not _is_hidden([name]) and path.is_file():
                    yield path.relative_to(self.root).as_posix(), path.stat().st_size

    def read(self, item: Item) -> EncodedImage:  # noqa: D102
        return read_file(self.root / item.name)


class ZipSource:
    """A zip with the same inside as a folder; members are read in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {path}: {error}") from error

    def listing(self) -> Listing:  # noqa: D102
        members = [info for info in self.archive.infolist() if not info.is_dir()]
        unsafe = [info.filename for info in members if _escapes(info.filename)]
        files = ((info.filename, info.file_size) for info in members if not _escapes(info.filename))
        found = arrange(files, str(self.path))
        return Listing(found.splits, found.classes, unsafe + found.ignored)

    def read(self, item: Item) -> EncodedImage:  # noqa: D102
        try:
            return EncodedImage(suffix_of(item.name), self.archive.read(item.name))
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"cannot read {item.name} in {self.path}: {error}") from error


@dataclass(frozen=True)
class ShapesSource:
    """The embedded set; test images lie far beyond the training images in the sequence."""

    n_train: int = 8000
    n_test: int = 2000
    size: int = 64
    seed: int = 0

    def listing(self) -> Listing:  # noqa: D102
        starts = {"train": (0, self.n_train), "test": (shapes_render.TEST_START, self.n_test)}
        splits = {name: [self._item(start + i) for i in range(n)] for name, (start, n) in starts.items() if n}
        return Listing(splits, shapes_render.class_names())

    def _item(self, index: int) -> Item:
        scene = shapes_render.draw_scene(index, self.seed)
        return Item(str(index), -1, f"{scene.names['texture']} {scene.names['shape']}", scene.caption, scene.labels())

    def read(self, item: Item) -> EncodedImage:  # noqa: D102
        image, _, _ = shapes_render.render(int(item.name), size=self.size, seed=self.seed)
        return EncodedImage("jpg", shapes_render.encode(image))


def arrange(files: Iterable[tuple[str, int]], where: str) -> Listing:
    """Sort (name, bytes) pairs into splits and classes by their folders.

    A single outermost folder that is no split is looked through. Below a split, the first folder is the class.

    Raises:
        UserError: no images, or images beside class folders.
    """
    images: list[tuple[tuple[str, ...], Item]] = []
    ignored = []
    for name, size in sorted(files):
        parts = PurePosixPath(name).parts
        if _is_hidden(parts):
            continue
        if size == 0 or suffix_of(name) not in IMAGE_SUFFIXES:
            ignored.append(name)
        else:
            images.append((parts, Item(name, size)))
    if not images:
        raise UserError(f"{where} holds no images (extensions: {', '.join(IMAGE_SUFFIXES)})")
    while len({parts[0] for parts, _ in images}) == 1 and len(images[0][0]) > 1 and not _are_splits(images):
        images = [(parts[1:], item) for parts, item in images]
    split_depth = 1 if _are_splits(images) else 0
    if not split_depth:
        _require_splits_or_classes(images, where)
    splits: dict[str, list[Item]] = {}
    for parts, item in images:
        label = parts[split_depth] if len(parts) > split_depth + 1 else None
        splits.setdefault(parts[0] if split_depth else "", []).append(Item(item.name, item.size, label))
    for items in splits.values():
        _require_all_or_no_labels(items, where)
    return Listing(splits, None, ignored)


def read_file(path: Path) -> EncodedImage:
    """Bytes of an image file as they are.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return EncodedImage(suffix_of(path.name), path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename}: {error.strerror or error}") from error


def _are_splits(images: list[tuple[tuple[str, ...], Item]]) -> bool:
    return all(len(parts) > 1 and parts[0].lower() in SPLIT_FOLDERS for parts, _ in images)


def _require_splits_or_classes(images: list[tuple[tuple[str, ...], Item]], where: str) -> None:
    """Refuse class folders below train and test where another folder stands beside these."""
    first = {parts[0] for parts, _ in images if len(parts) > 2}
    splits = sorted(name for name in first if name.lower() in SPLIT_FOLDERS)
    others = sorted({parts[0] for parts, _ in images} - set(splits))
    if splits and others:
        raise UserError(
            f"{where}: {', '.join(splits)} look like splits, but {others[0]} stands beside them; move it away"
        )


def _require_all_or_no_labels(items: list[Item], where: str) -> None:
    bare = [item.name for item in items if item.label is None]
    if bare and len(bare) < len(items):
        raise UserError(f"{where}: {bare[0]} lies beside class folders ({len(bare)} such); move it into a class folder")


def _is_hidden(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") or part in SYSTEM_FILES for part in parts)


def _escapes(name: str) -> bool:
    """Whether a member of a zip would lie outside the folder it is unpacked to."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in path.parts[0]
