"""Small stand-ins for SLURM's programs, for answers that a healthy cluster does not give."""

import os
from pathlib import Path

import pytest


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, **programs: str) -> None:
    """Put shell scripts of these names first on PATH."""
    folder.mkdir(exist_ok=True)
    for name, script in programs.items():
        file = folder / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
