"""Each operation alone is torchvision's, the affine map is all of them in order, and what differs is bounded."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import ColorJitter
from torchvision.transforms.v2 import functional as F

from convscope.core.data.photometric import (
    TO_YIQ,
    Draws,
    PhotometricConfig,
    augment,
    draw,
    gaussian_blur,
    one_by_one,
    photometric,
)
from convscope.core.errors import UserError
from tests.core.data.test_crop import photo


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Four pictures of 0 to 255, (4, 3, 40, 56)."""
    return torch.stack([F.pil_to_tensor(photo(56, 40, seed)) for seed in range(4)])


def still(count: int, **changed: list[float]) -> Draws:
    """Draws that change nothing but what is named."""
    values = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "sigma": 0.0, "solarize": False}
    tensors = {name: torch.tensor(changed.get(name, [value] * count)) for name, value in values.items()}
    return Draws(**tensors)


def test_nothing_is_changed_by_still_draws(images):
    assert torch.equal(photometric(images, still(4)), images.float())


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_one_factor_is_torchvisions(images, name):
    """In floating point, where torchvision does not round: to the digit, clipping included."""
    factors = [0.0, 0.6, 1.0, 1.7]
    ours = photometric(images, still(4, **{name: factors})) / 255
    for image, factor, found in zip(images, factors, ours):
        expected = getattr(F, f"adjust_{name}")(image.float() / 255, factor)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)  # its luma has four digits


def test_all_factors_are_applied_in_order(images):
    """Faded pictures need no clipping on the way."""
    faded = images.float() * 0.3 + 90
    draws = still(4, brightness=[0.8, 0.9, 1.1, 1.2], contrast=[0.7, 1.2, 0.8, 1.1], saturation=[0.8, 1.1, 1.2, 0.0])
    for found, image, b, c, s in zip(
        photometric(faded, draws) / 255, faded / 255, draws.brightness, draws.contrast, draws.saturation
    ):
        expected = F.adjust_brightness(image, float(b))
        expected = F.adjust_saturation(F.adjust_contrast(expected, float(c)), float(s))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_a_hue_keeps_luma_and_turns_back(images):
    faded = images.float() * 0.3 + 90
    luma = torch.tensor([0.299, 0.587, 0.114])
    turned = photometric(faded, still(4, hue=[0.1, -0.1, 0.03, 0.25]))
    assert ((turned - faded).movedim(1, -1) @ luma).abs().max() < 0.1
    assert (turned - faded).abs().mean() > 2
    back = photometric(turned, still(4, hue=[-0.1, 0.1, -0.03, -0.25]))
    torch.testing.assert_close(back, faded, atol=1e-2, rtol=0)
    torch.testing.assert_close(photometric(faded, still(4, hue=[1.0] * 4)), faded, atol=1e-2, rtol=0)


@pytest.mark.parametrize("turn", [0.05, -0.1, 0.1])
def test_a_hue_turns_as_torchvisions_does(images, turn):
    """It keeps luma where HSV keeps the largest colour; chroma moves the same way."""
    ours = photometric(images, still(4, hue=[turn] * 4)) - images
    theirs = torch.stack([F.adjust_hue(image.float() / 255, turn) for image in images]) * 255 - images
    chroma = torch.tensor(TO_YIQ)[1:]
    one, other = ((change.movedim(1, -1) @ chroma.T).flatten() for change in (ours, theirs))
    assert torch.cosine_similarity(one, other, dim=0) > 0.85
    assert one.norm() == pytest.approx(float(other.norm()), rel=0.35)


def test_blur_is_torchvisions(images):
    sigmas = [0.3, 1.0, 1.6, 2.0]
    found = gaussian_blur(images.float(), torch.tensor(sigmas))
    for image, sigma, blurred in zip(images, sigmas, found):
        expected = F.gaussian_blur(image.double(), [17, 17], [sigma, sigma])  # 17 = 2 * ceil(4 * 2.0) + 1
        torch.testing.assert_close(blurred.double(), expected, atol=1e-3, rtol=0)


def test_only_chosen_images_are_blurred_and_solarized(images):
    found = photometric(images, still(4, sigma=[0.0, 1.0, 0.0, 2.0], solarize=[False, False, True, True]))
    assert (found[0] - images[0]).abs().max() < 1e-3
    torch.testing.assert_close(found[1], F.gaussian_blur(images[1].float(), [17, 17], [1.0, 1.0]), atol=1e-2, rtol=0)
    torch.testing.assert_close(found[2], F.solarize(images[2], 128).float(), atol=1e-3, rtol=0)


def test_solarisation_is_torchvisions_and_has_no_step():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[None, :, None]  # (1, 3, 1, 256)
    assert torch.equal(photometric(levels, still(1, solarize=[True])), F.solarize(levels, 128).float())
    close = torch.tensor([127.0, 127.4999, 127.5001, 127.9999]).repeat(3, 1)[None, :, None]
    found = photometric(close, still(1, solarize=[True]))[0, 0, 0]
    torch.testing.assert_close(found, torch.tensor([127.0, 127.4999, 127.4999, 127.0001]), atol=1e-4, rtol=0)


def test_small_images_are_blurred_too():
    one = torch.rand(1, 3, 4, 4) * 255
    assert gaussian_blur(one, torch.tensor([2.0])).shape == one.shape


def test_difference_from_torchvisions_sequence(images):
    """Fixed order, one clipping and another hue: the usual strengths, in levels of 255."""
    config = PhotometricConfig(blur=0.0, grey=0.0, jitter=1.0)
    differences, changes = [], []
    for seed in range(20):
        draws = draw(config, 4, torch.Generator().manual_seed(seed))
        ours = photometric(images, draws)
        for i, image in enumerate(images):
            expected = image.float() / 255
            for step in np.random.default_rng(seed).permutation(["brightness", "contrast", "saturation", "hue"]):
                expected = getattr(F, f"adjust_{step}")(expected, float(getattr(draws, step)[i]))
            differences.append((ours[i] - 255 * expected).abs().mean())
            changes.append((image - 255 * expected).abs().mean())
    assert torch.stack(differences).mean() < 0.2 * torch.stack(changes).mean()


def test_draws():
    config = PhotometricConfig(solarize=0.2)
    draws = draw(config, 20_000, torch.Generator().manual_seed(0))
    jittered = draws.brightness != 1
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.015)
    assert draws.brightness[jittered].min() == pytest.approx(0.6, abs=0.01)
    assert draws.brightness[jittered].max() == pytest.approx(1.4, abs=0.01)
    assert (draws.saturation == 0).float().mean() == pytest.approx(0.2, abs=0.015)
    assert draws.hue.abs().max() == pytest.approx(0.1, abs=0.001)
    assert (draws.sigma > 0).float().mean() == pytest.approx(0.5, abs=0.015)
    assert draws.sigma.max() == pytest.approx(2.0, abs=0.01)
    assert draws.solarize.float().mean() == pytest.approx(0.2, abs=0.015)
    again = draw(config, 20_000, torch.Generator().manual_seed(0))
    assert torch.equal(draws.hue, again.hue)


@pytest.mark.parametrize("colours", ["fast", "exact"])
def test_draws_belong_to_positions(images, colours):
    """Two processes, or any parts of a batch, change an image as one does; views of one image differ."""
    config, positions = PhotometricConfig(solarize=0.2, colours=colours), torch.tensor([3, 40, 41, 10**12])
    whole = augment(images, config, 7, positions)
    for part in (slice(0, None, 2), slice(1, None, 2), slice(3, 4)):
        assert torch.equal(augment(images[part], config, 7, positions[part]), whole[part])
    assert not torch.equal(augment(images, config, 8, positions), whole)
    twice = augment(images.repeat_interleave(2, 0), config, 7, positions)
    assert twice.shape == (8, 3, 40, 56)
    assert all(not torch.equal(one, other) for one, other in zip(twice[::2], twice[1::2]))


def test_exact_colours_are_torchvisions(images):
    config = PhotometricConfig(jitter=1.0, solarize=1.0, blur=1.0, sigma=(1.0, 1.0), grey=0.0, colours="exact")
    state = torch.get_rng_state()
    found = one_by_one(images, config, [11, 12, 13, 14])
    assert torch.equal(torch.get_rng_state(), state)
    for image, seed, changed in zip(images, (11, 12, 13, 14), found):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            torch.rand(1)  # whether to jitter
            expected = ColorJitter(0.4, 0.4, 0.2, 0.1)(image)
        expected = F.solarize(F.gaussian_blur(expected, [9, 9], [1.0, 1.0]), 128)
        assert torch.equal(changed, expected)
        assert changed.dtype == torch.uint8


@pytest.mark.parametrize(
    "wrong", [{"grey": 1.5}, {"brightness": -0.1}, {"hue": 0.6}, {"sigma": (0.0, 1.0)}, {"sigma": (2.0, 1.0)}]
)
def test_settings_that_mean_nothing(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        PhotometricConfig(**wrong)
