"""Copy detection against a loop that follows DINO's evaluation, and the command on drawn copies."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from convscope.core.errors import UserError
from convscope.core.results import load_result
from convscope.eval.copy_detection import CopyDetectionCommand, copy_precision, run
from tests.core.data.tars import write_tar

CPU = torch.device("cpu")
SETTINGS = {"model": "timm:resnet10t@random", "device": "cpu", "workers": 0, "image_size": 64}


def slow(similarity: list[float], originals: list[int], depth: int) -> float:
    """The area under precision over recall of one copy, from the first `depth` of its ranking."""
    area, found = 0.0, 0
    for rank, image in enumerate(sorted(range(len(similarity)), key=lambda i: -similarity[i])[:depth]):
        if image in originals:
            before = found / rank if rank else 1.0
            found += 1
            area += (before + found / (rank + 1)) / 2 / len(originals)
    return area


@pytest.mark.parametrize("depth", [3, 20, None])
def test_against_a_loop(depth: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(30, 4, generator=generator), torch.randn(15, 4, generator=generator)
    links = [*"abcdeabcd", *(None for _ in range(21))]  # two originals, but for e
    copies = ["abcde"[i % 5] for i in range(15)]
    found = copy_precision(queries, gallery, copies, links, depth=depth, device=CPU)
    similarity = (F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T).tolist()
    wanted = [[i for i, link in enumerate(links) if link == copy] for copy in copies]
    expected = [slow(row, originals, depth or 30) for row, originals in zip(similarity, wanted)]
    assert found.tolist() == pytest.approx(expected)
    assert 0 < sum(expected) < 15


def test_a_single_original_by_hand() -> None:
    """Three images point more and more away from the copy: ranks 0, 1 and 2, of which two count."""
    gallery = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    queries = torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    found = copy_precision(queries, gallery, ["a", "b", "c"], ["a", "b", "c"], depth=2, device=CPU)
    assert found.tolist() == pytest.approx([1, (0 + 1 / 2) / 2, 0])


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def drawn(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(8, 0).repeat(8, 1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copydays' way: 200000.png is the original of copies/strong/200001.png, and of copies/jpeg/200000.jpg.

    The last strong copy looks like a distractor.
    """
    root = tmp_path_factory.mktemp("copies")
    for name in ("originals", "copies/strong", "copies/jpeg", "others"):
        (root / name).mkdir(parents=True)
    for number in range(4):
        image = drawn(number)
        image.save(root / f"originals/{2000 + number}00.png")
        strong = image if number < 3 else drawn(12)
        strong.resize((50, 40)).save(root / f"copies/strong/{2000 + number}01.png")
        image.save(root / f"copies/jpeg/{2000 + number}00.jpg", quality=90)
        drawn(10 + number).save(root / f"others/{2000 + number}00.png")
    return root


def test_folders(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    places = {"queries": folders / "copies", "gallery": folders / "originals", "distractors": folders / "others"}
    run(CopyDetectionCommand(**SETTINGS, **places, link_letters=4, output=output))
    result = load_result(output)
    assert set(result.figures) == {"map", "jpeg map", "strong map"}
    assert result.figures["jpeg map"].value == 1
    assert 0 < result.figures["strong map"].value < 1
    assert result.figures["map"].n == 8
    both = [result.figures[f"{name} map"].value for name in ("jpeg", "strong")]
    assert result.figures["map"].value == pytest.approx(sum(both) / 2)
    assert (result.data["train"]["count"], result.data["distractors"]) == (8, 4)
    assert "strong map" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"4 of 8 copies, such as .*200001\.png, have no original"):
        run(CopyDetectionCommand(**SETTINGS, **places, output=output))


def test_shards_say_the_same_as_folders(folders: Path, tmp_path: Path) -> None:
    """The link is a json field of the copies and a member of the originals; what has none is a distractor."""
    copies, originals = [], []
    for number in range(4):
        image = folders / f"copies/strong/{2000 + number}01.png"
        described = json.dumps({"original": number}).encode()
        copies += [(f"c{number}.png", image.read_bytes()), (f"c{number}.json", described)]
        originals += [(f"o{number}.png", encoded(drawn(number))), (f"o{number}.original", str(number).encode())]
        originals += [(f"x{number}.png", encoded(drawn(10 + number)))]
    write_tar(tmp_path / "copies" / "copies-000000.tar", copies)
    write_tar(tmp_path / "originals" / "originals-000000.tar", originals)
    run(CopyDetectionCommand(**SETTINGS, data=str(tmp_path), output=tmp_path / "shards.json"))
    places = {"queries": folders / "copies/strong", "gallery": folders / "originals", "distractors": folders / "others"}
    run(CopyDetectionCommand(**SETTINGS, **places, link_letters=4, output=tmp_path / "folders.json"))
    of_shards, of_folders = load_result(tmp_path / "shards.json"), load_result(tmp_path / "folders.json")
    assert of_shards.figures["map"].value == pytest.approx(of_folders.figures["map"].value)
    assert of_shards.data["distractors"] == 4


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    for places in ({}, {"queries": tmp_path}, {"data": "a", "queries": tmp_path, "gallery": tmp_path}):
        with pytest.raises(UserError, match="--queries and --gallery"):
            CopyDetectionCommand(**SETTINGS, **places)
    with pytest.raises(UserError, match="--depth must be at least 1"):
        CopyDetectionCommand(**SETTINGS, data="a", depth=0)
