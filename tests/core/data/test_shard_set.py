"""Opening what users name, reading any sample, and saying what is wrong."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset

from convscope.core.data import shard_set
from convscope.core.data.build import BuildConfig
from convscope.core.data.build import run as build
from convscope.core.data.decode import decode
from convscope.core.data.shard_index import index_path, write_index
from convscope.core.data.shard_set import label_of, open_shards
from convscope.core.data.subset import per_class_subset, read_labels
from convscope.core.errors import UserError
from tests.core.data.tars import noise, png, write_split, write_tar


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """Two splits from `shards build`: train with three shards of four samples, test with one of two."""
    for split, group, count in (("train", "cat", 6), ("train", "dog", 6), ("test", "cat", 1), ("test", "dog", 1)):
        folder = tmp_path / "source" / split / group
        folder.mkdir(parents=True)
        for i in range(count):
            noise(i).save(folder / f"{i}.png")
    build(BuildConfig(source=str(tmp_path / "source"), dest=str(tmp_path / "d"), samples_per_shard=4))
    return tmp_path / "d"


def keys(source: Path | str, split: str = "train") -> list[str]:
    return [str(sample["__key__"]) for sample in open_shards(str(source), split)]


def test_built_folder(built):
    shards = open_shards(str(built), "train")
    listing = json.loads((built / "train" / "shards.json").read_text())
    assert (len(shards), shards.fingerprint, shards.classes) == (12, listing["fingerprint"], ["cat", "dog"])
    assert (shards.source, shards.split) == (str(built), "train")
    assert [path.name for path in shards.shards] == [f"train-{i:06d}.tar" for i in range(3)]
    assert keys(built) == [f"{i:08d}" for i in range(12)]
    assert len(open_shards(str(built), "test")) == 2


def test_same_samples_as_webdataset(built):
    paths = [str(path) for path in sorted((built / "train").glob("*.tar"))]
    others = list(webdataset.WebDataset(paths, shardshuffle=False))
    shards = open_shards(str(built), "train")
    assert len(others) == len(shards)
    for mine, other in zip(shards, others):
        assert mine == {name: value for name, value in other.items() if name not in ("__url__", "__local_path__")}


def test_shards_of_webdatasets_writer_need_no_index(tmp_path):
    rows = [{"__key__": f"{i:04d}", "png": png(i), "cls": str(i).encode()} for i in range(10)]
    with webdataset.ShardWriter(str(tmp_path / "%06d.tar"), maxcount=4, verbose=0) as writer:
        for row in rows:
            writer.write(row)
    shards = open_shards(str(tmp_path), "train")
    assert list(shards) == rows
    assert shards.classes is None
    assert index_path(tmp_path / "000000.tar").exists()
    again = open_shards(str(tmp_path), "train")
    assert (list(again), again.fingerprint) == (rows, shards.fingerprint)


def test_shards_of_download_tools(tmp_path):
    """As img2dataset leaves them: json with status and caption, a missing text, other extensions, files beside."""
    rows = []
    for i, (suffix, caption) in enumerate([("jpg", "a cat"), ("png", None), ("webp", "an eel"), ("jpeg", "")]):
        fields = {"key": f"00000000{i}", "status": "success", "caption": caption, "width": 8, "label": i}
        rows.append((f"00000000{i}.{suffix}", png(i)))
        if caption is not None:
            rows.append((f"00000000{i}.txt", caption.encode()))
        rows.append((f"00000000{i}.json", json.dumps(fields).encode()))
    write_tar(tmp_path / "00000.tar", rows)
    for name in ("00000.parquet", "00000_stats.json"):
        (tmp_path / name).write_bytes(b"not for us")
    shards = open_shards(str(tmp_path / "{00000..00000}.tar"), "train")
    assert [sample["__key__"] for sample in shards] == [f"00000000{i}" for i in range(4)]
    assert [sample.get("txt") for sample in shards] == [b"a cat", None, b"an eel", b""]
    assert [label_of(sample, "label") for sample in shards] == [0, 1, 2, 3]
    assert [decode(sample).getpixel((0, 0))[0] for sample in shards] == [0, 1, 2, 3]


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    write_split(tmp_path / "train", [3])

    def refuse(path: Path, data: bytes) -> None:
        raise UserError(f"cannot write {path}: read-only file system")

    monkeypatch.setattr(shard_set, "write_bytes", refuse)  # this user may be root, whom no permission stops
    assert keys(tmp_path) == ["00000", "00001", "00002"]
    assert [path.suffix for path in (tmp_path / "train").iterdir()] == [".tar"]


def test_ways_to_name_shards(tmp_path):
    write_split(tmp_path / "train", [3, 2, 4])
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    first = str(tmp_path / "train" / "train-000000.tar")
    for source, count in (
        (tmp_path, 9),
        (tmp_path / "train", 9),
        (first, 3),
        (tmp_path / "train" / "train-{000000..000001}.tar", 5),
        (tmp_path / "train" / "train-00000{0,2}.tar", 7),
    ):
        shards = open_shards(str(source), "train")
        assert (len(shards), shards.split, shards.classes) == (count, "train", ["a", "b", "c"])
    assert open_shards(first, "test").split == "train"  # what it is, not what was asked for


def test_fingerprint_follows_the_data(tmp_path):
    write_split(tmp_path / "train", [3, 2])
    write_split(tmp_path / "copy" / "train", [3, 2])
    write_split(tmp_path / "other" / "train", [3, 3])
    prints = [open_shards(str(tmp_path / name), "train").fingerprint for name in (".", "copy", "other")]
    assert prints[0] == prints[1] != prints[2]


def test_fingerprint_follows_pixels_that_leave_sizes_alone(tmp_path):
    prints = []
    for name, value in (("one", 1), ("other", 2)):
        members = [(f"{i:04d}.ppm", b"P6 4 4 255\n" + bytes([value] * 48)) for i in range(40)]
        write_tar(tmp_path / name / "train" / "000000.tar", members)
        prints.append(open_shards(str(tmp_path / name), "train").fingerprint)
    assert prints[0] != prints[1]


def test_embedded_shapes():
    shards = open_shards("builtin:shapes", "test")
    assert len(shards) == 2000
    assert shards.classes is not None
    assert {label_of(sample) for sample in (shards[i] for i in range(400))} <= set(range(len(shards.classes)))
    with pytest.raises(UserError, match="no split 'val'; it has test, train"):
        open_shards("builtin:shapes", "val")


def test_index_out_of_range(tmp_path):
    shards = open_shards(str(write_split(tmp_path / "train", [2])), "train")
    for index in (2, -1):
        with pytest.raises(IndexError):
            shards[index]
    assert shards[np.int64(1)]["__key__"] == "00001"


def test_pickle_fork_and_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_set, "MAX_OPEN", 2)
    shards = open_shards(str(write_split(tmp_path / "train", [5] * 8)), "train")
    expected = [shards[i] for i in range(40)]
    copy = pickle.loads(pickle.dumps(shards))
    assert list(copy) == expected
    assert copy.fingerprint == shards.fingerprint
    order = np.random.default_rng(0).integers(0, 40, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shards.__getitem__, order)) == [expected[i] for i in order]
    child = os.fork()
    if child == 0:
        os._exit(0 if [shards[i] for i in range(40)] == expected else 1)
    assert [shards[i] for i in range(40)] == expected
    assert os.waitpid(child, 0)[1] == 0


def test_few_files_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_set, "MAX_OPEN", 3)
    before = len(os.listdir("/proc/self/fd"))
    shards = open_shards(str(write_split(tmp_path / "train", [1] * 20)), "train")
    assert len(list(shards)) == 20
    assert len(os.listdir("/proc/self/fd")) - before <= 3
    del shards
    assert len(os.listdir("/proc/self/fd")) == before


def error(source: Path | str, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        open_shards(str(source), split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_is_told(tmp_path, built):
    assert "nowhere does not exist" in error(tmp_path / "nowhere")
    assert "(and 1 more)" in error(built / "train" / "train-{000000..000004}.tar")
    assert "Unbalanced" in error(built / "train-{000000.tar")
    assert "has no split 'val'; it has test, train" in error(built, "val")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "holds no .tar files" in error(tmp_path / "empty")
    assert "it holds no shards; see convscope shards build" in error(tmp_path / "empty", "test")
    assert "hold no samples" in error(write_tar(tmp_path / "none.tar", []))
    assert "there is builtin:shapes" in error("builtin:colours")


def test_other_files_than_tars(tmp_path):
    for name in ("x.tar.gz", "x.zip"):
        (tmp_path / name).write_bytes(b"x")
        assert "is no plain .tar" in error(tmp_path / name)


def test_unfinished_build(built):
    (built / "train" / "shards.json").unlink()
    assert "not finished" in error(built)


def test_shards_that_do_not_fit_their_list(built):
    first, second, third = sorted((built / "train").glob("*.tar"))
    whole = second.read_bytes()
    second.write_bytes(whole[:1500])
    assert "train-000001.tar is truncated: 1500 of" in error(built)
    second.write_bytes(whole + bytes(512))
    assert "train-000001.tar is too long" in error(built)
    second.unlink()
    assert "train-000001.tar is missing" in error(built)
    second.write_bytes(whole)
    (built / "train" / "extra.tar").write_bytes(whole)
    assert "extra.tar is not in" in error(built)
    (built / "train" / "extra.tar").unlink()
    index_path(third).write_bytes(index_path(first).read_bytes()[:16])
    assert "train-000002.tar.idx is stale" in error(built)


@pytest.mark.parametrize("content", ["[]", "{}", '{"shards": [{}], "fingerprint": "", "samples": 1}', "{"])
def test_list_that_shards_build_did_not_write(built, content):
    (built / "train" / "shards.json").write_text(content)
    assert "shards.json" in error(built)


def test_count_that_does_not_fit_the_list(built):
    path = built / "train" / "shards.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"samples": 13}))
    assert "12 samples, 13 in shards.json" in error(built)


def test_classes_that_are_no_list_of_names(built):
    (built / "classes.json").write_text('{"cat": 0}')
    assert "not a list of class names" in error(built)


@pytest.mark.parametrize("indexed", [True, False])
def test_truncated_shard_made_elsewhere(tmp_path, indexed):
    path = next(write_split(tmp_path / "train", [5]).glob("*.tar"))
    if indexed:
        write_index(path)
    path.write_bytes(path.read_bytes()[:4096])
    assert "train-000000.tar is" in error(tmp_path)
    assert "truncated" in error(tmp_path)


def test_shard_that_changes_or_vanishes_while_in_use(tmp_path):
    shards = open_shards(str(write_split(tmp_path / "train", [5])), "train")
    path = shards.shards[0]
    data = bytearray(path.read_bytes())
    data[:512] = b"x" * 512
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000000\.tar: bytes 0 to 2048 .*stale or the shard damaged"):
        shards[0]
    path.write_bytes(data[:2500])
    with pytest.raises(UserError, match="truncated"):
        shards[1]
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        pickle.loads(pickle.dumps(shards))[0]


def test_label_from_member_or_json():
    sample = {
        "__key__": "k",
        "cls": b"3\n",
        "json": b'{"shape": 5, "text": "7", "name": "cat", "half": 0.5, "no": null}',
    }
    assert [label_of(sample), label_of(sample, "shape"), label_of(sample, "text")] == [3, 5, 7]
    assert label_of({"__key__": "k", "cls": "4"}) == 4
    for field, cause in (("name", "'cat', not an integer"), ("half", "not an integer"), ("no", "no label 'no'")):
        with pytest.raises(UserError, match=f"sample k.*{cause}"):
            label_of(sample, field)
    for other in ({"txt": b"x"}, {"json": b"[1]"}, {"cls": b"cat"}, {"json": b"{"}):
        with pytest.raises(UserError, match="sample k"):
            label_of({"__key__": "k", **other})


def test_labels_of_a_split_are_read_without_images(tmp_path):
    shards = open_shards(str(write_split(tmp_path / "train", [4, 3], corrupt=[2])), "train")
    assert read_labels(shards).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert shards.without_image(5) == {"__key__": "00005", "cls": b"2"}
    with pytest.raises(UserError, match="sample 00000 has no label 'shape'"):
        read_labels(shards, "shape")


def test_per_class_subset():
    labels = np.random.default_rng(0).integers(0, 4, 400) * 2
    few, more = (per_class_subset(labels, count, seed=1) for count in (5, 20))
    assert np.bincount(labels[more]).tolist() == [20, 0, 20, 0, 20, 0, 20]
    assert (np.diff(more) > 0).all()
    assert set(few.tolist()) < set(more.tolist())
    assert more.dtype == np.int64
    assert np.array_equal(more, per_class_subset(labels, 20, seed=1))
    assert not np.array_equal(more, per_class_subset(labels, 20, seed=2))
    with pytest.raises(UserError, match=r"class \d has \d+ samples, fewer than 150"):
        per_class_subset(labels, 150, seed=1)
    with pytest.raises(UserError, match="at least one"):
        per_class_subset(labels, 0, seed=1)
