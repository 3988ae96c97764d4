"""A run that is killed goes on with other numbers of processes and workers, at the very next sample."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from convscope.core.data.order import Shuffled
from tests.core.data.tars import write_split
from tests.core.training.test_two_processes import children

MODULE = "tests.core.training.recorder"
SAMPLES = 103  # 60 steps of 8 are four epochs and a part, and no epoch ends with a step


def start(data: Path, output: Path, world: int, workers: int) -> "subprocess.Popen[bytes]":
    """A run of `world` processes, alone or under torchrun."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m"] if world > 1 else []
    words = [sys.executable, "-m", *launch, MODULE, str(data), str(output), str(workers)]
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


def test_other_processes_and_workers_continue_at_the_next_sample(tmp_path: Path) -> None:
    data, output = write_split(tmp_path / "train", [40, 3, 60]), tmp_path / "run"
    kill_after(start(data, output, world=1, workers=0), output, 10)
    kill_after(start(data, output, world=2, workers=0), output, 25)
    kill_after(start(data, output, world=2, workers=1), output, 40)
    assert start(data, output, world=1, workers=3).wait(timeout=120) == 0

    order = Shuffled(SAMPLES, seed=0)
    lines = seen(output)
    worlds = []
    for step in range(1, 61):
        last = max(line["begin"] for line in lines if line["step"] == step)  # what was computed again counts once
        ranks = {line["rank"]: line["index"] for line in lines if (line["step"], line["begin"]) == (step, last)}
        world = len(ranks)
        worlds.append(world)
        expected = order(np.arange((step - 1) * 8, step * 8)).tolist()
        assert [ranks[i % world][i // world] for i in range(8)] == expected
    assert worlds == sorted(worlds[:20]) + sorted(worlds[20:], reverse=True)  # one, two, one
    assert set(worlds) == {1, 2}
    shown = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in shown] == list(range(1, 61))
    assert shown[-1]["attempt"] == 4
