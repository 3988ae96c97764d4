"""What a submission is told: `--slurm.*` flags of any command, over a site's file of defaults."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convscope.core.config import from_dict, load_yaml
from convscope.core.errors import UserError

PREFIX = "--slurm."


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """Resources and behaviour of a job; each field is a flag `--slurm.FIELD`."""

    nodes: int = 1  # how many machines
    gpus_per_node: int = 0  # GPUs of each, and as many processes
    tasks_per_node: int = 0  # processes of each; default: one a GPU, else one
    cpus_per_task: int = 0  # cores of a process; default: the cluster's
    mem: str = ""  # memory of a node, such as 64G
    timeout: str = "24:00:00"  # minutes, or [D-]HH:MM:SS; a job that runs into it goes on in its next attempt
    signal_delay: int = 120  # seconds before the limit at which a job is told to save
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""  # nodes to leave out
    name: str = ""  # of the job; default: the run directory's
    max_restarts: int = 100  # attempts after the first one
    patience: int = 3  # attempts in a row that may pass without a step
    setup: tuple[str, ...] = ()  # lines of shell before the command, such as "module load cuda"
    python: str = ""  # what starts Python, such as "singularity exec image.sif python"
    arg: tuple[str, ...] = ()  # further arguments of sbatch, key=value
    srun_arg: tuple[str, ...] = ()  # further arguments of srun
    parallel: int = 0  # points of a sweep that run at once; 0: all
    then: str = ""  # command line of convscope that runs after success
    config: str = ""  # YAML file with defaults for any of these
    dry_run: bool = False  # print the script that would be submitted
    local: bool = False  # run the same job here and wait for it

    def __post_init__(self) -> None:
        for name in ("nodes", "signal_delay", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{PREFIX}{_flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("gpus_per_node", "tasks_per_node", "cpus_per_task", "max_restarts", "parallel"):
            if getattr(self, name) < 0:
                raise UserError(f"{PREFIX}{_flag(name)} must be at least 0, got {getattr(self, name)}")
        if wrong := [item for item in self.arg if "=" not in item]:
            raise UserError(f"{PREFIX}arg takes key=value, got {wrong[0]!r}")

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1


def split(arguments: Sequence[str]) -> tuple[list[str], SlurmSettings | None]:
    """Take the `--slurm.*` flags out of a command line; None where there are none.

    Raises:
        UserError: an unknown flag, a flag without its value, or a value that means nothing.
    """
    rest: list[str] = []
    given: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith(PREFIX):
            rest.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag.removeprefix(PREFIX).replace("-", "_")
        if name not in _TYPES:
            known = ", ".join(_flag(field) for field in _TYPES)
            raise UserError(f"no flag {flag}; after {PREFIX} comes one of {known}")
        if _TYPES[name] is bool:
            given[name] = True
            continue
        value = value if equals else next(words, "")
        if not value or (not equals and value.startswith("--")):
            raise UserError(f"{flag} needs a value")
        given[name] = _read(name, value, given)
    if not given:
        return rest, None
    site = load_yaml(Path(given["config"])) if "config" in given else {}
    return rest, from_dict(SlurmSettings, {**_underscored(site), **given}, given.get("config", "--slurm"))


def _read(name: str, value: str, given: Mapping[str, Any]) -> Any:
    if _TYPES[name] is int:
        try:
            return int(value)
        except ValueError:
            raise UserError(f"{PREFIX}{_flag(name)} takes a whole number, got {value!r}") from None
    return (*given.get(name, ()), value) if _TYPES[name] == tuple[str, ...] else value


def _underscored(site: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in site.items()}


def _flag(name: str) -> str:
    return name.replace("_", "-")


_TYPES = typing.get_type_hints(SlurmSettings)
_TYPES = {field.name: _TYPES[field.name] for field in dataclasses.fields(SlurmSettings)}
