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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import submitit

import convscope
from convscope.core.config import read_yaml
from convscope.core.errors import UserError
from convscope.core.files import write_json
from convscope.core.log import info
from convscope.slurm.job import Job, teardown
from convscope.slurm.settings import SlurmSettings
from convscope.slurm.state import SUBMISSIONS, living_job

LAST = "submission.json"  # in RUN/slurm: what `slurm resume` submits again
GROUP = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")


@dataclass(frozen=True)
class Point:
    """One command line, and the run directory or folder that it belongs to."""

    words: tuple[str, ...]
    home: Path
    is_run: bool


def submit(words: Sequence[str], settings: SlurmSettings, sweep: Path | None = None) -> None:
    """Submit a command line, or one for each point of a sweep as an array, and say how to follow it.

    Raises:
        UserError: a job for the run lives, there is no SLURM, or sbatch refuses.
    """
    points = [_point(words)] if sweep is None else [_point(point) for point in sweep_points(words, sweep)]
    if not settings.dry_run:
        for point in points:
            if point.is_run and (job := living_job(point.home)):
                raise UserError(
                    f"job {job} for {point.home} lives; wait for it, or convscope slurm cancel {point.home}"
                )
    if sweep is not None:
        finished = [point for point in points if _finished(point)]
        if finished:
            info(f"{len(finished)} of {len(points)} points are finished and left as they are")
        points = [point for point in points if not _finished(point)]
        if not points:
            return
    folder = (points[0].home.parent if sweep is not None else points[0].home) / "slurm"
    executor = _executor(folder, settings, points[0].home.name if sweep is None else points[0].home.parent.name)
    if settings.dry_run:
        print(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))
        return
    jobs = _submit(executor, [_job(point, folder, settings) for point in points])
    for point, job in zip(points, jobs):
        _record(point, job.job_id, folder, settings)
        print(f"job {job.job_id}  {point.home}")
    info(f"logs: {folder}; follow with: convscope slurm logs {points[0].home}")
    if settings.local:
        for job in jobs:
            job.results()
    elif settings.then:
        _then(folder, settings, [job.job_id for job in jobs])


def sweep_points(words: Sequence[str], file: Path) -> list[tuple[str, ...]]:
    """A command line for each point: a mapping of flags to lists is a grid, a list of mappings is taken as it is.

    Each point's run directory is a folder of `--output-dir`, named by its values.

    Raises:
        UserError: neither of both, or no --output-dir.
    """
    settings = read_yaml(file)
    if isinstance(settings, Mapping):
        points: list[dict[str, Any]] = [{}]
        for flag, values in settings.items():
            choices = values if isinstance(values, list) else [values]
            points = [{**point, str(flag): value} for point in points for value in choices]
    elif isinstance(settings, list) and all(isinstance(point, Mapping) for point in settings):
        points = [dict(point) for point in settings]
    else:
        raise UserError(f"{file}: a sweep is a mapping of flags to lists of values, or a list of such mappings")
    if not points or points == [{}]:
        raise UserError(f"{file} names no points")
    base = _value(words, "--output-dir")
    if base is None:
        raise UserError("a sweep needs --output-dir, the folder of its runs")
    found = []
    for point in points:
        name = "-".join(f"{flag.replace('_', '-')}={_shown(value)}" for flag, value in point.items()).replace("/", "_")
        flags = [word for flag, value in point.items() for word in _flag(flag, value)]
        found.append((*words, *flags, "--output-dir", str(Path(base) / name)))
    return found


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *(str(item) for item in (value if isinstance(value, list) else [value]))]


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _point(words: Sequence[str]) -> Point:
    output = _value(words, "--output-dir")
    if output is not None:
        return Point(tuple(words), Path(output).absolute(), True)
    model = next((word for word in words[2:] if Path(word).is_dir()), None)
    return Point(tuple(words), (Path(model) if model else Path("slurm-jobs") / "-".join(words[:2])).absolute(), False)


def _value(words: Sequence[str], flag: str) -> str | None:
    found = None
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            found = words[i + 1]
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def _finished(point: Point) -> bool:
    return point.is_run and (point.home / "backbone.safetensors").is_file()


def _job(point: Point, folder: Path, settings: SlurmSettings) -> Job:
    return Job(point.words, str(folder), str(point.home) if point.is_run else None, settings.patience)


def _executor(folder: Path, settings: SlurmSettings, name: str) -> Any:
    if settings.local:
        local = submitit.LocalExecutor(folder=folder)
        local.update_parameters(timeout_min=60 * 24 * 30, tasks_per_node=settings.processes)
        return local
    python = f"{settings.python or shlex.quote(sys.executable)} -P"
    try:
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=10**6, python=python)
    except RuntimeError as error:
        raise UserError("no SLURM here: srun is not found; --slurm.local runs the job on this machine") from error
    chosen = {"partition", "account", "qos", "constraint", "exclude", "mem", "gpus_per_node", "cpus_per_task"}
    parameters = {key: value for key, value in asdict(settings).items() if key in chosen and value}
    srun = ["--kill-on-bad-exit=1", *settings.srun_arg]
    if settings.cpus_per_task:
        srun.append(f"--cpus-per-task={settings.cpus_per_task}")  # srun does not inherit it
    code = "/dev/null" if settings.dry_run else str(snapshot(folder))
    executor.update_parameters(
        job_name=settings.name or name,
        nodes=settings.nodes,
        ntasks_per_node=settings.processes,
        time=settings.timeout,
        signal_delay_s=settings.signal_delay,
        srun_args=srun,
        setup=[f"export PYTHONPATH={shlex.quote(code)}", f"unset {' '.join(sorted(GROUP))}", *settings.setup],
        teardown=list(teardown(folder, settings.max_restarts)),
        array_parallelism=settings.parallel or 10**4,
        additional_parameters={"requeue": True, **dict(item.split("=", 1) for item in settings.arg)},
        **parameters,
    )
    return executor


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


def snapshot(folder: Path) -> Path:
    """Copy the package below `folder`, once for each state of the code; the folder to put on PYTHONPATH."""
    package = Path(convscope.__file__).parent
    files = sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    target = folder / "code" / digest.hexdigest()[:12]
    if not target.is_dir():
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copytree(package, temporary / "convscope", ignore=shutil.ignore_patterns("__pycache__"))
        with contextlib.suppress(OSError):  # somebody else was faster, with the same bytes
            temporary.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _record(point: Point, job: str, folder: Path, settings: SlurmSettings) -> None:
    home = point.home / "slurm"
    home.mkdir(parents=True, exist_ok=True)
    described = {"words": list(point.words), "settings": asdict(settings), "directory": str(Path.cwd())}
    write_json(home / LAST, described)
    with open(home / SUBMISSIONS, "a") as file:
        file.write(json.dumps({"job": job, "time": time.time(), "logs": str(folder)}) + "\n")


def _then(folder: Path, settings: SlurmSettings, jobs: Sequence[str]) -> None:
    """Another command line, once all jobs have succeeded."""
    executor = _executor(folder, settings, f"{settings.name or 'then'}")
    executor.update_parameters(nodes=1, ntasks_per_node=1, dependency="afterok:" + ":".join(jobs))
    words = tuple(shlex.split(settings.then.removeprefix("convscope ")))
    job = _submit(executor, [Job(words, str(folder), None, settings.patience)])[0]
    print(f"job {job.job_id}  afterwards: convscope {settings.then}")
