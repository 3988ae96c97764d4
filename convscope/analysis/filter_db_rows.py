"""What a database of filters says about a model and its layers: the published columns, and further ones."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from convscope import __version__
from convscope.analysis.conv_layers import ConvLayer, conv_layers
from convscope.analysis.operator_counts import operator_counts
from convscope.core.backbone import Backbone
from convscope.core.errors import UserError

Row = dict[str, Any]

# Columns of the published table that only people know.
DESCRIPTIONS = (
    "Name",
    "Paper",
    "Pretraining-Dataset",
    "Training-Dataset",
    "Visual Category",
    "Task",
    "Accessible",
    "Dataset URL",
)
POINTWISE = "1x1"


@dataclass(frozen=True)
class ModelFilters:
    """A model's convolutions that go into a database."""

    row: Row  # columns that all its layers share
    layers: Sequence[tuple[Row, ConvLayer]]


def model_filters(backbone: Backbone, *, fold_bn: bool = False, sizes: Sequence[str] = ()) -> ModelFilters:
    """The layers with kernels of `sizes`, by default of all but 1x1, and the rows of their tables."""
    layers = conv_layers(backbone, fold_bn=fold_bn)
    counts = Counter({"(1, 1) filters": 0, "(3, 3) filters": 0})
    for layer in layers:
        counts[f"({layer.weight.shape[2]}, {layer.weight.shape[3]}) filters"] += len(layer.filters)
    total = sum(counts.values()) - counts["(1, 1) filters"]
    operators = operator_counts(backbone)
    operators["BatchNormalization"] -= sum(layer.folded for layer in layers)
    row = {
        "model": backbone.source + (" (BN folded)" if fold_bn else ""),
        "path": backbone.source,
        "producer": f"convscope {__version__} (torch {torch.__version__})",
        "op_set": 0,
        "depth": layers.path,
        **dict.fromkeys(DESCRIPTIONS),
        "Name": backbone.arch,
        "total_filters": total,
        "3x3_filter_share": counts["(3, 3) filters"] / total if total else 0.0,
        **counts,
        **operators,
        "weights_hash": backbone.weights_hash(),
        "fold_bn": fold_bn,
        "arch": backbone.arch,
        "source": backbone.source,
        "matched": backbone.matched,
        "depth_from": layers.depth_from,
    }
    wanted = [layer for layer in layers if (layer.size in sizes if sizes else layer.size != POINTWISE)]
    order: Counter[str] = Counter()  # layer_id counts within a kernel size, as published for 3x3
    rows = []
    for layer in wanted:
        rows.append((_layer_row(layer, order[layer.size]), layer))
        order[layer.size] += 1
    return ModelFilters(row, rows)


def model_key(row: Mapping[Any, Any]) -> str:
    """What makes a model of a database the same as another."""
    known = row.get("weights_hash")
    if isinstance(known, str):
        return f"{known} {'folded' if bool(row.get('fold_bn')) else 'raw'}"
    return f"{row.get('model')} {row.get('path')}"


def read_descriptions(path: Path) -> dict[str, Row]:
    """Columns by MODEL: a CSV table with a column `model`, or YAML with a mapping for each MODEL.

    Raises:
        UserError: it cannot be read, has another form, or sets a column that is computed.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if path.suffix in (".yaml", ".yml"):
        found = _yaml(path, text)
    else:
        lines = csv.DictReader(text.splitlines())
        if "model" not in (lines.fieldnames or ()):
            raise UserError(f"{path} has no column model; it names the MODEL that a line is about")
        found = {line.pop("model"): {name: value for name, value in line.items() if name} for line in lines}
    computed = {
        "filter_ids",
        "model_id",
        "layer_id",
        "conv_depth",
        "weights_hash",
        "fold_bn",
        "filters_hash",
        "dataset",
    }
    if wrong := sorted({name for row in found.values() for name in row} & computed):
        raise UserError(f"{path} sets {', '.join(wrong)}, which convscope computes; leave it out")
    return {
        model: {name: str(value) for name, value in row.items() if value not in (None, "")}
        for model, row in found.items()
    }


def _yaml(path: Path, text: str) -> dict[str, Row]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(row, dict) for row in found.values()):
        raise UserError(f"{path} has to map each MODEL to its columns, such as Task: Classification")
    return {str(model): row for model, row in found.items()}


def _layer_row(layer: ConvLayer, layer_id: int) -> Row:
    outputs, inputs = layer.weight.shape[:2]
    return {
        "conv_depth": layer.depth,
        "conv_depth_norm": layer.depth_norm,
        "layer_id": layer_id,
        "layer_depth": layer.path,
        "in_channels": inputs,
        "out_channels": outputs,
        "layer_name": layer.name,
        "kernel_size": layer.size,
        "groups": layer.groups,
        "depthwise": layer.groups > 1 and inputs == 1,
        "stride": f"{layer.stride[0]}x{layer.stride[1]}",
        "bn_folded": layer.folded,
    }
