"""Shared fixtures: small data made on the spot."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, a core each, and start processes of their own

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep derived data out of the user's cache and every test deterministic."""
    if "CONVSCOPE_TEST_CACHE" not in os.environ:
        os.environ["CONVSCOPE_TEST_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("CONVSCOPE_CACHE", os.environ["CONVSCOPE_TEST_CACHE"])
    torch.manual_seed(0)


@pytest.fixture
def reference() -> Path:
    """The folder of reference fixtures beside the checkout; the test is skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "reference" / "fixtures"
    if not folder.is_dir():
        pytest.skip("reference fixtures are not beside this checkout")
    return folder


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of a size such as "64k", for tests that fill a disk."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    mounted: list[Path] = []

    def make(size: str) -> Path:
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"this machine lets nobody mount: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
