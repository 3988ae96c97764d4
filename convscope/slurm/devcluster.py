"""A private SLURM on this one machine, to try and test submission without a cluster.

`python -m convscope.slurm.devcluster up DIR --nodes 2` starts munged, slurmctld and one slurmd for each pretended node,
as the user who calls it, with every file below DIR; `... down DIR` stops them. Nothing outside DIR is touched.
"""

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from convscope.core.errors import UserError

CLUSTER = "convscope-dev"
DAEMONS = ("slurmd", "slurmctld", "munged")  # in the order in which they stop
TOOLS = ("sinfo", "squeue", "scancel", "munge")
PACKAGES = "slurmctld slurmd slurm-client munge"
START_TIMEOUT = 60.0  # seconds until every node must be idle
STOP_TIMEOUT = 5.0  # seconds for jobs, then for each daemon, to end; after that they are killed
MAX_PATH = 60  # slurmd puts sockets with names of about 45 characters below DIR; the kernel allows 107 in all

# Node names are loopback addresses, so that a job resolves them without /etc/hosts. cred_expire sets the delay of a
# requeue (120 s by default; below 5 it falls back). config_overrides lets a small machine pose as a large one.
CONFIG = """\
ClusterName={cluster}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/pids/slurmctld.own
SlurmdPidFile={root}/pids/slurmd.%n.own
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,nohold_on_prolog_fail
PriorityType=priority/basic
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=3
OverTimeLimit=0
KillOnBadExit=0
SlurmctldTimeout=10
SlurmdTimeout=10
BatchStartTimeout=10
MessageTimeout=10
InactiveLimit=0
CompleteWait=0
MinJobAge=300
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={0} NodeAddr={0} NodeHostname={1} Port={2} CPUs={3} RealMemory=8000 Gres=gpu:2 State=UNKNOWN"
GRES = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"  # stand-ins; they only set CUDA_VISIBLE_DEVICES


def up(directory: Path, nodes: int = 2, *, cpus: int = 8) -> Path:
    """Start a cluster below `directory` and wait until every node is idle.

    Args:
        directory: made if absent; at most 60 characters, because sockets lie below it.
        nodes: pretended nodes, named 127.0.0.1, 127.0.0.2, ...
        cpus: cores that each node claims to have.

    Returns:
        The cluster's slurm.conf; commands find the cluster through `SLURM_CONF=<that path>`.

    Raises:
        UserError: SLURM is not installed, the directory will not do, or the cluster does not start.
    """
    root = directory.resolve()
    if not 1 <= nodes <= 254:  # one loopback address each
        raise UserError(f"a cluster has from 1 to 254 nodes, not {nodes}")
    if len(str(root)) > MAX_PATH:
        raise UserError(f"{root} is too long for sockets; choose a directory of at most {MAX_PATH} characters")
    programs = _programs()
    config = root / "slurm.conf"
    if _members(config):
        raise UserError(f"a cluster is already running in {root}; stop it with: {_command('down', root)}")
    names = [f"127.0.0.{i}" for i in range(1, nodes + 1)]
    _write_files(root, names, cpus)
    try:
        _start(programs["munged"], "munged", config, *_munge_arguments(root))
        probe = [programs["munge"], "-n", "-S", str(root / "munge" / "socket")]
        _wait(lambda: subprocess.run(probe, capture_output=True, check=False).returncode == 0, root)
        _start(programs["slurmctld"], "slurmctld", config, "-D", "-c")
        for name in names:
            _start(programs["slurmd"], f"slurmd.{name}", config, "-D", "-c", "-N", name)
        _wait(lambda: _ask(config, "sinfo", "-h", "-N", "-p", "main", "-o", "%t").split() == ["idle"] * nodes, root)
    except BaseException:
        down(root)
        raise
    return config


def down(directory: Path) -> None:
    """Cancel the jobs and stop every process of the cluster below `directory`; its files stay."""
    config = directory.resolve() / "slurm.conf"
    if "slurmctld" in _members(config).values() and (jobs := _ask(config, "squeue", "-h", "-o", "%A").split()):
        _ask(config, "scancel", *jobs)
        _poll(lambda: not _ask(config, "squeue", "-h").strip(), STOP_TIMEOUT)
    for daemon in DAEMONS:
        _signal(config, daemon, signal.SIGTERM)
        _poll(partial(_gone, config, daemon), STOP_TIMEOUT)
    for _ in range(3):  # what outlives slurmd by design (slurmstepd, a rank), and what that starts as it dies
        _signal(config, None, signal.SIGKILL)
        _poll(lambda: not _members(config), 1.0)
    for record in (config.parent / "pids").glob("*"):
        with suppress(ChildProcessError, ValueError):  # a daemon that this very process started would stay as a zombie
            os.waitpid(int(record.read_text()), os.WNOHANG)


def _programs() -> dict[str, str]:
    """Paths of what the cluster runs; daemons lie in directories that are on root's PATH only."""
    found = {name: shutil.which(name, path=_path()) for name in (*DAEMONS, *TOOLS)}
    if missing := [name for name, path in found.items() if path is None]:
        raise UserError(
            f"SLURM is not installed ({', '.join(missing)} not found); "
            f"on Debian or Ubuntu: apt-get install -y --no-install-recommends {PACKAGES}"
        )
    return {name: path for name, path in found.items() if path}


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _write_files(root: Path, names: Sequence[str], cpus: int) -> None:
    host = socket.gethostname().split(".")[0]
    port, *ports = _free_ports(len(names) + 1)
    nodes = "\n".join(NODE.format(name, host, number, cpus) for name, number in zip(names, ports))
    text = CONFIG.format(cluster=CLUSTER, host=host, port=port, user=os.getuid(), root=root, nodes=nodes)
    key = root / "munge" / "key"
    try:
        for folder in ("munge", "state", "spool", "log", "pids"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for above_socket in (root, root / "munge"):
            above_socket.chmod(0o755)  # munged refuses a socket that some users could not reach
        (root / "slurm.conf").write_text(text)
        (root / "gres.conf").write_text(GRES)
        key.unlink(missing_ok=True)
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
    except OSError as error:
        raise UserError(f"cannot set up a cluster in {root}: {error}") from error


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on; all are held open until the last is known, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _munge_arguments(root: Path) -> list[str]:
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    return ["-F", *(f"--{option}={root / 'munge' / name}" for option, name in files.items())]


def _start(program: str, name: str, config: Path, *arguments: str) -> None:
    """Start a daemon in a session of its own and record its pid in `pids/NAME`."""
    root = config.parent
    log = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        program,
        [program, *arguments],
        {"PATH": _path(), "SLURM_CONF": str(config)},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(root / "log" / f"{name}.out"), log, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    (root / "pids" / name).write_text(f"{pid}\n")


def _ask(config: Path, *command: str) -> str:
    """Standard output of a SLURM command, or nothing where it fails: the caller asks again."""
    environment = {"PATH": _path(), "SLURM_CONF": str(config)}
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=20, check=False).stdout
    return ""


def _poll(done: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _wait(done: Callable[[], bool], root: Path) -> None:
    if not _poll(done, START_TIMEOUT):
        raise UserError(f"SLURM did not start in {root} within {START_TIMEOUT:.0f} s; its logs are in {root / 'log'}")


def _signal(config: Path, daemon: str | None, number: signal.Signals) -> None:
    """Send a signal to the named daemon's processes, or to everything that is left of the cluster."""
    for pid, name in _members(config).items():
        if daemon in (None, name):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _members(config: Path) -> dict[int, str]:
    """Processes of this cluster: its daemons and step managers by program name, and what runs in its jobs.

    The environment says which cluster a process belongs to, so no other process is ever found. A shell that merely
    exported SLURM_CONF is not one of them.
    """
    found = {}
    ours = f"SLURM_CONF={config}".encode()
    in_job = f"SLURM_CLUSTER_NAME={CLUSTER}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or is another user's
            pid = int(process.name)
            variables = (process / "environ").read_bytes().split(b"\0")
            program = (process / "exe").readlink().name.removesuffix("-wlm")  # Debian's name for SLURM's own
            if ours in variables and (program in (*DAEMONS, "slurmstepd") or in_job in variables):
                found[pid] = program
    return found


def _gone(config: Path, daemon: str) -> bool:
    return daemon not in _members(config).values()


def _command(action: str, directory: Path) -> str:
    return f"python -m convscope.slurm.devcluster {action} {directory}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: `up` prints the line that points a shell at the cluster."""
    parser = argparse.ArgumentParser(prog="python -m convscope.slurm.devcluster", description="A private SLURM.")
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--nodes", type=int, default=2, help="pretended nodes (default: 2)")
    options = parser.parse_args(argv)
    try:
        if options.action == "up":
            print(f"export SLURM_CONF={up(options.directory, options.nodes)}")
        else:
            down(options.directory)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
