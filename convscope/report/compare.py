"""Results of several runs beside one another, and whether they may be compared."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convscope.core.results import EvalResult
from convscope.report.tables import Cell, Table

WIDE = 6  # figures; a task with more of them than rows is shown with one row a figure


@dataclass(frozen=True)
class Row:
    """One result, and the run that it came from."""

    run: str
    result: EvalResult


def comparison(rows: Sequence[Row]) -> Table:
    """One task's results: a row each, or a column each where a result has many figures.

    Where settings differ a column says which rows share theirs (A, B, ...); only those may be compared.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.result.figures))
    settings = _settings(rows)
    mixed = len(set(settings)) > 1
    header = ["run", "model", *(["setting"] if mixed else []), *names]
    cells: list[list[Cell]] = [
        [row.run, model_name(row.result), *([mark] if mixed else []), *(row.result.figures.get(name) for name in names)]
        for row, mark in zip(rows, settings)
    ]
    table = Table(header, cells, rows[0].result.task)
    return table.transposed() if len(names) > max(WIDE, len(rows)) else table


def differences(rows: Sequence[Row]) -> list[str]:
    """One line for each thing that makes a task's results incomparable; empty where nothing does."""
    found = []
    for subject, of in (("protocol", _protocol), ("data", _data), ("preprocessing", _preprocessing)):
        flat = [of(row.result) for row in rows]
        keys = dict.fromkeys(key for values in flat for key in values)
        differing = [key for key in keys if len({json.dumps(v.get(key), default=str) for v in flat}) > 1]
        if differing:
            said = "; ".join(
                f"{row.run}: " + ", ".join(f"{key} {v.get(key, 'not recorded')}" for key in differing[:4])
                for row, v in zip(rows, flat)
            )
            found.append(f"{rows[0].result.task}: {subject} differs, so these rows are not comparable ({said})")
    return found


def model_name(result: EvalResult) -> str:
    """The model's source, or its architecture where the source is not recorded."""
    return str(result.model.get("source") or result.model.get("arch") or "?")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def _settings(rows: Sequence[Row]) -> list[str]:
    """A letter for each row; rows with equal protocol, data and preprocessing share one."""
    keys = [
        json.dumps([_protocol(r.result), _data(r.result), _preprocessing(r.result)], sort_keys=True, default=str)
        for r in rows
    ]
    order = list(dict.fromkeys(keys))
    return [chr(ord("A") + order.index(key)) if order.index(key) < 26 else f"#{order.index(key)}" for key in keys]


def _protocol(result: EvalResult) -> dict[str, Any]:
    return {"protocol": result.protocol}


def _data(result: EvalResult) -> dict[str, Any]:
    """All but the place, where there are fingerprints: a data set may lie in another place elsewhere."""
    flat = flatten(result.data)
    if any("fingerprint" in key for key in flat):
        flat.pop("source", None)
    return flat


def _preprocessing(result: EvalResult) -> dict[str, Any]:
    return flatten(result.preprocessing)
