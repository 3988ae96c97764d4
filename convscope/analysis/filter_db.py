"""Databases of convolution filters in one HDF5 file, in the format of CNN Filter DB (Gavrikov and Keuper 2022).

```
/filters         (n, 3, 3): the 3x3 filters of all layers of all models, one layer after the other
/meta            a row a layer, as pandas.read_hdf(path, "meta") reads it; filter_ids "start:end" with the end included
/filters_5x5, /meta_5x5, ...    the same for other kernels
```

`/filter` (n, 9), as the published README spells it, is read too, and `/meta` as the bytes of a CSV table.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from convscope.core.errors import UserError
from convscope.core.plain_pickle import code_in_pickle

Array = NDArray[Any]
INDEX = ["model_id", "conv_depth", "conv_depth_norm", "layer_id"]
MAIN = "3x3"
READ_WEIGHTS = 1 << 19  # numbers that are read at a time: 2 MB of float32, which stays in a core's cache


@dataclass(frozen=True)
class FilterTable:
    """The filters of one kernel size, and the layers that they are of."""

    size: str  # height and width, such as "3x3"
    dtype: np.dtype[Any]
    meta: pd.DataFrame  # a row a layer; what is the index in the file are columns here
    spans: NDArray[np.int64]  # (layers, 2): first filter of each layer, and the one behind its last

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a kernel."""
        height, width = self.size.split("x")
        return int(height), int(width)

    @property
    def count(self) -> int:
        """Number of filters of all layers."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


class FilterSource(Protocol):
    """Where filters are read from."""

    @property
    def tables(self) -> Mapping[str, FilterTable]:
        """What there is, by kernel size."""
        ...

    def read(self, size: str, start: int, stop: int) -> Array:
        """Filters `start` to `stop` (stop - start, height * width)."""
        ...


class FilterDatabase:
    """An open database."""

    def __init__(self, path: Path, file: Any, tables: Mapping[str, FilterTable], datasets: Mapping[str, str]) -> None:
        self.path, self.file, self.tables = path, file, tables
        self._datasets = {size: file[name] for size, name in datasets.items()}

    def read(self, size: str, start: int, stop: int) -> Array:
        """Filters `start` to `stop` as stored (stop - start, height * width).

        Raises:
            UserError: the file is damaged.
        """
        try:
            found: Array = self._datasets[size][start:stop]
        except (OSError, RuntimeError) as error:
            raise UserError(f"{self.path}: cannot read filters {start} to {stop}: {_reason(error)}") from error
        return found.reshape(stop - start, -1)

    @property
    def compressed(self) -> bool:
        """Whether filters are stored compressed."""
        return any(dataset.compression is not None for dataset in self._datasets.values())

    @property
    def foreign(self) -> list[str]:
        """Names in the file that are no part of the format."""
        own = {dataset.name.lstrip("/") for dataset in self._datasets.values()}
        return [name for name in self.file if name not in own and not re.fullmatch(r"meta(_\d+x\d+)?", name)]


def chunks_of(source: FilterSource, size: str, start: int, stop: int) -> Iterator[Array]:
    """Filters `start` to `stop` in parts (m, height * width) of bounded size."""
    rows = max(READ_WEIGHTS // int(np.prod(source.tables[size].shape)), 1)
    for first in range(start, stop, rows):
        yield source.read(size, first, min(first + rows, stop))


@contextmanager
def open_filter_db(path: Path) -> Iterator[FilterDatabase]:
    """Open a database for reading; the tables are in memory, the filters are not.

    Raises:
        UserError: no such file, damaged, no database of filters, one whose table and filters do not fit, or one that
            holds pickles of more than plain data, which reading the table would run.
    """
    if not path.is_file():
        raise UserError(f"no filter database {path}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} is no whole HDF5 file: {_reason(error)}") from error
    with file:
        datasets = _datasets(path, file)
        if not datasets:
            names = ", ".join(f"/{name}" for name in file) or "nothing"
            raise UserError(f"{path} is no filter database: it has no /filters, but {names}")
        shapes = {size: (file[name].shape, file[name].dtype) for size, name in datasets.items()}
        csv = {size: _csv(file, meta_name(size)) for size in datasets}
        _refuse_code(path, file)
    tables = {}
    for size, (shape, dtype) in shapes.items():
        meta = _meta(path, size, csv[size], shape[0])
        tables[size] = FilterTable(size, dtype, meta, _spans(path, size, meta, shape[0]))
    with h5py.File(path, "r") as file:
        yield FilterDatabase(path, file, tables, datasets)


def filters_name(size: str) -> str:
    """Name of the data set of filters of a size such as "5x5"."""
    return "filters" if size == MAIN else f"filters_{size}"


def meta_name(size: str) -> str:
    """Name of the table of layers with kernels of a size such as "5x5"."""
    return "meta" if size == MAIN else f"meta_{size}"


def parse_span(text: Any) -> tuple[int, int]:
    """First filter and the one behind the last from "start:end", where the end is included.

    Raises:
        ValueError: it is nothing of the kind.
    """
    first, colon, last = str(text).partition(":")
    if not colon:
        raise ValueError(f"filter_ids {text!r} is not start:end")
    return int(first), int(last) + 1


def _datasets(path: Path, file: Any) -> dict[str, str]:
    """Name of the data set of each kernel size, 3x3 first."""
    found = {}
    for name in sorted(file, key=len):
        match = re.fullmatch(r"filters?(?:_(\d+)x(\d+))?", name)
        if match is None or not isinstance(file[name], h5py.Dataset):
            continue
        height, width = (int(side) if side else 3 for side in match.groups())
        shape = file[name].shape
        if shape[1:] not in ((height, width), (height * width,)) or file[name].dtype.kind != "f":
            raise UserError(f"{path}: /{name} holds {file[name].dtype} {shape}, not filters of {height}x{width}")
        found[f"{height}x{width}"] = name
    return found


def _refuse_code(path: Path, file: Any) -> None:
    """Look through all that PyTables unpickles when pandas reads a table: attributes, and arrays of objects."""

    def look(name: str, node: Any) -> None:
        pickles = [bytes(value) for value in node.attrs.values() if isinstance(value, np.bytes_)]
        if isinstance(node, h5py.Dataset) and h5py.check_vlen_dtype(node.dtype) is not None:
            pickles += [np.asarray(row).tobytes() for row in node]
        for code in filter(None, map(code_in_pickle, pickles)):
            raise UserError(f"{path} is refused: /{name} names {code}, which is no plain data and could run code")

    look("", file)
    file.visititems(look)


def _csv(file: Any, name: str) -> bytes | None:
    """The table's bytes, where it is a CSV table."""
    if name not in file or not isinstance(file[name], h5py.Dataset):
        return None
    return np.asarray(file[name][...]).astype(np.uint8).tobytes()


def _meta(path: Path, size: str, csv: bytes | None, count: int) -> pd.DataFrame:
    name = meta_name(size)
    try:
        found = pd.read_csv(io.BytesIO(csv)) if csv is not None else pd.read_hdf(path, name)
    except KeyError as error:
        if count == 0:  # pandas writes no empty table
            return pd.DataFrame(columns=[*INDEX, "filter_ids"])
        raise UserError(f"{path} has filters of {size}, but no table /{name} that says what they are") from error
    except Exception as error:  # of pandas, PyTables, HDF5 or a pickle
        raise UserError(f"{path}: cannot read the table /{name}: {_reason(error)}") from error
    if not isinstance(found, pd.DataFrame):
        raise UserError(f"{path}: /{name} is no table of layers")
    if len(set(found.index.names)) < found.index.nlevels <= len(INDEX):  # the README names conv_depth twice
        found.index = found.index.set_names(INDEX[: found.index.nlevels])
    meta = found.reset_index() if set(found.index.names) & set(INDEX) else found.reset_index(drop=True)
    if missing := [each for each in ("model_id", "filter_ids") if each not in meta]:
        raise UserError(f"{path}: the table /{name} has no column {', '.join(missing)}")
    return meta


def _spans(path: Path, size: str, meta: pd.DataFrame, count: int) -> NDArray[np.int64]:
    try:
        spans = np.array([parse_span(each) for each in meta["filter_ids"]], dtype=np.int64).reshape(-1, 2)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    wrong = (spans[:, 0] < 0) | (spans[:, 1] <= spans[:, 0]) | (spans[:, 1] > count)
    if wrong.any():
        row = int(wrong.argmax())
        named = f"row {row} of /{meta_name(size)} names the filters {meta['filter_ids'][row]}"
        raise UserError(f"{path}: {named}, but there are {count}")
    return spans


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
