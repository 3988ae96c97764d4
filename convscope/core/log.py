"""What the user sees on the terminal: plain lines, and a progress bar where there is a terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL = 10.0  # seconds between two progress lines where there is no terminal


def info(message: str) -> None:
    """Print one line on standard error, so that standard output stays for results."""
    print(message, file=sys.stderr, flush=True)


class Ticker:
    """Counts finished items of a long job and shows them."""

    def __init__(self, label: str, total: int, progress: Progress | None) -> None:
        self.label, self.total, self.done = label, total, 0
        self._progress = progress
        self._task = progress.add_task(label, total=total, note="") if progress else None
        self._start = self._last = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Say that `count` more items are done; `note` follows the bar (a loss, a rate)."""
        self.done += count
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=count, note=note)
        elif time.monotonic() - self._last >= PLAIN_INTERVAL:
            self._last = time.monotonic()
            rate = self.done / (self._last - self._start)
            remaining = (self.total - self.done) / rate if rate else float("inf")
            info(f"{self.label} {self.done}/{self.total} {note} eta {remaining:.0f} s".replace("  ", " "))


@contextmanager
def progress(label: str, total: int, enabled: bool = True) -> Iterator[Ticker]:
    """Show progress over `total` items: a bar on a terminal, a line every ten seconds elsewhere."""
    if not enabled or not sys.stderr.isatty():
        ticker = Ticker(label, total, None)
        if not enabled:
            ticker._last = float("inf")
        yield ticker
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        yield Ticker(label, total, bar)
