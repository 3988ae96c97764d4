"""Seven ways in which a cluster ends a job, on a real SLURM: every run reaches the weights of an undisturbed one.

All of them at once, each on nodes of its own, for most of the time is waiting.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convscope.cli import main
from convscope.slurm import devcluster
from convscope.slurm.state import job_state, submissions
from tests.core.data.tars import write_split
from tests.core.training.small_run import metrics

STEPS, POKE_AT, PATIENCE = 80, 24, 200.0  # steps of a run, step at which it is disturbed, seconds for all
RUN = [
    *("--backbone", "resnet18_cifar", "--backbone-args", "channels=4,4,8,8", "--size", "32", "--mask-unit", "8"),
    *("--decoder-width", "16", "--batch-size", "8", "--steps", str(STEPS), "--log-every", "2", "--warmup-epochs", "1"),
    *("--checkpoint-every", "20", "--lr", "0.05", "--device", "cpu", "--picture-every", "0", "--workers", "1"),
]
NODES = 10
USED = {  # by scenario, the nodes that it may use
    "usr2": (1, 2),
    "crash": (1, 2),
    "node down": (3, 4, 5),
    "preempted": (6, 7),
    "cancelled": (1, 2),
    "zombie": (8, 9),
    "time limit": (10, 1, 2),
    "undisturbed": (1, 2),
    "undisturbed, one process": (9, 10),
}
ALONE = {"zombie", "undisturbed, one process"}  # on one node; the others are on two


@pytest.fixture(scope="module")
def nodes() -> Iterator[Path]:
    """The folder of a private SLURM of ten nodes."""
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(devcluster.up(directory, nodes=NODES)))
            patch.setenv("OMP_NUM_THREADS", "1")
            yield directory
    finally:
        devcluster.down(directory)
        shutil.rmtree(directory)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the jobs see too; pytest's own names are long and are removed while jobs still write."""
    path = Path(tempfile.mkdtemp(prefix="runs-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def convscope(*words: str) -> str:
    """Run a command in this process; what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(list(words))
    return out.getvalue()


def submit(data: Path, run: Path, *flags: str) -> str:
    convscope("pretrain", "spark", "--data", str(data), "--output-dir", str(run), *RUN, *flags)
    return str(submissions(run)[-1]["job"])


def shell(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def step(run: Path) -> int:
    """The last one that was logged."""
    try:
        return max((int(line["step"]) for line in metrics(run)), default=0)
    except (OSError, ValueError):
        return 0


def processes(job: str) -> dict[int, int]:
    """Process id of each rank of a job."""
    found: dict[int, int] = {}
    for number in sorted(int(process.name) for process in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
            words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
            if f"SLURM_JOB_ID={job}".encode() in environment and b"python" in words[0] and b"-m" in words:
                rank = next(part for part in environment if part.startswith(b"SLURM_PROCID="))
                found.setdefault(int(rank.split(b"=")[1]), number)  # the oldest: the others are its data loaders
    return found


def crash(job: str, _: Path) -> None:
    """One rank dies while the other one hangs."""
    ranks = processes(job)
    os.kill(ranks[0], signal.SIGSTOP)
    os.kill(ranks[1], signal.SIGKILL)


def node_down(job: str, _: Path) -> None:
    last = shell("scontrol", "show", "hostnames", shell("squeue", "-h", "-j", job, "-o", "%N")).split()[-1]
    shell("scontrol", "update", f"NodeName={last}", "State=DOWN", "Reason=test")


def sleep_into_the_limit(job: str, _: Path) -> None:
    """The limit is a minute: the processes stand still until shortly before it, while SLURM's signal comes."""
    ranks = processes(job).values()
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    used = shell("squeue", "-h", "-j", job, "-o", "%M").split(":")
    wait = 55 - (60 * int(used[-2]) + int(used[-1]))
    go_on = f"sleep {max(wait, 0)}; kill -CONT {' '.join(map(str, ranks))}"  # SLURM may have done so with its signal
    subprocess.Popen(["sh", "-c", go_on], stderr=subprocess.DEVNULL)


def preempt(job: str, _: Path) -> None:
    urgent = ("-p", "urgent", "-w", "127.0.0.[6,7]", "-N2", "--ntasks-per-node=8", "-o", "/dev/null")
    shell("sbatch", *urgent, "--wrap", "sleep 1")


def zombie(job: str, directory: Path) -> None:
    """The node's daemon dies; its process stands still until another attempt has begun, and then goes on."""
    node, rank = shell("squeue", "-h", "-j", job, "-o", "%N"), processes(job)[0]
    os.kill(int((directory / "pids" / f"slurmd.{node}").read_text()), signal.SIGKILL)
    os.kill(rank, signal.SIGSTOP)
    log = Path(shell("scontrol", "show", "job", "-o", job).split(" StdErr=")[1].split()[0])
    begun = log.parent.parent / "attempts" / "0002.json"
    subprocess.Popen(["sh", "-c", f"until [ -e {begun} ]; do sleep 0.1; done; kill -CONT {rank}"])


DISTURBANCES: dict[str, Callable[[str, Path], object]] = {
    "usr2": lambda job, _: shell("scancel", "--signal=USR2", job),
    "crash": crash,
    "node down": node_down,
    "preempted": preempt,
    "cancelled": lambda job, _: shell("scancel", job),
    "zombie": zombie,
    "time limit": sleep_into_the_limit,
}


@pytest.mark.slurm
def test_every_ending_is_survived(nodes: Path, folder: Path) -> None:
    data = write_split(folder / "data" / "train", [20, 20])
    jobs = {}
    for name, used in USED.items():
        others = ",".join(str(i) for i in range(1, NODES + 1) if i not in used)
        flags = ["--slurm.nodes", "1" if name in ALONE else "2", "--slurm.exclude", f"127.0.0.[{others}]"]
        flags += ["--slurm.timeout", "1" if name == "time limit" else "5", "--slurm.signal-delay", "5"]
        jobs[name] = submit(data, folder / name, *flags)
    waiting, states = dict(DISTURBANCES), dict.fromkeys(jobs, "")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and set(states.values()) != {"COMPLETED"}:
        for name, job in list(jobs.items()):
            if name in waiting and step(folder / name) >= POKE_AT:
                waiting.pop(name)(job, nodes)
            states[name] = job_state(job)
            if states[name] == "CANCELLED" and name == "cancelled":
                convscope("slurm", "resume", str(folder / name))
                jobs[name] = str(submissions(folder / name)[-1]["job"])
        time.sleep(0.3)

    assert states == dict.fromkeys(jobs, "COMPLETED"), logs(folder)
    assert "was superseded" in logs(folder, "zombie")
    for name in DISTURBANCES:
        reference = folder / ("undisturbed, one process" if name in ALONE else "undisturbed")
        expected, found = (load_file(run / "backbone.safetensors") for run in (reference, folder / name))
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
        assert metrics(folder / name) == metrics(reference), name
        assert len(list((folder / name / "attempts").glob("*.json"))) >= 2, name


def logs(folder: Path, run: str = "*") -> str:
    """The end of every log."""
    files = sorted(folder.glob(f"{run}/slurm/*_log.err"))
    return "\n".join(f"{file}: {file.read_text(errors='replace')[-1500:]}" for file in files)


def wait_for(done: Callable[[], bool], folder: Path, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, logs(folder)
        time.sleep(0.3)


def exported(run: Path) -> bool:
    return (run / "backbone.safetensors").is_file()


@pytest.mark.slurm
def test_arrays_gpus_and_jobs_that_submit_jobs(nodes: Path, folder: Path) -> None:
    data, file = write_split(folder / "data" / "train", [20]), folder / "sweep.yaml"
    file.write_text("seed: [0, 1]\n")
    short = ("--steps", "4", "--slurm.timeout", "5")
    first, second = folder / "first", folder / "second"
    words = ["pretrain", "spark", "--data", str(data), *RUN]
    inner = " ".join([*words, "--output-dir", str(second), *short, "--slurm.gpus-per-node", "2"])
    submit(data, first, *short, "--slurm.gpus-per-node", "1", "--slurm.then", inner)
    sweep = [*words, "--output-dir", str(folder / "sweep"), *short, "--sweep", str(file)]
    submitted = convscope(*sweep).split()
    assert submitted[1].rsplit("_", 1) == [submitted[4].rsplit("_", 1)[0], "0"]  # one array
    points = [folder / "sweep" / f"seed={seed}" for seed in (0, 1)]
    wait_for(lambda: all(map(exported, [first, second, *points])), folder)
    worlds = [json.loads((run / "attempts" / "0001.json").read_text())["world"] for run in (first, second)]
    assert worlds == [1, 2]  # a process for each GPU
    weights = [load_file(run / "backbone.safetensors")["conv1.weight"] for run in points]
    assert not torch.equal(*weights)

    wait_for(lambda: all(job_state(str(submissions(run)[-1]["job"])) == "COMPLETED" for run in points), folder)
    (points[1] / "backbone.safetensors").unlink()
    submitted = convscope(*sweep).split()
    assert submitted[2:] == [str(points[1])]  # the other one is finished
    wait_for(lambda: exported(points[1]), folder)
