"""`convscope slurm status | logs | cancel | resume RUN`."""

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from convscope.core.config import from_dict
from convscope.core.errors import UserError
from convscope.core.files import read_json
from convscope.slurm.settings import SlurmSettings
from convscope.slurm.state import ENDED, job_state, living_job, submissions
from convscope.slurm.submit import LAST, submit


@dataclass(frozen=True, kw_only=True)
class RunCommand:
    """A run that was submitted with --slurm.* flags."""

    run: tyro.conf.Positional[Path]
    """Its run directory."""


@dataclass(frozen=True, kw_only=True)
class LogsCommand(RunCommand):
    """The logs of a submitted run, newest attempt last."""

    follow: bool = False
    """Go on printing what comes, until the job ends."""


def run_status(config: RunCommand) -> None:
    """Print the job's state and how far the run is."""
    print("\n".join(f"{name:<9} {value}" for name, value in status(config.run).items()))


def run_logs(config: LogsCommand) -> None:
    """Print the logs of the newest submission's first process."""
    submission = _newest(config.run)
    files = [Path(submission["logs"], f"{submission['job']}_0_log.{end}") for end in ("out", "err")]
    seen = dict.fromkeys(files, 0)
    while True:
        for file in files:
            if file.is_file():
                with open(file, errors="replace") as log:
                    log.seek(seen[file])
                    print(log.read(), end="", flush=True)
                    seen[file] = log.tell()
        if not config.follow or job_state(submission["job"]) in ENDED:
            return
        time.sleep(2)


def run_cancel(config: RunCommand) -> None:
    """Cancel the job of a run; the same command or `slurm resume` continues it."""
    job = living_job(config.run)
    if job is None:
        raise UserError(f"no job for {config.run} lives")
    done = subprocess.run(["scancel", job], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"scancel {job}: {done.stderr.strip()}")
    print(f"job {job} cancelled; convscope slurm resume {config.run} continues the run")


def run_resume(config: RunCommand) -> None:
    """Submit a run again, as it was submitted last."""
    file = config.run / "slurm" / LAST
    if not file.is_file():
        raise UserError(f"{config.run} was never submitted; start it with --slurm.* flags")
    described = read_json(file)
    os.chdir(described["directory"])  # paths of the command line may be relative
    submit(described["words"], from_dict(SlurmSettings, described["settings"], str(file)))


def status(run: Path) -> dict[str, str]:
    """What is known of a submitted run.

    Raises:
        UserError: it was never submitted.
    """
    submission = _newest(run)
    state = job_state(submission["job"])
    if state == "UNKNOWN" and (run / "backbone.safetensors").is_file():
        state = "COMPLETED"  # SLURM has forgotten it, its files have not
    found = {"run": str(run), "job": submission["job"], "state": state}
    attempts = [json.loads(file.read_text()) for file in sorted(run.glob("attempts/[0-9]*.json"))]
    found["attempts"] = str(len(attempts))
    line = _last_line(run / "metrics.jsonl")
    total = next((attempt["total_steps"] for attempt in reversed(attempts) if "total_steps" in attempt), None)
    if line is None or not total:
        return found
    found["progress"] = f"step {line['step']} of {total} ({line['step'] / total:.1%}), epoch {line['epoch']:g}"
    rate = line.get("samples_per_second")
    if rate:
        left = (total - line["step"]) * line["samples"] / line["step"] / rate
        found["speed"] = f"{rate:g} samples/s; {left / 3600:.1f} h left"
    found["loss"] = f"{line['loss']:.6g}"
    return found


def _newest(run: Path) -> dict[str, str]:
    known = submissions(run)
    if not known:
        raise UserError(f"{run} was never submitted; start it with --slurm.* flags")
    return {key: str(value) for key, value in known[-1].items()}


def _last_line(file: Path) -> dict[str, float] | None:
    """The newest line with a loss."""
    if not file.is_file():
        return None
    for text in reversed(file.read_text().splitlines()):
        line = json.loads(text)
        if "loss" in line:
            return dict(line)
    return None
