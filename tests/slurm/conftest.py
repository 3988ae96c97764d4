"""One private SLURM for all the tests that need one."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from convscope.slurm import devcluster


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with a short path: tmp_path is too long for sockets below it."""
    path = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """slurm.conf of a running cluster of two nodes, which SLURM_CONF points at; an error where SLURM is missing."""
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            config = devcluster.up(directory, nodes=2)
            patch.setenv("SLURM_CONF", str(config))
            yield config
    finally:
        devcluster.down(directory)
        shutil.rmtree(directory)
