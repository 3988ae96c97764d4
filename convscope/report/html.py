"""One self-contained HTML file: no scripts, no network, light and dark, readable on a phone."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2

from convscope import __version__
from convscope.core.errors import UserError
from convscope.core.files import write_bytes
from convscope.core.results import Figure
from convscope.report.tables import Table, interval, number, shown

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by blank lines; a warning stands out."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Image:
    """A PNG or SVG picture."""

    data: bytes
    caption: str
    alt: str  # what the picture shows, for those who cannot see it


@dataclass(frozen=True)
class KeyValues:
    """Named values; `summary` folds them away under that line."""

    values: Mapping[str, object]
    summary: str = ""


@dataclass(frozen=True)
class Links:
    """Files beside the report, by the name that is shown; addresses are relative to it."""

    title: str
    files: Mapping[str, str]


Part = Text | Table | Image | KeyValues | Links


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    parts: Sequence[Part]


def write_report(path: Path, title: str, sections: Sequence[Section], *, lead: str = "") -> None:
    """Write the report, whole or not at all.

    Args:
        path: the HTML file.
        title: its heading.
        sections: in order; two or more get a table of contents.
        lead: a sentence below the heading.

    Raises:
        UserError: a picture is neither PNG nor SVG, or the file cannot be written.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(data_uri=_data_uri, shown=shown, number=number, interval=interval)
    environment.tests.update(figure=lambda cell: isinstance(cell, Figure), numeric=_numeric)
    environment.tests["kind"] = lambda part, name: type(part).__name__ == name
    template = environment.from_string(files("convscope.report").joinpath("report.html.j2").read_text())
    page = template.render(title=title, lead=lead, sections=sections, version=__version__)
    write_bytes(path, page.encode())


def _numeric(cell: object) -> bool:
    return cell is None or isinstance(cell, (int, float, Figure))


def _data_uri(image: Image) -> str:
    if image.data.startswith(PNG_SIGNATURE):
        kind = "image/png"
    elif b"<svg" in image.data[:2000]:
        kind = "image/svg+xml"
    else:
        raise UserError(f"report: the picture {image.caption!r} is neither PNG nor SVG")
    return f"data:{kind};base64,{base64.b64encode(image.data).decode()}"
