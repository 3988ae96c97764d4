"""`torchrun` with two gloo processes: one run, one log, and exact resume."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convscope.core.checkpoint import latest_checkpoint
from convscope.core.data.build import BuildConfig, run
from tests.core.training.small_run import command, make_images, metrics


def torchrun(data: Path, output: Path, *flags: str) -> list[str]:
    """The same command line under torchrun."""
    python, *arguments = command(data, output, "--workers", "0", *flags)
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]


def run_and_kill(words: list[str], output: Path, step: int) -> None:
    """Start, and kill every process once the metrics of `step` are written."""
    group = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    file, deadline = output / "metrics.jsonl", time.monotonic() + 240
    while group.poll() is None and time.monotonic() < deadline:
        if file.exists() and any(f'"step": {step},' in line for line in file.read_text().splitlines()):
            break
        time.sleep(0.005)
    assert group.poll() is None, "the run ended before it could be killed"
    workers = children(group.pid)
    assert len(workers) == 2
    for process in (*workers, group.pid):
        os.kill(process, signal.SIGKILL)
    group.wait(timeout=60)


def children(parent: int) -> list[int]:
    """Processes that `parent` started."""
    stats = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            stats.append((entry / "stat").read_text())
    fields = [(int(stat.split(" ", 1)[0]), int(stat.rsplit(")", 1)[1].split()[1])) for stat in stats]
    return [process for process, its_parent in fields if its_parent == parent]


@pytest.mark.slow
def test_a_killed_group_continues_exactly(tmp_path: Path) -> None:
    run(BuildConfig(source=str(make_images(tmp_path / "images")), dest=str(tmp_path / "shards"), samples_per_shard=7))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ("--accumulate", "2")
    done = subprocess.run(torchrun(tmp_path / "shards", whole, *flags), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("on cpu x 2") == 1
    assert [line["step"] for line in metrics(whole)] == list(range(3, 25, 3))
    assert metrics(whole)[-1]["samples"] == 24 * 8  # the batch size is the global one
    assert json.loads((whole / "attempts" / "0001.json").read_text())["world"] == 2

    run_and_kill(torchrun(tmp_path / "shards", killed, *flags), killed, 9)
    assert latest_checkpoint(killed) is not None
    done = subprocess.run(torchrun(tmp_path / "shards", killed, *flags), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stderr.split("continuing at step ")[1].split()[0]) < 24
    assert metrics(killed) == metrics(whole)
    one, other = (load_file(output / "backbone.safetensors") for output in (whole, killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_mistake_under_torchrun_is_told_once(tmp_path: Path) -> None:
    words = torchrun(tmp_path / "absent", tmp_path / "run")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("convscope: error: ") == 1
    assert sys.executable not in done.stderr.split("convscope: error: ")[1].splitlines()[0]
