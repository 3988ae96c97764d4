"""Whole pictures of any shape, from files or shards, as the evaluations of landmarks and copies read them."""

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from convscope.core.data.decode import decode, is_image
from convscope.core.data.shard_set import ShardSet
from convscope.core.errors import UserError

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Fit = Literal["longest", "square"]


class Pictures(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image: ...


@dataclass(frozen=True)
class PictureFiles:
    """Image files, or what lies inside a box of each."""

    files: Sequence[Path]
    boxes: Sequence[Box] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        file = self.files[index]
        try:
            image = decode({"__key__": str(file), file.suffix[1:].lower(): file.read_bytes()})
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from error
        return image if self.boxes is None else image.crop(_whole(self.boxes[index]))


@dataclass(frozen=True)
class ShardPictures:
    """The images of a split."""

    shards: ShardSet

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Image.Image:
        return decode(self.shards[index])


def find_pictures(folder: Path) -> list[Path]:
    """Every image file in the folder and below it, in order of its path.

    Raises:
        UserError: there is no such folder or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found = sorted(path for path in folder.rglob("*") if path.is_file() and is_image(path.suffix[1:].lower()))
    if not found:
        raise UserError(f"{folder} holds no images")
    return found


def named_pictures(folder: Path, names: Sequence[str]) -> list[Path]:
    """The image file of each name, which may leave out its suffix.

    Raises:
        UserError: a name without a file.
    """
    by_name: dict[str, Path] = {}
    for path in find_pictures(folder):
        by_name[path.relative_to(folder).as_posix()] = path
        by_name.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    if missing := [name for name in names if name not in by_name]:
        raise UserError(f"{folder} lacks {len(missing)} of {len(names)} images, such as {missing[0]}")
    return [by_name[name] for name in names]


def files_hash(files: Sequence[Path]) -> str:
    """Changes when names or sizes of the files do."""
    described = "\n".join(f"{file.name}:{file.stat().st_size}" for file in files)
    return hashlib.sha256(described.encode()).hexdigest()


def resized(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    """Made smaller until the longest side is at most `size` (Lanczos), or a square of that side (bicubic)."""
    if fit == "square":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    small = image.copy()
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    return small


def picture_batches(
    pictures: Pictures, size: int, fit: Fit, *, batch_size: int, workers: int
) -> Generator[Tensor, None, None]:
    """All pictures in their order, uint8 (B, 3, H, W); neighbours of one shape come together.

    Args:
        pictures: what is read.
        size: of the longest side, or of the square, in pixels.
        fit: which of them.
        batch_size: pictures at a time, at most.
        workers: processes that decode.

    Raises:
        UserError: a picture that cannot be read.
    """
    loader: DataLoader[Tensor | UserError] = DataLoader(
        _Resized(pictures, size, fit),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    waiting: list[Tensor] = []
    for item in loader:
        if isinstance(item, UserError):
            raise item
        if waiting and (len(waiting) == batch_size or item.shape != waiting[0].shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(item)
    if waiting:
        yield torch.stack(waiting)


@dataclass(frozen=True)
class _Resized(Dataset[Tensor | UserError]):
    """Errors are handed over as they are, because a loader wraps what a worker raises in its traceback."""

    pictures: Pictures
    size: int
    fit: Fit

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor | UserError:
        try:
            image = resized(self.pictures[index], self.size, self.fit)
        except UserError as error:
            return error
        pixels: Tensor = functional.pil_to_tensor(image)
        return pixels


def _whole(box: Box) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(side) for side in box)
    return left, top, max(right, left + 1), max(bottom, top + 1)
