"""What a submission is told: `--slurm.*` flags of any command, over a site's file of defaults."""

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from convscope.core.config import from_dict
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
    timeout: str = "24:00:00"  # minutes, or [D-]HH:MM:SS; training that runs into it goes on in its next attempt
    signal_delay: int = 120  # seconds before the limit at which a job is told to save
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""  # nodes to leave out
    name: str = ""  # of the job; default: the run directory's
    max_restarts: int = 100  # attempts after the first one
    patience: int = 3  # failed attempts in a row, without a new checkpoint in between, that end the job
    setup: tuple[str, ...] = ()  # lines of shell before the command, such as "module load cuda"
    python: str = ""  # what starts Python, such as "singularity exec image.sif python"
    arg: tuple[str, ...] = ()  # further arguments of sbatch, key=value or key
    srun_arg: tuple[str, ...] = ()  # further arguments of srun
    parallel: int = 0  # points of a sweep that run at once; default: all, and one with `local`
    then: str = ""  # command line of convscope that runs after success; "eval": linear probe and k-NN of the run
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
        if wrong := [item for item in self.arg if not item or item.startswith("-")]:
            raise UserError(f"{PREFIX}arg takes key=value or key, without dashes, got {wrong[0]!r}")
        if self.local and self.nodes > 1:
            raise UserError(f"{PREFIX}local is this one machine; leave {PREFIX}nodes out")

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
        if _TYPES[name] is not bool:
            value = value if equals else next(words, "")
            if not value or (not equals and value.startswith("--")):
                raise UserError(f"{flag} needs a value; one that starts with dashes is written {flag}=--value")
        value = _read(name, value if equals or value else "true", flag)
        given[name] = given.get(name, ()) + value if isinstance(value, tuple) else value
    if not given:
        return rest, None
    site = _site(Path(given["config"])) if "config" in given else {}
    return rest, from_dict(SlurmSettings, {**site, **given}, given.get("config", "--slurm"))


def _read(name: str, value: Any, where: str) -> Any:
    """A word of the command line or of a site's file as the field's type."""
    kind = _TYPES[name]
    if kind == tuple[str, ...]:
        return tuple(value) if isinstance(value, list) else (value,)
    if kind is int and str(value).isdecimal():
        return int(value)
    if kind is bool and str(value).lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    if kind is not str or not isinstance(value, str):
        wanted = {int: "a whole number", bool: "true or false", str: "one value"}[kind]
        raise UserError(f"{where} takes {wanted}, got {value!r}")
    return value


def _site(file: Path) -> dict[str, Any]:
    """A site's defaults. Values are read as text first: YAML 1.1 takes 24:00:00 for the number 86400."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no mapping of settings")
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    if unknown := sorted(named.keys() - _TYPES):
        raise UserError(f"{file}: unknown key {', '.join(unknown)}; known keys: {', '.join(map(_flag, _TYPES))}")
    return {name: _read(name, value, f"{file}: {_flag(name)}") for name, value in named.items()}


def _flag(name: str) -> str:
    return name.replace("_", "-")


_TYPES = typing.get_type_hints(SlurmSettings)
_TYPES = {field.name: _TYPES[field.name] for field in dataclasses.fields(SlurmSettings)}
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
