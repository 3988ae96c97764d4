"""A table of figures, and how it reads in plain text."""

from collections.abc import Sequence
from dataclasses import dataclass

from convscope.core.results import Figure

Cell = str | int | float | Figure | None


@dataclass(frozen=True)
class Table:
    """Rows under a header; a `Figure` is shown with its interval, `None` as a dash."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the cells that stand out

    def transposed(self) -> "Table":
        """The same table with rows and columns swapped; the first column becomes the header."""
        columns = list(zip(*self.rows))
        header = [self.header[0], *(shown(cell) for cell in columns[0])]
        rows = [[name, *column] for name, column in zip(self.header[1:], columns[1:])]
        return Table(header, rows, self.caption, frozenset((column - 1, row + 1) for row, column in self.best))


def number(value: float) -> str:
    """A number to three significant digits, or to the nearest integer where it is large."""
    if isinstance(value, int) or value == 0 or 1e3 <= abs(value) < 1e7:
        return f"{value:.0f}"
    return f"{value:#.3g}".removesuffix(".")


def interval(figure: Figure) -> str:
    """The 95 % interval of a figure as text, empty where it has none."""
    if figure.low is None or figure.high is None:
        return ""
    return f"[{number(figure.low)}, {number(figure.high)}]"


def shown(cell: Cell) -> str:
    """A cell as plain text."""
    if cell is None:
        return "-"
    if isinstance(cell, Figure):
        return f"{number(cell.value)} {interval(cell)}".strip()
    return number(cell) if isinstance(cell, float) else str(cell)


def markdown(table: Table) -> str:
    """A table as GitHub-flavoured Markdown, padded so that it reads in a terminal too."""
    lines = [list(table.header)]
    for r, row in enumerate(table.rows):
        lines.append([f"**{shown(cell)}**" if (r, c) in table.best else shown(cell) for c, cell in enumerate(row)])
    lines = [[text.replace("|", "\\|").replace("\n", " ") for text in line] for line in lines]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(table.header))]
    drawn = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in lines]
    drawn.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(drawn)
