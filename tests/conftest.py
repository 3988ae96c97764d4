"""Shared fixtures: small data made on the spot."""

import os
from pathlib import Path

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
