"""Ctrl-C, SIGTERM and SIGUSR2 as a flag that the loop reads between steps."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from convscope.core import distributed
from convscope.core.log import info

ASK_EVERY = 2.0  # seconds between two questions on CUDA, where an answer waits for the device


@dataclass
class Stop:
    """Whether a signal asked this process to stop, and which."""

    signal: int | None = None


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """Turn SIGINT, SIGTERM and SIGUSR2 (a cluster's time limit) into a flag that the loop reads between steps.

    A second Ctrl-C kills. A SIGUSR2 that was blocked until now, so as not to be lost, is let through.
    """
    stop = Stop()
    previous: dict[int, Any] = {}

    def remember(number: int, _: object) -> None:
        stop.signal = number
        if number == signal.SIGINT:
            signal.signal(number, previous[number])
            if distributed.is_main():  # a step may take minutes; a stream may be in use where the signal arrives
                os.write(2, b"\nstopping after this step; press Ctrl-C again to lose what is not saved\n")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        previous[number] = signal.getsignal(number)
        signal.signal(number, remember)
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    try:
        yield stop
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for restored, handler in previous.items():
            signal.signal(restored, handler)


class Agreement:
    """Whether any process was asked to stop, answered to all of them at the same steps.

    On a CPU they ask after every step; on CUDA at the lines of the log, and about every two seconds in between, by
    the mean time of a step, which they tell one another with the answer.
    """

    def __init__(self, stop: Stop, device: torch.device, step: int, log_every: int) -> None:
        self.stop, self.every_step, self.log_every = stop, device.type == "cpu", log_every
        self.next, self.asked, self.clock = step + 1, step, time.perf_counter()

    def reached(self, step: int) -> bool:
        """Called by every process after every step."""
        mine = self.stop.signal is not None
        if distributed.world() == 1:
            return mine
        if not self.every_step and step < self.next and step % self.log_every:
            return False
        seconds = (time.perf_counter() - self.clock) / (step - self.asked)
        means = distributed.mean_over_ranks({"stop": torch.tensor(float(mine)), "seconds": torch.tensor(seconds)})
        self.next = step + max(1, int(ASK_EVERY / max(means["seconds"], 1e-6)))
        self.asked, self.clock = step, time.perf_counter()
        return means["stop"] > 0


def leave(stop: Stop, step: int, run: Path) -> NoReturn:
    """Say how to continue, and exit as a program ended by that signal does."""
    if distributed.is_main():
        info(f"stopped after step {step}, all saved; run the same command again to continue {run}")
    raise SystemExit(128 + (stop.signal or signal.SIGTERM))
