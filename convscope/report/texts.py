"""A comparison as text: Markdown, CSV, LaTeX."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence

from convscope.report.compare import Row, cautions, comparison, differences, model_name, paired, paired_table, settings
from convscope.report.latex import latex
from convscope.report.tables import markdown

Tasks = Mapping[str, Sequence[Row]]

COLUMNS = ("task", "run", "model", "figure", "value", "low", "high", "n", "protocol", "setting")
PAIRED = ("against", "difference", "difference_low", "difference_high", "excludes_0")


def as_markdown(tasks: Tasks) -> str:
    """A heading, the notes and the tables of each task."""
    parts = []
    for task, rows in tasks.items():
        parts += [f"## {task}", *_notes(rows), markdown(comparison(rows))]
        if found := paired(rows):
            table = paired_table(found)
            parts += [f"{table.caption}:", markdown(table)]
    return "\n\n".join(parts) + "\n"


def as_csv(tasks: Tasks) -> str:
    """One line a figure, with the paired difference to the first run on the same samples where there is one.

    Rows of one task may be compared where they have the same setting.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*COLUMNS, *PAIRED))
    for task, rows in tasks.items():
        found = {(id(each.row), each.figure): each for each in paired(rows)}
        for row, mark in zip(rows, settings(rows)):
            for name, figure in row.result.figures.items():
                values = (figure.value, figure.low, figure.high, figure.n, row.result.protocol, mark)
                pair = found.get((id(row), name))
                more = (
                    ("",) * len(PAIRED)
                    if pair is None
                    else (pair.against.run, pair.value.value, pair.value.low, pair.value.high, pair.excludes_zero)
                )
                writer.writerow([task, row.run, model_name(row.result), name, *values, *more])
    return text.getvalue()


def as_latex(tasks: Tasks) -> str:
    """A table for each task and one for its paired differences."""
    parts = ["% needs \\usepackage{booktabs}; bold: the best of the rows that may be compared"]
    for rows in tasks.values():
        parts += [
            latex(comparison(rows), _notes(rows)),
            *(latex(paired_table(found)) for found in [paired(rows)] if found),
        ]
    return "\n\n".join(parts) + "\n"


FORMATS: Mapping[str, Callable[[Tasks], str]] = {"markdown": as_markdown, "csv": as_csv, "latex": as_latex}


def _notes(rows: Sequence[Row]) -> list[str]:
    return [*differences(rows), *cautions(rows)]
