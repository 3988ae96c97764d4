"""Pickles read as data: containers, strings, numbers and arrays of numbers, and nothing that could run code."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convscope.core.errors import UserError

ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
KINDS = "biufO"  # of dtype that are read: numbers, and objects that are plain data themselves


class _RefusedError(pickle.UnpicklingError):
    """The pickle names something else than data."""


class _Dtype:
    """What numpy.dtype(...) stood for."""

    def __init__(self, name: str) -> None:
        self.dtype = np.dtype(_text(name))
        if self.dtype.kind not in KINDS:
            raise _RefusedError(f"an array of {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = _text(state[1])
        self.dtype = self.dtype.newbyteorder(">" if order == ">" else "<" if order == "<" else "=")


class _Array:
    """What an array stood for; its bytes are read here, numpy's own restoring is not run."""

    value: NDArray[Any] | list[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = raw if isinstance(raw, list) else _from_bytes(raw, dtype, shape, "F" if fortran else "C")


class _Settings:
    """What PyTables' settings of compression stood for, which lie beside its indices."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keep none of them."""


class _PlainUnpickler(pickle.Unpickler):
    """Gives a function of this file for each name that arrays are stored with, and refuses every other name."""

    named = False

    def find_class(self, module: str, name: str) -> Any:
        self.named = True
        made: dict[str, Callable[..., Any]] = {}
        if module in ARRAY_MODULES:
            made = {
                "_reconstruct": lambda *_: _Array(),
                "scalar": lambda dtype, raw: _from_bytes(raw, dtype, (), "C").item(),
                "_frombuffer": lambda raw, dtype, shape, order: _from_bytes(raw, dtype, shape, order),
            }
        elif module == "numpy":
            made = {"dtype": lambda name, *_: _Dtype(name), "ndarray": lambda *_: None}
        elif module == "_codecs":  # how Python 3 writes bytes for Python 2
            made = {"encode": lambda text, *_: text.encode("latin1")}
        elif module in ("builtins", "__builtin__"):  # an empty string of bytes, in old protocols
            made = {"bytes": lambda: b"", "object": lambda: _Settings()}
        elif (module, name) in (("copy_reg", "_reconstructor"), ("tables.filters", "Filters")):
            made = {name: lambda *_: _Settings()}
        if name not in made:
            raise _RefusedError(f"{module}.{name}")
        return made[name]


def read_plain_pickle(path: Path) -> Any:
    """The content of a pickle, arrays as lists.

    Raises:
        UserError: no such file, no pickle, or one that holds anything but data; nothing in it is run.
    """
    try:
        with path.open("rb") as file:
            return _as_lists(_PlainUnpickler(file, encoding="latin1").load())
    except _RefusedError as error:
        raise UserError(f"{path} is refused: it names {error}, which is no plain data and could run code") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{path} is no pickle that can be read: {error or type(error).__name__}") from error


def code_in_pickle(data: bytes) -> str | None:
    """What a pickle names that is no plain data and could run code; None where there is no such thing.

    What breaks off before it names anything, as bytes that are no pickle do, holds no code either.
    """
    unpickler = _PlainUnpickler(io.BytesIO(data), encoding="latin1")
    try:
        unpickler.load()
    except _RefusedError as error:
        return str(error)
    except Exception as error:  # beyond a name the real one might go on where ours does not
        return f"something that cannot be told ({type(error).__name__})" if unpickler.named else None
    return None


def _from_bytes(raw: bytes | str, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    if not isinstance(dtype, _Dtype):
        raise _RefusedError("an array without a dtype")
    data = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
    values = np.frombuffer(data, dtype.dtype)
    return values.reshape(shape, order="F" if order == "F" else "C")


def _as_lists(value: Any, depth: int = 0) -> Any:
    if depth > 10:
        raise ValueError("it is nested too deeply")
    if isinstance(value, _Array):
        value = value.value
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {_as_lists(key, depth + 1): _as_lists(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_lists(item, depth + 1) for item in value]
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise _RefusedError(f"a {type(value).__name__}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _RefusedError(f"a dtype {value!r}")
    return value
