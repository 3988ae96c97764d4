"""Small databases of filters, and how the published notebook reads one."""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from convscope.analysis.filter_db_command import FilterDbCommand, run

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
