"""Kill, continue, compare: a resumed run equals an uninterrupted one bit for bit."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convscope.core.checkpoint import latest_checkpoint
from tests.core.training.small_run import command, finish, make_images, metrics

VARIANTS = {
    "plain": ["--workers", "0"],
    "ema, accumulation, workers": ["--workers", "2", "--accumulate", "2", "--ema-decay", "0.9"],
    "fp16, checkpointed activations": ["--workers", "0", "--precision", "fp16", "--grad-checkpointing"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in shards."""
    from convscope.core.data.build import BuildConfig, run

    folder = tmp_path_factory.mktemp("data")
    run(BuildConfig(source=str(make_images(folder / "images")), dest=str(folder / "shards"), samples_per_shard=7))
    return folder / "shards"


def run_until_step(words: list[str], output: Path, step: int, number: int) -> int:
    """Start, wait for metrics of `step`, send the signal; the exit code."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        file = output / "metrics.jsonl"
        if file.exists() and any(line["step"] >= step for line in metrics_so_far(file)):
            process.send_signal(number)
            break
        time.sleep(0.005)
    return process.wait(timeout=60)


def metrics_so_far(file: Path) -> list[dict[str, int]]:
    """Lines that are complete."""
    import json

    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The exported encoder."""
    return load_file(output / "backbone.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_kill_and_resume_is_exact(data: Path, tmp_path: Path, variant: str) -> None:
    flags = VARIANTS[variant]
    finish(data, tmp_path / "whole", *flags)
    killed = tmp_path / "killed"
    code = run_until_step(command(data, killed, *flags), killed, 9, signal.SIGKILL)
    assert code == -signal.SIGKILL, "the run ended before it could be killed"
    assert latest_checkpoint(killed) is not None
    done = finish(data, killed, *flags)
    assert "continuing at step" in done.stderr

    assert metrics(killed) == metrics(tmp_path / "whole")
    assert metrics(killed)[-1]["step"] == 24
    whole, resumed = weights(tmp_path / "whole"), weights(killed)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    ends = [torch.load(latest_checkpoint(run), weights_only=True) for run in (tmp_path / "whole", killed)]
    assert same(*ends)
    assert not list(killed.rglob("*.tmp"))  # what the kill may have left is gone too


def same(one: object, other: object) -> bool:
    """Equality of nested checkpoints."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(data: Path, tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        command(data, tmp_path / "run", "--workers", "1", "--steps", "4000", "--checkpoint-every", "1000"),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "all saved" in said
    assert ("press Ctrl-C again" in said) == (number == signal.SIGINT)
    assert "Traceback" not in said
    step = torch.load(latest_checkpoint(tmp_path / "run"), weights_only=True)["step"]
    assert 0 < step < 1000  # saved where it stopped, not at the next interval


def test_a_finished_run_is_left_as_it_is(data: Path, tmp_path: Path) -> None:
    finish(data, tmp_path / "run", "--steps", "3")
    before = weights(tmp_path / "run")
    finish(data, tmp_path / "run", "--steps", "3")
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3]


def test_other_settings_are_refused(data: Path, tmp_path: Path) -> None:
    finish(data, tmp_path / "run", "--steps", "3")
    refused = subprocess.run(
        command(data, tmp_path / "run", "--steps", "3", "--mask-ratio", "0.7"), capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "mask_ratio was 0.6, now 0.7" in refused.stderr
    finish(data, tmp_path / "run", "--steps", "3", "--workers", "0", "--log-every", "1")  # these may change


def test_a_second_run_into_the_folder_is_refused(data: Path, tmp_path: Path) -> None:
    words = command(data, tmp_path / "run", "--steps", "4000", "--workers", "0")
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists() and first.poll() is None:
            time.sleep(0.01)
        second = subprocess.run(words, capture_output=True, text=True)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert f"another run is writing to {tmp_path / 'run'} (pid {first.pid}" in second.stderr
