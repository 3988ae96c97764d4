"""What is said of a job by squeue, sacct and the run directory, when they answer and when they do not."""

import json
from pathlib import Path

import pytest

from convscope.core.errors import UserError
from convscope.slurm.commands import LogsCommand, RunCommand, run_cancel, run_logs, run_status, status
from convscope.slurm.state import JobState, job_state, living_job
from tests.slurm.fakes import install

FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


@pytest.mark.parametrize(
    ("squeue", "sacct", "expected"),
    [
        ("echo RUNNING", "echo COMPLETED", JobState("RUNNING", False)),
        ("echo NODE_FAIL", "exit 1", JobState("NODE_FAIL", False)),
        ("echo PREEMPTED", "exit 1", JobState("PREEMPTED", False)),
        ("echo COMPLETED", "exit 1", JobState("COMPLETED", True)),
        ("echo COMPLETED; echo REQUEUED", "exit 1", JobState("REQUEUED", False)),  # of an array
        (FORGOTTEN, "echo 'CANCELLED by 0'", JobState("CANCELLED", True)),
        (FORGOTTEN, "echo CANCELLED+", JobState("CANCELLED", True)),
        (FORGOTTEN, "echo PREEMPTED", JobState("PREEMPTED", True)),
        (FORGOTTEN, "echo NODE_FAIL", JobState("NODE_FAIL", True)),
        (FORGOTTEN, "echo RUNNING", JobState("RUNNING", True)),  # a runaway of the data base
        (FORGOTTEN, "exit 1", JobState("UNKNOWN", True)),
        ("exit 0", "echo TIMEOUT", JobState("TIMEOUT", True)),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "echo COMPLETED", JobState("NO ANSWER", False)),
    ],
)
def test_state_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, sacct: str, expected: JobState
) -> None:
    install(monkeypatch, tmp_path / "bin", squeue=squeue, sacct=sacct)
    assert job_state("7") == expected


def test_no_slurm_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_state("7") == JobState("UNKNOWN", True)


def submitted(run: Path, *jobs: str) -> Path:
    (run / "slurm").mkdir(parents=True)
    lines = [json.dumps({"job": job, "logs": str(run / "slurm")}) for job in jobs]
    (run / "slurm" / "submissions.jsonl").write_text("\n".join([*lines, '{"job": "9']))  # the last line was cut
    return run


def test_a_second_job_is_refused_while_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = submitted(tmp_path / "run", "7", "8")
    install(monkeypatch, tmp_path / "bin", squeue='[ "$5" = 7 ] && echo PENDING || echo FAILED')
    assert living_job(run) == "7"
    install(monkeypatch, tmp_path / "bin", squeue="echo 'Socket timed out' >&2; exit 1")
    with pytest.raises(UserError, match=r"SLURM does not answer, and job 8 .* may live"):
        living_job(run)
    install(monkeypatch, tmp_path / "bin", squeue=FORGOTTEN, sacct="echo PREEMPTED")
    assert living_job(run) is None


def test_status_reads_what_a_kill_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = submitted(tmp_path / "run", "7")
    install(monkeypatch, tmp_path / "bin", squeue="echo RUNNING")
    assert status(run) == {"run": str(run), "job": "7", "state": "RUNNING", "attempts": "0"}
    (run / "attempts").mkdir()
    (run / "attempts" / "0001.json").write_text('{"total_steps": 40}')
    (run / "attempts" / "0002.json").touch()  # it has taken its number
    line = {"step": 10, "samples": 80, "epoch": 2.0, "loss": 0.5, "samples_per_second": 8.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "step": 20})[:-9])
    assert status(run)["attempts"] == "2"
    assert status(run)["progress"] == "step 10 of 40 (25.0%), epoch 2"
    assert status(run)["speed"] == "8 samples/s; 0.0 h left"


def test_a_sweep_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        submitted(tmp_path / "sweep" / f"seed={i}", f"7_{i}")
    cancelled = tmp_path / "cancelled"
    install(
        monkeypatch,
        tmp_path / "bin",
        squeue='[ "$5" = 7_1 ] && echo COMPLETED || echo PENDING',
        scancel=f'echo "$@" > {cancelled}',
    )
    run_status(RunCommand(run=tmp_path / "sweep"))
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["seed=0", "PENDING"],
        ["seed=1", "COMPLETED"],
        ["seed=2", "PENDING"],
    ]
    run_cancel(RunCommand(run=tmp_path / "sweep"))
    assert cancelled.read_text() == "7_0 7_2\n"
    with pytest.raises(UserError, match="is a sweep; name one of its 3 points"):
        run_logs(LogsCommand(run=tmp_path / "sweep"))


def test_following_a_log_prints_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted(tmp_path / "run", "7")
    log = run / "slurm" / "7_1_log.out"
    log.write_text("first\n")
    # The job writes once more and ends while it is asked about.
    install(monkeypatch, tmp_path / "bin", squeue=f"echo last >> {log}; echo COMPLETED")
    run_logs(LogsCommand(run=run, rank=1, follow=True))
    assert capsys.readouterr().out == "first\nlast\n"
    run_logs(LogsCommand(run=run))
    assert "no log of process 0 yet" in capsys.readouterr().err
