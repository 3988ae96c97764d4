"""Statistics of shards whose content is known."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convscope.core.data.shard_set import open_shards
from convscope.core.data.statistics import statistics
from convscope.core.errors import UserError
from convscope.core.pairs.captions import CaptionSource
from convscope.report.shard_stats import StatsCommand, run
from tests.core.data.tars import Member, write_tar

SIZES = [(40, 30), (10, 80), (64, 64), (64, 64), (200, 50)]


def encoded(size: tuple[int, int], kind: str, mode: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).convert(mode).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    members: list[Member] = []
    for i, size in enumerate(SIZES):
        suffix, kind, mode = [("jpg", "JPEG", "RGB"), ("png", "PNG", "L")][i % 2]
        members += [(f"{i}.{suffix}", encoded(size, kind, mode)), (f"{i}.cls", str(i % 2 * 10).encode())]
        if i < 3:
            members.append((f"{i}.txt", ("word " * i + "end").encode()))
    members += [("5.jpg", b"rubbish"), ("6.cls", b"10")]
    write_tar(tmp_path / "shards" / "train" / "train-000000.tar", members[:6])
    write_tar(tmp_path / "shards" / "train" / "train-000001.tar", members[6:])
    return tmp_path / "shards"


def test_counts(folder: Path) -> None:
    found = statistics(open_shards(str(folder), "train"), CaptionSource())
    assert found.samples == 7
    assert list(zip(found.widths, found.heights)) == SIZES
    assert found.bytes == [len(encoded(s, *[("JPEG", "RGB"), ("PNG", "L")][i % 2])) for i, s in enumerate(SIZES)]
    assert found.formats == Counter({"JPEG RGB": 3, "PNG L": 2})
    assert found.labels == Counter({"0": 3, "10": 3})
    assert found.members == Counter({"jpg": 4, "png": 2, "cls": 6, "txt": 3})
    assert (found.caption_words, found.caption_characters) == ([1, 2, 3], [3, 8, 13])
    assert [key for key, _ in found.unreadable] == ["5", "6"]


def test_captions_and_labels_in_json(tmp_path: Path) -> None:
    """As img2dataset and others write them."""
    fields = [
        {"caption": "a cat", "label": 3},
        {"captions": ["one two", "three"], "cls": 4},
        {"width": 8},
        ["no fields"],
    ]
    members: list[Member] = []
    for i, values in enumerate(fields):
        members += [(f"{i}.jpg", encoded((8, 8), "JPEG", "RGB")), (f"{i}.json", json.dumps(values).encode())]
    members += [("4.jpg", encoded((8, 8), "JPEG", "RGB")), ("4.json", b"{")]
    write_tar(tmp_path / "train" / "train-000000.tar", members)
    found = statistics(open_shards(str(tmp_path / "train"), "train"), CaptionSource())
    assert found.labels == Counter({"3": 1, "4": 1})
    assert (found.caption_words, found.caption_characters) == ([2, 2, 1], [5, 7, 5])
    assert found.samples == 5


def test_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(StatsCommand(source=str(folder), output=tmp_path / "page.html"))
    said = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in said[2].strip("|").split("|")]
    assert cells[:-1] == ["train", "2", "7", "7", "2", "2", "3", "64 x 64"]
    assert float(cells[-1]) == round(
        sorted(statistics(open_shards(str(folder), "train"), CaptionSource()).bytes)[2] / 1000, 1
    )
    page = (tmp_path / "page.html").read_text()
    assert "Unreadable images: 5: " in page
    assert "4 of 7 samples have no .txt member." in page
    assert "2 classes, 3 to 3 samples each." in page
    assert page.count("data:image/svg+xml") == 6


def test_a_sample_of_the_samples(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(StatsCommand(source=str(folder), output=tmp_path / "page.html", samples=3))
    assert "| 7       | 3         |" in capsys.readouterr().out


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        run(StatsCommand(source=str(tmp_path / "no"), output=tmp_path / "page.html"))
    with pytest.raises(UserError, match="--samples must be at least 1"):
        StatsCommand(source="x", samples=0)
