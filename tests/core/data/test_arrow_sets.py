"""Data sets in the layouts of Hugging Face's `datasets`, which were compared with what it writes."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from convscope.cli import main
from convscope.core.data.build import BuildConfig, run
from convscope.core.data.shard_set import open_shards
from convscope.core.data.sources import Columns, open_source
from convscope.core.errors import UserError
from tests.core.data.tars import noise

NAMES = ["cat", "dog", "eel"]


def encoded(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    noise(seed).save(file, kind)
    return file.getvalue()


def table(first: int, count: int, *, named: bool = True):
    """Rows as `datasets` stores them; the names of classes are in the schema."""
    rows = range(first, first + count)
    feature = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": feature}})} if named else None
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = [{"bytes": encoded(i, ("PNG", "JPEG", "WEBP")[i % 3]), "path": None} for i in rows]
    return pyarrow.table(
        {
            "image": pyarrow.array(images, kind),
            "label": pyarrow.array([i % 3 for i in rows], pyarrow.int64()),
            "caption": [f"picture {i}" for i in rows],
            "width": pyarrow.array([12 if i % 2 else None for i in rows], pyarrow.int32()),
        },
    ).replace_schema_metadata(metadata)


def write_stream(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, rows.schema) as writer:
        for batch in rows.to_batches(max_chunksize=3):
            writer.write_batch(batch)


def write_parquet(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(rows, path, row_group_size=4)


def saved_to_disk(root: Path) -> dict[str, int]:
    write_stream(root / "train" / "data-00000-of-00002.arrow", table(0, 7))
    write_stream(root / "train" / "data-00001-of-00002.arrow", table(7, 4))
    write_stream(root / "test" / "data-00000-of-00001.arrow", table(11, 2))
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return {"train": 11, "test": 2}


def one_split(root: Path) -> dict[str, int]:
    write_stream(root / "data-00000-of-00001.arrow", table(0, 5))
    return {"": 5}


def from_the_hub(root: Path) -> dict[str, int]:
    write_parquet(root / "data" / "train-00000-of-00002.parquet", table(0, 7))
    write_parquet(root / "data" / "train-00001-of-00002.parquet", table(7, 4))
    write_parquet(root / "data" / "validation-00000-of-00001.parquet", table(11, 2))
    return {"train": 11, "validation": 2}


def from_the_cache(root: Path) -> dict[str, int]:
    write_stream(root / "my_set-train-00000-of-00001.arrow", table(0, 5))
    return {"train": 5}


@pytest.mark.parametrize("layout", [saved_to_disk, one_split, from_the_hub, from_the_cache])
def test_layouts(tmp_path, layout):
    expected = layout(tmp_path)
    source = open_source(str(tmp_path))
    listing = source.listing()
    assert {split: len(items) for split, items in listing.splits.items()} == expected
    assert listing.classes == NAMES
    number = 0
    for split in expected:
        for item in listing.splits[split]:
            assert (item.label, item.caption) == (NAMES[number % 3], f"picture {number}")
            assert item.fields == ({"width": 12} if number % 2 else {})
            suffix, data = source.read(item)
            assert suffix == ("png", "jpg", "webp")[number % 3]
            assert data == encoded(number, ("PNG", "JPEG", "WEBP")[number % 3])
            number += 1


def test_shards_from_one_file(tmp_path):
    write_parquet(tmp_path / "x.parquet", table(0, 9))
    run(BuildConfig(source=str(tmp_path / "x.parquet"), dest=str(tmp_path / "out"), samples_per_shard=4))
    shards = open_shards(str(tmp_path / "out"), "train")
    assert shards.classes == NAMES
    pictures = {np.asarray(noise(i)).tobytes() for i in range(0, 9, 3)}  # the lossless ones
    found = [Image.open(io.BytesIO(shards[i]["png"])) for i in range(9) if "png" in shards[i]]
    assert {np.asarray(image).tobytes() for image in found} == pictures
    assert sorted(shards[i]["txt"] for i in range(9)) == sorted(f"picture {i}".encode() for i in range(9))


def test_convert_is_a_command(tmp_path, capsys):
    saved_to_disk(tmp_path / "set")
    main(["shards", "convert", str(tmp_path / "set"), str(tmp_path / "out"), "--samples-per-shard", "4"])
    said = capsys.readouterr().out
    assert "train: 11 samples in 3 shards" in said
    assert "test: 2 samples in 1 shard," in said
    assert len(open_shards(str(tmp_path / "out"), "test")) == 2


def test_plain_bytes_and_labels_without_names(tmp_path):
    rows = pyarrow.table(
        {"jpg": [encoded(0, "JPEG"), encoded(1, "JPEG")], "label": [7, 10], "text": [["a", "b"], ["c"]]}
    )
    with pyarrow.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)
    source = open_source(str(tmp_path / "x.arrow"))
    items = source.listing().splits[""]
    assert [(item.label, item.caption) for item in items] == [("7", "a"), ("10", "c")]
    assert source.read(items[1]) == ("jpg", encoded(1, "JPEG"))


def test_rows_whose_label_is_withheld(tmp_path):
    """As in the test splits of the hub: -1 everywhere, and perhaps no names."""
    write_parquet(tmp_path / "set" / "train-00000-of-00001.parquet", table(0, 6))
    test = table(6, 3, named=False)
    test = test.set_column(1, "label", pyarrow.array([-1] * 3, pyarrow.int64()))
    write_parquet(tmp_path / "set" / "test-00000-of-00001.parquet", test)
    listing = open_source(str(tmp_path / "set")).listing()
    assert listing.classes == NAMES
    assert [item.label for item in listing.splits["test"]] == [None] * 3
    run(BuildConfig(source=str(tmp_path / "set"), dest=str(tmp_path / "out")))
    shards = open_shards(str(tmp_path / "out"), "test")
    assert shards.classes == NAMES
    assert all("cls" not in shards[i] for i in range(3))


def test_mistakes_are_told(tmp_path):
    write_stream(tmp_path / "a.arrow", table(0, 3))
    for columns, said in ((Columns(label="kind"), "no column 'kind'"), (Columns(image="label"), "no column 'label'")):
        with pytest.raises(UserError, match=said):
            open_source(str(tmp_path / "a.arrow"), columns=columns).listing()
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:900])
    with pytest.raises(UserError, match=r"cannot read .*cut\.arrow"):
        open_source(str(tmp_path / "cut.arrow")).listing()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"cannot read .*cut\.parquet"):
        open_source(str(tmp_path / "cut.parquet")).listing()
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    elsewhere = pyarrow.array([{"bytes": None, "path": "/there/x.jpg"}], kind)
    write_stream(tmp_path / "b.arrow", pyarrow.table({"image": elsewhere}))
    source = open_source(str(tmp_path / "b.arrow"))
    with pytest.raises(UserError, match=r"row 0 of the set has no image bytes, only '/there/x\.jpg'"):
        source.read(source.listing().splits[""][0])
    two = pyarrow.table({"left": [encoded(0)], "right": [encoded(1)]})
    write_stream(tmp_path / "c.arrow", two)
    with pytest.raises(UserError, match="no image column among left, right; name --image-column"):
        open_source(str(tmp_path / "c.arrow")).listing()
    columns = Columns(image="right")
    source = open_source(str(tmp_path / "c.arrow"), columns=columns)
    assert source.read(source.listing().splits[""][0]).data == encoded(1)


def test_a_folder_of_images_with_a_table_beside_them_stays_a_folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(encoded(0))
    parquet.write_table(pyarrow.table({"file_name": ["cat/a.png"]}), tmp_path / "metadata.parquet")
    assert [item.label for item in open_source(str(tmp_path)).listing().splits[""]] == ["cat", "dog"]
