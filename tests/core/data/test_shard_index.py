"""The index agrees with tarfile and webdataset on every kind of tar, and names every kind of damage."""

import io
import itertools
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from convscope.core.data.shard_index import index_path, load_index, parse_sample, read_sample, scan, write_index
from convscope.core.errors import UserError
from tests.core.data.tars import write_tar

LONG = "folder/" * 20 + "x" * 90
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def samples(path: Path) -> list[dict]:
    starts, error = scan(path)
    assert error is None
    data = path.read_bytes()
    return [parse_sample(data[start:stop]) for start, stop in itertools.pairwise(starts.tolist())]


def by_webdataset(path: Path) -> list[dict]:
    found = webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False)
    return [{name: value for name, value in s.items() if name not in ("__url__", "__local_path__")} for s in found]


def plain(path: Path, count: int = 4) -> Path:
    """`count` samples of an image (700 bytes) and a label: 2560 bytes each."""
    members = [(f"{i}.{suffix}", bytes([i + 1]) * n) for i in range(count) for suffix, n in (("jpg", 700), ("cls", 1))]
    return write_tar(path, members)


@pytest.mark.parametrize("tar_format", FORMATS)
def test_same_samples_as_webdataset(tmp_path, tar_format):
    members = [
        ("__meta__/about.txt", b"skipped"),
        ("a/", b""),
        ("a/0001.JPG", b"\xff" * 513),
        ("a/0001.seg.PNG", b"b" * 512),
        ("a/0001.cls", b""),
        ("README", b"no suffix"),
        ("b.c/0001.jpg", b"the folder has a dot"),
        ("b.c/", b""),
        ("./0002.jpg", b"d"),
        ("./0002.json", b"{}"),
        ("é/ü.jpg", b"not ASCII"),
        ("x" * 96 + ".jpg", b"full name field"),
        ("0003.", b"empty suffix"),
    ]
    if tar_format != tarfile.USTAR_FORMAT:
        members += [(LONG + ".jpg", b"long"), (LONG + ".cls", b"1")]
    else:
        members += [("folder/" * 15 + "y.jpg", b"prefix field")]
    path = write_tar(tmp_path / "x.tar", members, tar_format)
    assert samples(path) == by_webdataset(path)
    assert len(samples(path)) == 7


def test_reads_what_webdatasets_writer_wrote(tmp_path):
    rows = [
        {"__key__": f"{i:04d}", "jpg": bytes(range(i)), "cls": str(i).encode(), "txt": b"caption"} for i in range(9)
    ]
    with webdataset.ShardWriter(str(tmp_path / "%d.tar"), maxcount=4, verbose=0) as writer:
        for row in rows:
            writer.write(row)
    assert [sample for i in range(3) for sample in samples(tmp_path / f"{i}.tar")] == rows


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 1100), min_size=1, max_size=3), max_size=5),
    tar_format=st.sampled_from(FORMATS),
    long=st.booleans(),
)
def test_any_tar_is_read_as_tarfile_reads_it(tmp_path_factory, sizes, tar_format, long):
    prefix = "p" * 120 if long and tar_format != tarfile.USTAR_FORMAT else "p"
    rows = [
        {f"s{j}": bytes([i + j]) * n for j, n in enumerate(members)} | {"__key__": f"{prefix}{i}"}
        for i, members in enumerate(sizes)
    ]
    members = [(f"{r['__key__']}.{name}", data) for r in rows for name, data in r.items() if name != "__key__"]
    path = write_tar(tmp_path_factory.mktemp("t") / "x.tar", members, tar_format)
    assert samples(path) == rows


def test_links_and_folders_are_passed_over_whatever_length_they_claim(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("0.jpg", tarfile.REGTYPE), ("1.jpg", tarfile.LNKTYPE), ("2.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "0.jpg", 600
            tar.addfile(info, io.BytesIO(b"z" * 600) if kind == tarfile.REGTYPE else None)
    assert [sample["__key__"] for sample in samples(path)] == ["0"]


def test_sidecar_is_little_endian_starts_and_end(tmp_path):
    path = plain(tmp_path / "x.tar")
    starts = write_index(path)
    assert starts.tolist() == [0, 2560, 5120, 7680, 10240]
    assert index_path(path).read_bytes() == b"".join(n.to_bytes(8, "little") for n in starts.tolist())
    assert load_index(path).tolist() == starts.tolist()


def test_empty_tar_has_no_samples(tmp_path):
    path = write_tar(tmp_path / "x.tar", [])
    assert scan(path)[0].tolist() == [0]
    write_index(path)
    assert load_index(path).tolist() == [0]


@pytest.mark.parametrize("size", range(0, 10241, 512))
def test_every_truncation_is_found(tmp_path, size):
    """webdataset reads a tar cut between two members without a word."""
    path = plain(tmp_path / "x.tar")
    path.write_bytes(path.read_bytes()[:size])
    starts, error = scan(path)
    assert "truncated" in error
    assert str(size) in error
    assert starts[-1] <= size
    with pytest.raises(UserError, match=r"x\.tar is damaged: truncated"):
        write_index(path)
    assert not index_path(path).exists()


@pytest.mark.parametrize("size", [100, 2560 + 100, 2560 + 1000])
def test_truncation_inside_a_header_or_file(tmp_path, size):
    path = plain(tmp_path / "x.tar")
    path.write_bytes(path.read_bytes()[:size])
    starts, error = scan(path)
    assert "truncated" in error
    assert starts.tolist() == ([0] if size == 100 else [0, 2560])


@pytest.mark.parametrize("byte", [0, 124, 148, 156, 257, 511])
def test_flipped_bit_in_a_header(tmp_path, byte):
    """webdataset drops the rest of the shard without a word."""
    path = plain(tmp_path / "x.tar")
    data = bytearray(path.read_bytes())
    data[5120 + byte] ^= 1
    path.write_bytes(data)
    starts, error = scan(path)
    assert error == "bad header checksum at byte 5120"
    assert starts.tolist() == [0, 2560, 5120]


def test_wiped_header_in_the_middle(tmp_path):
    path = plain(tmp_path / "x.tar")
    data = bytearray(path.read_bytes())
    data[5120:5632] = bytes(512)
    path.write_bytes(data)
    assert "data follow the end" in scan(path)[1]


def test_two_tars_in_one_file(tmp_path):
    path = plain(tmp_path / "x.tar")
    path.write_bytes(path.read_bytes() * 2)
    assert "data follow the end" in scan(path)[1]


def test_scattered_sample(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")])
    assert "sample a are not together (byte 2048)" in scan(path)[1]


def test_twice_the_same_file(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.JPG", b"2")])
    assert "sample a has two .jpg files" in scan(path)[1]


@pytest.mark.parametrize("data", [b"\x1f\x8b" + b"z" * 2000, b"PK\x03\x04" + b"z" * 2000, b"\xff" * 1024])
def test_not_a_tar(tmp_path, data):
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    assert "not a tar" in scan(path)[1]


@pytest.mark.parametrize(
    "record", [b"0 path=a\n", b"x path=a\n", b"12 size=ten\n", b"9 path", b"-3 path=a\n", b"14 size=-1536\n"]
)
def test_bad_extended_header(tmp_path, record):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, len(record)
        tar.addfile(info, io.BytesIO(record))
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert scan(path)[1] == "bad extended header at byte 0"


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        scan(tmp_path / "x.tar")


def rewritten(path: Path) -> None:
    plain(path, 5)


def shortened(path: Path) -> None:
    index_path(path).write_bytes(index_path(path).read_bytes()[:-8])


def cut_inside_a_number(path: Path) -> None:
    index_path(path).write_bytes(index_path(path).read_bytes()[:-3])


def emptied(path: Path) -> None:
    index_path(path).write_bytes(b"")


def shifted(path: Path) -> None:
    starts = np.frombuffer(index_path(path).read_bytes(), "<u8").copy()
    starts[-2] += 1024
    index_path(path).write_bytes(starts.tobytes())


def out_of_order(path: Path) -> None:
    starts = np.frombuffer(index_path(path).read_bytes(), "<u8").copy()
    starts[1] = starts[2]
    index_path(path).write_bytes(starts.tobytes())


@pytest.mark.parametrize("change", [rewritten, shortened, cut_inside_a_number, emptied, shifted, out_of_order])
def test_stale_index(tmp_path, change):
    path = plain(tmp_path / "x.tar")
    write_index(path)
    change(path)
    with pytest.raises(UserError, match=r"x\.tar\.idx is stale.*shards index"):
        load_index(path)


def test_a_tar_rewritten_inside_after_it_was_indexed(tmp_path):
    """It ends and its last sample begins where they did."""
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{i}.txt", bytes(size)) for i, size in enumerate((600, 1200, 600, 10))])
    write_index(path)
    write_tar(path, [(f"{i}.txt", bytes(size)) for i, size in enumerate((1200, 600, 600, 10))])
    indexed = index_path(path).stat().st_mtime_ns
    os.utime(path, ns=(indexed, indexed + 1))
    with pytest.raises(UserError, match=r"x\.tar\.idx is stale"):
        load_index(path)
    write_index(path)
    assert load_index(path).tolist() == [0, 2048, 3584, 5120, 6144]


def test_tar_truncated_after_it_was_indexed(tmp_path):
    path = plain(tmp_path / "x.tar")
    write_index(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"x\.tar is truncated: 5000 bytes"):
        load_index(path)


def test_slice_that_is_not_one_sample(tmp_path):
    data = plain(tmp_path / "x.tar").read_bytes()
    for start, stop, cause in (
        (0, 5120, "0 is followed by 1"),
        (512, 2560, "checksum"),
        (0, 600, "truncated"),
        (0, 0, "no files"),
    ):
        with pytest.raises(UserError, match=cause):
            parse_sample(data[start:stop])


def test_only_the_wanted_members_are_read(tmp_path):
    data = plain(tmp_path / "x.tar").read_bytes()
    asked = []

    def read(offset: int, count: int) -> bytes:
        asked.append(count)
        return data[offset : offset + count]

    assert read_sample(read, 2560, lambda suffix: suffix == "cls") == {"__key__": "0", "cls": b"\x01"}
    assert max(asked) == 512


@pytest.fixture(scope="module")
def one_sample(tmp_path_factory) -> bytes:
    return plain(tmp_path_factory.mktemp("tars") / "x.tar", count=1).read_bytes()[:2560]


def outcome(read, *arguments) -> object:
    try:
        return read(*arguments)
    except UserError as error:
        return str(error)


@settings(deadline=None, max_examples=500)
@given(changes=st.lists(st.tuples(st.integers(0, 2559), st.integers(0, 255)), max_size=4), stop=st.integers(0, 2560))
def test_short_names_are_read_as_any_others_are(one_sample, changes, stop):
    """Whatever bytes are damaged: what is read quickly is what is read thoroughly."""
    data = bytearray(one_sample)
    for place, value in changes:
        data[place] = value
    slice_ = bytes(data[: stop if changes else 2560])
    thorough = outcome(read_sample, lambda offset, count: slice_[offset : offset + count], len(slice_))
    assert outcome(parse_sample, slice_) == thorough
