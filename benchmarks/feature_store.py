"""Memory and time of writing features to the store, and of reading them back, beyond what the process had before.

python benchmarks/feature_store.py [--rows 400000] [--width 2048] [--folder FOLDER]
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from convscope.eval.feature_store import FeatureStore

BATCH = 256


def anonymous() -> float:
    """MB of memory that no file backs (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    store = FeatureStore(folder, options.rows)
    rows = np.random.default_rng(0).random((BATCH, options.width), dtype=np.float32)
    try:
        start, begun, peak = anonymous(), time.monotonic(), 0.0
        store.begin({"layer": options.width}, {})
        with store.writer(["layer"]) as writer:
            for first in range(0, options.rows, BATCH):
                index = np.arange(first, min(first + BATCH, options.rows))
                writer.write(index, {"layer": rows[: len(index)]})
                peak = max(peak, anonymous() - start)
        store.finish(["layer"], [str(i) for i in range(options.rows)])
        size = options.rows * options.width * 4 / 1e9
        print(f"wrote {size:.2f} GB in {time.monotonic() - begun:.1f} s, memory +{peak:.1f} MB")
        start, begun, peak = anonymous(), time.monotonic(), 0.0
        weight = torch.rand(options.width, 10)
        for part in store.read("layer").split(4096):
            _ = part @ weight
            peak = max(peak, anonymous() - start)
        print(f"read it in {time.monotonic() - begun:.1f} s, memory +{peak:.1f} MB")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
