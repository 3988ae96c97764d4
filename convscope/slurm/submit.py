"""Submission: the command line becomes a job of submitit's, and this process returns.

The code is copied beside the logs first, so that editing it later does not change a job that waits or goes on.
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import submitit

import convscope
from convscope.core.errors import UserError
from convscope.core.files import write_json
from convscope.core.log import info
from convscope.slurm.job import Job, teardown
from convscope.slurm.local import local_executor, run_here
from convscope.slurm.points import Point, following, read_points
from convscope.slurm.settings import SlurmSettings
from convscope.slurm.state import SUBMISSIONS, living_job, state_of, submissions

LAST = "submission.json"  # in RUN/slurm: what `slurm resume` submits again
GROUP = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "CONVSCOPE_JOB")


def submit(words: Sequence[str], settings: SlurmSettings, sweep: Path | None = None) -> None:
    """Submit a command line, or one for each point of a sweep as an array, and say how to follow it.

    Raises:
        UserError: a command line is wrong, a job for the run lives, there is no SLURM, or sbatch refuses.
    """
    points = read_points(words, sweep)
    base = points[0].home.parent if sweep is not None else points[0].home
    if not settings.dry_run:
        _refuse_living(points)
    if sweep is not None:
        unfinished = [point for point in points if not point.finished]
        if len(unfinished) < len(points):
            info(f"{len(points) - len(unfinished)} of {len(points)} points are finished and left as they are")
        points = unfinished
        if not points:
            return
    after = following(settings.then, points) if settings.then else []
    folder = base / "slurm"
    name = settings.name or base.name
    if settings.dry_run:
        print(script(folder, settings, name, points))
        return
    if sweep is not None:
        _describe(folder, words, settings, sweep.absolute())
    if settings.local:
        _run_here(points, after, folder, settings)
        return
    jobs = _submit(_executor(folder, settings, name, points), [Job(point.words, str(folder)) for point in points])
    for point, job in zip(points, jobs):
        _record(point, job.job_id, folder, settings)
    info(f"logs: {folder}; follow with: convscope slurm logs {points[0].home}")
    for line, waits_for in after:
        _submit_after(line, [jobs[i].job_id for i in waits_for], folder, settings, f"{name}-then")


def _refuse_living(points: Sequence[Point]) -> None:
    for point in points:
        known = submissions(point.home)
        if known and known[-1].get("local") and not state_of(point.home, known[-1]).ended:
            raise UserError(f"a job on this machine writes to {point.home}; wait for it, or end it with Ctrl-C")
        if job := living_job(point.home):
            raise UserError(f"job {job} for {point.home} lives; wait for it, or convscope slurm cancel {point.home}")


def _run_here(
    points: Sequence[Point], after: Sequence[tuple[tuple[str, ...], Any]], folder: Path, settings: SlurmSettings
) -> None:
    executor = local_executor(folder, settings, _setup(snapshot(folder), settings))
    names = [str(point.home) for point in points]
    info(f"logs: {folder}; follow with: convscope slurm logs {names[0]}")
    with _environment_of_no_job():
        run_here(
            executor,
            [Job(point.words, str(folder)) for point in points],
            names,
            settings.parallel or 1,
            lambda number, job: _record(points[number], job, folder, settings),
        )
        executor.update_parameters(tasks_per_node=1)
        lines = [shlex.join(line) for line, _ in after]
        jobs = [Job(line, str(folder)) for line, _ in after]
        run_here(executor, jobs, lines, 1, lambda number, job: print(f"job {job}  then: convscope {lines[number]}"))


def script(folder: Path, settings: SlurmSettings, name: str, points: Sequence[Point]) -> str:
    """The batch script that would be submitted; nothing is written, and no SLURM is needed."""
    executor = _executor(folder, settings, name, points)
    if len(points) > 1:
        executor.parameters["map_count"] = len(points)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


class _Unchecked(submitit.SlurmExecutor):  # type: ignore[misc]
    """For a script that is only shown: submitit refuses to make an executor where there is no srun."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def _executor(folder: Path, settings: SlurmSettings, name: str, points: Sequence[Point]) -> Any:
    python = f"{settings.python or shlex.quote(sys.executable)} -P"
    kind = _Unchecked if settings.dry_run else submitit.SlurmExecutor
    try:
        executor = kind(folder=folder, max_num_timeout=10**6, python=python)
    except RuntimeError as error:
        raise UserError("no SLURM here: srun is not found; --slurm.local runs the job on this machine") from error
    chosen = {"partition", "account", "qos", "constraint", "exclude", "mem", "gpus_per_node", "cpus_per_task"}
    parameters = {key: value for key, value in asdict(settings).items() if key in chosen and value}
    srun = ["--kill-on-bad-exit=1", *settings.srun_arg]
    if settings.cpus_per_task:
        srun.append(f"--cpus-per-task={settings.cpus_per_task}")  # srun does not inherit it
    code = code_folder(folder) if settings.dry_run else snapshot(folder)
    pairs = [item.partition("=") for item in settings.arg]
    executor.update_parameters(
        job_name=name,
        nodes=settings.nodes,
        ntasks_per_node=settings.processes,
        time=settings.timeout,
        signal_delay_s=settings.signal_delay,
        srun_args=srun,
        setup=_setup(code, settings),
        teardown=list(teardown(folder, [point.home for point in points], settings.max_restarts, settings.patience)),
        array_parallelism=settings.parallel or 10**4,
        additional_parameters={"requeue": True, **{key: value if equals else True for key, equals, value in pairs}},
        **parameters,
    )
    return executor


def _setup(code: Path, settings: SlurmSettings) -> list[str]:
    """Lines of shell before Python: the copied code, no variables of another group, and what the user wants."""
    path = f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    return [path, f"unset {' '.join(sorted(GROUP))}", *settings.setup]


def _submit(executor: Any, jobs: Sequence[Job]) -> list[Any]:
    try:
        with _environment_of_no_job():
            if len(jobs) == 1:
                return [executor.submit(jobs[0])]
            with executor.batch():
                return [executor.submit(job) for job in jobs]
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch refused: {' '.join(str(error).split())[-300:]}") from error


@contextlib.contextmanager
def _environment_of_no_job() -> Iterator[None]:
    """Submitting from within a job must not hand its variables on; SLURM_CONF says where the cluster is."""
    names = [name for name in os.environ if (name.startswith(OF_A_JOB) and name != "SLURM_CONF") or name in GROUP]
    saved = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(saved)


def code_folder(folder: Path) -> Path:
    """Where `snapshot` keeps the package as it is now."""
    digest = hashlib.sha256()
    for path in _package_files():
        digest.update(f"{path.relative_to(_package())}\0".encode() + path.read_bytes())
    return folder / "code" / digest.hexdigest()[:12]


def snapshot(folder: Path) -> Path:
    """Copy the package below `folder`, once for each state of the code; the folder to put on PYTHONPATH."""
    target = code_folder(folder)
    if not target.is_dir():
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copytree(_package(), temporary / "convscope", ignore=shutil.ignore_patterns("__pycache__"))
        with contextlib.suppress(OSError):  # somebody else was faster, with the same bytes
            temporary.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _package() -> Path:
    return Path(convscope.__file__).parent


def _package_files() -> list[Path]:
    return sorted(path for path in _package().rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _record(point: Point, job: str, folder: Path, settings: SlurmSettings) -> None:
    home = point.home / "slurm"
    _describe(home, point.words, settings, None)
    with open(home / SUBMISSIONS, "a") as file:
        line = {"job": job, "time": time.time(), "logs": str(folder), "local": settings.local}
        file.write(json.dumps(line) + "\n")
    print(f"job {job}  {point.home}")


def _describe(folder: Path, words: Sequence[str], settings: SlurmSettings, sweep: Path | None) -> None:
    described = {"words": list(words), "settings": asdict(settings), "directory": str(Path.cwd())}
    write_json(folder / LAST, described | ({} if sweep is None else {"sweep": str(sweep)}))


def _submit_after(line: tuple[str, ...], jobs: Sequence[str], folder: Path, settings: SlurmSettings, name: str) -> None:
    """Another command line in one process, once all jobs have succeeded."""
    executor = _executor(folder, settings, name, [])
    additional = executor.parameters["additional_parameters"] | {"kill-on-invalid-dep": "yes"}
    executor.update_parameters(
        nodes=1, ntasks_per_node=1, dependency="afterok:" + ":".join(jobs), additional_parameters=additional
    )
    if settings.gpus_per_node:
        executor.update_parameters(gpus_per_node=1)
    job = _submit(executor, [Job(line, str(folder))])[0]
    print(f"job {job.job_id}  then: convscope {shlex.join(line)}")
