"""Flags, sweeps, snapshots and the job object, without a cluster."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from convscope.cli import main
from convscope.core.checkpoint import SUPERSEDED, RunDirectory
from convscope.core.errors import UserError
from convscope.slurm.job import group_variables, stuck
from convscope.slurm.settings import SlurmSettings, split
from convscope.slurm.submit import snapshot, sweep_points
from tests.core.data.tars import write_split
from tests.core.training.small_run import FLAGS, command, metrics
from tests.core.training.test_resume import run_until_step


def test_flags_are_taken_out_of_a_command_line(tmp_path: Path) -> None:
    words = [
        "runs/a",
        "--slurm.nodes",
        "2",
        "--data",
        "d",
        "--slurm.setup=a b",
        "--slurm.setup",
        "c",
        "--slurm.dry-run",
    ]
    rest, settings = split([*words, "--slurm.srun-arg=--mpi=pmix", "--slurm.arg", "comment=x=y"])
    assert rest == ["runs/a", "--data", "d"]
    expected = {
        "nodes": 2,
        "setup": ("a b", "c"),
        "dry_run": True,
        "srun_arg": ("--mpi=pmix",),
        "arg": ("comment=x=y",),
    }
    assert settings == SlurmSettings(**expected)
    assert split(["--data", "d"]) == (["--data", "d"], None)
    site = tmp_path / "site.yaml"
    site.write_text(yaml.safe_dump({"partition": "main", "gpus-per-node": 8, "nodes": 5}))
    _, settings = split(["--slurm.config", str(site), "--slurm.nodes", "3"])
    assert settings is not None
    assert (settings.partition, settings.processes, settings.nodes) == ("main", 8, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--slurm.nodez", "2"], "no flag --slurm.nodez"),
        (["--slurm.nodes"], "--slurm.nodes needs a value"),
        (["--slurm.nodes", "--data"], "--slurm.nodes needs a value"),
        (["--slurm.nodes", "two"], "takes a whole number"),
        (["--slurm.nodes", "0"], "at least 1"),
        (["--slurm.arg", "exclusive"], "key=value"),
        (["--slurm.config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    ],
)
def test_wrong_flags(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        split(words)


def test_points_of_a_sweep(tmp_path: Path) -> None:
    file, words = tmp_path / "sweep.yaml", ["pretrain", "spark", "--output-dir", "out"]
    file.write_text("lr: [0.1, 0.2]\nmask_ratio: [0.5, 0.6]\n")
    points = sweep_points(words, file)
    assert len(points) == 4
    assert points[0] == (*words, "--lr", "0.1", "--mask-ratio", "0.5", "--output-dir", "out/lr=0.1-mask-ratio=0.5")
    file.write_text("- {size: [32, 48], flip: false}\n- {seed: 3}\n")
    tail = ("--size", "32", "48", "--no-flip", "--output-dir", "out/size=32x48-flip=False")
    assert sweep_points(words, file) == [(*words, *tail), (*words, "--seed", "3", "--output-dir", "out/seed=3")]
    file.write_text("just words")
    with pytest.raises(UserError, match="a sweep is a mapping"):
        sweep_points(words, file)
    file.write_text("lr: [1]")
    with pytest.raises(UserError, match="needs --output-dir"):
        sweep_points(["pretrain", "spark"], file)


def test_code_is_copied_once_for_each_state(tmp_path: Path) -> None:
    first = snapshot(tmp_path)
    assert snapshot(tmp_path) == first
    assert (first / "convscope" / "slurm" / "job.py").is_file()
    code = "import convscope.slurm.job, sys; print(convscope.__file__, 'torch' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(first)}, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == [str(first / "convscope" / "__init__.py"), "False"]  # signals come before torch


def test_variables_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = group_variables(1, 4, 1, "node1")
    assert {key: first[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node1",
    }
    assert group_variables(3, 4, 1, "node1")["MASTER_PORT"] == first["MASTER_PORT"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert group_variables(1, 4, 1, "node1")["MASTER_PORT"] != first["MASTER_PORT"]


def test_attempts_without_progress(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    for number, step in enumerate((0, 20, 20, 20, 20), start=1):
        assert not stuck(tmp_path, 3)
        (tmp_path / "attempts" / f"{number:04d}.json").write_text(json.dumps({"step": step}))
    assert stuck(tmp_path, 3)
    assert not stuck(tmp_path, 4)


def test_an_attempt_that_was_superseded_writes_nothing(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, takes_over=True) as old:
        old.start_attempt({"step": 0})
        old.save(1, {"step": 1}, keep=2)
        with RunDirectory(tmp_path, takes_over=True) as new:
            new.start_attempt({"step": 1})
            for write in (lambda: old.save(2, {"step": 2}, keep=2), lambda: old.append_metrics({"step": 2})):
                with pytest.raises(SystemExit) as ended:
                    write()
                assert ended.value.code == SUPERSEDED
            new.save(3, {"step": 3}, keep=2)
        assert torch.load(tmp_path / "checkpoints" / "step-00000003.pt", weights_only=True) == {"step": 3}
        assert not (tmp_path / "checkpoints" / "step-00000002.pt").exists()
        assert not (tmp_path / "metrics.jsonl").exists()


def test_a_time_limits_signal_saves(tmp_path: Path) -> None:
    data = write_split(tmp_path / "train", [20])
    words = command(data, tmp_path / "run", "--workers", "1", "--steps", "4000", "--checkpoint-every", "3000")
    assert run_until_step(words, tmp_path / "run", 3, signal.SIGUSR2) == 128 + signal.SIGUSR2
    assert 0 < metrics(tmp_path / "run")[-1]["step"] < 3000
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))


def spark(data: Path, run: Path, *flags: str) -> list[str]:
    return ["pretrain", "spark", "--data", str(data), "--output-dir", str(run), *FLAGS, "--workers", "0", *flags]


def test_the_same_job_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = write_split(tmp_path / "train", [20]), tmp_path / "run"
    main(spark(data, run, "--slurm.local", "--slurm.tasks-per-node", "2"))
    assert "follow with: convscope slurm logs" in capsys.readouterr().err
    main(["slurm", "status", str(run)])
    shown = capsys.readouterr().out
    assert "step 24 of 24 (100.0%)" in shown
    assert "attempts  1" in shown
    assert json.loads((run / "attempts" / "0001.json").read_text())["world"] == 2
    main(["slurm", "resume", str(run)])  # finished: nothing changes
    assert len(metrics(run)) == 8


def test_a_sweep_here_skips_what_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, file = write_split(tmp_path / "train", [20]), tmp_path / "sweep.yaml"
    file.write_text("seed: [0, 1]\n")
    words = [*spark(data, tmp_path / "sweep", "--steps", "3"), "--sweep", str(file), "--slurm.local"]
    main(words)
    runs = [tmp_path / "sweep" / f"seed={seed}" for seed in (0, 1)]
    before = [load_file(run / "backbone.safetensors") for run in runs]
    assert not torch.equal(before[0]["conv1.weight"], before[1]["conv1.weight"])
    (runs[1] / "backbone.safetensors").unlink()
    stamp = (runs[0] / "metrics.jsonl").stat().st_mtime
    time.sleep(0.01)
    capsys.readouterr()
    main(words)
    assert "1 of 2 points are finished" in capsys.readouterr().err
    assert (runs[0] / "metrics.jsonl").stat().st_mtime == stamp
    assert (runs[1] / "backbone.safetensors").is_file()


def test_mistakes_are_told_before_anything_is_submitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["slurm", "status", str(tmp_path)], "was never submitted"),
        (["slurm", "resume", str(tmp_path)], "was never submitted"),
        (["slurm", "cancel", str(tmp_path)], "no job for"),
        (spark(tmp_path, tmp_path / "run", "--mask-ratio", "7", "--slurm.dry-run"), "--mask-ratio"),
        ([*spark(tmp_path, tmp_path / "run"), "--sweep", "x.yaml"], "add --slurm.* flags"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
