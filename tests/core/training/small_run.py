"""A tiny SparK run that tests start, stop and compare."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FLAGS = [
    *("--backbone", "resnet18_cifar", "--backbone-args", "channels=4,4,8,8", "--size", "32", "--mask-unit", "8"),
    *("--decoder-width", "16", "--batch-size", "8", "--steps", "24", "--log-every", "3", "--checkpoint-every", "4"),
    *("--warmup-epochs", "0.5", "--lr", "0.05", "--drop-path", "0.1", "--device", "cpu", "--picture-every", "0"),
]


def make_images(folder: Path, count: int = 20, side: int = 40) -> Path:
    """Class folders with random pictures."""
    rng = np.random.default_rng(0)
    for index in range(count):
        target = folder / "train" / f"class{index % 2}" / f"{index:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(target)
    return folder


def command(data: Path, output: Path, *flags: str) -> list[str]:
    """The command line of the run."""
    words = ["pretrain", "spark", "--data", str(data), "--output-dir", str(output), *FLAGS, *flags]
    return [sys.executable, "-m", "convscope", *words]


def spark(data: Path, output: Path, *flags: str) -> list[str]:
    """The words of the run for `cli.main`, which reads in this process."""
    return command(data, output, "--workers", "0", *flags)[3:]


def finish(data: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    done = subprocess.run(command(data, output, *flags), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_second", "attempt")} for line in lines]
