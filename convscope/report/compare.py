"""Results of several runs beside one another, and whether they may be compared."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from convscope.core.results import EvalResult, Figure, Samples, fingerprint_of, paired_difference
from convscope.report.tables import Cell, Table, number

WIDE = 6  # figures; a task with more of them than rows is shown with one row a figure
NAMED = 6  # settings spelled out in a note
LARGER = re.compile(r"\b(top\d+|accuracy|m?ap|m?p|recall|precision|auc|f1|r2)\b", re.IGNORECASE)  # is better
SMALLER = re.compile(r"\b(rank|loss|error|mse|rmse|mae|perplexity)\b")


@dataclass(frozen=True)
class Row:
    """One result, and the run that it came from."""

    run: str
    result: EvalResult
    samples: Samples = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Difference:
    """How much more a run reached than another one on the same test samples."""

    row: Row
    against: Row
    figure: str
    value: Figure

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.value.low is not None and self.value.high is not None and not self.value.low <= 0 <= self.value.high


def comparison(rows: Sequence[Row]) -> Table:
    """One task's results: a row each, or a column each where a result has many figures.

    Where settings differ a column says which rows share theirs (A, B, ...); only those may be compared, and the best
    among them stands out.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.result.figures))
    marks = settings(rows)
    mixed = len(set(marks)) > 1
    first = ["run", "model", *(["setting"] if mixed else [])]
    cells: list[list[Cell]] = [
        [row.run, model_name(row.result), *([mark] if mixed else []), *(row.result.figures.get(name) for name in names)]
        for row, mark in zip(rows, marks)
    ]
    best = {(r, len(first) + c) for c, name in enumerate(names) for r in _best(rows, marks, name)}
    table = Table([*first, *names], cells, rows[0].result.task, frozenset(best))
    return table.transposed() if len(names) > max(WIDE, len(rows)) else table


def settings(rows: Sequence[Row]) -> list[str]:
    """A letter for each row; rows with equal protocol, data and preprocessing share one."""
    keys = [_key([_protocol(r.result), _data(r.result), _preprocessing(r.result)]) for r in rows]
    order = list(dict.fromkeys(keys))
    return [chr(ord("A") + order.index(key)) if order.index(key) < 26 else f"#{order.index(key)}" for key in keys]


def differences(rows: Sequence[Row]) -> list[str]:
    """One line for each thing that makes a task's results incomparable; empty where nothing does."""
    found, marks = [], settings(rows)
    for subject, of in (("protocol", _protocol), ("data", _data), ("preprocessing", _preprocessing)):
        flat = [of(row.result) for row in rows]
        keys = dict.fromkeys(key for values in flat for key in values)
        differing = [key for key in keys if len({_key(values.get(key)) for values in flat}) > 1]
        sharing: dict[str, set[str]] = {}  # the settings that say the same about this subject
        for values, mark in zip(flat, marks):
            said = ", ".join(f"{key} {values.get(key, 'not recorded')}" for key in differing[:4])
            sharing.setdefault(said, set()).add(mark)
        if differing:
            listed = [f"{', '.join(sorted(of_them))}: {said}" for said, of_them in sharing.items()]
            more = f"; and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
            found.append(
                f"{rows[0].result.task}: {subject} differs, so these rows are not comparable "
                f"(setting {'; '.join(listed[:NAMED])}{more})"
            )
    return found


def cautions(rows: Sequence[Row]) -> list[str]:
    """One line for each result of a model that was loaded in part."""
    return [
        f"{row.run}: only {share:.1%} of the weights of {model_name(row.result)} came from its checkpoint"
        for row in rows
        if isinstance(share := row.result.model.get("matched"), float) and share < 1
    ]


def paired(rows: Sequence[Row]) -> list[Difference]:
    """One task's rows against the first one on the same test samples, labels and protocol, by a paired bootstrap.

    Of many figures, those of the kind that comes first.
    """
    found, firsts = [], dict[str, Row]()
    for row in rows:
        if not row.samples or not fingerprint_of(row.result):
            continue
        against = firsts.setdefault(_key([_protocol(row.result), fingerprint_of(row.result), _label(row.result)]), row)
        shared = [name for name, values in row.samples.items() if values.shape == _shape(against.samples.get(name))]
        if len(shared) > WIDE:  # of every layer the figure that is reported first
            shared = [name for name in shared if name.split()[-1] == shared[0].split()[-1]]
        for name in shared if against is not row else []:
            difference = paired_difference(row.samples[name], against.samples[name])
            found.append(Difference(row, against, name, difference))
    return found


def paired_table(found: Sequence[Difference]) -> Table:
    """Differences, and whether they can be chance."""
    cells: list[list[Cell]] = [
        [each.row.run, each.against.run, each.figure, each.value, "yes" if each.excludes_zero else "no"]
        for each in found
    ]
    caption = f"{found[0].row.result.task}: difference on the same test samples, with its paired bootstrap interval"
    return Table(["run", "minus", "figure", "difference", "excludes 0"], cells, caption)


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


def _best(rows: Sequence[Row], marks: Sequence[str], name: str) -> list[int]:
    """Rows whose figure is the best, as it is shown, of those that may be compared; none where one is alone."""
    sign = -1 if SMALLER.search(name) else 1 if LARGER.search(name) else 0  # of a count nothing is better
    found: list[int] = []
    for mark in dict.fromkeys(marks if sign else ()):
        values = {
            r: row.result.figures[name].value
            for r, row in enumerate(rows)
            if marks[r] == mark and name in row.result.figures
        }
        if len(values) > 1:
            top = number(max(values.values(), key=lambda value: sign * value))
            found += [r for r, value in values.items() if number(value) == top]
    return found


def _key(values: object) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _shape(values: Any) -> tuple[int, ...] | None:
    return None if values is None else tuple(values.shape)


def _label(result: EvalResult) -> str:
    return str(result.data.get("label"))


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
