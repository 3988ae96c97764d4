"""Every pixel format becomes RGB, and everything unreadable is named."""

import io
import pickle
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from convscope.core.data.decode import DecodeError, decode
from tests.core.data.tars import noise


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes, suffix: str = "png") -> np.ndarray:
    image = decode({"__key__": "k", suffix: data})
    assert image.mode == "RGB"
    return np.asarray(image)


PICTURE = noise(0)
PIXELS = np.asarray(PICTURE)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats(kind):
    suffix = {"TIFF": "tif"}.get(kind, kind.lower())
    assert np.array_equal(decoded(encode(PICTURE, kind, lossless=True), suffix), PIXELS)


def test_jpeg_is_pillows():
    data = encode(PICTURE, "JPEG")
    assert np.array_equal(decoded(data, "jpeg"), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_are_converted_as_pillow_does(mode):
    image = PICTURE.convert(mode)
    assert np.array_equal(decoded(encode(image, "PNG")), np.asarray(image.convert("RGB")))


def test_transparent_pixels_keep_their_colour():
    pixels = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    assert np.array_equal(decoded(encode(Image.fromarray(pixels), "PNG")), PIXELS)


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency_makes_no_warning():
    image = PICTURE.quantize(16)
    data = encode(image, "PNG", transparency=bytes(range(16)))
    assert np.array_equal(decoded(data), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg():
    flat = Image.new("RGB", (16, 16), (200, 30, 90))
    found = decoded(encode(flat.convert("CMYK"), "JPEG", quality=95), "jpg")
    assert np.abs(found.astype(int) - (200, 30, 90)).max() <= 3


def test_ycck_jpeg():
    """As Adobe's programs write CMYK: inverted, and its colours as luma and chroma."""
    flat = np.asarray(Image.new("RGB", (16, 16), (200, 30, 90)).convert("CMYK"))
    data = simplejpeg.encode_jpeg(255 - flat, quality=95, colorspace="CMYK", colorsubsampling="444")
    assert simplejpeg.decode_jpeg_header(data)[2] == "YCCK"
    assert b"Adobe" in data
    assert np.abs(decoded(data, "jpg").astype(int) - (200, 30, 90)).max() <= 3


def test_16_bit_colour():
    deep = np.random.default_rng(0).integers(0, 65536, (5, 4, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)  # filter 0
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 5, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    assert np.abs(decoded(data) - deep / 257).max() <= 1  # Pillow keeps the upper byte


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    deep = np.array([[0, 128, 257, 1000], [30000, 32768, 65000, 65535]], np.uint16)
    found = decoded(encode(Image.fromarray(deep), kind), {"PPM": "pgm"}.get(kind, kind.lower()))
    assert np.array_equal(found[..., 0], np.round(deep / 257).astype(np.uint8))
    assert np.array_equal(found[..., 0], found[..., 2])


def test_pixels_without_an_agreed_range_are_refused():
    for pixels in (np.ones((2, 2), np.float32), np.full((2, 2), 1 << 20, np.int32), np.full((2, 2), -1, np.int32)):
        with pytest.raises(DecodeError, match="no agreed range"):
            decoded(encode(Image.fromarray(pixels), "TIFF"), "tiff")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(orientation):
    turns = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(encode(PICTURE, "PNG", exif=exif)), turns[orientation](PIXELS))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_lose_the_picture():
    data = encode(PICTURE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 30)
    assert np.array_equal(decoded(data, "jpg"), decoded(encode(PICTURE, "JPEG"), "jpg"))


def test_first_frame():
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    assert decoded(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), "gif")[0, 0].tolist() == [
        255,
        0,
        0,
    ]


def test_which_member_is_the_image():
    red, blue = (encode(Image.new("RGB", (2, 2), colour), "PNG") for colour in ("red", "blue"))
    assert decode({"__key__": "k", "seg.png": blue, "cls": b"1", "png": red}).getpixel((0, 0)) == (255, 0, 0)
    assert decode({"__key__": "k", "cls": b"1", "left.png": blue}).getpixel((0, 0)) == (0, 0, 255)
    assert decode({"__key__": "k", "jpg": blue}).getpixel((0, 0)) == (0, 0, 255)  # the bytes decide, not the name


@pytest.mark.parametrize(
    ("sample", "cause"),
    [
        ({"cls": b"1", "txt": b"x"}, "no image among its members cls, txt"),
        ({"png": b""}, "its .png is empty"),
        ({"png": b"rubbish"}, "no image format"),
        ({"jpg": encode(noise(1, (64, 64)), "JPEG")[:1500]}, "truncated"),
        ({"png": encode(noise(1, (64, 64)), "PNG")[:5000]}, "truncated"),
        ({"bmp": encode(PICTURE, "BMP")[:100]}, "truncated"),
    ],
)
def test_unreadable_samples_are_named(sample, cause):
    with pytest.raises(DecodeError, match=cause) as caught:
        decode({"__key__": "000123", **sample})
    assert str(caught.value).startswith("sample 000123: ")
    assert "\n" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))  # as it comes out of a worker process
    assert (str(copy), copy.key, copy.cause) == (str(caught.value), "000123", caught.value.cause)


def test_damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    for kind, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("TIFF", "tif"), ("GIF", "gif"), ("WEBP", "webp")):
        whole = encode(noise(2, (40, 30)), kind)
        for _ in range(40):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 5):
                data[place] = rng.integers(256)
            with suppress(DecodeError):
                decoded(bytes(data), suffix)
