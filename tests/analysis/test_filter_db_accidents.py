"""Databases of filters: kills, full disks, two writers, damaged and hostile files."""

import fcntl
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from convscope.analysis.filter_db import open_filter_db
from convscope.core.errors import UserError
from convscope.core.models import load_backbone
from tests.analysis.filter_databases import EFFICIENTNET, RESNET, VIT, as_the_notebook, export, published


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three networks, one of them without a 3x3 filter."""
    return export(tmp_path_factory.mktemp("db") / "filters.h5", RESNET, EFFICIENTNET, VIT, task="Classification")


def test_a_killed_export_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "w.pth"
    models = [f"timm:test_resnet@random={seed}" for seed in (1, 2)] + [str(weights)]
    path, journal = tmp_path / "f.h5", tmp_path / ".f.h5.part" / "journal.jsonl"
    os.mkfifo(weights)  # nobody writes into it, so that the export waits there
    child = os.fork()
    if child == 0:
        try:
            export(path, *models, arch="test_resnet")
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while not (journal.exists() and len(journal.read_bytes().splitlines()) == 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not path.exists()
    with journal.open("a") as file:  # a line, and filters, that the kill has cut
        file.write('{"row": {"mo')
    with (journal.parent / "3x3.raw").open("ab") as file:
        file.write(b"half")
    weights.unlink()
    torch.save(load_backbone("timm:test_resnet@random=3").model.state_dict(), weights)
    capsys.readouterr()
    export(path, *models, arch="test_resnet")
    assert "going on after 2 model(s)" in capsys.readouterr().err
    whole = export(tmp_path / "whole.h5", *models, arch="test_resnet")
    assert np.array_equal(as_the_notebook(path)[0], as_the_notebook(whole)[0])
    pd.testing.assert_frame_equal(pd.read_hdf(path, "meta"), pd.read_hdf(whole, "meta"))
    hidden = sorted(each.name for each in tmp_path.iterdir() if each.name.startswith("."))
    assert hidden == [".f.h5.lock", ".whole.h5.lock"]


def test_a_kill_while_the_file_is_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = export(tmp_path / "f.h5", RESNET)
    before = path.read_bytes()
    (tmp_path / ".f.h5.new").write_bytes(before[:9999])  # what such a kill leaves
    export(path, EFFICIENTNET)
    filters, meta = as_the_notebook(path)
    assert meta["filter_ids"].map(len).sum() == len(filters)
    assert sorted(each.name for each in tmp_path.iterdir()) == [".f.h5.lock", "f.h5", "f.parquet"]


def test_other_settings_start_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="nothing-there"):
        export(tmp_path / "f.h5", RESNET, "nothing-there.pth")
    assert (tmp_path / ".f.h5.part").exists()
    export(tmp_path / "f.h5", EFFICIENTNET, fold_bn=True)
    assert "discarded" in capsys.readouterr().err
    assert set(pd.read_hdf(tmp_path / "f.h5", "meta")["source"]) == {EFFICIENTNET}


def test_one_writer(tmp_path: Path) -> None:
    with (tmp_path / ".f.h5.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another command is writing"):
            export(tmp_path / "f.h5", RESNET)


def test_refusals(tmp_path: Path, database: Path) -> None:
    def refused(match: str, *models: str | Path, output: Path = tmp_path / "f.h5", **settings) -> None:
        before = output.read_bytes() if output.exists() else None
        with pytest.raises(UserError, match=match) as error:
            export(output, *models, **settings)
        assert "\n" not in str(error.value)
        assert (output.read_bytes() if output.exists() else None) == before

    refused("name at least one MODEL")
    refused("no model nowhere", "nowhere")
    refused("no filter database .*nowhere.h5", "nowhere.h5")
    refused("no kernel size", RESNET, sizes=("3",))
    refused("end in .h5", RESNET, output=tmp_path / "f.txt")
    refused("no convolution with a kernel of 3x3", VIT, sizes=("3x3",))
    refused("is the output itself", database, output=database)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["weights"] = np.zeros(3)
    refused("no filter database: it has no /filters, but /weights", RESNET, output=tmp_path / "other.h5")
    with h5py.File(tmp_path / "bare.h5", "w") as file:
        file["filters"] = np.zeros((3, 3, 3))
    refused("no table /meta", RESNET, output=tmp_path / "bare.h5")
    published(tmp_path / "short.h5", np.zeros((40, 3, 3)))
    with h5py.File(tmp_path / "short.h5", "a") as file:
        del file["filters"]
        file["filters"] = np.zeros((39, 3, 3))
    refused("names the filters 30:39, but there are 39", tmp_path / "short.h5")
    (tmp_path / "cut.h5").write_bytes(database.read_bytes()[:50_000])
    refused("no whole HDF5 file", RESNET, output=tmp_path / "cut.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    refused("no whole HDF5 file", tmp_path / "text.h5")


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["/", "/meta", "/meta/table"])
def test_pickled_code_in_an_attribute_is_refused(tmp_path: Path, place: str) -> None:
    path = published(tmp_path / "f.h5", np.ones((4, 3, 3)), models=1)
    for number, data in enumerate((Touch(tmp_path / "ran"), ["plain", Touch(tmp_path / "ran")])):
        with h5py.File(path, "a") as file:
            file[place].attrs["note"] = np.bytes_(pickle.dumps(data, protocol=4 * number))
        with pytest.raises(UserError, match=r"refused: .* names .*mkdir"), open_filter_db(path):
            pass
    assert not (tmp_path / "ran").exists()
    with h5py.File(path, "a") as file:
        file[place].attrs["note"] = np.bytes_("c is the first letter of this text, which is no pickle.")
    with open_filter_db(path) as database:
        assert database.tables["3x3"].count == 4


def test_pickled_code_in_a_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    with h5py.File(path, "w") as file:
        file["filters"] = np.ones((4, 3, 3))
    table = pd.DataFrame({"model_id": [0], "filter_ids": ["0:3"], "Task": [None], "x": [[1.5, "mixed"]]}, dtype=object)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table.to_hdf(path, key="meta", mode="a", format="fixed")  # objects, which pandas pickles
    with open_filter_db(path) as database:
        assert database.tables["3x3"].meta["x"].tolist() == [[1.5, "mixed"]]
    with h5py.File(path, "a") as file:
        (name,) = [name for name, node in file["meta"].items() if h5py.check_vlen_dtype(node.dtype) is not None]
        file["meta"][name][0] = np.frombuffer(pickle.dumps(Touch(tmp_path / "ran")), np.uint8)
    with pytest.raises(UserError, match=r"refused: .* names .*mkdir"), open_filter_db(path):
        pass
    assert not (tmp_path / "ran").exists()


def test_damaged_filters_are_not_merged(tmp_path: Path, database: Path) -> None:
    path = tmp_path / "damaged.h5"
    path.write_bytes(database.read_bytes())
    with h5py.File(path, "a") as file:
        file["filters"][7, 1, 1] += 1
    with pytest.raises(UserError, match="not those that were stored"):
        export(tmp_path / "f.h5", path)
    assert not (tmp_path / "f.h5").exists()


def test_full_disk(mount: Callable[[str], Path], database: Path) -> None:
    with pytest.raises(UserError, match=r"No space left|has room for"):
        export(mount("256k") / "f.h5", RESNET)
    disk = mount("24m")
    path = export(disk / "f.h5", RESNET)
    before = path.read_bytes()
    (disk / "filler").write_bytes(bytes(12 << 20))
    with pytest.raises(UserError, match="has room for"):
        export(path, "timm:test_resnet@random=1")
    assert path.read_bytes() == before
    (disk / "filler").unlink()
    export(path, "timm:test_resnet@random=1")
    assert pd.read_hdf(path, "meta").index.get_level_values("model_id").max() == 1


@pytest.mark.parametrize("order", ["tables, h5py", "h5py, tables"])
def test_both_hdf5_libraries_in_one_process(tmp_path: Path, database: Path, order: str) -> None:
    script = f"""
import {order}, sys, pandas
meta = pandas.read_hdf(sys.argv[1], "meta")
with h5py.File(sys.argv[1]) as file:
    filters = file["filters"][...]
with h5py.File(sys.argv[2], "w") as file:
    file["filters"] = filters
meta.to_hdf(sys.argv[2], key="meta", mode="a", format="table")
with h5py.File(sys.argv[2]) as file:
    assert (file["filters"][...] == filters).all()
assert pandas.read_hdf(sys.argv[2], "meta").equals(meta)
"""
    words = [sys.executable, "-W", "ignore", "-c", script, str(database), str(tmp_path / "copy.h5")]
    subprocess.run(words, check=True)
