"""Evaluation pixels are timm's to the bit; training crops obey their ranges."""

import pickle

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from convscope.core.backbone import Preprocessing
from convscope.core.data.transforms import Normalize, crop_flip, eval_transform
from convscope.core.errors import UserError
from tests.core.data.tars import noise

SETTINGS = [
    Preprocessing(size=(224, 224)),
    Preprocessing(size=(64, 64), interpolation="bilinear", crop_pct=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    Preprocessing(size=(256, 256), crop_pct=0.95),
    Preprocessing(size=(240, 240), crop_pct=0.9, interpolation="lanczos"),
    Preprocessing(size=(60, 90), crop_pct=0.8),
    Preprocessing(size=(80, 80), crop_pct=0.9, crop_mode="squash"),
    Preprocessing(size=(80, 64), crop_pct=1.0, crop_mode="squash", interpolation="bilinear"),
    Preprocessing(size=(90, 60), crop_pct=1.0, interpolation="bilinear"),
]


@pytest.mark.parametrize("size", [(100, 80), (80, 100), (300, 300), (31, 500), (64, 64), (1, 1)])
@pytest.mark.parametrize("p", SETTINGS, ids=str)
def test_evaluation_equals_timm(p, size):
    options = {
        "is_training": False,
        "interpolation": p.interpolation,
        "crop_pct": p.crop_pct,
        "crop_mode": p.crop_mode,
        "mean": p.mean,
        "std": p.std,
    }
    image = noise(1, size)
    pixels = eval_transform(p)(image)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, *p.size))
    assert torch.equal(pixels, timm.data.create_transform((3, *p.size), normalize=False, **options)(image))
    normalized = timm.data.create_transform((3, *p.size), **options)(image)
    assert torch.equal(Normalize(p.mean, p.std)(pixels[None])[0], normalized)


def test_image_of_the_right_size_is_untouched():
    image = noise(2, (64, 64))
    for interpolation in ("bicubic", "bilinear"):
        p = Preprocessing(size=(64, 64), crop_pct=1.0, interpolation=interpolation)
        assert np.array_equal(eval_transform(p)(image).permute(1, 2, 0).numpy(), np.asarray(image))


def test_training_crop():
    """The crop's place is read off an image whose pixels tell their coordinates."""
    x, y = np.meshgrid(np.arange(200, dtype=np.uint8), np.arange(200, dtype=np.uint8))
    image = Image.fromarray(np.dstack([x, y, np.zeros_like(x)]))
    transform = crop_flip(100, scale=(0.3, 0.5), ratio=(0.5, 2.0), interpolation="bilinear")
    areas, ratios, mirrored = [], [], 0
    for seed in range(300):
        torch.manual_seed(seed)
        pixels = transform(image)
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 100, 100))
        across, down = (float(v[-1] - v[0]) * 100 / 99 for v in (pixels[0, 50].float(), pixels[1, :, 50].float()))
        mirrored += across < 0
        areas.append(abs(across) * down / 200**2)
        ratios.append(abs(across) / down)
    assert 0.28 < min(areas) < 0.32
    assert 0.48 < max(areas) < 0.52
    assert 0.45 < min(ratios) < 0.6
    assert 1.7 < max(ratios) < 2.2
    assert 120 < mirrored < 180
    torch.manual_seed(0)
    first = transform(image)
    torch.manual_seed(0)
    assert torch.equal(first, transform(image))


def test_a_rectangular_crop_is_not_distorted():
    """A crop of the ratio 1 has the shape of what it is resized to."""
    x, y = np.meshgrid(np.arange(240, dtype=np.uint8), np.arange(240, dtype=np.uint8))
    image = Image.fromarray(np.dstack([x, y, np.zeros_like(x)]))
    pixels = crop_flip((60, 120), scale=(0.3, 0.3), ratio=(1.0, 1.0), flip=False)(image)
    assert pixels.shape == (3, 60, 120)
    across, down = float(pixels[0, 30, -1] - pixels[0, 30, 0]) / 119, float(pixels[1, -1, 60] - pixels[1, 0, 60]) / 59
    assert across == pytest.approx(down, rel=0.03)
    assert across * 120 * down * 60 == pytest.approx(0.3 * 240**2, rel=0.05)


def test_whole_image_without_flip_is_the_image():
    image = noise(3, (50, 50))
    transform = crop_flip(50, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
    assert np.array_equal(transform(image).permute(1, 2, 0).numpy(), np.asarray(image))


def test_normalize_and_back():
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    out = normalize(images)
    assert out.dtype == torch.float32
    value = (images[1, 2, 3, 4].item() / 255 - 0.406) / 0.225
    assert out[1, 2, 3, 4].item() == pytest.approx(value, abs=1e-6)
    assert torch.equal(normalize.inverse(out), images)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(normalize(last), out)
    assert normalize(last).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, images)  # which is left alone
    extremes = normalize.inverse(torch.tensor([[[[-9.0]], [[9.0]], [[0.0]]]]))
    assert extremes.flatten().tolist() == [0, 255, round(0.406 * 255)]
    assert list(normalize.state_dict()) == []
    assert normalize.to("meta").mean.device.type == "meta"


def test_transforms_can_be_sent_to_workers():
    image = noise(4, (80, 70))
    for transform in (eval_transform(SETTINGS[0]), eval_transform(SETTINGS[4]), crop_flip(32)):
        torch.manual_seed(1)
        expected = transform(image)
        torch.manual_seed(1)
        assert torch.equal(pickle.loads(pickle.dumps(transform))(image), expected)


def test_bad_settings_are_told():
    with pytest.raises(UserError, match="unknown interpolation 'cubic'; known: nearest, "):
        crop_flip(32, interpolation="cubic")
    for size in ((32, 32), (32, 48)):
        with pytest.raises(UserError, match="unknown interpolation"):
            eval_transform(Preprocessing(size=size, interpolation="cubic"))
    with pytest.raises(UserError, match="crop_pct"):
        eval_transform(Preprocessing(size=(32, 32), crop_pct=0.0))
    with pytest.raises(UserError, match="crop_mode 'border' is not supported"):
        eval_transform(Preprocessing(size=(32, 32), crop_mode="border"))
