"""Image bytes to RGB."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from convscope.core.data.shard_index import Sample
from convscope.core.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")


class DecodeError(UserError):
    """A sample without a readable image."""

    def __init__(self, key: str, cause: str) -> None:
        super().__init__(key, cause)
        self.key, self.cause = key, cause

    def __str__(self) -> str:
        return f"sample {self.key}: {self.cause}"


def is_image(suffix: str) -> bool:
    """Whether a member of that suffix is an image: `jpg`, `left.png`."""
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def decode(sample: Sample) -> Image.Image:
    """The sample's image (the first frame, if it moves), RGB and upright.

    Transparency is dropped and 16-bit grey is scaled to 8 bits.

    Raises:
        DecodeError: no image, or one that cannot be read to its end.
    """
    key = str(sample["__key__"])
    try:
        image = Image.open(io.BytesIO(image_bytes(sample)))
        image.load()
        return _to_rgb(_upright(image))
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise anything on damaged input
        cause = "no image format that Pillow reads" if isinstance(error, UnidentifiedImageError) else error
        raise DecodeError(key, " ".join(str(cause).split()) or type(error).__name__) from error


def image_bytes(sample: Sample) -> bytes:
    """The encoded image among the sample's members; of several, the first in the order of IMAGE_SUFFIXES.

    Raises:
        DecodeError: there is none, or it is empty.
    """
    key = str(sample["__key__"])
    found = [suffix for suffix in sample if is_image(suffix)]
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in found), found[0] if found else "")
    data = sample.get(suffix)
    if not isinstance(data, bytes):
        raise DecodeError(key, f"no image among its members {', '.join(name for name in sample if name != '__key__')}")
    if not data:
        raise DecodeError(key, f"its .{suffix} is empty")
    return data


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # pixels are fine; a photograph is not lost to a broken note on how it was held
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):  # convert() would clip these at 255
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("32-bit pixels beyond 16 bits have no agreed range")
        image = Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # same colours as directly, without Pillow's warning
    return image.convert("RGB")
