"""The same images from folders, a zip and shards."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2

from convscope.core.data.build import BuildConfig, build
from convscope.core.data.image_files import ImageFiles, open_images
from convscope.core.data.sources import FolderSource
from convscope.core.errors import UserError
from tests.core.data.tars import noise, png, write_tar

NAMES = ["cat/cat1-dog1.png", "cat/cat2-oven1.png", "dog/dog1-cat2.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        file = tmp_path / "stimuli" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(seed, (9, 7)).save(file)
    return tmp_path / "stimuli"


def pixels(images: ImageFiles) -> torch.Tensor:
    return torch.cat(list(images.batches(v2.PILToTensor(), 2)))


def test_three_forms_hold_the_same(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "stimuli.zip", "w") as archive:
        for name in NAMES:
            archive.write(folder / name, f"inside/{name}")
    settings = BuildConfig(source=str(folder), dest=str(tmp_path / "shards"), split="test", shuffle=False)
    build(FolderSource(folder), settings)
    forms = [open_images(str(place)) for place in (folder, tmp_path / "stimuli.zip", tmp_path / "shards")]
    expected = torch.stack([v2.functional.pil_to_tensor(noise(seed, (9, 7))) for seed in range(3)])
    for form in forms:
        assert [name.removeprefix("inside/") for name in form.names] == NAMES
        assert form.labels == ["cat", "cat", "dog"]
        assert torch.equal(pixels(form), expected)
    assert len({form.fingerprint for form in forms}) == 3
    assert open_images(str(folder)).fingerprint == forms[0].fingerprint


def test_shards_made_elsewhere(tmp_path: Path) -> None:
    members = [("cat/cat1-dog1.png", png(1)), ("cat/cat1-dog1.json", json.dumps({"wnid": 3}).encode())]
    write_tar(tmp_path / "a.tar", members)
    found = open_images(str(tmp_path), label="wnid")
    assert (found.names, found.labels) == (["cat/cat1-dog1"], ["3"])
    assert open_images(str(tmp_path)).labels == [""]


def test_another_size_is_told(folder: Path) -> None:
    noise(5, (8, 8)).save(folder / NAMES[1])
    with pytest.raises(UserError, match=r"cat2-oven1\.png 8 x 8; all have to be alike"):
        pixels(open_images(str(folder)))


def test_a_broken_image_is_told(folder: Path) -> None:
    (folder / NAMES[2]).write_bytes(b"no image")
    with pytest.raises(UserError, match="dog1-cat2"):
        pixels(open_images(str(folder)))
