"""Tables for papers: LaTeX with booktabs."""

from collections.abc import Sequence

from convscope.core.results import Figure
from convscope.report.tables import Cell, Table, interval, number, shown

SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after the end of a row it would be read as an option
    "]": "{]}",
    "\n": " ",
    "\r": " ",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def escape(text: str) -> str:
    """Text that LaTeX sets as it stands."""
    return "".join(SPECIAL.get(sign, sign) for sign in text)


def latex(table: Table, notes: Sequence[str] = ()) -> str:
    """A `table` environment, notes below it; the document needs `\\usepackage{booktabs}`."""
    numeric = [all(_is_number(row[i]) for row in table.rows) for i in range(len(table.header))]
    rows = [
        " & ".join(_cell(cell, (r, c) in table.best) for c, cell in enumerate(row)) for r, row in enumerate(table.rows)
    ]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(table.caption)}}}",
        rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}",
        r"\toprule",
        " & ".join(map(escape, table.header)) + r" \\",
        r"\midrule",
        *(rf"{row} \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par{{\footnotesize {escape(note)}}}" for note in notes),
        r"\end{table}",
    ]
    return "\n".join(lines)


def _cell(cell: Cell, best: bool) -> str:
    if not isinstance(cell, Figure):
        return "--" if cell is None else escape(shown(cell))
    value = rf"\textbf{{{number(cell.value)}}}" if best else number(cell.value)
    return rf"{value} {{\scriptsize {escape(interval(cell))}}}" if interval(cell) else value


def _is_number(cell: Cell) -> bool:
    return cell is None or isinstance(cell, int | float | Figure)
