"""`convscope shards stats`: what the shards of a folder hold, as one HTML file."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.statistics import SplitStatistics, statistics
from convscope.core.errors import UserError
from convscope.core.pairs.captions import CaptionSource
from convscope.plots.histogram import draw_counts, draw_histogram
from convscope.report.html import Image, Part, Section, Text, write_report
from convscope.report.tables import Cell, Table, markdown

NAMED = 5  # unreadable samples told by name


@dataclass(frozen=True, kw_only=True)
class StatsCommand:
    """Formats, sizes, labels and caption lengths of every split, as numbers and as one HTML page."""

    source: tyro.conf.Positional[str]
    """Folder that `shards build` wrote, a folder of tars, a brace pattern, URLs or pipe: commands, builtin:shapes."""
    output: Path = Path("shards.html")
    """The HTML file to write."""
    samples: int | None = None
    """Look at this many samples of each split, drawn at random; default: all."""
    seed: int = 0
    """Of that draw."""

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise UserError(f"--samples must be at least 1, got {self.samples}")


def run(config: StatsCommand) -> None:
    """Write the page and print the numbers.

    Raises:
        UserError: no shards, or a damaged one.
    """
    sections = []
    rows: list[list[Cell]] = []
    for shards in _splits(config.source):
        indices = None
        if config.samples is not None and config.samples < len(shards):
            indices = np.sort(np.random.default_rng(config.seed).permutation(len(shards))[: config.samples]).tolist()
        found = statistics(shards, CaptionSource(), indices)
        rows.append(_row(shards, found))
        sections.append(Section(shards.split, _parts(shards, found)))
    table = Table(list(HEAD), rows, "Splits")
    write_report(config.output, f"Shards of {config.source}", [Section("Overview", [table]), *sections])
    print(markdown(table))
    print(config.output)


HEAD = ("split", "shards", "samples", "looked at", "unreadable", "classes", "captions", "median size", "median kB")


def _splits(source: str) -> list[ShardSet]:
    folder = Path(source).expanduser()
    names = sorted(path.name for path in folder.iterdir() if any(path.glob("*.tar"))) if folder.is_dir() else []
    if source == "builtin:shapes":
        names = ["train", "test"]
    return [open_shards(source, name) for name in names or ["train"]]


def _row(shards: ShardSet, found: SplitStatistics) -> list[Cell]:
    size = f"{_median(found.widths):g} x {_median(found.heights):g}" if found.widths else None
    kilobytes = round(_median(found.bytes) / 1000, 1) if found.bytes else None
    unreadable, classes, captions = len(found.unreadable), len(found.labels), len(found.caption_words)
    counts = [len(shards.shards), len(shards), found.samples, unreadable, classes, captions]
    return [shards.split, *counts, size, kilobytes]


def _parts(shards: ShardSet, found: SplitStatistics) -> list[Part]:
    parts: list[Part] = []
    if found.unreadable:
        named = "; ".join(f"{key}: {cause}" for key, cause in found.unreadable[:NAMED])
        more = f" and {len(found.unreadable) - NAMED} more" if len(found.unreadable) > NAMED else ""
        parts.append(Text(f"Unreadable images: {named}{more}", warning=True))
    for name, count in found.members.items():
        if count < found.samples:
            parts.append(Text(f"{found.samples - count} of {found.samples} samples have no .{name} member."))
    parts.append(Table(["format", "samples"], [[name, n] for name, n in found.formats.most_common()], "Formats"))
    if found.widths:
        short = [min(size) for size in zip(found.widths, found.heights)]
        ratio = [width / height for width, height in zip(found.widths, found.heights)]
        parts += [
            _histogram(short, "short side in pixels", log=True),
            _histogram(ratio, "width / height", log=True),
            _histogram([size / 1000 for size in found.bytes], "kB of an image", log=True),
        ]
    if found.labels:
        counts = [(_class_name(shards, label), count) for label, count in _ordered(found.labels)]
        about = f"{len(counts)} classes, {min(found.labels.values())} to {max(found.labels.values())} samples each."
        parts.append(Image(draw_counts(counts, xlabel="class").render("svg"), about, "Samples of each class"))
    if found.caption_words:
        parts.append(_histogram(found.caption_words, "words of a caption"))
        parts.append(_histogram(found.caption_characters, "characters of a caption"))
    return parts


def _histogram(values: list[int] | list[float], xlabel: str, *, log: bool = False) -> Part:
    low, middle, high = min(values), _median(values), max(values)
    if low == high:
        return Text(f"{xlabel}: {low:.4g} everywhere")
    caption = f"{xlabel}: {low:.4g} to {high:.4g}, median {middle:.4g}"
    return Image(draw_histogram(values, xlabel=xlabel, log=log).render("svg"), caption, f"Histogram of {xlabel}")


def _ordered(labels: Counter[str]) -> list[tuple[str, int]]:
    """Numbers by value, before words."""
    numbers = sorted((pair for pair in labels.items() if pair[0].isdecimal()), key=lambda pair: int(pair[0]))
    return numbers + sorted(pair for pair in labels.items() if not pair[0].isdecimal())


def _class_name(shards: ShardSet, label: str) -> str:
    known = shards.classes is not None and label.isdecimal() and int(label) < len(shards.classes)
    return shards.classes[int(label)] if known and shards.classes else label


def _median(values: list[int] | list[float]) -> float:
    return float(np.median(values))
