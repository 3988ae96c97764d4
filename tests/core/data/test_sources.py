"""What is found in folders, zips, tables and torchvision data sets."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

from convscope.core.data.sources import Columns, FolderSource, open_source
from convscope.core.errors import UserError


def jpeg(value: int = 0) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(encoded, "JPEG")
    return encoded.getvalue()


def write(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    return root


def zipped(root: Path, path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(root))
    return path


def summary(source: str) -> dict[str, list[tuple[str, str | None]]]:
    splits = open_source(source).listing().splits
    return {split: [(item.name, item.label) for item in items] for split, items in splits.items()}


LAYOUTS = {
    "class folders": (["dog/b.jpg", "cat/a.JPEG"], {"": [("cat/a.JPEG", "cat"), ("dog/b.jpg", "dog")]}),
    "flat": (["b.jpg", "a.png"], {"": [("a.png", None), ("b.jpg", None)]}),
    "one folder": (["photos/b.jpg", "photos/a.jpg"], {"": [("photos/a.jpg", None), ("photos/b.jpg", None)]}),
    "splits": (
        ["train/cat/a.jpg", "test/cat/b.jpg"],
        {"test": [("test/cat/b.jpg", "cat")], "train": [("train/cat/a.jpg", "cat")]},
    ),
    "only one split": (["train/cat/a.jpg"], {"train": [("train/cat/a.jpg", "cat")]}),
    "splits in a folder": (["set/train/x/a.jpg"], {"train": [("set/train/x/a.jpg", "x")]}),
    "split without classes": (["val/a.jpg"], {"val": [("val/a.jpg", None)]}),
    "deeper than the class": (["cat/1/a.jpg", "dog/a.jpg"], {"": [("cat/1/a.jpg", "cat"), ("dog/a.jpg", "dog")]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_and_zip_of_it_list_the_same(tmp_path, layout):
    names, expected = LAYOUTS[layout]
    root = write(tmp_path / "source", *names)
    assert summary(str(root)) == expected
    archive = zipped(root, tmp_path / "source.zip")
    assert summary(str(archive)) == expected
    for item in open_source(str(root)).listing().splits[next(iter(expected))]:
        from_folder, from_zip = (open_source(str(path)).read(item) for path in (root, archive))
        assert from_folder == from_zip
        assert from_folder.data == (root / item.name).read_bytes()
        assert from_folder.suffix == ("png" if item.name.endswith("png") else "jpg")


def test_files_of_the_system_are_ignored_and_useless_ones_named(tmp_path):
    root = write(tmp_path, "cat/a.jpg", "dog/a.jpg", ".git/x.jpg", "cat/.a.jpg", "__MACOSX/cat/a.jpg", "cat/Thumbs.db")
    (root / "cat" / "empty.jpg").touch()
    (root / "cat" / "notes.txt").write_text("x")
    for source in (root, zipped(root, tmp_path.parent / f"{tmp_path.name}.zip")):
        listing = open_source(str(source)).listing()
        assert [item.name for item in listing.splits[""]] == ["cat/a.jpg", "dog/a.jpg"]
        assert listing.ignored == ["cat/empty.jpg", "cat/notes.txt"]


def test_zip_members_that_would_escape_are_left_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        for name in ("../up.jpg", "/root.jpg", "a/../../b.jpg", "ok/a.jpg", "fine/b.jpg"):
            archive.writestr(name, jpeg())
    listing = open_source(str(tmp_path / "evil.zip")).listing()
    assert [item.name for item in listing.splits[""]] == ["fine/b.jpg", "ok/a.jpg"]
    assert set(listing.ignored) == {"../up.jpg", "/root.jpg", "a/../../b.jpg"}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_member_is_named(tmp_path, compression):
    root = write(tmp_path / "source", "a.jpg", "b.jpg")
    path = zipped(root, tmp_path / "source.zip", compression)
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 0xFF  # inside the first member's data
    path.write_bytes(damaged)
    source = open_source(str(path))
    with pytest.raises(UserError, match=r"a\.jpg"):
        source.read(source.listing().splits[""][0])


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a.jpg", "cat/b.jpg"], "a.jpg lies beside class folders"), (["notes.txt/x"], "no images")],
)
def test_unusable_folder_is_told_in_one_line(tmp_path, names, message):
    root = write(tmp_path / "source", *names)
    with pytest.raises(UserError, match=message):
        open_source(str(root)).listing()


def test_unknown_source_is_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_source(str(tmp_path / "absent"))
    (tmp_path / "a.zip").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="neither"):
        open_source(str(tmp_path / "a.zip"))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_table_columns_are_found_by_their_usual_names(tmp_path, suffix):
    write(tmp_path, "img/a.jpg", "img/b.jpg")
    frame = pandas.DataFrame(
        {"Filepath": ["img/a.jpg", "img/b.jpg"], "title": ["a, b", "NA"], "label": [7, 10], "author": ["x", "y"]}
    )
    path = tmp_path / f"table.{suffix}"
    if suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    source = open_source(str(path))
    items = source.listing().splits[""]
    assert [(i.name, i.label, i.caption, dict(i.fields)) for i in items] == [
        ("img/a.jpg", "7", "a, b", {"author": "x"}),
        ("img/b.jpg", "10", "NA", {"author": "y"}),
    ]
    assert source.read(items[1]).data == (tmp_path / "img" / "b.jpg").read_bytes()


def test_table_columns_can_be_named(tmp_path):
    write(tmp_path, "a.jpg")
    (tmp_path / "t.csv").write_text("where,what,label\na.jpg,words,3\n")
    columns = Columns(image="where", caption="what")
    (item,) = open_source(str(tmp_path / "t.csv"), columns=columns).listing().splits[""]
    assert (item.name, item.caption, item.label) == ("a.jpg", "words", "3")


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("x,y\n1,2\n", Columns(), "no image column among x, y"),
        ("image\na.jpg\n", Columns(label="kind"), "no column 'kind'"),
        ("image,label\na.jpg,\n", Columns(), "row 1 has no label"),
        ("image\na.jpg\nlost.jpg\n", Columns(), "row 2 names lost.jpg"),
    ],
)
def test_mistake_in_a_table_is_located(tmp_path, text, columns, message):
    write(tmp_path, "a.jpg")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "t.csv"), columns=columns).listing()


def write_mnist(root: Path, images: dict[str, np.ndarray], labels: dict[str, list[int]]) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in images:
        count = len(labels[prefix])
        shape = b"".join(n.to_bytes(4, "big") for n in images[prefix].shape)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + shape + images[prefix].tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + count.to_bytes(4, "big") + bytes(labels[prefix])
        )


def test_torchvision_arrays_become_lossless_images_with_published_labels(tmp_path):
    rng = np.random.default_rng(0)
    images = {"train": rng.integers(0, 256, (3, 28, 28), np.uint8), "t10k": rng.integers(0, 256, (2, 28, 28), np.uint8)}
    write_mnist(tmp_path, images, {"train": [4, 0, 9], "t10k": [1, 1]})
    source = open_source("torchvision:MNIST", data_root=tmp_path)
    listing = source.listing()
    assert listing.classes is not None
    labels = {split: [listing.classes.index(item.label) for item in items] for split, items in listing.splits.items()}
    assert labels == {"train": [4, 0, 9], "test": [1, 1]}
    suffix, data = source.read(listing.splits["test"][1])
    assert suffix == "png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), images["t10k"][1])


def test_torchvision_files_keep_their_bytes(tmp_path):
    write(tmp_path / "eurosat" / "2750", "Forest/a.jpg", "River/b.jpg")
    source = open_source("torchvision:EuroSAT", data_root=tmp_path)
    listing = source.listing()
    assert [(item.label) for item in listing.splits[""]] == ["Forest", "River"]
    image = source.read(listing.splits[""][1])
    assert image == ("jpg", (tmp_path / "eurosat" / "2750" / "River" / "b.jpg").read_bytes())


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("NoSuchSet", None, "no data set 'NoSuchSet'"),
        ("MNIST", "val", "train and test, not 'val'"),
        ("FakeData", None, "FakeData"),
    ],
)
def test_unusable_torchvision_set_is_told(tmp_path, name, split, message):
    with pytest.raises(UserError, match=message):
        open_source(f"torchvision:{name}", split=split, data_root=tmp_path)


def test_other_folders_beside_splits_are_refused(tmp_path):
    for name in ("train/cat/a.jpg", "test/cat/b.jpg", "docs/figure.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="test, train look like splits, but docs stands beside them"):
        FolderSource(tmp_path).listing()


def test_a_link_to_a_folder_above_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").write_bytes(b"x")
    (tmp_path / "again").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link to a folder that is there already"):
        FolderSource(tmp_path).listing()
