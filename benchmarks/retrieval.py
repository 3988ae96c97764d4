"""How much memory and time retrieval takes over a gallery that lies in a memory map.

    python benchmarks/retrieval.py                                        # small
    python benchmarks/retrieval.py --gallery 1000000 --queries 1000       # needs 3.1 GB of disk
    python benchmarks/retrieval.py --gallery 1000000 --index ivf-pq

The map is written first, some rows at a time, and the evaluation is a process of its own. Peak memory is that of the
process, with the pages of the map that the system keeps for it (`peak`), and without them (`own`): only the latter has
to be there, for pages of a file can be dropped.
"""

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from convscope.eval.features import Features
from convscope.eval.retrieval import RetrievalConfig, retrieval
from convscope.eval.search_index import IndexKind

ROWS = 10_000  # written at a time
CENTRES = 1000  # of the classes; an image is its centre and as much noise


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    gallery: int = 20_000
    queries: int = 100
    width: int = 768
    dtype: Literal["float32", "float16"] = "float32"
    index: IndexKind = "flat"
    nlist: int | None = None
    nprobe: int = 16
    folder: Path | None = None
    """Where the map is written; default: the system's temporary folder. It is deleted afterwards."""
    worker: Path | None = None
    """Set by the program itself: the folder that holds the map."""


def main(settings: Settings) -> None:
    if settings.worker is not None:
        print(json.dumps(measure(settings, settings.worker)))
        return
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        write(settings, Path(folder))
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", folder]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"{settings.gallery} x {settings.width} {settings.dtype}, {settings.queries} queries, {settings.index}: {found}"
    )


def write(settings: Settings, folder: Path) -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, settings.width), dtype=np.float32)
    for name, count in (("gallery", settings.gallery), ("queries", settings.queries)):
        labels = rng.integers(0, CENTRES, count)
        x = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", settings.dtype, (count, settings.width))
        for start in range(0, count, ROWS):
            part = labels[start : start + ROWS]
            x[start : start + ROWS] = centres[part] + 4 * rng.standard_normal((len(part), settings.width), np.float32)
        np.save(folder / f"{name}-labels.npy", labels)


def measure(settings: Settings, folder: Path) -> dict[str, float]:
    gallery, queries = (
        Features(
            [],
            torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")),
            torch.from_numpy(np.load(folder / f"{name}-labels.npy")),
        )
        for name in ("gallery", "queries")
    )
    known = torch.isin(queries.y, gallery.y)
    queries = Features([], queries.x[known], queries.y[known])
    config = RetrievalConfig(device="cpu", index=settings.index, nlist=settings.nlist, nprobe=settings.nprobe)
    before, peak_own, done = own_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak_own[0] = max(peak_own[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    figures = retrieval(gallery, queries, config)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    measured = {"seconds": seconds, "peak MB": peak, "own MB": peak_own[0], "own MB before": before}
    return {name: round(value, 1) for name, value in measured.items()} | {
        name: round(figure.value, 4) for name, figure in figures.items()
    }


def own_memory() -> float:
    """Megabytes of this process that no file backs (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    main(tyro.cli(Settings))
