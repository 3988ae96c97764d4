"""Flags, sweeps, snapshots and the job object, without a cluster."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from convscope.cli import main
from convscope.core.checkpoint import SUPERSEDED, RunDirectory
from convscope.core.errors import UserError
from convscope.slurm.job import group_variables
from convscope.slurm.points import following, read_point, sweep_points
from convscope.slurm.settings import SlurmSettings, split
from convscope.slurm.submit import snapshot
from tests.core.data.tars import write_split
from tests.core.training.small_run import spark


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
        (["--slurm.arg", "--exclusive"], "written --slurm.arg=--value"),
        (["--slurm.arg=--exclusive"], "without dashes"),
        (["--slurm.local=perhaps"], "takes true or false"),
        (["--slurm.local", "--slurm.nodes", "2"], "this one machine"),
        (["--slurm.config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    ],
)
def test_wrong_flags(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        split(words)


def test_a_sites_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "timeout: 24:00:00\nmem: 64\ngpus_per_node: 8\nlocal: no\nsetup: [module load cuda]\narg: exclusive\n"
    )
    _, settings = split(["--slurm.config", str(site)])
    expected = {"timeout": "24:00:00", "mem": "64", "gpus_per_node": 8, "setup": ("module load cuda",)}
    assert settings == SlurmSettings(**expected, arg=("exclusive",), config=str(site))
    site.write_text("timeout: 60\n")
    _, settings = split(["--slurm.config", str(site), "--slurm.dry-run=yes", "--slurm.local=false"])
    assert settings == SlurmSettings(timeout="60", dry_run=True, config=str(site))
    for text, said in (
        ("nodes: many", "nodes takes a whole number, got 'many'"),
        ("partition: [a]", "partition takes one value"),
        ("hosts: 2", "unknown key hosts"),
        ("- nodes", "holds no mapping"),
    ):
        site.write_text(text)
        with pytest.raises(UserError, match=said):
            split(["--slurm.config", str(site)])


def shown_script(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    main([*words, "--slurm.dry-run"])
    return capsys.readouterr().out.splitlines()


def test_every_option_is_in_the_script_and_none_needs_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no srun there
    run = tmp_path / "a run"
    expected = {
        "--slurm.nodes 4": "#SBATCH --nodes=4",
        "--slurm.gpus-per-node 8": "#SBATCH --gpus-per-node=8",
        "--slurm.tasks-per-node 2": "#SBATCH --ntasks-per-node=2",
        "--slurm.cpus-per-task 6": "#SBATCH --cpus-per-task=6",
        "--slurm.mem 64G": "#SBATCH --mem=64G",
        "--slurm.timeout 2-00:00:00": "#SBATCH --time=2-00:00:00",
        "--slurm.signal-delay 300": "#SBATCH --signal=USR2@300",
        "--slurm.partition gpu": "#SBATCH --partition=gpu",
        "--slurm.account me": "#SBATCH --account=me",
        "--slurm.qos high": "#SBATCH --qos=high",
        "--slurm.constraint a100": "#SBATCH --constraint=a100",
        "--slurm.exclude n[1-3]": "#SBATCH --exclude='n[1-3]'",
        "--slurm.name spark": "#SBATCH --job-name=spark",
        "--slurm.setup=ulimit\u00a0-n": "ulimit\u00a0-n",
        "--slurm.arg comment=x=y": "#SBATCH --comment=x=y",
        "--slurm.arg exclusive": "#SBATCH --exclusive",
    }
    flags = [word for option in expected for word in option.split(" ")]
    python = ["--slurm.python", "run image.sif python", "--slurm.srun-arg=--mpi=pmix", "--slurm.max-restarts", "7"]
    lines = shown_script(capsys, *spark(tmp_path, run), *flags, *python, "--slurm.patience", "5")
    assert set(expected.values()) <= set(lines)
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(lines)
    command = next(line for line in lines if line.startswith("srun "))
    assert "--kill-on-bad-exit=1 --mpi=pmix --cpus-per-task=6 run image.sif python -P -u -m submitit" in command
    code = next(line for line in lines if line.startswith("export PYTHONPATH="))
    assert code.startswith(f"export PYTHONPATH='{run}/slurm/code/")
    assert code.endswith("'${PYTHONPATH:+:$PYTHONPATH}")
    teardown = "\n".join(lines[lines.index(command) :])
    assert '[ "$again" -ge 7 ]' in teardown
    assert '[ "$same" -ge 5 ]' in teardown
    assert f"homes=('{run}')" in teardown
    assert subprocess.run(["/bin/bash", "-n"], input="\n".join(lines), text=True).returncode == 0
    assert not run.exists()


def test_analyses_are_submitted_as_evaluations_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("all", "erf"):
        lines = shown_script(capsys, "analyze", name, "timm:test_resnet@random", "--slurm.gpus-per-node", "1")
        assert "#SBATCH --gpus-per-node=1" in lines
        assert any(line.startswith("#SBATCH --job-name=") and f"analyze-{name}" in line for line in lines)


def test_the_script_of_a_sweep_is_an_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("seed: [0, 1, 2]\n")
    words = [*spark(tmp_path, tmp_path / "out"), "--sweep", str(file)]
    assert "#SBATCH --array=0-2%2" in shown_script(capsys, *words, "--slurm.parallel", "2")
    assert "#SBATCH --array=0-2%3" in shown_script(capsys, *words)


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


def test_where_the_files_of_a_job_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, run = write_split(tmp_path / "data" / "train", [20]).parent, tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    jobs = tmp_path / "slurm-jobs"
    for words in (
        ["eval", "knn", "timm:resnet18@random", "--data", str(data)],
        ["eval", "knn", str(run), "--data", str(data)],
        ["shards", "build", str(data), str(tmp_path / "out")],
    ):
        point = read_point(words)
        assert (point.home.parent, point.is_run, point.finished) == (jobs, False, False)
        assert point.home.name.startswith("-".join(words[:2]) + "-")
        assert read_point(words).home == point.home
        assert read_point([*words[:-1], "elsewhere"]).home != point.home
    main(spark(data / "train", Path("run"), "--steps", "1"))
    assert read_point(["pretrain", "spark", "--config", "run/config.yaml"]).home == run
    tuned = ["eval", "fine-tune", str(run), "--data", str(data), "--output-dir", "tuned", "--epochs", "1"]
    assert (read_point(tuned).home, read_point(tuned).is_run) == (tmp_path / "tuned", True)


def test_what_follows_a_run(tmp_path: Path) -> None:
    data = write_split(tmp_path / "data" / "train", [20]).parent
    runs = [read_point(spark(data, tmp_path / name)) for name in ("a", "b")]
    with pytest.raises(UserError, match="test"):  # there is no such split
        following("eval", runs)
    write_split(data / "test", [4])
    lines = following("convscope eval", runs)
    assert [(line[:2], waits_for) for line, waits_for in lines] == [
        (("eval", "linear-probe"), [0]),
        (("eval", "knn"), [0]),
        (("eval", "linear-probe"), [1]),
        (("eval", "knn"), [1]),
    ]
    assert lines[1][0][2:] == (str(tmp_path / "a"), "--data", str(data))
    assert following("eval --data timm", runs[:1])[0][0][2:] == (str(tmp_path / "a"), "--data", "timm")
    free = ("eval", "knn", "timm:x", "--data", "d d", "--slurm.nodes", "1")
    assert following("eval knn timm:x --data 'd d' --slurm.nodes 1", runs) == [(free, [0, 1])]
    for wrong, said in (("eval --k many", "--k"), ("eval nothing", "no command"), ("eval knn", "data")):
        with pytest.raises(UserError, match=said):
            following(wrong, runs)
    mixed = read_point([*spark(data, tmp_path / "c"), "--data", str(data), str(data)])
    with pytest.raises(UserError, match="say on which data"):
        following("eval", [mixed])


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


def test_an_attempt_that_was_superseded_writes_nothing(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, takes_over=True) as old:
        old.start_attempt()
        old.save(1, {"step": 1}, keep=2)
        with RunDirectory(tmp_path, takes_over=True) as new:
            new.start_attempt()
            for write in (lambda: old.save(2, {"step": 2}, keep=2), lambda: old.append_metrics({"step": 2})):
                with pytest.raises(SystemExit) as ended:
                    write()
                assert ended.value.code == SUPERSEDED
            new.save(3, {"step": 3}, keep=2)
        assert torch.load(tmp_path / "checkpoints" / "step-00000003.pt", weights_only=True) == {"step": 3}
        assert not (tmp_path / "checkpoints" / "step-00000002.pt").exists()
        assert not (tmp_path / "metrics.jsonl").exists()


def test_mistakes_are_told_before_anything_is_submitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("mask_ratio: [0.5, 7]\n")
    for words, said in (
        (["slurm", "status", str(tmp_path)], "was never submitted"),
        (["slurm", "resume", str(tmp_path)], "was never submitted"),
        (["slurm", "cancel", str(tmp_path)], "no job for"),
        (spark(tmp_path, tmp_path / "run", "--mask-ratio", "7", "--slurm.dry-run"), "--mask-ratio"),
        ([*spark(tmp_path, tmp_path / "run"), "--sweep", "x.yaml"], "add --slurm.* flags"),
        ([*spark(tmp_path, tmp_path / "run"), "--sweep", str(sweep), "--slurm.dry-run"], "--mask-ratio"),
        ([*spark(tmp_path, tmp_path / "run"), "--slurm.then", "eval knn", "--slurm.dry-run"], "--data"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
