import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import submitit

import convscope
from convscope.core.errors import UserError
from convscope.slurm import devcluster


def _processes_below(directory: Path) -> list[str]:
    """Command lines of live processes that name the directory in their arguments or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(directory).encode() in text:
            found.append(text.decode(errors="replace"))
    return found


def _run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.mark.slurm
def test_nodes_are_idle(cluster: Path) -> None:
    listing = _run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t", check=True)
    assert listing.stdout.splitlines() == ["127.0.0.1 idle", "127.0.0.2 idle"]


@pytest.mark.slurm
def test_submitit_job_returns_its_result_and_sees_the_cluster(cluster: Path, tmp_path: Path) -> None:
    executor = submitit.SlurmExecutor(folder=tmp_path)
    executor.update_parameters(nodes=2, ntasks_per_node=1, time=5)
    job = executor.submit(os.getenv, "SLURM_CONF")
    assert job.results() == [str(cluster)] * 2  # one a task


@pytest.mark.slurm
def test_gpus_are_visible_to_a_job(cluster: Path) -> None:
    shown = _run("srun", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES", check=True)
    assert shown.stdout.strip() == "0,1"


@pytest.mark.slurm
def test_down_leaves_no_process_even_of_a_job_that_ignores_its_end(installed: None, short_dir: Path) -> None:
    module = [sys.executable, "-m", "convscope.slurm.devcluster"]
    started = _run(*module, "up", str(short_dir), "--nodes", "1", check=True)
    assert started.stdout == f"export SLURM_CONF={short_dir}/slurm.conf\n"
    environment = os.environ | {"SLURM_CONF": f"{short_dir}/slurm.conf"}
    mark = short_dir / "running"
    script = f"trap '' TERM; (setsid sleep 600 &); touch {mark}; sleep 600"
    _run("sbatch", "--output=/dev/null", "--wrap", script, env=environment, check=True)
    assert devcluster._poll(mark.exists, 30)
    assert len(_processes_below(short_dir)) >= 6  # three daemons, slurmstepd, the script, the two sleeps

    second = _run(*module, "up", str(short_dir))
    assert second.returncode == 2
    assert "already running" in second.stderr

    _run(*module, "down", str(short_dir), check=True)
    assert _processes_below(short_dir) == []


@pytest.mark.slurm
def test_a_user_without_privileges_has_one_too(installed: None, short_dir: Path) -> None:
    """The other tests are root's where root runs them."""
    if os.geteuid() != 0:
        pytest.skip("the other tests show this: root does not run them")
    package = short_dir / "convscope"
    for name in ("__init__.py", "core/__init__.py", "core/errors.py", "slurm/__init__.py", "slurm/devcluster.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(convscope.__file__).parent / name, package / name)
    nobody: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": short_dir}
    short_dir.chmod(0o755)  # munged wants its socket within reach of everybody
    for path in (short_dir, *short_dir.rglob("*")):
        os.chown(path, nobody["user"], nobody["group"])
    python = next((path for path in (sys.executable, "/usr/bin/python3") if _runs(path, nobody)), None)
    if python is None:
        pytest.skip("no Python of at least version 3.11 here that other users may run")
    module, directory = [python, "-m", "convscope.slurm.devcluster"], short_dir / "cluster"
    environment = {"PATH": os.environ["PATH"], "SLURM_CONF": str(directory / "slurm.conf")}
    try:
        _run(*module, "up", str(directory), "--nodes", "1", check=True, env=environment, **nobody)
        ran = _run("srun", "id", "-u", env=environment, **nobody)
        assert (ran.stdout, ran.stderr) == ("65534\n", "")
    finally:
        _run(*module, "down", str(directory), check=True, env=environment, **nobody)
    assert _processes_below(directory) == []


def _runs(python: str, user: dict[str, Any]) -> bool:
    try:
        return _run(python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))", **user).returncode == 0
    except PermissionError:
        return False


@pytest.mark.slurm
def test_a_directory_can_be_used_again(installed: None, short_dir: Path) -> None:
    for _ in range(2):
        config = devcluster.up(short_dir, nodes=1)
        try:
            queue = _run("squeue", "-h", env=os.environ | {"SLURM_CONF": str(config)}, check=True)
            assert queue.stdout == ""
        finally:
            devcluster.down(short_dir)
    assert _processes_below(short_dir) == []


@pytest.mark.slurm
def test_a_start_that_fails_is_one_line_and_leaves_no_process(
    installed: None, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devcluster, "START_TIMEOUT", 3.0)
    monkeypatch.setattr(devcluster, "CONFIG", devcluster.CONFIG.replace("/munge/socket", "/munge/elsewhere"))
    with pytest.raises(UserError, match=f"did not start in {short_dir} .* logs are in {short_dir}/log$"):
        devcluster.up(short_dir)
    assert _processes_below(short_dir) == []


def test_missing_slurm_is_one_line_with_the_remedy(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(short_dir))  # no sinfo there, whatever else is installed
    with pytest.raises(UserError, match=r"sinfo.* not found.*apt-get install .*slurmctld slurmd slurm-client munge$"):
        devcluster.up(short_dir)


def test_a_directory_too_long_for_sockets_and_no_nodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 60 characters"):
        devcluster.up(tmp_path / ("x" * 60))
    with pytest.raises(UserError, match="from 1 to 254 nodes"):
        devcluster.up(tmp_path, nodes=0)


def test_down_without_a_cluster_does_nothing(tmp_path: Path) -> None:
    devcluster.down(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_members_are_found_by_environment_not_by_name(tmp_path: Path) -> None:
    """A shell that exported SLURM_CONF is not the cluster's; a process inside one of its jobs is."""
    config = tmp_path / "slurm.conf"
    in_job = {"SLURM_CONF": str(config), "SLURM_CLUSTER_NAME": devcluster.CLUSTER}
    shell = subprocess.Popen(["sleep", "60"], env={"SLURM_CONF": str(config)})
    rank = subprocess.Popen(["sleep", "60"], env=in_job)
    other = subprocess.Popen(["sleep", "60"], env=in_job | {"SLURM_CONF": "/other/slurm.conf"})
    try:
        assert devcluster._poll(lambda: bool(devcluster._members(config)), 10)
        assert list(devcluster._members(config)) == [rank.pid]
        devcluster.down(tmp_path)
        assert rank.wait(timeout=10) == -9
        assert shell.poll() is None
        assert other.poll() is None
    finally:
        for process in (shell, rank, other):
            process.kill()
            process.wait()
