"""`analyze filters --db`: what it says of a database is what is said of the models in it."""

import csv
from operator import itemgetter
from pathlib import Path

import h5py
import numpy as np
import pytest

from convscope.analysis.filter_db import open_filter_db
from convscope.analysis.filter_db_command import FilterDbCommand
from convscope.analysis.filter_db_command import run as export
from convscope.analysis.filter_db_layers import stored_layers
from convscope.analysis.filters_command import FiltersCommand, measure, run
from convscope.analysis.filters_output import details, figures
from convscope.core.errors import UserError
from convscope.core.models import load_backbone
from convscope.core.results import load_result
from tests.analysis.filter_databases import EFFICIENTNET, RESNET, published


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("db") / "filters.h5"
    for model, task in ((RESNET, "Classification"), (EFFICIENTNET, "Segmentation")):
        export(FilterDbCommand(models=(model,), output=path, task=task))
    return path


def analyze(folder: Path, *models: str, **settings):
    run(FiltersCommand(models=models, output_dir=folder, **settings))
    with (folder / "filters.csv").open() as table:
        return load_result(folder / "filters.json"), list(csv.DictReader(table))


def test_same_as_of_the_models(tmp_path: Path, database: Path) -> None:
    ours, rows = analyze(tmp_path, db=database, by="model")
    config = FiltersCommand(models=(), size="3x3")
    report = measure({source: load_backbone(source) for source in (EFFICIENTNET, RESNET)}, config)
    for label, model in details(report)["models"].items():
        expected = [layer for layer in model["layers"] if layer["size"] != "1x1"]
        found = ours.details["models"][label]["layers"]
        assert sorted(found, key=itemgetter("size", "layer")) == sorted(expected, key=itemgetter("size", "layer"))
    theirs = figures(report)
    assert ours.figures.keys() == theirs.keys()
    for name, figure in theirs.items():
        assert ours.figures[name].value == pytest.approx(figure.value, rel=1e-9)
    assert ours.model["models"] == 2
    assert ours.model["filters"]["3x3"] == sum(int(row["filters"]) for row in rows if row["size"] == "3x3")


def test_by_a_column_and_all_together(tmp_path: Path, database: Path) -> None:
    with open_filter_db(database) as opened:
        groups = stored_layers(opened, "Task")
        assert list(groups) == ["Classification", "Segmentation"]
        assert {layer.model for layer in groups["Segmentation"]} == {EFFICIENTNET}
        (label,) = (whole := stored_layers(opened))
        assert label == "filters.h5"
        assert len(whole[label]) == sum(map(len, groups.values()))
        assert len({(layer.name, layer.size) for layer in whole[label]}) == len(whole[label])


def test_the_published_layout(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4 * 64, 3, 3))
    path = published(tmp_path / "published.h5", values)
    with h5py.File(path, "a") as file:
        file["filters"][70] = np.nan
    result, rows = analyze(tmp_path / "out", db=path, by="Task")
    assert [row["model"] for row in rows] == ["(none)", "Classification", "Classification"]
    assert result.details["models"]["(none)"]["unreached"] == ["layer 1"]
    assert {row["orthogonality"] for row in rows} == {""}  # the table does not say how many channels there are
    covariance = np.cov(values[:64].reshape(64, 9).T)
    shares = np.linalg.eigvalsh(covariance) / np.trace(covariance)
    assert float(rows[0]["entropy"]) == pytest.approx(-(shares * np.log10(shares)).sum(), rel=1e-9)


def test_refusals(tmp_path: Path, database: Path) -> None:
    for said, models, settings in (
        ("add --db", (RESNET,), {"by": "Task"}),
        ("takes no MODELs", (RESNET,), {"db": database}),
        ("no column 'Dataset'; it has .*Task", (), {"db": database, "by": "Dataset"}),
        ("no filter database", (), {"db": tmp_path / "nothing.h5"}),
        ("no 9x9 filters", (), {"db": database, "size": "9x9"}),
    ):
        with pytest.raises(UserError, match=said):
            run(FiltersCommand(models=models, output_dir=tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()
    many = published(tmp_path / "many.h5", np.ones((2 * 65, 3, 3)), models=65)
    with pytest.raises(UserError, match="has 65 values; take one with at most 64"):
        run(FiltersCommand(models=(), output_dir=tmp_path / "out", db=many, by="model"))
