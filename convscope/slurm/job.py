"""The job that runs on the cluster. Nothing here imports torch before signals are in order.

The pickled job never changes: what an attempt does follows from the run directory alone. A stop (time limit,
preemption) is a flag that the training loop reads between steps; it saves, and the job then asks for its next attempt.
"""

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STOPPED = {128 + number for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}  # saved, and not at the end
REFUSED = 2  # exit code of a mistake that the user has to mend
SUPERSEDED = 75  # as in core.checkpoint, which imports torch
HOPELESS = "hopeless"  # a file beside the logs, for a job or one attempt of it: it asks for no further attempt
PAUSES = (1, 3, 10)  # seconds between tries to reach SLURM's controller
GOES_ON = {"RUNNING", "SIGNALING"}  # the second one for a moment, after each signal that SLURM passes on


@dataclass(frozen=True)
class Job:
    """A command line of convscope, as submitit pickles it.

    Args:
        words: the command line without the program.
        folder: where logs and notes of the job lie.
    """

    words: tuple[str, ...]
    folder: str

    def __call__(self) -> dict[str, object]:
        """Run the command as one process of the job's group; its rank."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # kept until the loop can take it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        import submitit

        environment = submitit.JobEnvironment()
        rank = int(environment.global_rank)
        os.environ |= group_variables(
            rank, int(environment.num_tasks), int(environment.local_rank), str(environment.hostnames[0])
        )
        job = job_id()
        if job is not None:
            os.environ["CONVSCOPE_JOB"] = job
        from convscope.cli import main

        try:
            main(list(self.words))
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
            sys.stdout.flush()
            sys.stderr.flush()
            if code:
                os._exit(self._after(code, rank, job))  # without a result
        return {"rank": rank}

    def _after(self, code: int, rank: int, job: str | None) -> int:
        """What to exit with after `code`, once it is seen to whether there will be another attempt."""
        if job is None:
            return code
        if code in STOPPED:  # SLURM knows whether it goes on; if it cannot be asked, the batch script tries again
            return 0 if rank or requeue(job) else 1
        if code == REFUSED:
            print("convscope: the command was refused; this job is not tried again", file=sys.stderr, flush=True)
            Path(self.folder, f"{HOPELESS}-{job}").touch()
        elif code == SUPERSEDED:
            Path(self.folder, f"{HOPELESS}-{job}.{_restarts()}").touch()
        return code


def job_id() -> str | None:
    """This process's job, None without SLURM; ARRAY_TASK in an array, where one task's plain id means all of them."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def _restarts() -> str:
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def group_variables(rank: int, world: int, local: int, host: str) -> dict[str, str]:
    """What torchrun would set; the port differs between jobs and between attempts."""
    attempt = f"{os.environ.get('SLURM_JOB_ID', os.getppid())}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"
    port = random.Random(attempt).randint(20000, 30000)  # below the range from which systems pick ports themselves
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }


def requeue(job: str) -> bool:
    """Ask for another attempt, unless the job is already leaving: cancelled, or requeued by somebody else.

    Returns:
        Whether that is settled; False where SLURM did not answer.
    """
    for pause in (*PAUSES, 0):
        shown = _output("scontrol", "show", "job", "-o", job)
        if shown is not None:
            fields = dict(part.split("=", 1) for part in shown.split() if "=" in part)
            if fields.get("JobState") not in GOES_ON or fields.get("Restarts") != _restarts():
                return True
            if _output("scontrol", "requeue", job) is not None:
                return True
        time.sleep(pause)
    return False


def _output(*command: str) -> str | None:
    """What a command prints; None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"convscope: {error}", file=sys.stderr, flush=True)
        return None
    if done.returncode:
        print(f"convscope: {shlex.join(command)}: {done.stderr.strip()}", file=sys.stderr, flush=True)
        return None
    return done.stdout


def teardown(folder: Path, homes: Sequence[Path], max_restarts: int, patience: int) -> Sequence[str]:
    """Shell lines that ask for another attempt when this one failed, if the job is still this attempt's.

    Args:
        folder: where logs and notes of the job lie.
        homes: run directory of each task of the array, or of the one job.
        max_restarts: attempts after the first one.
        patience: failures in a row, without a new checkpoint in between, after which the job ends.
    """
    # Failures are counted here and not in Python, for what fails may be Python's start. Attempts that SLURM ends
    # (preemption, a lost node) do not come this far and do not count.
    return (
        "rc=$?",
        "again=${SLURM_RESTART_COUNT:-0}",
        'id="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"',
        f"cd {shlex.quote(str(folder))} || exit $rc",
        f"homes=({' '.join(shlex.quote(str(home)) for home in homes)})",
        f'if [ $rc -ne 0 ] && [ ! -e "{HOPELESS}-$id" ] && [ ! -e "{HOPELESS}-$id.$again" ]; then',
        '  latest=$(cat "${homes[${SLURM_ARRAY_TASK_ID:-0}]}/checkpoints/latest" 2>/dev/null)',
        '  echo "after ${latest:-no checkpoint}" >> "failures-$id"',
        f'  same=$(tail -n {patience} "failures-$id" | grep -cxF "after ${{latest:-no checkpoint}}")',
        f'  if [ "$same" -ge {patience} ]; then',
        f'    echo "convscope: {patience} attempts in a row failed ${{latest:+after }}${{latest:-before a checkpoint}};'
        ' this job is not tried again" >&2',
        f'  elif [ "$again" -ge {max_restarts} ]; then',
        f'    echo "convscope: attempt ended with $rc, and {max_restarts} restarts are the limit" >&2',
        "  else",
        '    echo "convscope: attempt ended with $rc; asking for another one" >&2',
        f"    for pause in {' '.join(map(str, PAUSES))} 0; do",
        '      if now=$(scontrol show job -o "$id"); then',
        '        case "$now " in *" Restarts=$again "*) scontrol requeue "$id" && break ;; *) break ;; esac',
        "      fi",
        "      sleep $pause",
        "    done",
        "  fi",
        "fi",
        "exit $rc",
    )
