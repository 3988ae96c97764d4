"""Databases of filters in the published format: what is in one, appending, merging."""

from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from convscope.analysis.filter_db import chunks_of, open_filter_db
from convscope.analysis.operator_counts import operator_counts
from convscope.core.errors import UserError
from convscope.core.models import load_backbone, save_backbone
from tests.analysis.filter_databases import EFFICIENTNET, INDEX, RESNET, VIT, as_the_notebook, export, published


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
