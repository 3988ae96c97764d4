"""The layers of a database, read one at a time, in the place of a network's."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from convscope.analysis.filter_db import FilterDatabase
from convscope.core.errors import UserError

MOST_GROUPS = 64  # each has a histogram of its own, and a place in the pictures


@dataclass(frozen=True)
class StoredLayer:
    """A layer whose weights are read when they are asked for."""

    database: FilterDatabase
    span: tuple[int, int]
    model: str
    name: str
    size: str
    depth: int
    depth_norm: float
    out_channels: int
    groups: int
    folded: bool

    @property
    def weight(self) -> Tensor:
        """Weight (c_out, c_in / groups, h, w); (1, n, h, w) where the database does not know the channels."""
        start, stop = self.span
        values = self.database.read(self.size, start, stop)
        height, width = self.database.tables[self.size].shape
        native = values.astype(values.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(native).reshape(self.out_channels, -1, height, width)

    @property
    def filters(self) -> Tensor:
        """The filters (n, h*w)."""
        weight = self.weight
        return weight.reshape(-1, weight.shape[2] * weight.shape[3])


@dataclass(frozen=True)
class StoredLayers:
    """A group of layers, in the order of the file."""

    layers: tuple[StoredLayer, ...]
    depth_from: str = "database"
    unreached: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[StoredLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def without(self, names: Sequence[str]) -> "StoredLayers":
        """The others."""
        others = tuple(layer for layer in self.layers if layer.name not in names)
        return dataclasses.replace(self, layers=others, unreached=tuple(names))

    @property
    def folded(self) -> tuple[str, ...]:
        """Names of the layers that a BatchNorm is folded into."""
        return tuple(layer.name for layer in self.layers if layer.folded)


def stored_layers(database: FilterDatabase, by: str | None = None) -> dict[str, StoredLayers]:
    """The layers of a database by the value of a column, such as Task; all together without one.

    Raises:
        UserError: no such column, or one with too many values.
    """
    groups: dict[str, list[StoredLayer]] = {}
    for size, table in database.tables.items():
        if by is not None and len(table.meta) and by not in table.meta:
            raise UserError(f"{database.path} has no column {by!r}; it has {_columns(table.meta)}")
        spans = table.spans.tolist()
        for span, row in zip(spans, table.meta.to_dict("records")):
            label = database.path.name if by is None else _text(row[by])
            groups.setdefault(label, []).append(_layer(database, size, (span[0], span[1]), row))
    if not groups:
        raise UserError(f"{database.path} holds no filters")
    if len(groups) > MOST_GROUPS:
        many = f"column {by!r} of {database.path} has {len(groups)} values"
        raise UserError(f"{many}; take one with at most {MOST_GROUPS}")
    return {label: StoredLayers(_named(groups[label])) for label in sorted(groups, key=_natural)}


def database_record(database: FilterDatabase) -> dict[str, Any]:
    """What a result says of the database in the place of a model."""
    tables = database.tables.values()
    numbers = {number for table in tables for number in table.meta["model_id"]}
    return {
        "source": str(database.path),
        "models": len(numbers),
        "layers": sum(len(table.meta) for table in tables),
        "filters": {table.size: table.count for table in tables},
    }


def _layer(database: FilterDatabase, size: str, span: tuple[int, int], row: Mapping[Any, Any]) -> StoredLayer:
    count = span[1] - span[0]
    outputs, inputs = _whole(row.get("out_channels")), _whole(row.get("in_channels"))
    known = outputs * inputs == count
    alone = known and inputs == 1 and outputs > 1  # the published table does not say groups
    name = row.get("layer_name")
    return StoredLayer(
        database=database,
        span=span,
        model=str(row.get("model", row["model_id"])),
        name=name if isinstance(name, str) else f"layer {row.get('layer_id', span[0])}",
        size=size,
        depth=_whole(row.get("conv_depth")),
        depth_norm=float(row.get("conv_depth_norm", 0.0)),
        out_channels=outputs if known else 1,
        groups=_whole(row.get("groups")) or (outputs if alone else 1),
        folded=bool(row.get("bn_folded") == 1),
    )


def _named(layers: Sequence[StoredLayer]) -> tuple[StoredLayer, ...]:
    """The layers with their model's name before their own, where there are several models."""
    if len({layer.model for layer in layers}) == 1:
        return tuple(layers)
    return tuple(dataclasses.replace(layer, name=f"{layer.model}: {layer.name}") for layer in layers)


def _whole(value: Any) -> int:
    """A number of the table; 0 where it has none."""
    return 0 if value is None or value != value else int(value)


def _text(value: Any) -> str:
    if value is None or value != value:
        return "(none)"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _natural(label: str) -> list[Any]:
    """Sorts step-9 before step-10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", label)]


def _columns(meta: pd.DataFrame) -> str:
    """Columns with few values."""
    return ", ".join(str(name) for name in meta if 1 < meta[name].nunique() <= MOST_GROUPS)
