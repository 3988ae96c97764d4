"""When processes agree to stop."""

import time
from pathlib import Path

import torch

from convscope.core.training import stop
from convscope.core.training.stop import Agreement, Stop
from tests.processes import run_on_two


def steps_until_agreed(rank: int) -> list[int]:
    """Step after which a process stops when process 1 is told so during step 4, in three ways to agree."""
    stop.ASK_EVERY = 0.1
    return [until_agreed(rank, *case) for case in (("cpu", 1000), ("cuda", 4), ("cuda", 1000))]


def until_agreed(rank: int, device: str, log_every: int) -> int:
    told = Stop()
    agreement = Agreement(told, torch.device(device), 0, log_every)
    for step in range(1, 1001):
        time.sleep(0.01 * (1 + rank))  # one process is slower than the other
        if rank == 1 and step == 4:
            told.signal = 10
        if agreement.reached(step):
            return step
    return 0


def test_all_stop_after_the_same_step(tmp_path: Path) -> None:
    first, second = run_on_two(steps_until_agreed, tmp_path)
    assert first == second
    assert first[:2] == [4, 4]  # asked after every step; at the lines of the log
    assert 4 <= first[2] < 1000  # by the clock, long before the log


def test_one_process_needs_no_agreement() -> None:
    told = Stop()
    agreement = Agreement(told, torch.device("cuda"), 0, 1000)
    assert not agreement.reached(1)
    told.signal = 10
    assert agreement.reached(2)
