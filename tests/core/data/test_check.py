"""Every kind of damage is found and named; sound shards pass."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convscope.core.data.build import BuildConfig
from convscope.core.data.build import run as run_build
from convscope.core.data.check import CheckConfig, IndexConfig, check, run, run_index
from convscope.core.errors import UserError


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    """Two splits; train has two shards of four samples."""
    for split, group, count in (("train", "cat", 4), ("train", "dog", 4), ("test", "cat", 2)):
        folder = tmp_path / "source" / split / group
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg")
    run_build(BuildConfig(source=str(tmp_path / "source"), dest=str(tmp_path / "d"), samples_per_shard=4))
    return tmp_path / "d"


def rewrite(path: Path, change) -> None:
    """Pack a shard anew with the members `change(name, data)`; its index and line in shards.json follow."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (pair for member in members for pair in change(*member)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    Path(f"{path}.idx").unlink()
    run_index(IndexConfig(folder=str(path.parent)))
    listed = json.loads((path.parent / "shards.json").read_text())
    for row in listed["shards"]:
        if row["file"] == path.name:
            row["bytes"] = path.stat().st_size
            row["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "shards.json").write_text(json.dumps(listed))


def found(dest: Path, **options) -> list[tuple[str, str | None]]:
    return [(problem.shard, problem.key) for problem in check(dest, **options)]


def messages(dest: Path) -> str:
    return "\n".join(map(str, check(dest)))


def test_sound_shards_have_no_problem(dest, capsys):
    assert check(dest) == []
    run(CheckConfig(folder=str(dest)))
    assert capsys.readouterr().out.count("\n") == 1


def test_truncated_tar(dest):
    path = dest / "train" / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    problems = check(dest)
    assert {problem.shard for problem in problems} == {"train/train-000001.tar"}
    text = messages(dest)
    assert "truncated" in text
    assert "stale index" in text
    assert "3000 bytes" in text


def test_flipped_bit_in_a_header(dest):
    path = dest / "train" / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    assert "checksum" in messages(dest)
    assert {shard for shard, _ in found(dest)} == {"train/train-000000.tar"}


def test_flipped_bit_in_an_image_shows_in_the_hash(dest):
    path = dest / "test" / "test-000000.tar"
    data = bytearray(path.read_bytes())
    data[512 + 200] ^= 1
    path.write_bytes(data)
    assert [str(problem) for problem in check(dest, decode=False)] == [
        "test/test-000000.tar: sha256 differs from shards.json"
    ]


def test_corrupt_image_is_named_by_shard_and_key(dest):
    bad = lambda name, data: [(name, b"not an image" if name == "00000005.jpg" else data)]  # noqa: E731
    rewrite(dest / "train" / "train-000001.tar", bad)
    assert found(dest) == [("train/train-000001.tar", "00000005")]
    assert found(dest, decode=False) == []


def test_key_that_another_shard_has(dest):
    rewrite(dest / "train" / "train-000001.tar", lambda name, data: [(name.replace("00000006", "00000002"), data)])
    assert found(dest) == [("train/train-000001.tar", "00000002")]
    assert "already in train/train-000000.tar" in messages(dest)


def test_shards_made_elsewhere_need_no_list(dest, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for path in (dest / "train").glob("*.tar*"):
        path.rename(folder / path.name)
    assert check(folder) == []
    (folder / "train-000001.tar.idx").unlink()
    assert found(folder) == [("train-000001.tar", None)]


def test_missing_label(dest):
    rewrite(dest / "train" / "train-000000.tar", lambda name, data: [] if name == "00000001.cls" else [(name, data)])
    assert found(dest) == [("train/train-000000.tar", "00000001")]


@pytest.mark.parametrize("label", [b"2", b"cat", b"-1"])
def test_label_that_is_no_class(dest, label):
    change = lambda name, data: [(name, label if name == "00000004.cls" else data)]  # noqa: E731
    rewrite(dest / "train" / "train-000001.tar", change)
    assert found(dest) == [("train/train-000001.tar", "00000004")]


def test_wrong_number_of_samples(dest):
    rewrite(
        dest / "train" / "train-000001.tar", lambda name, data: [] if name.startswith("00000007") else [(name, data)]
    )
    assert messages(dest) == "train/train-000001.tar: 3 samples, 4 in shards.json"


def test_missing_and_unlisted_shards(dest):
    (dest / "train" / "train-000001.tar").rename(dest / "train" / "train-000002.tar")
    (dest / "train" / "train-000001.tar.idx").rename(dest / "train" / "train-000002.tar.idx")
    assert found(dest) == [("train/train-000001.tar", None), ("train/train-000002.tar", None)]


def test_unfinished_build(dest):
    (dest / "train" / "shards.json").unlink()
    assert found(dest) == [("train", None)]


def test_stale_and_missing_index_are_found_and_mended(dest, capsys):
    (dest / "train" / "train-000000.tar.idx").unlink()
    index = dest / "train" / "train-000001.tar.idx"
    whole = index.read_bytes()
    index.write_bytes(whole[:-8])
    assert found(dest) == [("train/train-000000.tar", None), ("train/train-000001.tar", None)]
    run_index(IndexConfig(folder=str(dest)))
    assert "2 of 3" in capsys.readouterr().out
    assert index.read_bytes() == whole
    assert check(dest) == []


def test_problems_are_printed_and_counted(dest, capsys):
    (dest / "test" / "test-000000.tar.idx").unlink()
    (dest / "train" / "train-000000.tar.idx").unlink()
    with pytest.raises(UserError, match="2 problems"):
        run(CheckConfig(folder=str(dest)))
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_folder_without_shards_is_told(tmp_path):
    with pytest.raises(UserError, match="no splits"):
        check(tmp_path)
    with pytest.raises(UserError, match="no \\.tar"):
        run_index(IndexConfig(folder=str(tmp_path)))


def test_damaged_shard_is_not_indexed(dest):
    path = dest / "test" / "test-000000.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match="test-000000"):
        run_index(IndexConfig(folder=str(dest)))
