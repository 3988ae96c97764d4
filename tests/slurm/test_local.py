"""Jobs on this machine, with submitit's local processes and without."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convscope.cli import main
from convscope.core.checkpoint import latest_checkpoint
from convscope.slurm.commands import status
from convscope.slurm.local import local_executor
from convscope.slurm.settings import SlurmSettings
from tests.core.data.tars import write_split
from tests.core.training.small_run import command, metrics, spark
from tests.core.training.test_resume import run_until_step


def test_a_point_that_fails_is_one_line_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file, out = write_split(tmp_path / "train", [20]), tmp_path / "sweep.yaml", tmp_path / "out"
    words = [*spark(data, out, "--steps", "2"), "--sweep", str(file), "--slurm.local"]
    file.write_text("- {seed: 0, backbone_args: nonsense=1}\n- {seed: 1}\n")
    with pytest.raises(SystemExit) as ended:
        main([*words, "--slurm.then", f"shards check {data}"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "error: 1 of 2 did not finish" in printed.err
    assert "nonsense" in printed.err.splitlines()[-1]
    assert "then" not in printed.out

    finished = out / "seed=1"
    before, stamp = load_file(finished / "backbone.safetensors"), (finished / "metrics.jsonl").stat().st_mtime_ns
    file.write_text("seed: [0, 1]\n")
    main([*words, "--slurm.then", f"shards check {data}"])
    printed = capsys.readouterr()
    assert "1 of 2 points are finished" in printed.err
    assert f"then: convscope shards check {data}" in printed.out
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == stamp
    after = load_file(out / "seed=0" / "backbone.safetensors")
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])
    main(["slurm", "resume", str(out)])
    assert "2 of 2 points are finished" in capsys.readouterr().err


def test_a_time_limits_signal_saves(tmp_path: Path) -> None:
    data = write_split(tmp_path / "train", [20])
    words = command(data, tmp_path / "run", "--workers", "1", "--steps", "4000", "--checkpoint-every", "3000")
    assert run_until_step(words, tmp_path / "run", 3, signal.SIGUSR2) == 128 + signal.SIGUSR2
    assert 0 < metrics(tmp_path / "run")[-1]["step"] < 3000
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))


def test_the_same_job_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = write_split(tmp_path / "train", [20]), tmp_path / "run"
    main(spark(data, run, "--steps", "6", "--slurm.local", "--slurm.tasks-per-node", "2"))
    assert "follow with: convscope slurm logs" in capsys.readouterr().err
    main(["slurm", "status", str(run)])
    shown = capsys.readouterr().out
    assert "step 6 of 6 (100.0%)" in shown
    assert "attempts  1" in shown
    assert json.loads((run / "attempts" / "0001.json").read_text())["world"] == 2
    main(["slurm", "resume", str(run)])  # finished: nothing changes
    assert len(metrics(run)) == 2


def test_a_local_job_sees_what_this_process_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("PYTHONPATH", f"{Path.cwd()}:/of/the/user")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexport OF_PYTHON=1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    names = ["CUDA_VISIBLE_DEVICES", "PYTHONPATH", "OF_SETUP", "OF_PYTHON"]
    settings = SlurmSettings(local=True, python=str(python), tasks_per_node=2)
    executor = local_executor(tmp_path, settings, ["export OF_SETUP='a b'", 'export PYTHONPATH="/code:$PYTHONPATH"'])
    found = executor.submit(subprocess.check_output, ["printenv", *names], text=True).results()
    assert [each.splitlines() for each in found] == [["3,5", f"/code:{Path.cwd()}:/of/the/user", "a b", "1"]] * 2


def test_ctrl_c_saves_a_local_job(tmp_path: Path) -> None:
    data, run = write_split(tmp_path / "train", [20]), tmp_path / "run"
    flags = ("--workers", "1", "--steps", "4000", "--checkpoint-every", "3000", "--slurm.local")
    started = subprocess.Popen(
        command(data, run, *flags),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not (run / "metrics.jsonl").exists() and started.poll() is None:
        time.sleep(0.05)
    assert status(run)["state"] == "RUNNING"
    os.killpg(started.pid, signal.SIGINT)  # a terminal sends it to all of them
    _, said = started.communicate(timeout=120)
    assert started.returncode == 130
    assert said.splitlines()[-2:] == ["stopping; what trains saves first", "interrupted"]
    assert 0 < torch.load(latest_checkpoint(run), weights_only=True)["step"] < 3000
    assert status(run)["state"] == "UNKNOWN"


def test_a_run_without_slurm_flags_never_imports_submitit(tmp_path: Path) -> None:
    data = write_split(tmp_path / "train", [20])
    words = spark(data, tmp_path / "run", "--steps", "1")
    code = f"import sys; from convscope.cli import main; main({words!r}); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert "'convscope.ssl.pretrain'" in done.stdout
    assert "submitit" not in done.stdout
    assert "convscope.slurm" not in done.stdout
