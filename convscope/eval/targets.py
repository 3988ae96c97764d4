"""Targets other than one class: several labels of an image, or numbers to predict."""

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from convscope.core.data.shard_set import Sample, ShardSet, field_of
from convscope.core.errors import UserError
from convscope.core.log import progress

Targets = Literal["classes", "multi-label", "regression"]


def read_targets(splits: Sequence[ShardSet], field: str, kind: Targets) -> list[Tensor]:
    """Multi-label or regression targets of every sample of each split; images are not read.

    The field is a json field, or a member that holds JSON. Multi-label: a list of class numbers, or a list with
    1, 0 or -1 (unknown) for each class; it is read as the latter where all lists of all splits have equal length, at
    least two, and hold nothing else. Regression: a number, or a list of them.

    Returns:
        For each split float32 (N, C): 1 present, 0 absent, -1 ignored; or (N, T).

    Raises:
        UserError: a sample without the field, or with something else in it.
    """
    lists = [_read(shards, field) for shards in splits]
    if kind == "regression":
        width = len(lists[0][0][1])
        return [torch.tensor([_of_width(key, row, width) for key, row in rows], dtype=torch.float32) for rows in lists]
    everything = [row for rows in lists for _, row in rows]
    if _are_vectors(everything):
        return [torch.tensor([row for _, row in rows], dtype=torch.float32) for rows in lists]
    classes = 1 + max((_class_number(key, value) for key, row in lists[0] for value in row), default=-1)
    return [_indicators(rows, classes) for rows in lists]


def _read(shards: ShardSet, field: str) -> list[tuple[str, list[float]]]:
    """Key and numbers of every sample."""
    rows = []
    with progress("reading targets", len(shards)) as ticker:
        for index in range(len(shards)):
            sample = shards.without_image(index)
            rows.append((str(sample["__key__"]), _numbers(sample, field)))
            ticker.advance()
    return rows


def _numbers(sample: Sample, field: str) -> list[float]:
    value: Any = field_of(sample, field)
    if isinstance(value, bytes):
        try:
            value = json.loads(value)
        except ValueError:
            value = value.decode(errors="replace")
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        raise UserError(f"sample {sample['__key__']!s}: its {field!r} is {value!r}, not a number or a list of numbers")
    return numbers


def _of_width(key: str, row: list[float], width: int) -> list[float]:
    if len(row) != width or not row:
        raise UserError(f"sample {key} has {len(row)} numbers to predict, the first one {width}")
    return row


def _are_vectors(rows: Sequence[Sequence[float]]) -> bool:
    lengths = {len(row) for row in rows}
    return len(lengths) == 1 and min(lengths) >= 2 and {value for row in rows for value in row} <= {-1, 0, 1}


def _class_number(key: str, value: float) -> int:
    if value != int(value) or value < 0:
        raise UserError(f"sample {key}: class {value!r} is not a whole number from 0 on")
    return int(value)


def _indicators(rows: Sequence[tuple[str, Sequence[float]]], classes: int) -> Tensor:
    present = torch.zeros(len(rows), classes)
    for index, (key, row) in enumerate(rows):
        for value in row:
            if _class_number(key, value) >= classes:
                raise UserError(f"sample {key} has class {value}; the train split has {classes} classes")
            present[index, int(value)] = 1
    return present
