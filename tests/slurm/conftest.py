"""Private SLURMs for the tests that need one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from convscope.core.errors import UserError
from convscope.slurm import devcluster


@pytest.fixture(scope="session")
def installed() -> None:
    """Skips a test where SLURM is not installed, with the remedy; with CONVSCOPE_REQUIRE_SLURM it fails instead."""
    try:
        devcluster._programs()
    except UserError as error:
        if "CONVSCOPE_REQUIRE_SLURM" in os.environ:
            raise
        pytest.skip(str(error))


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with a short path: tmp_path is too long for sockets below it."""
    path = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def cluster(installed: None) -> Iterator[Path]:
    """slurm.conf of a running cluster of two nodes, which SLURM_CONF points at."""
    with running(nodes=2) as directory:
        yield directory / "slurm.conf"


@contextmanager
def running(nodes: int) -> Iterator[Path]:
    """The folder of a cluster, for as long as it runs."""
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(devcluster.up(directory, nodes=nodes)))
            patch.setenv("OMP_NUM_THREADS", "1")
            yield directory
    finally:
        devcluster.down(directory)
        shutil.rmtree(directory)
