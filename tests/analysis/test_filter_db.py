"""Databases of filters: the published format, appending, merging, and what is left behind by accidents."""

import fcntl
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from convscope.analysis.filter_db import chunks_of, open_filter_db
from convscope.analysis.filter_db_command import FilterDbCommand, run
from convscope.analysis.operator_counts import operator_counts
from convscope.core.errors import UserError
from convscope.core.models import load_backbone, save_backbone

INDEX = ["model_id", "conv_depth", "conv_depth_norm", "layer_id"]
RESNET, EFFICIENTNET, VIT = "timm:test_resnet@random", "timm:test_efficientnet@random", "timm:test_vit@random"


def export(output: Path, *models: str | Path, **settings) -> Path:
    run(FilterDbCommand(models=tuple(map(str, models)), output=output, **settings))
    return output


def as_the_notebook(path: Path, meta: str = "meta", filters: str = "filters") -> tuple[np.ndarray, pd.DataFrame]:
    """All filters, and the table with lists of ids in place of "start:end", the end included."""
    with h5py.File(path) as file:
        values = file[filters][...]
    table = pd.read_hdf(path, meta)
    ends = table["filter_ids"].str.split(":")
    table["filter_ids"] = [np.arange(int(first), 1 + int(last)) for first, last in ends]
    return values, table


def published(path: Path, filters: np.ndarray, *, name: str = "filters", models: int = 2) -> Path:
    """A file as released: two layers a model, and no column of our own."""
    size = len(filters) // (2 * models)
    rows = [
        {
            **dict(zip(INDEX, (2 * model, layer, float(layer), layer))),
            "filter_ids": f"{(2 * model + layer) * size}:{(2 * model + layer + 1) * size - 1}",
            "model": f"net{model}",
            "path": f"net{model}.onnx",
            "op_set": 11,
            "producer": "pytorch 1.9",
            "Task": "Classification" if model else None,
            "(3, 3) filters": 2 * size,
            "Conv": 2,
        }
        for model in range(models)
        for layer in range(2)
    ]
    with h5py.File(path, "w") as file:
        file[name] = filters
    pd.DataFrame(rows).set_index(INDEX).to_hdf(path, key="meta", mode="a", format="table")
    return path


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three networks, one of them without a 3x3 filter."""
    return export(tmp_path_factory.mktemp("db") / "filters.h5", RESNET, EFFICIENTNET, VIT, task="Classification")


def test_reads_as_the_published_one(database: Path) -> None:
    filters, meta = as_the_notebook(database)
    assert filters.dtype == np.float32
    assert filters.shape[1:] == (3, 3)
    assert meta.index.names == INDEX
    assert np.concatenate(meta["filter_ids"].to_list()).tolist() == list(range(len(filters)))
    for number, source in enumerate((RESNET, EFFICIENTNET)):
        convs = {n: m for n, m in load_backbone(source).model.named_modules() if isinstance(m, nn.Conv2d)}
        rows = meta.xs(number, level="model_id")
        assert sorted(rows["layer_name"]) == sorted(n for n, m in convs.items() if m.kernel_size == (3, 3))
        for row in rows.itertuples():
            weight = convs[row.layer_name].weight.detach().numpy()
            assert np.array_equal(filters[row.filter_ids], weight.reshape(-1, 3, 3))
            assert (row.out_channels, row.in_channels) == weight.shape[:2]
            assert row.depthwise == (convs[row.layer_name].groups == weight.shape[0] > 1)


def test_columns_of_a_model(database: Path) -> None:
    meta = pd.read_hdf(database, "meta")
    counts: Counter[str] = Counter()
    for conv in load_backbone(EFFICIENTNET).model.modules():
        if isinstance(conv, nn.Conv2d):
            height, width = conv.kernel_size
            counts[f"({height}, {width}) filters"] += conv.weight.shape[0] * conv.weight.shape[1]
    rows = meta.xs(1, level="model_id")
    for name, count in counts.items():
        assert set(rows[name]) == {count}
    total = sum(counts.values()) - counts["(1, 1) filters"]
    assert set(rows["total_filters"]) == {total}
    assert set(rows["3x3_filter_share"]) == {counts["(3, 3) filters"] / total}
    assert set(rows["Task"]) == {"Classification"}
    assert rows["Paper"].isna().all()
    assert set(rows["weights_hash"]) == {load_backbone(EFFICIENTNET).weights_hash()}
    assert rows.index.get_level_values("layer_id").tolist() == list(range(len(rows)))
    depths = rows.index.get_level_values("conv_depth").to_numpy()
    assert ((np.diff(depths) > 0) == (np.diff(rows["layer_depth"]) > 0)).all()
    assert rows["layer_depth"].iloc[0] == depths[0] == 0  # nothing comes before the stem
    assert (rows["layer_depth"] < rows["depth"]).all()


def test_operators_are_those_that_run() -> None:
    network = load_backbone("timm:resnet18@random", model_args={"channels": (4, 4, 8, 8)})
    counts = operator_counts(network)
    names = ("Conv", "BatchNormalization", "Relu", "Add", "MaxPool", "GlobalAveragePool")
    found = {name: counts[name] for name in names}
    # conv1, 4 x 2 blocks of two, four shortcuts; a ReLU behind conv1 and two a block
    assert found == {"Conv": 21, "BatchNormalization": 21, "Relu": 17, "Add": 8, "MaxPool": 1, "GlobalAveragePool": 1}
    assert counts["ConvTranspose"] == 0


def test_other_kernels_have_their_own_tables(database: Path) -> None:
    filters, meta = as_the_notebook(database, "meta_16x16", "filters_16x16")
    patches = load_backbone(VIT).model.patch_embed.proj.weight.detach().numpy()
    assert np.array_equal(filters, patches.reshape(-1, 16, 16))
    assert meta.index.get_level_values("model_id").tolist() == [2]
    twin = pd.read_parquet(database.with_suffix(".parquet"))
    assert Counter(twin["dataset"]) == {"filters": len(pd.read_hdf(database, "meta")), "filters_16x16": 1}
    with h5py.File(database) as file:
        assert "filters_1x1" not in file


def test_chosen_kernels(tmp_path: Path) -> None:
    path = export(tmp_path / "f.h5", RESNET, sizes=("1x1",))
    filters, meta = as_the_notebook(path, "meta_1x1", "filters_1x1")
    convs = [part for part in load_backbone(RESNET).model.modules() if isinstance(part, nn.Conv2d)]
    assert len(filters) == sum(conv.weight.numel() for conv in convs if conv.kernel_size == (1, 1)) > 0
    assert set(meta["kernel_size"]) == {"1x1"}
    with h5py.File(path) as file:
        assert set(file) == {"filters", "filters_1x1", "meta_1x1"}


def test_only_a_vit(tmp_path: Path) -> None:
    path = export(tmp_path / "vit.h5", VIT)
    with h5py.File(path) as file:
        assert file["filters"].shape == (0, 3, 3)
    export(path, RESNET)
    filters, meta = as_the_notebook(path)
    assert len(filters) == meta["filter_ids"].map(len).sum() > 0
    assert set(meta.index.get_level_values("model_id")) == {1}


def test_fold_bn(tmp_path: Path) -> None:
    network = load_backbone(RESNET)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 2)
            nn.init.uniform_(part.running_var, 0.5, 2)
    save_backbone(tmp_path / "w.safetensors", network)
    path = export(tmp_path / "f.h5", tmp_path / "w.safetensors", fold_bn=True)
    export(path, tmp_path / "w.safetensors")  # the raw ones are other filters
    filters, meta = as_the_notebook(path)
    parts = dict(network.model.named_modules())
    folded, raw = (meta.xs(number, level="model_id").set_index("layer_name") for number in (0, 1))
    conv, norm = parts["layer1.0.conv1"], parts["layer1.0.bn1"]
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]
    expected = (conv.weight * scale).detach().reshape(-1, 3, 3)
    row = folded.loc["layer1.0.conv1"]
    assert torch.allclose(torch.from_numpy(filters[row.filter_ids]), expected, atol=1e-7)
    assert np.array_equal(filters[raw.loc["layer1.0.conv1"].filter_ids], conv.weight.detach().reshape(-1, 3, 3))
    assert folded["bn_folded"].all()
    assert not raw["bn_folded"].any()
    assert (folded["BatchNormalization"] == 0).all()
    assert meta["model"].nunique() == 2


def test_appending(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = export(tmp_path / "f.h5", RESNET)
    filters, meta = as_the_notebook(path)
    export(path, "timm:test_resnet@random=1", RESNET)
    assert f"note: {RESNET} is in {path} already, as model_id 0" in capsys.readouterr().err
    more, grown = as_the_notebook(path)
    assert np.array_equal(more[: len(filters)], filters)
    pd.testing.assert_frame_equal(grown.iloc[: len(meta)], meta)
    assert grown.index.get_level_values("model_id").unique().tolist() == [0, 1]
    assert len(more) == 2 * len(filters)
    before = path.read_bytes()
    path.with_suffix(".parquet").unlink()  # as if stopped between the two files
    export(path, RESNET)
    assert path.read_bytes() == before
    assert len(pd.read_parquet(path.with_suffix(".parquet"))) == len(grown)


@pytest.mark.parametrize("name", ["filters", "filter"])
def test_merging_published_files(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((48, 3, 3)) if name == "filters" else rng.standard_normal((48, 9)).astype(np.float32)
    source = published(tmp_path / "published.h5", values, name=name)
    path = export(tmp_path / "f.h5", source, RESNET)
    filters, meta = as_the_notebook(path)
    assert filters.dtype == values.dtype
    assert np.array_equal(filters[:48], values.reshape(-1, 3, 3))
    assert meta.index.get_level_values("model_id").unique().tolist() == [0, 2, 3]
    assert meta["Task"].isna().tolist()[:4] == [True, True, False, False]
    assert meta["op_set"].tolist()[:5] == [11, 11, 11, 11, 0]
    export(path, source)  # known by name and path
    assert len(as_the_notebook(path)[0]) == len(filters)
    other = export(tmp_path / "g.h5", EFFICIENTNET)
    export(other, path, dtype="float32")
    merged, table = as_the_notebook(other)
    start = len(merged) - len(filters)
    assert np.array_equal(merged[start:], filters.astype(np.float32))
    assert table.index.get_level_values("model_id").unique().tolist() == [0, 1, 3, 4]
    assert table["fold_bn"].iloc[-len(meta) :].fillna(-1).tolist() == [-1.0] * 4 + [0.0] * (len(meta) - 4)


def test_reads_a_csv_table_and_the_readmes_index(tmp_path: Path) -> None:
    values = np.arange(36, dtype=np.float32).reshape(4, 9)
    table = pd.DataFrame({"model_id": [0, 0], "filter_ids": ["0:1", "2:3"]})
    with h5py.File(tmp_path / "csv.h5", "w") as file:
        file["filters"] = values.reshape(4, 3, 3)
        file["meta"] = np.frombuffer(table.to_csv(index=False).encode(), np.uint8)
    keys = ["model_id", "conv_depth", "conv_depth"]
    index = pd.MultiIndex.from_tuples([(0, 0, 0.0), (0, 1, 1.0)], names=keys)
    with h5py.File(tmp_path / "readme.h5", "w") as file:
        file["filter"] = values
    pd.DataFrame({"filter_ids": ["0:1", "2:3"]}, index=index).to_hdf(tmp_path / "readme.h5", key="meta", mode="a")
    for name in ("csv", "readme"):
        with open_filter_db(tmp_path / f"{name}.h5") as database:
            found = database.tables["3x3"]
            assert found.spans.tolist() == [[0, 2], [2, 4]]
            assert np.array_equal(np.concatenate(list(chunks_of(database, "3x3", 1, 4))), values[1:4])
    assert found.meta["conv_depth_norm"].tolist() == [0.0, 1.0]


def test_gzip_and_float64(tmp_path: Path) -> None:
    plain = export(tmp_path / "plain.h5", RESNET)
    path = export(tmp_path / "f.h5", RESNET, dtype="float64", compression="gzip")
    export(path, "timm:test_resnet@random=1")  # stays as it is
    with h5py.File(path) as file:
        assert (file["filters"].dtype, file["filters"].compression) == (np.float64, "gzip")
        assert np.array_equal(file["filters"][: len(as_the_notebook(plain)[0])], as_the_notebook(plain)[0])


def test_descriptions(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(f"model,Task,Year\n{RESNET},Segmentation,2020\nanother,Denoising,2021\n")
    path = export(tmp_path / "f.h5", RESNET, EFFICIENTNET, metadata=tmp_path / "m.csv", task="Classification")
    meta = pd.read_hdf(path, "meta")
    assert meta.groupby("model")["Task"].first().to_dict() == {RESNET: "Segmentation", EFFICIENTNET: "Classification"}
    assert meta.groupby("model")["Year"].first().dropna().to_dict() == {RESNET: "2020"}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({RESNET: {"Visual Category": "natural"}}))
    path = export(tmp_path / "g.h5", RESNET, metadata=tmp_path / "m.yaml", dataset_url="none")
    assert set(pd.read_hdf(path, "meta")["Visual Category"]) == {"natural"}
    for text, said in (("filter_ids: 1", "computes"), ("- 1", "map each MODEL"), ("a: [", "not valid YAML")):
        (tmp_path / "bad.yaml").write_text(text if text[0] in "-a" else f"x: {{{text}}}")
        with pytest.raises(UserError, match=said):
            export(tmp_path / "h.h5", RESNET, metadata=tmp_path / "bad.yaml")


def test_a_killed_export_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [f"timm:test_resnet@random={seed}" for seed in range(1, 7)]
    path, journal = tmp_path / "f.h5", tmp_path / ".f.h5.part" / "journal.jsonl"
    child = os.fork()
    if child == 0:
        export(path, *models)
        os._exit(0)
    deadline = time.monotonic() + 60
    while not (journal.exists() and len(journal.read_bytes().splitlines()) > 2) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not path.exists()
    with journal.open("a") as file:  # a line, and filters, that the kill has cut
        file.write('{"row": {"mo')
    with (journal.parent / "3x3.raw").open("ab") as file:
        file.write(b"half")
    capsys.readouterr()
    export(path, *models)
    assert "going on after" in capsys.readouterr().err
    whole = export(tmp_path / "whole.h5", *models)
    assert np.array_equal(as_the_notebook(path)[0], as_the_notebook(whole)[0])
    pd.testing.assert_frame_equal(pd.read_hdf(path, "meta"), pd.read_hdf(whole, "meta"))
    hidden = sorted(each.name for each in tmp_path.iterdir() if each.name.startswith("."))
    assert hidden == [".f.h5.lock", ".whole.h5.lock"]


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
