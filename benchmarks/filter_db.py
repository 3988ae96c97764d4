"""Streaming a database of filters: how many a second, and in how much memory.

    python benchmarks/filter_db.py --million 8 --folder /tmp/filter-db

Each row runs in a process of its own, on one thread. `statistics` is what a layer is judged by (variance entropy, raw
and normalised, sparsity, the moments of the eigenfilters), `orthogonality` that of its channels, `coefficients` the
histograms of the drift, `merging` copies all into a new database; `svd` is what the published notebook does: all
filters in memory, scaled, scikit-learn's PCA.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

LAYERS = [(64, 64)] * 4 + [(128, 128)] * 4 + [(256, 256)] * 4 + [(512, 512)] * 3  # ResNet-18's: 1.1 million filters
TASKS = ("reading", "statistics", "orthogonality", "coefficients", "merging", "svd")


def make(path: Path, millions: float, compression: str) -> None:
    """A database of random networks, written as `export filter-db` writes it, a layer in memory at a time."""
    import pandas as pd

    from convscope.analysis.filter_db import FilterTable
    from convscope.analysis.filter_db_writer import Part, write_filter_db

    rows, spans, end = [], [], 0
    while end < millions * 1e6:
        model = len(rows) // len(LAYERS)
        outputs, inputs = LAYERS[len(rows) % len(LAYERS)]
        place = len(rows) % len(LAYERS)
        row = {"model_id": model, "conv_depth": place, "conv_depth_norm": place / (len(LAYERS) - 1), "layer_id": place}
        names = {"model": f"net{model}", "path": f"net{model}", "Task": ("Classification", "Segmentation")[model % 2]}
        rows.append({**row, **names, "in_channels": inputs, "out_channels": outputs, "layer_name": f"conv{place}"})
        spans.append((end, end + outputs * inputs))
        end += outputs * inputs

    class Drawn:
        tables = {"3x3": FilterTable("3x3", np.dtype(np.float32), pd.DataFrame(rows), np.array(spans))}  # noqa: RUF012

        def read(self, size: str, start: int, stop: int) -> np.ndarray:
            return np.random.default_rng(start).standard_normal((stop - start, 9), dtype=np.float32) * 0.02

    write_filter_db(path, [Part(source=Drawn(), tables=Drawn.tables)], dtype="float32", compression=compression)


def measure(task: str, path: Path) -> tuple[int, float]:
    """Number of filters, and seconds of CPU time."""
    import h5py

    from convscope.analysis.filter_db import chunks_of, open_filter_db
    from convscope.analysis.filter_db_command import FilterDbCommand, run
    from convscope.analysis.filter_db_layers import stored_layers
    from convscope.analysis.filter_drift import CoefficientCounts, basis_of, default_bins
    from convscope.analysis.filter_statistics import FilterMoments, orthogonality, sparsity_of
    from convscope.analysis.filters import filter_moments

    if task == "svd":
        from sklearn.decomposition import PCA

        start = time.process_time()
        with h5py.File(path) as file:
            filters = file["filters"][...].reshape(-1, 9)
        peak = np.abs(filters).max(axis=1)
        PCA(n_components=9, svd_solver="full").fit_transform(filters / np.where(peak == 0, 1, peak)[:, None])
        return len(filters), time.process_time() - start
    if task == "merging":
        target = path.with_name("merged.h5")
        start = time.process_time()
        run(FilterDbCommand(models=(str(path),), output=target))
        seconds = time.process_time() - start
        for made in (target, target.with_suffix(".parquet")):
            made.unlink()
    with open_filter_db(path) as database:
        table = database.tables["3x3"]
        if task == "merging":
            return table.count, seconds
        layers = next(iter(stored_layers(database).values()))
        moments = FilterMoments(9)
        moments.update(database.read("3x3", 0, 4096))
        basis = basis_of(moments.eigenfilters())
        counts = CoefficientCounts(basis, default_bins(basis))
        start = time.process_time()
        if task == "reading":
            for _ in chunks_of(database, "3x3", 0, table.count):
                pass
        for layer in layers if task != "reading" else ():
            if task == "statistics":
                raw, normalised, peak = filter_moments(layer.filters.numpy())
                raw.variance_entropy(), normalised.variance_entropy(), sparsity_of(peak)
            elif task == "orthogonality":
                orthogonality(layer.weight)
            else:
                counts.update(layer.filters)
        return table.count, time.process_time() - start


def main() -> None:
    """Make the databases that are missing, then run every task on each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=float, default=8)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/filter-db"))
    parser.add_argument("--task")
    parser.add_argument("--file", type=Path)
    given = parser.parse_args()
    if given.task:
        count, seconds = measure(given.task, given.file)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"| {given.task} | {count / 1e6:.1f} | {seconds:.2f} | {count / seconds / 1e6:.2f} | {peak:.0f} |")
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, millions, compression in (
        ("uncompressed", given.million, "none"),
        ("uncompressed, four times as large", 4 * given.million, "none"),
        ("gzip", given.million, "gzip"),
    ):
        path = given.folder / f"{compression}-{millions:g}.h5"
        if not path.exists():
            make(path, millions, compression)
        print(f"\n{name}, {path.stat().st_size / 1e6:.0f} MB\n")
        print("| task | million filters | CPU seconds | million filters/s | peak memory (MB) |\n|---|---|---|---|---|")
        for task in TASKS:
            words = [sys.executable, __file__, "--task", task, "--file", str(path)]
            lines = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()
            print(lines[-1], flush=True)


if __name__ == "__main__":
    main()
