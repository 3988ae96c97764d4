"""The job that runs on the cluster. Nothing here imports torch before signals are in order.

The pickled job never changes: what an attempt does follows from the run directory alone. A stop (time limit,
preemption) is a flag that the training loop reads between steps; it saves, and the job then asks for its next attempt.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STOPPED = {128 + number for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}  # saved, and not at the end
HOPELESS = "hopeless"  # a file beside the logs: another attempt would end like this one


@dataclass(frozen=True)
class Job:
    """A command line of convscope, as submitit pickles it.

    Args:
        words: the command line without the program.
        folder: where logs and notes of the job lie.
        run: run directory, for those commands that have one.
        patience: attempts in a row that may pass without a step.
    """

    words: tuple[str, ...]
    folder: str
    run: str | None
    patience: int

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
        os.environ["CONVSCOPE_JOB"] = str(environment.job_id)
        if self.run is not None and stuck(Path(self.run), self.patience):
            self._give_up(f"{self.patience} attempts in a row made no step; see the logs in {self.folder}")
        from convscope.cli import main

        try:
            main(list(self.words))
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
            sys.stdout.flush()
            sys.stderr.flush()
            if code in STOPPED:
                if rank == 0:
                    requeue()
                os._exit(0)  # no result: SLURM knows whether there will be another attempt
            if code == 2:  # a mistake that the user has to mend
                self._give_up("the command was refused")
            if code:
                os._exit(code)
        return {"rank": rank}

    def _give_up(self, why: str) -> None:
        print(f"convscope: {why}; this job is not tried again", file=sys.stderr, flush=True)
        Path(self.folder, f"{HOPELESS}-{os.environ['CONVSCOPE_JOB']}").touch()
        os._exit(2)


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


def stuck(run: Path, patience: int) -> bool:
    """Whether the newest attempts, more than `patience` of them, all started from the same step before the end."""
    records: list[dict[str, object]] = []
    for file in sorted(run.glob("attempts/[0-9]*.json"))[-patience - 1 :]:
        try:
            records.append(json.loads(file.read_text()))
        except (OSError, ValueError):
            records.append({})  # the attempt ended while it wrote this
    steps = {record.get("step") for record in records}
    return len(records) > patience and len(steps) == 1 and steps != {records[-1].get("total_steps")}


def requeue() -> None:
    """Ask for another attempt, unless the job is already leaving: cancelled, or requeued by somebody else."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    shown = _output("scontrol", "show", "job", "-o", job)
    fields = dict(part.split("=", 1) for part in shown.split() if "=" in part)
    mine = os.environ.get("SLURM_RESTART_COUNT", "0")
    if fields.get("JobState") == "RUNNING" and fields.get("Restarts") == mine:
        _output("scontrol", "requeue", job)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


def teardown(folder: Path, max_restarts: int) -> Sequence[str]:
    """Shell lines that ask for another attempt when this one failed, if the job is still this attempt's."""
    hopeless = (
        f"{folder}/{HOPELESS}-${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
    )
    return (
        "rc=$?",
        'now=$(scontrol show job -o "$SLURM_JOB_ID" | grep -o "Restarts=[0-9]*")',
        f'if [ $rc -ne 0 ] && [ "$now" = "Restarts=${{SLURM_RESTART_COUNT:-0}}" ] && '
        f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ] && [ ! -e "{hopeless}" ]; then',
        '  echo "convscope: attempt ended with $rc; asking for another one" >&2; scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $rc",
    )
