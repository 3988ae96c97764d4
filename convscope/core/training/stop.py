"""Ctrl-C, SIGTERM and SIGUSR2 as a flag that the loop reads between steps."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from convscope.core import distributed
from convscope.core.log import info


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


def leave(stop: Stop, step: int, run: Path) -> NoReturn:
    """Say how to continue, and exit as a program ended by that signal does."""
    if distributed.is_main():
        info(f"stopped after step {step}, all saved; run the same command again to continue {run}")
    raise SystemExit(128 + (stop.signal or signal.SIGTERM))
