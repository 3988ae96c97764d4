"""`convscope analyze filters`: convolution filters of one or several models."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tyro

from convscope.analysis.common import LoadsModels, model_records
from convscope.analysis.conv_layers import ConvLayers, Layers, conv_layers
from convscope.analysis.filter_db import FilterDatabase, open_filter_db
from convscope.analysis.filter_db_layers import database_record, stored_layers
from convscope.analysis.filter_drift import Basis, load_basis
from convscope.analysis.filters import (
    Comparison,
    FiltersConfig,
    LayerStatistics,
    NotFiniteError,
    compare,
    layer_statistics,
    pooled_basis,
)
from convscope.analysis.filters_files import write
from convscope.analysis.filters_output import FiltersReport, details, figures, summary
from convscope.core.backbone import Backbone
from convscope.core.errors import UserError
from convscope.core.log import info, progress
from convscope.core.models import model_record
from convscope.core.options import AllowPartial, Arch
from convscope.core.results import EvalResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiltersCommand(LoadsModels, FiltersConfig):
    """Convolution filters: how many are used, how much they differ, and how far models lie apart."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """One or more MODELs; none with --db."""
    db: Path | None = None
    """Database of filters (export filter-db, or CNN Filter DB's) in the place of MODELs; it may exceed memory."""
    by: str | None = None
    """Column of the database's table whose values are compared, such as Task or model."""
    size: str = "auto"
    """Kernel size of the plots and summary, such as 3x3; auto: the one that most models and layers have,
    1x1 aside."""
    fold_bn: bool = False
    """Scale the weights by the BatchNorm that follows them, as exporters do."""
    trajectory: bool = False
    """The models are moments of one training, in order; a run stands for all the checkpoints it has kept."""
    basis: Path | None = None
    """filters.npz of an earlier analysis whose components and bins are taken, so that drifts compare with its own."""
    compat: Literal["none", "filter-db"] = "none"
    """filter-db: histograms as in the paper's notebook, with bins over the data's range and 1e-7 for an empty one."""
    untrained: bool = False
    """Measure each model's randomly initialised twin too."""
    arch: Arch = None
    allow_partial: AllowPartial = 1.0
    output_dir: Path = Path("results")
    """Where filters.json, .npz, .csv and the plots go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size != "auto" and not re.fullmatch(r"\d+x\d+", self.size):
            raise UserError(f"filters: --size is auto or such as 3x3, got {self.size!r}")
        if self.by is not None and self.db is None:
            raise UserError("filters: --by names a column of a database; add --db FILE.h5")
        if self.db is not None and (self.models or self.untrained or self.fold_bn):
            raise UserError("filters: --db takes no MODELs, --untrained or --fold-bn; export filter-db adds them to it")


def run(config: FiltersCommand) -> None:
    """Load the models, measure, write the files and print the summary."""
    if config.db is not None:
        with open_filter_db(config.db) as database:
            result = evaluate_db(database, config)
    else:
        result = evaluate(config.load(_moments(config.models) if config.trajectory else config.models), config)
    print(summary(result))
    info(f"filters: wrote {config.output_dir}/filters.json, .npz, .csv and plots (filters-*.png, .svg)")


def evaluate(backbones: Mapping[str, Backbone], config: FiltersCommand) -> EvalResult:
    """Measure labelled backbones, write the files, and return the result."""
    records = {label: model_record(backbone) for label, backbone in backbones.items()}
    weights = "BatchNorm folded" if config.fold_bn else "as stored"
    model = model_records(records)
    return _written(measure(backbones, config), model, {"weights": weights}, config)


def evaluate_db(database: FilterDatabase, config: FiltersCommand) -> EvalResult:
    """The same for the layers of a database, read one at a time and grouped by the column `config.by`.

    Raises:
        UserError: no such column or size; a damaged file.
    """
    networks = stored_layers(database, config.by)
    statistics: dict[str, list[LayerStatistics]] = {}
    for label, layers in networks.items():
        unfit: list[str] = []
        statistics[label] = _statistics(label, layers, config, unfit)
        if unfit:
            info(f"note: {label}: the weights of {', '.join(unfit)} are not finite; left out")
            networks[label] = layers.without(unfit)
    data = {"database": str(database.path), "by": config.by, "weights": "as in the database"}
    return _written(_compared(networks, statistics, config), database_record(database), data, config)


def measure(backbones: Mapping[str, Backbone], config: FiltersCommand) -> FiltersReport:
    """Measure labelled backbones.

    Raises:
        UserError: a model without convolutions larger than 1x1 or with weights that are not finite; no such size.
    """
    networks = {label: _layers(label, backbone, config) for label, backbone in backbones.items()}
    statistics = {label: _statistics(label, layers, config) for label, layers in networks.items()}
    return _compared(networks, statistics, config)


def _statistics(
    label: str, layers: Layers, config: FiltersCommand, unfit: list[str] | None = None
) -> list[LayerStatistics]:
    """Measure every layer; the names of those that are not finite go into `unfit`, where it is given."""
    found: list[LayerStatistics] = []
    with progress(f"filters {label}", len(layers)) as ticker:
        for layer in layers:
            try:
                found.append(layer_statistics(layer, config))
            except NotFiniteError:
                if unfit is None:
                    raise
                unfit.append(layer.name)
            ticker.advance()
    return found


def _compared(
    networks: Mapping[str, Layers], statistics: Mapping[str, list[LayerStatistics]], config: FiltersCommand
) -> FiltersReport:
    size = main_size(statistics, config.size)
    comparisons = _comparisons(networks, statistics, size, config)
    return FiltersReport(config, size, networks, statistics, comparisons, config.trajectory)


def _written(
    report: FiltersReport, model: Mapping[str, Any], data: Mapping[str, Any], config: FiltersCommand
) -> EvalResult:
    result = EvalResult(
        task="filters",
        protocol="filter-db/1" if config.compat == "filter-db" else "filters/1",
        model=model,
        data={"size": report.size, **data},
        preprocessing={},
        figures=figures(report),
        details=details(report),
        seed=config.seed,
    )
    write(config.output_dir, result, report)
    return result


def main_size(statistics: Mapping[str, list[LayerStatistics]], wanted: str) -> str:
    """The kernel size that most models have, of those the one of most layers, 1x1 aside; or the wanted one.

    Raises:
        UserError: there is none, or not the wanted one.
    """
    layers = Counter(layer.size for one in statistics.values() for layer in one)
    models = Counter(size for one in statistics.values() for size in {layer.size for layer in one})
    known = sorted(set(layers) - {"1x1"})
    if not known:
        raise UserError(f"filters: {', '.join(statistics)}: no convolution larger than 1x1, so no filters to compare")
    if wanted not in ("auto", *known):
        raise UserError(f"filters: no {wanted} filters; there are {', '.join(known)} (1x1 has no pattern)")
    size = max(known, key=lambda each: (models[each], layers[each])) if wanted == "auto" else wanted
    if without := [label for label, one in statistics.items() if all(layer.size != size for layer in one)]:
        info(f"filters: no {size} filters in {', '.join(without)}; they are in filters.csv only")
    return size


def _layers(label: str, backbone: Backbone, config: FiltersCommand) -> ConvLayers:
    layers = conv_layers(backbone, fold_bn=config.fold_bn)
    if not len(layers):
        raise UserError(f"filters: {label} has no convolutions")
    if layers.depth_from != "graph":
        info(f"filters: the graph of {label} cannot be followed; its layers are in {layers.depth_from}")
    if layers.unreached:
        info(f"filters: {label} does not use {', '.join(layers.unreached)}; left out")
    if config.fold_bn and not any(layer.folded for layer in layers):
        info(f"filters: {label} has no BatchNorm directly behind a convolution; its weights stay as stored")
    return layers


def _comparisons(
    networks: Mapping[str, Layers],
    statistics: Mapping[str, list[LayerStatistics]],
    size: str,
    config: FiltersCommand,
) -> dict[str, Comparison]:
    """The comparison at every kernel size, the main one first."""
    every = [layer for layers in statistics.values() for layer in layers]
    sizes = [size, *sorted({layer.size for layer in every} - {size, "1x1"})]
    bases: dict[str, Basis] = load_basis(config.basis) if config.basis else {}
    if bases and size not in bases:
        raise UserError(f"filters: {config.basis} has no basis for {size} filters; it has {', '.join(bases)}")
    found: dict[str, Comparison] = {}
    for each in sizes:
        if bases and each not in bases:
            continue
        basis = bases.get(each) or pooled_basis(every, each)
        found[each] = compare(networks, each, basis, published=config.compat == "filter-db")
    return found


def _moments(sources: tuple[str, ...]) -> list[str]:
    """A run's checkpoints in the place of the run."""
    found: list[str] = []
    for source in sources:
        kept = sorted(Path(source).glob("checkpoints/step-*.pt"))
        found += [str(file) for file in kept] or [source]
    return found
