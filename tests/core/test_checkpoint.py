"""The files of a run: which checkpoints stay, which one is the newest, who may write."""

from pathlib import Path

import pytest
import torch

from convscope.core.checkpoint import RunDirectory, latest_checkpoint, load_checkpoint
from convscope.core.errors import UserError


def save(run: RunDirectory, *steps: int, keep: int) -> list[str]:
    for step in steps:
        run.save(step, {"step": step}, keep=keep)
    return sorted(file.stem for file in (run.path / "checkpoints").glob("*.pt"))


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 7])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    with RunDirectory(tmp_path / "run") as run:
        for last in range(1, 7):
            save(run, last, keep=keep)
            kept = sorted(file.name for file in (run.path / "checkpoints").glob("*.pt"))
            assert kept == [f"step-{step:08d}.pt" for step in range(max(1, last - keep + 1), last + 1)]
            assert load_checkpoint(run.latest())["step"] == last


def test_later_checkpoints_of_a_run_that_was_set_back_go(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as run:
        save(run, 10, 20, 30, keep=3)
        assert save(run, 15, keep=3) == ["step-00000010", "step-00000015"]


def test_latest_that_names_nothing(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as run:
        assert run.latest() is None
        save(run, 1, 2, keep=3)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "latest").write_text("step-00000001.pt\n")
    assert latest_checkpoint(tmp_path / "run") == folder / "step-00000001.pt"
    (folder / "latest").write_text("step-00000009.pt\n")
    assert latest_checkpoint(tmp_path / "run") == folder / "step-00000002.pt"
    (folder / "latest").unlink()
    assert latest_checkpoint(tmp_path / "run") == folder / "step-00000002.pt"


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    left = [tmp_path / "run" / ".config.yaml.1.tmp", tmp_path / "run" / "checkpoints" / ".step-00000003.pt.1.tmp"]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
    with RunDirectory(tmp_path / "run"):
        assert not any(file.exists() for file in left)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run"):
        with pytest.raises(UserError, match="another run is writing"), RunDirectory(tmp_path / "run"):
            pass
        with RunDirectory(tmp_path / "run", main=False) as other:  # another process of the same run
            assert other.latest() is None
    with RunDirectory(tmp_path / "run"):
        pass


def test_damaged_checkpoints_are_one_line(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as run:
        file = run.save(1, {"x": torch.zeros(1000)}, keep=1)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="step-00000001") as error:
        load_checkpoint(file)
    assert "\n" not in str(error.value)
    file.write_text("hello, a text\n")
    with pytest.raises(UserError, match="is no PyTorch checkpoint, or a damaged one"):
        load_checkpoint(file)
