"""Seven ways in which a cluster ends a job, and each task of an array ended twice, on a real SLURM.

Every run reaches the weights of an undisturbed one. All of them at once, for much of the time is waiting.
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
from convscope.slurm.state import job_state, state_of, submissions
from tests.core.data.tars import write_split
from tests.core.training.small_run import metrics
from tests.slurm.conftest import running

STEPS, PATIENCE = 64, 500.0  # steps of a run; seconds for all
POKE_AT = (12, 24)  # step of the first attempt at which a run is disturbed, and of the second one
RUN = [
    *("--backbone", "resnet18_cifar", "--backbone-args", "channels=4,4,8,8", "--size", "32", "--mask-unit", "8"),
    *("--decoder-width", "16", "--batch-size", "8", "--steps", str(STEPS), "--log-every", "2", "--warmup-epochs", "1"),
    *("--checkpoint-every", "10", "--lr", "0.05", "--device", "cpu", "--picture-every", "0", "--workers", "1"),
]
NODES = 10
USED = {  # by scenario, the nodes that it may use
    "usr2": (1, 2),
    "crash": (1, 2),
    "node down": (3, 4, 5),
    "preempted": (6, 7),
    "cancelled": (1, 2),  # a sweep of which one point is finished
    "zombie": (8, 9),
    "time limit": (10, 1, 2),
    "array": (1, 2),  # a sweep of two points
    "undisturbed": (1, 2),
    "undisturbed, one process": (9, 10),
}
ALONE = {"zombie", "undisturbed, one process"}  # on one node; the others are on two
SAVES = {"usr2", "preempted", "cancelled", "time limit"}  # lose no step


@pytest.fixture(scope="module")
def nodes(installed: None) -> Iterator[Path]:
    """The folder of a private SLURM of ten nodes."""
    with running(NODES) as directory:
        yield directory


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


def submit(data: Path, run: Path, *flags: str) -> None:
    convscope("pretrain", "spark", "--data", str(data), "--output-dir", str(run), *RUN, *flags)


def newest(run: Path) -> str:
    """Its newest job."""
    return str(submissions(run)[-1]["job"])


def shell(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def step(run: Path, attempt: int) -> int:
    """The last one that this attempt has logged."""
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return 0
    return max((int(line["step"]) for line in lines if line["attempt"] == attempt), default=0)


def processes(job: str) -> dict[int, int]:
    """Process id of each rank of a job, or of a task of an array."""
    found: dict[int, int] = {}
    array, _, task = job.partition("_")
    names = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}"} if task else {f"SLURM_JOB_ID={job}"}
    for number in sorted(int(process.name) for process in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{number}/environ").read_bytes().decode(errors="replace").split("\0")
            words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
            if names <= set(environment) and b"python" in words[0] and b"-m" in words:
                rank = next(part for part in environment if part.startswith("SLURM_PROCID="))
                found.setdefault(int(rank.split("=")[1]), number)  # the oldest: the others are its data loaders
    return found


def usr2(job: str, _: Path) -> None:
    shell("scancel", "--signal=USR2", job)


def crash(job: str, _: Path) -> None:
    """One rank dies while the other one hangs."""
    ranks = processes(job)
    os.kill(ranks[0], signal.SIGSTOP)
    os.kill(ranks[1], signal.SIGKILL)


def node_down(job: str, _: Path) -> None:
    last = shell("scontrol", "show", "hostnames", shell("squeue", "-h", "-j", job, "-o", "%N")).split()[-1]
    shell("scontrol", "update", f"NodeName={last}", "State=DOWN", "Reason=test")


def sleep_into_the_limit(job: str, _: Path) -> None:
    """The limit is a minute: the processes stand still until shortly before it, while SLURM's signal comes.

    The next attempt may take longer, for on a busy machine a minute is short.
    """
    ranks = processes(job).values()
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    used = shell("squeue", "-h", "-j", job, "-o", "%M").split(":")
    wait = 55 - (60 * int(used[-2]) + int(used[-1]))
    go_on = f"sleep {max(wait, 0)}; kill -CONT {' '.join(map(str, ranks))}"  # SLURM may do so earlier, with its signal
    requeued = f"[ $(squeue -h -j {job} -o %T) = PENDING ]"
    extend = f"for i in $(seq 900); do {requeued} && break; sleep 0.2; done"
    extend += f"; scontrol update JobId={job} TimeLimit=15"
    subprocess.Popen(["sh", "-c", f"({go_on}) & {extend}"], stderr=subprocess.DEVNULL)


def preempt(job: str, directory: Path) -> None:
    """The last node's daemon is slow, so that the job saves while SLURM's signal is still on its way there."""
    daemon = int((directory / "pids" / "slurmd.127.0.0.7").read_text())
    os.kill(daemon, signal.SIGSTOP)
    urgent = ("-p", "urgent", "-w", "127.0.0.[6,7]", "-N2", "--ntasks-per-node=8", "-o", "/dev/null")
    shell("sbatch", *urgent, "--wrap", "sleep 1")
    subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {daemon}"])


def zombie(job: str, directory: Path) -> None:
    """The node's daemon dies; its process stands still until another attempt has begun, and then goes on."""
    node, rank = shell("squeue", "-h", "-j", job, "-o", "%N"), processes(job)[0]
    os.kill(int((directory / "pids" / f"slurmd.{node}").read_text()), signal.SIGKILL)
    os.kill(rank, signal.SIGSTOP)
    log = Path(shell("scontrol", "show", "job", "-o", job).split(" StdErr=")[1].split()[0])
    begun = log.parent.parent / "attempts" / "0002.json"
    subprocess.Popen(
        ["sh", "-c", f"for i in $(seq 3000); do [ -e {begun} ] && break; sleep 0.1; done; kill -CONT {rank}"]
    )


def cancel(job: str, _: Path) -> None:
    log = Path(shell("scontrol", "show", "job", "-o", job).split(" StdErr=")[1].split()[0])
    convscope("slurm", "cancel", str(log.parent.parent))  # the sweep


Disturbance = Callable[[str, Path], None]
DISTURBANCES: dict[str, tuple[Disturbance, ...]] = {  # of the first attempt, and of the second one
    "usr2": (usr2,),
    "crash": (crash,),
    "node down": (node_down,),
    "preempted": (preempt,),
    "cancelled/checkpoint-every=10": (cancel,),
    "zombie": (zombie,),
    "time limit": (sleep_into_the_limit,),
    "array/checkpoint-every=9": (crash, usr2),
    "array/checkpoint-every=11": (usr2, crash),
}


SWEEPS = {"cancelled": "checkpoint_every: [1, 10]", "array": "checkpoint_every: [9, 11]"}


def submit_scenario(name: str, data: Path, folder: Path) -> None:
    others = ",".join(str(i) for i in range(1, NODES + 1) if i not in USED[name])
    flags = ["--slurm.nodes", "1" if name in ALONE else "2", "--slurm.exclude", f"127.0.0.[{others}]"]
    flags += ["--slurm.timeout", "1" if name == "time limit" else "15", "--slurm.signal-delay", "5"]
    if name in SWEEPS:
        (folder / f"{name}.yaml").write_text(SWEEPS[name])
        flags += ["--sweep", str(folder / f"{name}.yaml")]
    submit(data, folder / name, *flags)


@pytest.mark.slurm
def test_every_ending_is_survived(nodes: Path, folder: Path) -> None:
    data = write_split(folder / "data" / "train", [20, 20])
    done = dict.fromkeys(DISTURBANCES, 0)  # how often each was disturbed

    def disturb() -> None:
        for name, ways in DISTURBANCES.items():
            count = done[name]
            if count < len(ways) and step(folder / name, count + 1) >= POKE_AT[count]:
                ways[count](newest(folder / name), nodes)
                done[name] += 1

    submit_scenario("time limit", data, folder)  # alone, for on a busy machine a minute is short
    wait_for(lambda: disturb() or done["time limit"] == 1, folder)
    finished = folder / "cancelled" / "checkpoint-every=1" / "backbone.safetensors"
    finished.parent.mkdir(parents=True)
    finished.touch()
    for name in USED:
        if name != "time limit":
            submit_scenario(name, data, folder)
    array = [newest(folder / name).split("_") for name in DISTURBANCES if "array" in name]
    assert [job[1:] for job in array] == [["0"], ["1"]]
    assert array[0][0] == array[1][0]

    states = dict.fromkeys([*DISTURBANCES, "undisturbed", "undisturbed, one process"], "")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and set(states.values()) != {"COMPLETED"}:
        for name in [name for name in states if states[name] != "COMPLETED"]:
            disturb()
            states[name] = state_of(folder / name, submissions(folder / name)[-1]).name
            if states[name] == "CANCELLED" and name.startswith("cancelled/"):
                convscope("slurm", "resume", str(folder / "cancelled"))
            time.sleep(0.1)

    assert states == dict.fromkeys(states, "COMPLETED"), logs(folder)
    assert "was superseded" in logs(folder, "zombie")
    for name, ways in DISTURBANCES.items():
        run, reference = folder / name, folder / ("undisturbed, one process" if name in ALONE else "undisturbed")
        expected, found = load_file(reference / "backbone.safetensors"), load_file(run / "backbone.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
        assert metrics(run) == metrics(reference), name
        attempts = [json.loads(file.read_text()) for file in sorted((run / "attempts").glob("*.json"))]
        assert len(attempts) == 1 + len(ways), name  # and nobody else's requeue
        if name.split("/")[0] in SAVES:
            assert attempts[1]["step"] >= POKE_AT[0], name  # the last checkpoint alone would be of an earlier one
    assert [len(submissions(run)) for run in sorted((folder / "cancelled").glob("check*"))] == [0, 2]


def logs(folder: Path, run: str = "*") -> str:
    """The end of every log."""
    files = [*folder.glob(f"{run}/slurm/*_log.err"), *folder.glob(f"{run}/slurm/*_log.out")]
    return "\n".join(f"{file}: {file.read_text(errors='replace')[-1500:]}" for file in sorted(files))


def wait_for(done: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, logs(folder)
        time.sleep(0.3)


def exported(run: Path) -> bool:
    return (run / "backbone.safetensors").is_file()


@pytest.mark.slurm
def test_gpus_and_what_follows_a_run(nodes: Path, folder: Path) -> None:
    """A process for each GPU, `eval` after a run, and a job that submits a job."""
    data = write_split(folder / "data" / "train", [40]).parent
    write_split(data / "test", [20])
    first, second, short = folder / "first", folder / "second", ("--steps", "4", "--slurm.timeout", "15")
    inner = ["pretrain", "spark", "--data", str(data), *RUN, "--output-dir", str(second), *short]
    submit(data, first, *short, "--slurm.gpus-per-node", "2", "--slurm.then", "eval --workers 0")
    submit(data, folder / "outer", *short, "--slurm.then", " ".join([*inner, "--slurm.gpus-per-node", "1"]))
    results = [first / "results" / f"{task}.json" for task in ("linear-probe", "knn")]
    wait_for(lambda: exported(second) and all(result.is_file() for result in results), folder)
    worlds = [json.loads((run / "attempts" / "0001.json").read_text())["world"] for run in (first, second)]
    assert worlds == [2, 1]


@pytest.mark.slurm
def test_what_follows_a_run_that_is_cancelled_does_not_wait_for_ever(nodes: Path, folder: Path) -> None:
    data = write_split(folder / "data" / "train", [20])
    said = convscope(
        *("pretrain", "spark", "--data", str(data), "--output-dir", str(folder / "run"), *RUN),
        *("--slurm.arg", "begin=now+3600", "--slurm.then", f"shards check {data}"),
    ).split()
    follower = said[said.index("then:") - 1]
    assert not job_state(follower).ended
    convscope("slurm", "cancel", str(folder / "run"))
    wait_for(lambda: job_state(follower).name == "CANCELLED", folder)
