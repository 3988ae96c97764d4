"""What a run says of its data: samples that were skipped, sources that were mixed."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from convscope.core.errors import UserError
from convscope.core.training.config import TrainConfig
from tests.core.data.tars import write_split
from tests.core.training.small_run import command, finish, metrics
from tests.core.training.test_resume import run_until_step
from tests.core.training.test_two_processes import torchrun

RUNS = ("one", "two")
RUN = ("--workers", "0", "--max-skipped", "0.2")


def skipped(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]


def test_skipped_samples_are_named_once_and_counted_by_cause(tmp_path: Path) -> None:
    data = write_split(tmp_path / "train", [20], corrupt=[3])
    done = finish(data, tmp_path / "whole", *RUN)
    named = skipped(tmp_path / "whole")
    assert len(named) >= 9  # in 24 * 8 / 20 epochs
    assert {line["key"] for line in named} == {"00003"}
    assert {line["shard"] for line in named} == {str(data / "train-000000.tar")}
    assert Counter(line["cause"] for line in named) == {"no image format that Pillow reads": len(named)}
    assert metrics(tmp_path / "whole")[-1]["skipped"] == len(named)
    summary = f"note: {len(named)} samples were skipped ({len(named)} x no image format that Pillow reads)"
    assert summary in done.stderr

    killed = tmp_path / "killed"
    run_until_step(command(data, killed, *RUN), killed, 9, 9)
    finish(data, killed, *RUN)
    assert skipped(killed) == named  # those after the checkpoint are not told twice
    assert metrics(killed) == metrics(tmp_path / "whole")


def test_a_rotten_share_counts_over_attempts(tmp_path: Path) -> None:
    """5 % of the samples are allowed and 25 % are bad: the second attempt stops at once, for it knows of the first."""
    data, run = write_split(tmp_path / "train", [20], corrupt=[3, 4, 7, 8, 9]), tmp_path / "run"
    flags = ("--workers", "0", "--max-skipped", "0.05", "--log-every", "1", "--checkpoint-every", "1")
    attempts = []
    for _ in range(2):
        done = subprocess.run(command(data, run, *flags), capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert "more than the allowed share 0.05" in done.stderr
        told = len(skipped(run))
        assert f"{told} samples were skipped ({told} x no image format that Pillow reads)" in done.stderr
        attempts.append(metrics(run)[-1]["step"])
    assert attempts[0] >= 2  # so few samples prove nothing before
    assert attempts[1] - attempts[0] <= 1
    finish(data, run, *flags, "--max-skipped", "0.5")  # as it was told to; a flag given twice is the last one
    assert metrics(run)[-1]["step"] == 24


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_means_nothing(share: float) -> None:
    with pytest.raises(UserError, match="--max-skipped is a share between 0 and 1"):
        TrainConfig(steps=1, max_skipped=share)


@pytest.mark.slow
def test_two_processes_skip_what_one_skips(tmp_path: Path) -> None:
    data = write_split(tmp_path / "train", [11, 9], corrupt=[3, 14])
    finish(data, tmp_path / "one", *RUN)
    done = subprocess.run(torchrun(data, tmp_path / "two", *RUN), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("note: ") == 1
    kept = [Counter((line["step"], line["key"], line["shard"]) for line in skipped(tmp_path / run)) for run in RUNS]
    assert kept[0] == kept[1]
    assert metrics(tmp_path / "two")[-1]["skipped"] == metrics(tmp_path / "one")[-1]["skipped"] == kept[0].total()


def test_a_mixture_is_recorded(tmp_path: Path) -> None:
    one, other = write_split(tmp_path / "one" / "train", [12]), write_split(tmp_path / "other" / "train", [30])
    run = tmp_path / "run"
    words = ("--workers", "0", "--data", str(one), str(other), "--data-weights", "3", "1")
    finish(one, run, *words)
    last = metrics(run)[-1]
    counts = [last[f"seen/{source}"] for source in (one, other)]
    assert sum(counts) == last["samples"] == 24 * 8
    assert 0.6 < counts[0] / sum(counts) < 0.9
    assert last["epoch"] == round(24 * 8 / 42, 6)
    assert [line[f"seen/{one}"] for line in metrics(run)] == sorted(line[f"seen/{one}"] for line in metrics(run))
