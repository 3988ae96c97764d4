"""Shards as written: layout, bytes, splits, resuming, refusals."""

import hashlib
import io
import json
import os
import resource
import shutil
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convscope.core.data.build import BuildConfig, build, run
from convscope.core.data.sources import FolderSource
from convscope.core.errors import UserError


def image_bytes(seed: int, size: tuple[int, int] = (8, 8), encoding: str = "JPEG") -> bytes:
    encoded = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(encoded, encoding)
    return encoded.getvalue()


def make_source(root: Path, counts: dict[str, int]) -> Path:
    for group, count in counts.items():
        (root / group).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / group / f"{i:03d}.jpg").write_bytes(image_bytes(zlib.crc32(f"{group}/{i}".encode())))
    return root


def read_split(dest: Path, split: str) -> list[dict[str, bytes]]:
    """The samples in order, as Python's tarfile sees them."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted((dest / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return [{"key": key.encode(), **members} for key, members in samples.items()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_layout_is_the_documented_one(tmp_path):
    source = make_source(tmp_path / "s", {"train/cat": 5, "train/dog": 4, "test/dog": 2})
    run(BuildConfig(source=str(source), dest=str(tmp_path / "d"), samples_per_shard=4))
    written = files(tmp_path / "d")
    visible = {name for name in written if not Path(name).name.startswith(".")}
    shards = ["test/test-000000.tar", *(f"train/train-{i:06d}.tar" for i in range(3))]
    lists = {"classes.json", "train/shards.json", "test/shards.json"}
    assert visible == lists | set(shards) | {f"{name}.idx" for name in shards}
    assert json.loads(written["classes.json"]) == ["cat", "dog"]
    listed = json.loads(written["train/shards.json"])
    assert (listed["version"], listed["samples"]) == (1, 9)
    assert [row["samples"] for row in listed["shards"]] == [4, 4, 1]
    for row in listed["shards"]:
        data = written[f"train/{row['file']}"]
        assert row["bytes"] == len(data)
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
    joined = "".join(row["sha256"] for row in listed["shards"])
    assert listed["fingerprint"] == hashlib.sha256(joined.encode()).hexdigest()


def test_samples_hold_the_original_bytes_and_labels(tmp_path):
    source = make_source(tmp_path / "s", {"cat": 5, "dog": 4, "10": 1, "9": 1})
    run(BuildConfig(source=str(source), dest=str(tmp_path / "d"), samples_per_shard=3))
    classes = json.loads((tmp_path / "d" / "classes.json").read_text())
    assert classes == ["9", "10", "cat", "dog"]
    samples = read_split(tmp_path / "d", "train")
    names = [json.loads(sample["json"])["file"] for sample in samples]
    assert sorted(names) == sorted(str(p.relative_to(source)) for p in source.rglob("*.jpg"))
    assert [sample["key"].decode() for sample in samples] == [f"{i:08d}" for i in range(11)]
    for name, sample in zip(names, samples):
        assert sample["jpg"] == (source / name).read_bytes()
        assert classes[int(sample["cls"])] == name.split("/")[0]


def test_tar_members_carry_no_time_or_owner(tmp_path):
    source = make_source(tmp_path / "s", {"cat": 2})
    run(BuildConfig(source=str(source), dest=str(tmp_path / "d")))
    with tarfile.open(tmp_path / "d" / "train" / "train-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert not member.pax_headers


def test_index_holds_the_start_of_each_sample_and_the_end(tmp_path):
    source = make_source(tmp_path / "s", {"cat": 3, "dog": 2})
    run(BuildConfig(source=str(source), dest=str(tmp_path / "d")))
    path = tmp_path / "d" / "train" / "train-000000.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    starts = [member.offset for member in members if member.name.endswith(".jpg")]
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    assert np.fromfile(f"{path}.idx", "<u8").tolist() == [*starts, end]


def test_two_builds_are_identical_and_the_seed_changes_the_order(tmp_path):
    source = make_source(tmp_path / "s", {"cat": 9, "dog": 9})
    for name, seed, workers in (("a", 0, 1), ("b", 0, 4), ("c", 1, 1)):
        run(BuildConfig(source=str(source), dest=str(tmp_path / name), samples_per_shard=5, seed=seed, workers=workers))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["train/train-000000.tar"] != files(tmp_path / "c")["train/train-000000.tar"]


def test_classes_are_mixed_over_shards_unless_told_otherwise(tmp_path):
    source = make_source(tmp_path / "s", {"cat": 40, "dog": 40})
    labels = {}
    for shuffle in (True, False):
        dest = tmp_path / str(shuffle)
        run(BuildConfig(source=str(source), dest=str(dest), samples_per_shard=20, shuffle=shuffle))
        labels[shuffle] = [int(sample["cls"]) for sample in read_split(dest, "train")]
    assert labels[False] == [0] * 40 + [1] * 40
    for start in range(0, 80, 20):
        assert 2 <= sum(labels[True][start : start + 20]) <= 18


def test_shares_divide_each_class_without_overlap(tmp_path):
    source = make_source(tmp_path / "s", {"cat": 10, "dog": 20, "owl": 5})
    splits = ("train=0.6", "val=0.2", "test=0.2")
    run(BuildConfig(source=str(source), dest=str(tmp_path / "d"), splits=splits))
    found = {
        s: [json.loads(x["json"])["file"] for x in read_split(tmp_path / "d", s)] for s in ("train", "val", "test")
    }
    assert {split: len(names) for split, names in found.items()} == {"train": 21, "val": 7, "test": 7}
    assert len(set().union(*map(set, found.values()))) == 35
    for split, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        for group, count in (("cat", 10), ("dog", 20), ("owl", 5)):
            assert abs(sum(name.startswith(group) for name in found[split]) - share * count) <= 1


def test_split_names_one_split_or_chooses_one(tmp_path):
    flat = make_source(tmp_path / "flat", {"": 3})
    run(BuildConfig(source=str(flat), dest=str(tmp_path / "a"), split="val"))
    assert len(read_split(tmp_path / "a", "val")) == 3
    assert not (tmp_path / "a" / "classes.json").exists()
    own = make_source(tmp_path / "own", {"train/cat": 2, "test/cat": 1})
    run(BuildConfig(source=str(own), dest=str(tmp_path / "b"), split="test"))
    assert not (tmp_path / "b" / "train").exists()


def test_second_source_adds_a_split_with_the_same_classes(tmp_path):
    train = make_source(tmp_path / "one", {"cat": 2, "dog": 2})
    test = make_source(tmp_path / "two", {"dog": 2, "cat": 1})
    run(BuildConfig(source=str(train), dest=str(tmp_path / "d"), split="train"))
    run(BuildConfig(source=str(test), dest=str(tmp_path / "d"), split="test"))
    assert sorted(int(sample["cls"]) for sample in read_split(tmp_path / "d", "test")) == [0, 1, 1]
    owl = make_source(tmp_path / "three", {"owl": 1, "cat": 1})
    with pytest.raises(UserError, match="'owl'"):
        run(BuildConfig(source=str(owl), dest=str(tmp_path / "d"), split="val"))


def test_lost_class_list_cannot_change_the_labels_of_finished_shards(tmp_path):
    test = make_source(tmp_path / "test", {"dog": 2, "owl": 2})
    run(BuildConfig(source=str(test), dest=str(tmp_path / "d"), split="test"))
    (tmp_path / "d" / "classes.json").unlink()
    train = make_source(tmp_path / "train", {"cat": 2, "dog": 2, "owl": 2})
    run(BuildConfig(source=str(train), dest=str(tmp_path / "d"), split="train"))
    with pytest.raises(UserError, match="other images or labels"):
        run(BuildConfig(source=str(test), dest=str(tmp_path / "d"), split="test"))


class Failing(FolderSource):
    """A source that breaks off after a number of reads, and counts them."""

    def __init__(self, root: Path, reads: int) -> None:
        super().__init__(root)
        self.left, self.done = reads, 0

    def read(self, item):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.done += 1
        return super().read(item)


def test_interrupted_build_resumes_with_what_is_finished(tmp_path):
    root = make_source(tmp_path / "s", {"cat": 10, "dog": 10})
    config = BuildConfig(source=str(root), dest=str(tmp_path / "d"), samples_per_shard=4, workers=1)
    with pytest.raises(KeyboardInterrupt):
        build(Failing(root, 10), config)
    folder = tmp_path / "d" / "train"
    assert not (folder / "shards.json").exists()
    assert sorted(path.name for path in folder.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]
    (folder / ".train-000002.tar.0a.tmp").write_bytes(b"left by a kill")
    resumed = Failing(root, 1000)
    build(resumed, config)
    assert resumed.done == 12
    build(Failing(root, 1000), replace(config, dest=str(tmp_path / "whole")))
    assert files(tmp_path / "d") == files(tmp_path / "whole")
    again = Failing(root, 1000)
    build(again, config)
    assert again.done == 0


def test_shard_of_the_wrong_length_is_built_again(tmp_path):
    root = make_source(tmp_path / "s", {"cat": 6})
    config = BuildConfig(source=str(root), dest=str(tmp_path / "d"), samples_per_shard=2)
    run(config)
    before = files(tmp_path / "d")
    shard = tmp_path / "d" / "train" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    source = Failing(root, 1000)
    build(source, config)
    assert source.done == 2
    assert files(tmp_path / "d") == before


@pytest.mark.parametrize("change", [{"samples_per_shard": 3}, {"seed": 5}, {"resize": 4}, {"shuffle": False}])
def test_other_settings_are_not_mixed_in(tmp_path, change):
    root = make_source(tmp_path / "s", {"cat": 6})
    config = BuildConfig(source=str(root), dest=str(tmp_path / "d"))
    run(config)
    before = files(tmp_path / "d")
    with pytest.raises(UserError, match=next(iter(change))):
        run(replace(config, **change))
    assert files(tmp_path / "d") == before


def test_other_images_and_foreign_files_are_not_mixed_in(tmp_path):
    root = make_source(tmp_path / "s", {"cat": 6})
    run(BuildConfig(source=str(root), dest=str(tmp_path / "d")))
    make_source(tmp_path / "s", {"cat": 7})
    with pytest.raises(UserError, match="other images"):
        run(BuildConfig(source=str(root), dest=str(tmp_path / "d")))
    (tmp_path / "e" / "train").mkdir(parents=True)
    (tmp_path / "e" / "train" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="other files"):
        run(BuildConfig(source=str(root), dest=str(tmp_path / "e")))


@pytest.mark.parametrize(
    ("counts", "settings", "message"),
    [
        ({"train/cat": 1, "test/dog": 1}, {}, "test has class 'dog', which train lacks"),
        ({"train/cat": 1, "test/cat": 1}, {"splits": ("train=0.5", "test=0.5")}, "has its own splits"),
        ({"train/cat": 1, "test/cat": 1}, {"split": "val"}, "no split 'val'; it has test, train"),
        ({"cat": 3}, {"splits": ("train=0.5", "test=0.4")}, "add up to 1"),
        ({"cat": 3}, {"splits": ("train=many",)}, "add up to 1"),
        ({"cat": 1}, {"splits": ("train=0.9", "test=0.1")}, "no images for split test"),
        ({"cat": 1}, {"split": "../up"}, "cannot be the name"),
    ],
)
def test_mistake_is_told_before_anything_is_written(tmp_path, counts, settings, message):
    source = make_source(tmp_path / "s", counts)
    with pytest.raises(UserError, match=message):
        run(BuildConfig(source=str(source), dest=str(tmp_path / "d"), **settings))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "settings",
    [{"samples_per_shard": 0}, {"resize": 0}, {"split": "a", "splits": ("a=1",)}, {"workers": -1}, {"seed": -1}],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError):
        BuildConfig(source="s", dest="d", **settings)


def test_resize_shrinks_the_short_side_and_never_enlarges(tmp_path):
    root = tmp_path / "s"
    root.mkdir()
    small = image_bytes(0, (30, 20))
    for name, data in {
        "wide.jpg": image_bytes(1, (100, 60)),
        "tall.png": image_bytes(2, (50, 131), "PNG"),
        "small.jpg": small,
    }.items():
        (root / name).write_bytes(data)
    run(BuildConfig(source=str(root), dest=str(tmp_path / "d"), resize=24))
    found = {}
    for sample in read_split(tmp_path / "d", "train"):
        suffix = "png" if "png" in sample else "jpg"
        found[json.loads(sample["json"])["file"]] = (suffix, sample[suffix])
    sizes = {name: (suffix, Image.open(io.BytesIO(data)).size) for name, (suffix, data) in found.items()}
    assert sizes == {"wide.jpg": ("jpg", (40, 24)), "tall.png": ("png", (24, 63)), "small.jpg": ("jpg", (30, 20))}
    assert found["small.jpg"][1] == small
    expected = Image.open(root / "tall.png").resize((24, 63), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found["tall.png"][1]))), np.asarray(expected))


def test_image_that_cannot_be_resized_is_named_and_left_out(tmp_path, capsys):
    root = make_source(tmp_path / "s", {"": 3})
    (root / "broken.jpg").write_bytes(b"no image")
    run(BuildConfig(source=str(root), dest=str(tmp_path / "d"), resize=4))
    assert "broken.jpg" in capsys.readouterr().err
    assert len(read_split(tmp_path / "d", "train")) == 3
    assert json.loads((tmp_path / "d" / "train" / "shards.json").read_text())["samples"] == 3


def test_full_disk_is_one_clear_error_and_leaves_no_part_of_a_shard(tmp_path):
    root = make_source(tmp_path / "s", {"": 40})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a file cannot grow beyond this
    try:
        with pytest.raises(UserError, match=r"cannot write .*train-000000\.tar"):
            run(BuildConfig(source=str(root), dest=str(tmp_path / "d")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "d" / "train").iterdir()] == [".build.json"]


def test_caption_table_becomes_text_members(tmp_path, capsys):
    make_source(tmp_path / "img", {"": 2})
    (tmp_path / "pairs.csv").write_text("image,caption,year\nimg/000.jpg,één kat,1999\nimg/001.jpg,a dog,2001\n")
    run(BuildConfig(source=str(tmp_path / "pairs.csv"), dest=str(tmp_path / "d"), shuffle=False))
    first, second = read_split(tmp_path / "d", "train")
    assert (first["txt"].decode(), second["txt"].decode()) == ("één kat", "a dog")
    assert json.loads(first["json"]) == {"file": "img/000.jpg", "year": "1999"}
    assert "cls" not in first
    assert capsys.readouterr().out.count("\n") == 2


def test_names_that_are_no_utf8_are_packed(tmp_path):
    root = make_source(tmp_path / "s", {"": 1})
    (root / "000.jpg").rename(os.fsdecode(os.fsencode(root) + b"/caf\xe9.jpg"))
    run(BuildConfig(source=str(root), dest=str(tmp_path / "d")))
    (sample,) = read_split(tmp_path / "d", "train")
    assert json.loads(sample["json"])["file"] == "caf\udce9.jpg"  # as the operating system gives it


def test_classes_of_a_deleted_build_do_not_count(tmp_path):
    run(BuildConfig(source=str(make_source(tmp_path / "s", {"a": 2, "b": 2})), dest=str(tmp_path / "d")))
    shutil.rmtree(tmp_path / "d" / "train")
    run(BuildConfig(source=str(make_source(tmp_path / "other", {"x": 2, "y": 2})), dest=str(tmp_path / "d")))
    assert json.loads((tmp_path / "d" / "classes.json").read_text()) == ["x", "y"]
