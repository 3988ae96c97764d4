"""What has become of a job: squeue while SLURM remembers it, then sacct where there is one."""

import fcntl
import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convscope.core.errors import UserError
from convscope.core.files import whole_lines

SUBMISSIONS = "submissions.jsonl"  # in RUN/slurm: every submission of the run
ENDS = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}  # not NODE_FAIL, ...
FORGOTTEN = "Invalid job id"  # squeue's words


@dataclass(frozen=True)
class JobState:
    """SLURM's word for a job's state, and whether the job can still go on.

    UNKNOWN is the state of a job that everybody has forgotten, NO ANSWER that of one that nobody could be asked about.
    """

    name: str
    ended: bool


def job_state(job: str) -> JobState:
    """Ask squeue; NODE_FAIL, PREEMPTED and REQUEUED are not the end while it knows the job. Then ask sacct."""
    done = _ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")
    if done is not None:
        if done.returncode and FORGOTTEN not in done.stderr:
            return JobState("NO ANSWER", False)
        states = _states(done.stdout)
        if states:
            living = [state for state in states if state not in ENDS]
            return JobState((living or states)[-1], not living)
    done = _ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State")
    states = _states(done.stdout) if done is not None and done.returncode == 0 else []
    return JobState(states[-1] if states else "UNKNOWN", True)


def _ask(*command: str) -> subprocess.CompletedProcess[str] | None:
    """None where the program is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "no answer")


def _states(listing: str) -> list[str]:
    return [line.split()[0].rstrip("+") for line in listing.splitlines() if line.strip()]


def submissions(run: Path) -> list[dict[str, Any]]:
    """Every submission of a run, oldest first."""
    return whole_lines(run / "slurm" / SUBMISSIONS)


def state_of(run: Path, submission: dict[str, Any]) -> JobState:
    """State of one submission; of one on this machine its lock and its files tell."""
    if submission.get("local"):
        state = JobState("RUNNING", False) if _locked(run) else JobState("UNKNOWN", True)
    else:
        state = job_state(str(submission["job"]))
    if state.name == "UNKNOWN" and (run / "backbone.safetensors").is_file():
        return JobState("COMPLETED", True)  # forgotten, but its files are there
    return state


def _locked(run: Path) -> bool:
    """Whether a process of this machine holds the run directory's lock."""
    with suppress(FileNotFoundError):
        lock = os.open(run / ".lock", os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
    return False


def living_job(run: Path) -> str | None:
    """The job that runs, or will run, for this run directory.

    Raises:
        UserError: SLURM does not answer.
    """
    for submission in reversed(submissions(run)):
        if submission.get("local"):  # the run directory's lock keeps others out
            continue
        state = job_state(str(submission["job"]))
        if state.name == "NO ANSWER":
            raise UserError(f"SLURM does not answer, and job {submission['job']} for {run} may live; try again later")
        if not state.ended:
            return str(submission["job"])
    return None
