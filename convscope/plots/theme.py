"""One look for every plot: light, readable in print and on a phone, safe for colour-blind readers."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from convscope.core.files import write_bytes

INK, MUTED, GRID = "#1f2933", "#5f6b76", "#e3e7eb"
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#6b4c9a",
    "#8c6d31",
)  # after Okabe and Ito
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
MANY = 24  # points that are more than markers
DPI = 160
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "convscope",  # the same figure gives the same file
}


class Picture:
    """A finished drawing."""

    def __init__(self, figure: Figure) -> None:
        self._figure = figure

    def render(self, kind: str = "png") -> bytes:
        """The picture as the bytes of a "png" or "svg" file."""
        with _style():
            buffer = io.BytesIO()
            metadata = {"Date": None} if kind == "svg" else None
            self._figure.savefig(buffer, format=kind, dpi=DPI, bbox_inches="tight", pad_inches=0.12, metadata=metadata)
        return buffer.getvalue()

    def save(self, *paths: Path) -> None:
        """Write each path, whole or not at all, in the format of its suffix (.png or .svg)."""
        for path in paths:
            write_bytes(path, self.render(path.suffix.removeprefix(".")))


@contextmanager
def sheet(width: float, height: float, **spacing: Any) -> Iterator[Figure]:
    """An empty figure of the given size in inches, with the theme in force while it is being drawn.

    `spacing` goes to matplotlib's constrained layout (w_pad, h_pad, wspace, hspace).
    """
    with _style():
        yield Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(**spacing))


def colour(index: int) -> str:
    """The colour of the index-th series."""
    return COLOURS[index % len(COLOURS)]


def line(index: int) -> str:
    """The line style of the index-th series; it changes only when the colours run out."""
    return LINES[index // len(COLOURS) % len(LINES)]


def stroke(index: int, points: int = 0) -> dict[str, Any]:
    """Arguments of `axis.plot` for the index-th series: colour, dashes and marker, so that it is told apart in grey.

    Args:
        index: of the series.
        points: number of its points, where a marker at each would be too many.
    """
    return {
        "color": colour(index),
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
        "markevery": (0.02 + 0.023 * (index % len(MARKERS)), 0.18) if points > MANY else None,
    }


def wrap(label: str, width: int) -> str:
    """Break a model's name into lines after its separators; a piece that is longer than `width` stays whole."""
    lines = [""]
    for piece in re.findall(r"[^\s/_:@.-]+[\s/_:@.-]*|[\s/_:@.-]+", label):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.strip() for line in lines)


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(STYLE):
        yield
