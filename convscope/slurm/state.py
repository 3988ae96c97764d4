"""What has become of a job: squeue while SLURM remembers it, then sacct where there is one."""

import json
import subprocess
from pathlib import Path
from typing import Any

SUBMISSIONS = "submissions.jsonl"  # in RUN/slurm: every submission of the run
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "UNKNOWN"}


def job_state(job: str) -> str:
    """SLURM's word for it, UNKNOWN where SLURM has forgotten it. NODE_FAIL, PREEMPTED and REQUEUED are not the end."""
    for command in (
        ("squeue", "-h", "-t", "all", "-j", job, "-o", "%T"),
        ("sacct", "-X", "-n", "-P", "-j", job, "-o", "State"),
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except OSError:  # not installed here
            continue
        states = [line.split()[0].rstrip("+") for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0 and states:
            return next((state for state in states if state not in ENDED), states[-1])
    return "UNKNOWN"


def submissions(run: Path) -> list[dict[str, Any]]:
    """Every submission of a run, oldest first."""
    file = run / "slurm" / SUBMISSIONS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def living_job(run: Path) -> str | None:
    """The job that runs, or will run, for this run directory."""
    for submission in reversed(submissions(run)):
        if job_state(submission["job"]) not in ENDED:
            return str(submission["job"])
    return None
