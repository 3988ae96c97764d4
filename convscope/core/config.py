"""Frozen dataclasses to and from plain values and YAML; an unknown key is an error."""

import ast
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml

from convscope.core.errors import UserError
from convscope.core.files import write_bytes

T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """Turn a (nested) dataclass into dicts, lists and scalars that YAML and JSON can hold."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if isinstance(config, Path):
        return str(config)
    return config


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Build dataclass `cls` from plain values; absent keys keep their defaults.

    Raises:
        UserError: unknown or missing key, or a value of the wrong type, named by its path.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    if unknown := sorted(str(key) for key in values if key not in fields):
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; known keys: {', '.join(sorted(fields))}")
    absent = dataclasses.MISSING
    required = [name for name, f in fields.items() if f.default is absent and f.default_factory is absent]
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{where}: missing key {', '.join(missing)}")
    return cls(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _union(arguments, value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping, got {value!r}")
        return from_dict(typing.cast(type[Any], hint), value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where}: {value!r} is none of {', '.join(map(str, arguments))}")
        return value
    return _scalar(hint, value, where)


def _union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first member that takes the value; the error is that of the first."""
    if value is None and type(None) in members:
        return None
    errors = []
    for member in members:
        if member is not type(None):
            try:
                return _value(member, value, where)
            except UserError as error:
                errors.append(error)
    raise errors[0]


def _tuple(members: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where}: expected a list, got {value!r}")
    if len(members) == 2 and members[1] is ...:
        members = members[:1] * len(value)
    if len(members) != len(value):
        raise UserError(f"{where}: expected a list of {len(members)} values, got {value!r}")
    return tuple(_value(member, item, f"{where}[{i}]") for i, (member, item) in enumerate(zip(members, value)))


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            raise UserError(f"{where}: expected a number, got {value!r}") from None
    if hint in (int, float, str, bool, Path) and (
        not isinstance(value, hint) or (hint is int and isinstance(value, bool))
    ):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: missing, unreadable, or not a mapping.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no mapping of settings")
    return values


def read_yaml(path: Path) -> Any:
    """Read any YAML.

    Raises:
        UserError: missing or unreadable.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def save_yaml(path: Path, config: Any) -> None:
    """Write a dataclass as YAML that `from_dict(load_yaml(...))` reads back."""
    write_bytes(path, yaml.safe_dump(to_dict(config), sort_keys=False).encode())


def parse_assignments(items: Sequence[str]) -> dict[str, Any]:
    """`["depths=2,2,6,2", "patch_size=2"]` as keyword arguments; values are Python literals, else strings.

    Raises:
        UserError: an item without `=`.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"expected name=value, got {item!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def format_assignments(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Keyword arguments as `parse_assignments` reads them."""
    return tuple(f"{key}={value!r}".replace(" ", "") for key, value in values.items())
