"""A run that is killed goes on with other numbers of processes and workers, at the very next sample."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from convscope.core.data.order import Mixed, Order, Shuffled
from tests.core.data.tars import write_split
from tests.core.training.recorder import WEIGHTS
from tests.core.training.test_two_processes import children

MODULE = "tests.core.training.recorder"
SAMPLES = 103  # 60 steps of 8 are four epochs and a part, and no epoch ends with a step


def start(sources: list[Path], output: Path, world: int, workers: int) -> "subprocess.Popen[bytes]":
    """A run of `world` processes, alone or under torchrun."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m"] if world > 1 else []
    words = [sys.executable, "-m", *launch, MODULE, str(output), str(workers), *map(str, sources)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def seen(output: Path) -> list[dict[str, object]]:
    file = output.with_suffix(".seen")
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def kill_after(run: "subprocess.Popen[bytes]", output: Path, step: int) -> None:
    """kill -9 all of its processes once `step` has begun."""
    deadline = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline:
        if any(line["step"] >= step for line in seen(output)):
            break
        time.sleep(0.002)
    assert run.poll() is None, "the run ended before it could be killed"
    for process in (*children(run.pid), run.pid):
        os.kill(process, signal.SIGKILL)
    run.wait(timeout=60)


def run_in_parts(sources: list[Path], output: Path, parts: list[tuple[int, int]]) -> None:
    """A run whose parts have other numbers of (processes, workers); all but the last are killed, 13 steps apart."""
    *killed, last = parts
    for number, (world, workers) in enumerate(killed):
        kill_after(start(sources, output, world, workers), output, 10 + 13 * number)
    assert start(sources, output, *last).wait(timeout=120) == 0


def require_order(output: Path, order: Order) -> list[int]:
    """Every step has the samples of its positions, dealt to its processes in turn; how many processes each step had."""
    lines, worlds = seen(output), []
    for step in range(1, 61):
        last = max(line["begin"] for line in lines if line["step"] == step)  # what was computed again counts once
        ranks = {line["rank"]: line["index"] for line in lines if (line["step"], line["begin"]) == (step, last)}
        world = len(ranks)
        worlds.append(world)
        expected = order(np.arange((step - 1) * 8, step * 8)).tolist()
        assert [ranks[i % world][i // world] for i in range(8)] == expected
    return worlds


def shown(output: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_other_processes_and_workers_continue_at_the_next_sample(tmp_path: Path) -> None:
    data, output = write_split(tmp_path / "train", [40, 3, 60]), tmp_path / "run"
    run_in_parts([data], output, [(1, 0), (1, 3), (2, 1), (1, 0)])
    worlds = require_order(output, Shuffled(SAMPLES, seed=0))
    assert worlds == sorted(worlds[:30]) + sorted(worlds[30:], reverse=True)  # one, two, one
    assert set(worlds) == {1, 2}
    assert [line["step"] for line in shown(output)] == list(range(1, 61))
    assert shown(output)[-1]["attempt"] == 4


@pytest.mark.slow
def test_a_mixture_continues_at_the_next_sample(tmp_path: Path) -> None:
    output = tmp_path / "run"
    sources = [write_split(tmp_path / name, [count]) for name, count in (("a", 40), ("b", 63))]
    run_in_parts(sources, output, [(1, 0), (2, 1)])
    order = Mixed([Shuffled(40, seed=0), Shuffled(63, seed=0)], WEIGHTS, seed=0)
    assert set(require_order(output, order)) == {1, 2}
    index = order(np.arange(480))
    counts = [shown(output)[-1][f"seen/{source}"] for source in sources]
    assert counts == [int((index < 40).sum()), int((index >= 40).sum())]
