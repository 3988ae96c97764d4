"""How an attempt asks for the next one: from Python when it was told to stop, from the batch script when it failed."""

import subprocess
from pathlib import Path

import pytest

from convscope.slurm import job
from convscope.slurm.job import HOPELESS, job_id, requeue, teardown
from tests.slurm.fakes import install

# Shows what the file `shown` holds, and fails as often as there are lines in the file `down`.
SCONTROL = """
cd {folder}
if [ -s down ]; then sed -i 1d down; echo 'Unable to contact slurm controller' >&2; exit 1; fi
case $1 in show) cat shown ;; requeue) echo "$2" >> requeued ;; esac
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the answers of a stand-in for scontrol, and what it was asked to requeue."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    install(monkeypatch, tmp_path / "bin", scontrol=SCONTROL.format(folder=folder), sleep="exit 0")
    monkeypatch.setattr(job, "PAUSES", (0.0, 0.0, 0.0))
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    shown(folder, "RUNNING", 0)
    return folder


def shown(folder: Path, state: str, restarts: int) -> None:
    (folder / "shown").write_text(f"JobId=7 JobName=x Restarts={restarts} JobState={state} Reason=None\n")


def down(folder: Path, times: int) -> None:
    (folder / "down").write_text("x\n" * times)


def requeued(folder: Path) -> list[str]:
    """What was requeued since the last call."""
    file = folder / "requeued"
    found = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def test_a_task_of_an_array_names_itself_and_not_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert job_id() is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert job_id() == "7"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")  # as one task of each array has it
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert job_id() == "7_2"


def test_a_stopped_attempt_asks_for_the_next_one(slurm: Path) -> None:
    assert requeue("7_2")
    assert requeued(slurm) == ["7_2"]
    shown(slurm, "SIGNALING", 0)  # the signal that stopped it may still be on its way to another node
    assert requeue("7")
    assert requeued(slurm) == ["7"]
    shown(slurm, "COMPLETING", 0)
    assert requeue("7")
    shown(slurm, "RUNNING", 1)  # somebody has requeued it already
    assert requeue("7")
    assert requeued(slurm) == []


def test_a_controller_that_does_not_answer_is_asked_again(slurm: Path) -> None:
    down(slurm, 3)
    assert requeue("7")
    assert requeued(slurm) == ["7"]
    down(slurm, 99)
    assert not requeue("7")
    assert requeued(slurm) == []


def after(slurm: Path, code: int, homes: list[Path] | None = None, max_restarts: int = 100) -> str:
    """End a batch script with `code`; what it says."""
    folder = slurm.parent / "run with space"
    folder.mkdir(exist_ok=True)
    lines = teardown(folder, homes or [folder], max_restarts, patience=3)
    script = "\n".join([f"(exit {code})", *lines])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stderr


def test_a_failed_attempt_is_requeued_once(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after(slurm, 0)
    assert requeued(slurm) == []
    assert "ended with 137; asking for another one" in after(slurm, 137)
    assert requeued(slurm) == ["7"]
    down(slurm, 2)
    after(slurm, 1)
    assert requeued(slurm) == ["7"]
    shown(slurm, "RUNNING", 1)  # the next attempt is on its way
    after(slurm, 1)
    shown(slurm, "RUNNING", 10)  # not 1
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    after(slurm, 1)
    assert requeued(slurm) == []


def test_a_failed_task_of_an_array_requeues_itself_alone(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    after(slurm, 1, [slurm / "a", slurm / "b"])
    assert requeued(slurm) == ["7_1"]


def test_mistakes_superseded_attempts_and_the_limit_end_a_job(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = slurm.parent / "run with space"
    folder.mkdir()
    (folder / f"{HOPELESS}-7.0").touch()  # this attempt is of no use, the next one may be
    after(slurm, 137)
    assert requeued(slurm) == []
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    shown(slurm, "RUNNING", 1)
    after(slurm, 137)
    assert requeued(slurm) == ["7"]
    assert "1 restarts are the limit" in after(slurm, 137, max_restarts=1)
    (folder / f"{HOPELESS}-7").touch()
    after(slurm, 2)
    assert requeued(slurm) == []


def test_failures_without_a_new_checkpoint_end_a_job_but_not_the_next_one(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = slurm / "b" / "checkpoints"
    checkpoints.mkdir(parents=True)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    homes = [slurm / "a", slurm / "b"]
    said = []
    for latest in ("", "", "20", "20", "20"):
        if latest:
            (checkpoints / "latest").write_text(f"step-000000{latest}.pt\n")
        said.append(after(slurm, 1, homes))
    assert ["another one" in line for line in said] == [True] * 4 + [False]
    assert "3 attempts in a row failed after step-00000020.pt; this job is not tried again" in said[-1]
    assert requeued(slurm) == ["7_1"] * 4
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "8")  # submitted again, with the cause mended
    assert "another one" in after(slurm, 1, homes)
