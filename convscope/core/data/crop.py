"""Random crops for training, cut from a decoded image or, much faster, straight from the bytes of a JPEG."""

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

NOTES = b"Exif\0\0", b"tiff:Orientation"  # marks of what may say how the camera was held; the second is XMP's
NOTES_REACH = 1 << 18  # bytes of a file in which they may stand
ORIENTATION = 0x0112  # the EXIF tag that says how the camera was held
PILLOW = {InterpolationMode.BILINEAR: Image.Resampling.BILINEAR, InterpolationMode.BICUBIC: Image.Resampling.BICUBIC}
HALF = 2.0  # decoders have fast code for half the size and less, and none for what lies between
OVERSAMPLING = 2.0  # pixels of the copy for one of the result: closer, and its filter would be the resizing's


class Box(NamedTuple):
    """A crop in pixels of the whole image, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


class RandomCrop:
    """Crops of a random share `scale` of the area, resized to `size`, mirrored half of the time if `flip`.

    Args:
        size: height and width of the result in pixels.
        scale: range of the share.
        ratio: range of the crop's width over its height.
        interpolation: of the resizing.
        flip: whether to mirror.
        views: crops of one image; above 1, the result is (views, 3, H, W).
        after: applied to each crop, uint8 (3, H, W) -> the same.

    The boxes are those that torchvision's v2.RandomResizedCrop and v2.RandomHorizontalFlip draw from the same random
    state, whichever way the pixels are made.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float],
        ratio: tuple[float, float],
        interpolation: InterpolationMode,
        *,
        flip: bool,
        views: int = 1,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.size, self.interpolation, self.flip, self.views, self.after = size, interpolation, flip, views, after
        self._crop = v2.RandomResizedCrop(size, scale, ratio, interpolation=interpolation)

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB -> uint8 (3, H, W): to the bit what torchvision makes of a PIL image."""
        cuts = []
        for box in self._draw(image):
            cut = v2.functional.resized_crop(image, *box[:4], list(self.size), self.interpolation)
            cuts.append(_mirror(v2.functional.pil_to_tensor(cut), box))
        return self._views(cuts)

    def from_jpeg(self, data: bytes) -> Tensor | None:
        """The same from encoded bytes, decoded no larger than it needs; None where `decode` has to read them.

        The boxes are the same. Pixels differ from `__call__` by the rounding of another resizing and, where a crop is
        at least halved, by the decoder's own filter; docs/design.md has figures.
        """
        if self.interpolation not in PILLOW or (size := _plain_jpeg(data)) is None:
            return None
        boxes = self._draw(torch.empty(1).expand(3, *size))
        share = min(1.0, OVERSAMPLING * max(max(self.size[0] / box.height, self.size[1] / box.width) for box in boxes))
        least = {"min_height": math.ceil(size[0] * share), "min_width": math.ceil(size[1] * share)}
        try:
            pixels = simplejpeg.decode_jpeg(data, fastupsample=True, min_factor=HALF, **least)
        except ValueError:  # damaged, or merely odd: the thorough reader decides
            return None
        shrunk = pixels.shape[:2] != size
        return self._views([self._shrunk(pixels, size, box) if shrunk else self._whole(pixels, box) for box in boxes])

    def _draw(self, image: Image.Image | Tensor) -> list[Box]:
        boxes = []
        for _ in range(self.views):
            found = self._crop.make_params([image])
            mirrored = self.flip and float(torch.rand(1)) < 0.5
            boxes.append(Box(found["top"], found["left"], found["height"], found["width"], mirrored))
        return boxes

    def _whole(self, pixels: NDArray[np.uint8], box: Box) -> Tensor:
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        cut = v2.functional.resized_crop(image, *box[:4], list(self.size), self.interpolation)
        return _mirror(cut, box)

    def _shrunk(self, pixels: NDArray[np.uint8], size: tuple[int, int], box: Box) -> Tensor:
        """Cut from a copy of 1, 2, 3 or 4 eighths of the size, where the box lies between pixels."""
        scale = round(8 * max(pixels.shape[:2]) / max(size)) / 8  # the copy's sides are rounded up
        top, bottom = box.top * scale, (box.top + box.height) * scale
        left, right = box.left * scale, (box.left + box.width) * scale
        y, x = math.floor(top), math.floor(left)  # pixels beyond the box would otherwise enter at its borders
        own = Image.fromarray(np.ascontiguousarray(pixels[y : math.ceil(bottom), x : math.ceil(right)]))
        place = (left - x, top - y, right - x, bottom - y)
        cut = own.resize((self.size[1], self.size[0]), PILLOW[self.interpolation], box=place)
        return _mirror(v2.functional.pil_to_tensor(cut), box)

    def _views(self, cuts: list[Tensor]) -> Tensor:
        if self.after is not None:
            cuts = [self.after(cut) for cut in cuts]
        return cuts[0] if self.views == 1 else torch.stack(cuts)


def _mirror(image: Tensor, box: Box) -> Tensor:
    return image.flip(-1) if box.mirrored else image


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG, if its pixels need nothing but decoding: in colour or grey, and upright."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if any(data.find(note, 0, NOTES_REACH) >= 0 for note in NOTES):
            with Image.open(io.BytesIO(data)) as image:
                if image.getexif().get(ORIENTATION) in range(2, 9):  # others, such as 0, turn nothing
                    return None
    except Exception:  # Pillow's readers raise anything on damaged input
        return None
    return (height, width) if colours in ("YCbCr", "RGB", "Gray") else None
