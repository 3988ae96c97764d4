"""The same jobs on this machine: processes of submitit's, a few jobs at a time, which are waited for."""

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit

from convscope.core.errors import UserError
from convscope.core.log import info
from convscope.slurm.job import Job
from convscope.slurm.settings import SlurmSettings

MONTH = 60 * 24 * 30  # minutes; submitit wants a limit


def local_executor(folder: Path, settings: SlurmSettings, setup: Sequence[str]) -> Any:
    """Starts jobs here; `setup` are lines of shell, and every GPU that this process sees is seen by the job."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")  # submitit hides those that it was not asked for
    devices = "unset CUDA_VISIBLE_DEVICES" if shown is None else f"export CUDA_VISIBLE_DEVICES={shlex.quote(shown)}"
    script = "\n".join([devices, *setup, 'exec "$@"'])
    python = f"bash -c {shlex.quote(script)} bash {settings.python or shlex.quote(sys.executable)} -P"
    executor = submitit.LocalExecutor(folder=folder, python=python)
    executor.update_parameters(timeout_min=MONTH, tasks_per_node=settings.processes)
    return executor


def run_here(
    executor: Any, jobs: Sequence[Job], names: Sequence[str], parallel: int, started: Callable[[int, str], None]
) -> None:
    """Run jobs to their end, `parallel` at once; one that fails leaves the others alone.

    Args:
        executor: see `local_executor`.
        jobs: what to run.
        names: what to call them in an error.
        parallel: how many at once.
        started: told the number of each job, and submitit's name for it, as it starts.

    Raises:
        UserError: some did not finish.
        KeyboardInterrupt: Ctrl-C; training saves first.
    """
    waiting, running, failed = list(range(len(jobs))), dict[int, Any](), list[str]()
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                number = waiting.pop(0)
                with _deaf_to_ctrl_c():
                    running[number] = executor.submit(jobs[number])
                started(number, running[number].job_id)
            for number in [number for number, job in running.items() if job.done()]:
                job = running.pop(number)
                if not _succeeded(job):
                    failed.append(f"{names[number]} ({_last_words(job)})")
            time.sleep(0.2)
    except KeyboardInterrupt:
        for job in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGTERM)  # submitit's controller hands it on
        info("stopping; what trains saves first")
        for job in running.values():
            job.wait()
        raise
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} did not finish: {'; '.join(failed)}; the same command goes on")


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal; submitit's controller would kill what has not saved yet."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _succeeded(job: Any) -> bool:
    results = [job.task(task).paths.result_pickle for task in range(job.num_tasks)]
    return all(result.is_file() for result in results) and job.exception() is None


def _last_words(job: Any) -> str:
    log = job.task(0).paths.stderr
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    said = [line.strip() for line in lines if line.strip() and "submitit" not in line]
    return f"{said[-1] if said else 'no word'}; log: {log}"
