"""Crops from bytes are the crops that torchvision cuts from images, and pixels hardly differ."""

import functools
import io
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from scipy import ndimage
from torchvision.transforms import InterpolationMode, v2

from convscope.core.data.decode import decode
from convscope.core.data.transforms import crop_flip


@functools.cache
def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise of several scales, in which colours change slowly, and a sharp edge, as in photographs."""
    rng = np.random.default_rng(seed)
    layers = [ndimage.gaussian_filter(rng.normal(size=(height, width, 1)), (s, s, 0)) * s for s in (1, 4, 16)]
    colour = ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (16, 16, 0)) * 16
    pixels = 128 + 60 * (sum(layers) + colour)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (220, 40, 90)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def seeded(cut, *arguments) -> torch.Tensor:
    torch.manual_seed(3)
    return cut(*arguments)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("size", [(48, 48), (32, 80)])
def test_exact_crops_are_torchvisions(interpolation, size):
    image = photo(130, 97)
    mode = InterpolationMode(interpolation)
    ours = crop_flip(size, scale=(0.2, 1.0), ratio=(0.5, 2.0), interpolation=interpolation)
    shape = (0.5 * size[1] / size[0], 2.0 * size[1] / size[0])
    crop = v2.RandomResizedCrop(size, (0.2, 1.0), shape, interpolation=mode)
    theirs = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    for seed in range(20):
        torch.manual_seed(seed)
        expected = theirs(image)
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(ours(image), expected)
        assert torch.equal(torch.rand(1), after)  # as many draws


@pytest.mark.parametrize(
    ("size", "scale", "eighths", "bound"),
    [(8, (0.3, 1.0), 1, 0.3), (60, (0.7, 1.0), 3, 0.08), (100, (0.05, 0.2), 8, 0.01)],
)
def test_a_crop_from_bytes_has_the_same_box(size, scale, eighths, bound, monkeypatch):
    """The box is read off an image whose colours tell the place; a pixel is half a level wide."""
    width, height = 499, 373  # odd: the sides of a smaller copy are rounded up
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    data = encoded(Image.fromarray(np.dstack([x, y, 0 * x]).round().astype(np.uint8)), quality=100, subsampling=0)
    shapes = []

    def decode(*arguments, **options):
        pixels = simplejpeg.decode_jpeg(*arguments, **options)
        shapes.append(pixels.shape)
        return pixels

    monkeypatch.setattr(
        "convscope.core.data.crop.simplejpeg", SimpleNamespace(**{**vars(simplejpeg), "decode_jpeg": decode})
    )
    cut = crop_flip(size, scale)
    for seed in range(12):
        torch.manual_seed(seed)
        exact = cut(decoded(data)).float()
        torch.manual_seed(seed)
        shift = (cut.from_jpeg(data).float() - exact)[:2].mean((1, 2))
        assert shift.abs().max() < bound
    assert set(shapes) == {(-(-height * eighths // 8), -(-width * eighths // 8), 3)}


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("size", "side", "mean", "worst"),
    [(64, (150, 110), 1.0, 50), (64, (700, 500), 0.5, 10), (32, (1200, 900), 0.5, 10)],
)
def test_pixels_from_bytes_hardly_differ(interpolation, size, side, mean, worst):
    """In levels of 255. Near the full size it is the quick chroma that shows, at the edges of colours."""
    cut = crop_flip(size, (0.3, 1.0), interpolation=interpolation)
    for seed in range(3):
        data = encoded(photo(*side, seed=seed), quality=90)
        exact, fast = seeded(cut, decoded(data)), seeded(cut.from_jpeg, data)
        difference = (exact.int() - fast.int()).abs().float()
        assert difference.mean() < mean
        assert difference.max() <= worst


def test_full_size_without_chroma_subsampling_differs_by_rounding_only():
    """Both resizings round twice."""
    cut = crop_flip(64, (0.3, 1.0))
    for seed in range(6):
        data = encoded(photo(150, 110, seed=seed), quality=90, subsampling=0)
        assert (seeded(cut, decoded(data)).int() - seeded(cut.from_jpeg, data).int()).abs().max() <= 2


def test_grey_jpeg():
    data = encoded(photo(150, 110).convert("L"), quality=90)
    cut = crop_flip(40)
    fast = seeded(cut.from_jpeg, data)
    assert torch.equal(fast[0], fast[1])
    assert torch.equal(fast[0], fast[2])
    assert (seeded(cut, decoded(data)).int() - fast.int()).abs().max() <= 1


def test_what_needs_the_thorough_reader():
    image = photo(60, 50)
    turned = Image.Exif()
    turned[0x0112] = 6
    cut = crop_flip(32)
    whole = encoded(image, quality=90)
    assert cut.from_jpeg(whole) is not None
    assert cut.from_jpeg(encoded(image, exif=turned)) is None
    assert cut.from_jpeg(encoded(image.convert("CMYK"))) is None
    assert cut.from_jpeg(encoded(image, "PNG")) is None
    assert cut.from_jpeg(encoded(image, "WEBP")) is None
    assert cut.from_jpeg(whole[:-400]) is None
    assert cut.from_jpeg(whole[:30]) is None
    assert cut.from_jpeg(b"") is None
    assert crop_flip(32, interpolation="lanczos").from_jpeg(whole) is None


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("where", ["exif", "xmp"])
def test_fast_and_exact_crops_agree_on_which_way_is_up(orientation, where):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(60, 50), quality=95, **{where: exif if where == "exif" else XMP % orientation})
    image = decode({"__key__": "k", "jpg": data})
    assert image.size == ((50, 60) if 5 <= orientation <= 8 else (60, 50))
    cut = crop_flip(32)
    fast = seeded(cut.from_jpeg, data)
    assert (fast is None) == (2 <= orientation <= 8)
    if fast is not None:
        assert (seeded(cut, image).int() - fast.int()).abs().float().mean() < 3


def test_views_are_crops_one_after_the_other():
    data = encoded(photo(150, 110), quality=95)
    one, three = (crop_flip(40, (0.2, 1.0), views=views) for views in (1, 3))
    for cut in (lambda t: t(decoded(data)), lambda t: t.from_jpeg(data)):
        torch.manual_seed(5)
        singles = [cut(one) for _ in range(3)]
        torch.manual_seed(5)
        together = cut(three)
        assert together.shape == (3, 3, 40, 40)
        assert torch.equal(together, torch.stack(singles))


def test_the_decoder_shrinks_no_further_than_every_view_allows():
    data = encoded(photo(800, 600), quality=90)
    cut = crop_flip(32, (0.01, 1.0), views=8)  # alone, the largest would be cut from a copy of a quarter
    exact, fast = seeded(cut, decoded(data)), seeded(cut.from_jpeg, data)
    assert all((a.int() - b.int()).abs().float().mean() < 1.0 for a, b in zip(exact, fast))
