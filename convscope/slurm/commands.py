"""`convscope slurm status | logs | cancel | resume RUN`."""

import json
import os
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from convscope.core.config import from_dict
from convscope.core.errors import UserError
from convscope.core.files import read_json, whole_lines
from convscope.core.log import info
from convscope.slurm.settings import SlurmSettings
from convscope.slurm.state import SUBMISSIONS, living_job, state_of, submissions
from convscope.slurm.submit import LAST, submit


@dataclass(frozen=True, kw_only=True)
class RunCommand:
    """A run that was submitted with --slurm.* flags."""

    run: tyro.conf.Positional[Path]
    """Its run directory."""


@dataclass(frozen=True, kw_only=True)
class LogsCommand(RunCommand):
    """The logs of a submitted run, newest attempt last."""

    rank: int = 0
    """Which process of the job."""
    follow: bool = False
    """Go on printing what comes, until the job ends."""


def run_status(config: RunCommand) -> None:
    """Print the job's state and how far the run is; of a sweep, a line for each point."""
    if points := _points(config.run):
        width = max(len(point.name) for point in points)
        for point in points:
            found = status(point)
            print(f"{point.name:<{width}}  {found['state']:<10} {found.get('progress', '')}")
        return
    print("\n".join(f"{name:<9} {value}" for name, value in status(config.run).items()))


def run_logs(config: LogsCommand) -> None:
    """Print the logs of one process of the newest submission."""
    if points := _points(config.run):
        raise UserError(f"{config.run} is a sweep; name one of its {len(points)} points, such as {points[0]}")
    submission = _newest(config.run)
    stem = f"{submission['job']}_{config.rank}_log"
    files = [Path(submission["logs"], f"{stem}.{end}") for end in ("out", "err")]
    seen = dict.fromkeys(files, 0)
    while True:
        last = not config.follow or state_of(config.run, submission).ended  # asked first: what it wrote is read below
        for file in files:
            if file.is_file():
                with open(file, errors="replace") as log:
                    log.seek(seen[file])
                    print(log.read(), end="", flush=True)
                    seen[file] = log.tell()
        if last:
            break
        time.sleep(2)
    if not any(file.is_file() for file in files):
        info(f"no log of process {config.rank} yet: {files[1]}")


def run_cancel(config: RunCommand) -> None:
    """Cancel the job of a run, or those of a sweep; the same command or `slurm resume` continues it."""
    jobs = [job for run in _points(config.run) or [config.run] if (job := living_job(run))]
    if not jobs:
        raise UserError(f"no job for {config.run} lives")
    done = subprocess.run(["scancel", *jobs], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"scancel {' '.join(jobs)}: {done.stderr.strip()}")
    print(f"job {', '.join(jobs)} cancelled; convscope slurm resume {config.run} continues")


def run_resume(config: RunCommand) -> None:
    """Submit a run, or the unfinished points of a sweep, as it was submitted last."""
    file = config.run / "slurm" / LAST
    if not file.is_file():
        raise UserError(f"{config.run} was never submitted; start it with --slurm.* flags")
    described = read_json(file)
    os.chdir(described["directory"])  # paths of the command line may be relative
    settings = from_dict(SlurmSettings, described["settings"], str(file))
    submit(described["words"], settings, Path(described["sweep"]) if "sweep" in described else None)


def status(run: Path) -> dict[str, str]:
    """What is known of a submitted run.

    Raises:
        UserError: it was never submitted.
    """
    submission = _newest(run)
    found = {"run": str(run), "job": str(submission["job"]), "state": state_of(run, submission).name}
    attempts = sorted(run.glob("attempts/[0-9]*.json"))
    found["attempts"] = str(len(attempts))
    line = next((line for line in reversed(whole_lines(run / "metrics.jsonl")) if "loss" in line), None)
    total = next(filter(None, map(_total_steps, reversed(attempts))), None)
    if line is None or not total:
        return found
    found["progress"] = f"step {line['step']} of {total} ({line['step'] / total:.1%}), epoch {line['epoch']:g}"
    rate = line.get("samples_per_second")
    if rate:
        left = (total - line["step"]) * line["samples"] / line["step"] / rate
        found["speed"] = f"{rate:g} samples/s; {left / 3600:.1f} h left"
    found["loss"] = f"{line['loss']:.6g}"
    return found


def _total_steps(attempt: Path) -> int | None:
    """None of an attempt that is, or ended, before it knew."""
    with suppress(OSError, ValueError):
        return int(json.loads(attempt.read_text()).get("total_steps", 0)) or None
    return None


def _points(folder: Path) -> list[Path]:
    """Runs of a sweep that were submitted; none where `folder` is itself a run."""
    if (folder / "slurm" / SUBMISSIONS).is_file():
        return []
    return sorted(file.parent.parent for file in folder.glob(f"*/slurm/{SUBMISSIONS}"))


def _newest(run: Path) -> dict[str, Any]:
    known = submissions(run)
    if not known:
        raise UserError(f"{run} was never submitted; start it with --slurm.* flags")
    return known[-1]
