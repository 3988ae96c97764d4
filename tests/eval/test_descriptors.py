"""Pooling, scales and whitening against their definitions; pictures of any shape through a network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from convscope.core.backbone import create_backbone
from convscope.core.data.transforms import Normalize
from convscope.core.errors import UserError
from convscope.eval.descriptors import (
    DescriptorCommand,
    describe,
    gem,
    last_tokens,
    learn_whitening,
    over_scales,
    pool_tokens,
)
from convscope.eval.pictures import PictureFiles, find_pictures, named_pictures, resized

SETTINGS = {"model": "timm:resnet10t@random", "device": "cpu", "workers": 0, "image_size": 64}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> PictureFiles:
    """Four pictures of three shapes; the last one as large as the one before."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(64, 48), (40, 60), (96, 128), (96, 128)]):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(root / f"{number}.png")
    return PictureFiles(find_pictures(root))


@pytest.mark.parametrize("power", [1.0, 3.0, 4.0])
def test_gem_by_its_definition(power: float) -> None:
    tokens = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    for b in range(2):
        for c in range(3):
            values = [max(v, 1e-6) for v in tokens[b, :, c].tolist()]
            mean = sum(v**power for v in values) / 5
            assert float(gem(tokens, power)[b, c]) == pytest.approx(mean ** (1 / power), rel=1e-5)


def test_poolings() -> None:
    cls, tokens = torch.rand(2, 3), torch.rand(2, 5, 3)
    assert torch.equal(pool_tokens(cls, tokens, "cls+gem", 4.0), torch.cat([cls, gem(tokens, 4.0)], 1))
    assert torch.equal(pool_tokens(None, tokens, "max", 4.0), tokens.max(1).values)
    assert torch.equal(pool_tokens(None, tokens, "avg", 4.0), tokens.mean(1))
    with pytest.raises(UserError, match="no class token"):
        pool_tokens(None, tokens, "cls", 4.0)


def test_whitening_against_eigenvectors_of_the_covariance() -> None:
    """The same vectors but for signs of directions; whitened numbers are uncorrelated and of unit variance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3
    values, vectors = np.linalg.eigh(np.cov(x.double().numpy().T))
    expected = (x.double().numpy() - x.double().numpy().mean(0)) @ vectors[:, ::-1][:, :4] / np.sqrt(values[::-1][:4])
    whitening = learn_whitening(x, 4)
    found = (x - whitening.mean) @ whitening.projection
    np.testing.assert_allclose(np.abs(found.numpy()), np.abs(expected), atol=2e-4)
    np.testing.assert_allclose(np.cov(found.numpy().T), np.eye(4), atol=1e-3)
    torch.testing.assert_close(whitening(x), F.normalize(found, dim=1))


def test_directions_that_the_images_do_not_show() -> None:
    few = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert learn_whitening(few).projection.shape == (8, 4)
    with pytest.raises(UserError, match="5 images show 4"):
        learn_whitening(few, 5)
    with pytest.raises(UserError, match="at least two"):
        learn_whitening(few[:1])


def test_mean_over_scales_by_hand() -> None:
    rows = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])]  # unit: (.6, .8), (0, 1)
    torch.testing.assert_close(over_scales(rows), F.normalize(torch.tensor([[0.6, 1.8]]), dim=1))
    torch.testing.assert_close(over_scales(rows, 2), F.normalize(torch.tensor([[0.36, 1.64]]).sqrt(), dim=1))
    with pytest.raises(UserError, match="--scale-power"):
        over_scales([-rows[0]], 2)


def test_pictures_of_any_shape(pictures: PictureFiles) -> None:
    """In batches as one by one, by what the network gives for each scale."""
    backbone = create_backbone("resnet10t", seed=0)
    config = DescriptorCommand(**SETTINGS)
    found = describe(backbone, pictures, config, fit="longest", scales=(1.0, 0.5))
    normalize = Normalize(backbone.preprocessing.mean, backbone.preprocessing.std)
    with torch.inference_mode():
        for index in range(4):
            image = resized(pictures[index], 64, "longest")
            assert max(image.size) == (60 if index == 1 else 64)  # never enlarged
            pixels = normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
            half = F.interpolate(pixels, scale_factor=0.5, mode="bilinear", align_corners=False)
            each = [F.normalize(gem(last_tokens(backbone, x)[1], 3.0), dim=1) for x in (pixels, half)]
            torch.testing.assert_close(found[index], F.normalize(each[0] + each[1], dim=1)[0])


def test_a_query_is_cut_to_its_box(pictures: PictureFiles) -> None:
    boxed = PictureFiles(pictures.files[2:3], [(10.2, 20.0, 40.6, 90.0)])[0]
    whole = np.array(Image.open(pictures.files[2]))
    np.testing.assert_array_equal(np.array(boxed), whole[20:90, 10:41])


def test_a_transformer_with_a_class_token(pictures: PictureFiles) -> None:
    arguments = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    backbone = create_backbone("vit_tiny_patch16_224", arguments, seed=0)
    config = DescriptorCommand(**SETTINGS | {"pooling": "cls+gem", "gem_power": 4.0})
    assert describe(backbone, pictures, config, fit="square").shape == (4, 32)
    with pytest.raises(UserError, match="does not take pictures of 48 x 64"):
        describe(backbone, pictures, config, fit="longest")
    flexible = create_backbone(
        "vit_tiny_patch16_224", arguments | {"dynamic_img_size": True, "dynamic_img_pad": True}, seed=0
    )
    assert describe(flexible, pictures, config, fit="longest").shape == (4, 32)


def test_folders(pictures: PictureFiles, tmp_path: Path) -> None:
    folder = pictures.files[0].parent
    assert named_pictures(folder, ["2", "0.png"]) == [folder / "2.png", folder / "0.png"]
    with pytest.raises(UserError, match="lacks 1 of 2 images, such as 7"):
        named_pictures(folder, ["2", "7"])
    with pytest.raises(UserError, match="holds no images"):
        find_pictures(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        find_pictures(tmp_path / "none")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    for workers in (0, 1):
        config = DescriptorCommand(**SETTINGS | {"workers": workers})
        with pytest.raises(UserError, match=r"bad\.jpg: no image format") as caught:
            describe(create_backbone("resnet10t"), PictureFiles(find_pictures(tmp_path)), config, fit="square")
        assert "\n" not in str(caught.value)
