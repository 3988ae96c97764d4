"""Writing a database of filters from parts: what is in it, other databases, and new models. All filters are streamed.

The file is written under another name, read back and compared, and only then takes its place; whatever happens before
leaves the old one as it was.
"""

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pandas as pd

from convscope.analysis.filter_db import (
    INDEX,
    MAIN,
    READ_WEIGHTS,
    FilterDatabase,
    FilterSource,
    FilterTable,
    chunks_of,
    filters_name,
    meta_name,
    open_filter_db,
    parse_span,
)
from convscope.analysis.filter_db_rows import DESCRIPTIONS
from convscope.core.errors import UserError
from convscope.core.files import write_with
from convscope.core.log import Ticker, progress

Compression = Literal["none", "gzip"]
HASH = "filters_hash"
MARGIN = 16 << 20  # bytes of tables and of HDF5's own, when room on the disk is looked at


@dataclass(frozen=True, kw_only=True)
class Part:
    """Layers of one source that go into the database."""

    source: FilterSource
    tables: Mapping[str, FilterTable]  # their rows as they will stand there, but for filter_ids; spans in the source
    known: bool = False  # copied from the database itself, where they were compared when they came


def write_filter_db(path: Path, parts: Sequence[Part], *, dtype: Any, compression: Compression = "none") -> None:
    """Write the parts, one after the other, as the database `path`, and its tables beside it as Parquet.

    Args:
        path: replaced once the new file is whole.
        parts: in order; what is in `path` has to be among them to stay.
        dtype: of the filters.
        compression: gzip needs chunks and reads slower; none is one block a kernel size.

    Raises:
        UserError: no room, a source that is damaged, or a file that does not read back as it was written.
    """
    scratch = path.with_name(f".{path.name}.new")
    sizes = sorted({MAIN, *(size for part in parts for size in part.tables)}, key=lambda size: (size != MAIN, size))
    _check_room(path.parent, parts, np.dtype(dtype).itemsize)
    try:
        with _refusals(path):
            scratch.unlink(missing_ok=True)
            tables = _copy_filters(scratch, parts, sizes, np.dtype(dtype), compression)
            for size, table in tables.items():
                _write_meta(scratch, meta_name(size), table)
            _read_back(scratch, {size: _known(parts, size) for size in sizes})
            _sync(scratch)
            os.replace(scratch, path)
            _sync(path.parent)
    finally:
        with suppress(OSError):
            scratch.unlink()
    write_parquet(path)


def write_parquet(path: Path) -> None:
    """Write the tables of the database `path` as one Parquet file beside it, unless that is what it holds."""
    with open_filter_db(path) as database:
        tables = [t.meta.assign(dataset=filters_name(s)) for s, t in database.tables.items() if len(t.meta)]
    if not tables:
        return
    frame = _plain(pd.concat(tables, ignore_index=True))
    target = path.with_suffix(".parquet")
    with suppress(Exception):  # absent, damaged, or of an earlier state
        if pd.read_parquet(target).equals(frame):
            return
    write_with(target, lambda scratch: frame.to_parquet(scratch, index=False))


def _copy_filters(
    scratch: Path, parts: Sequence[Part], sizes: Sequence[str], dtype: np.dtype[Any], compression: Compression
) -> dict[str, pd.DataFrame]:
    """Write the filters; returns the tables that belong to them."""
    total = sum(table.count for part in parts for table in part.tables.values())
    tables = {}
    with h5py.File(scratch, "w") as file, progress("writing filters", total) as ticker:
        for size in sizes:
            count = sum(part.tables[size].count for part in parts if size in part.tables)
            target = _dataset(file, size, count, dtype, compression)
            rows, start = [], 0
            for part in parts:
                if size in part.tables:
                    rows.append(_copy_part(target, start, part, size, ticker))
                    start += part.tables[size].count
            tables[size] = _joined(rows)
        for part in parts:
            if part.known and isinstance(part.source, FilterDatabase):
                for name in part.source.foreign:
                    part.source.file.copy(name, file)
    return tables


def _copy_part(target: Any, start: int, part: Part, size: str, ticker: Ticker) -> pd.DataFrame:
    """Write a part's filters from row `start` on; returns its table with their places and hashes."""
    table = part.tables[size]
    places, hashes = [], []
    for first, last in table.spans.tolist():
        digest = hashlib.sha256()
        begin = start
        for chunk in chunks_of(part.source, size, first, last):
            values = chunk.astype(target.dtype, copy=False).reshape(-1, *table.shape)
            if not part.known:
                digest.update(_canonical(values))
            target[start : start + len(values)] = values
            start += len(values)
        ticker.advance(last - first)
        places.append(f"{begin}:{start - 1}")
        hashes.append(digest.hexdigest()[:16])
    meta = table.meta.assign(filter_ids=places)
    if part.known:
        return meta
    if HASH in meta:
        changed = [stored != found for stored, found in zip(meta[HASH], hashes) if isinstance(stored, str)]
        if any(changed):
            raise UserError(f"{getattr(part.source, 'path', 'a source')}: filters are not those that were stored")
    return meta.assign(**{HASH: hashes})


def _dataset(file: Any, size: str, count: int, dtype: np.dtype[Any], compression: Compression) -> Any:
    height, width = (int(side) for side in size.split("x"))
    shape, options = (count, height, width), {}
    if compression == "gzip" and count:
        rows = min(max(READ_WEIGHTS // (4 * height * width), 1), count)
        options = {"chunks": (rows, height, width), "compression": "gzip", "shuffle": True}
    return file.create_dataset(filters_name(size), shape=shape, dtype=dtype, **options)


def _joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One table, with the columns of all."""
    filled = [table for table in tables if len(table)]
    if not filled:
        return pd.DataFrame()
    joined = pd.concat(filled, ignore_index=True)
    shapes = [name for name in joined if str(name).endswith(") filters")]  # a kernel that a model does not have
    return joined.fillna(dict.fromkeys(shapes, 0)).astype(dict.fromkeys(shapes, np.int64))


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Numbers, truth values and text only; text where a column mixes them."""
    columns = {}
    for name, column in table.items():
        if column.dtype.kind not in "biuf":
            given = column.dropna()
            if all(isinstance(value, (bool, int, float, np.number)) for value in given):
                column = column.astype(np.float64)  # also a truth value that some rows lack, and what nobody gave
            else:
                column = column.map(str, na_action="ignore").astype(object)
        columns[str(name)] = column
    return pd.DataFrame(columns)


def _write_meta(scratch: Path, name: str, table: pd.DataFrame) -> None:
    if not len(table):  # pandas writes no empty table
        return
    wanted = [*INDEX, "layer_depth", "in_channels", "out_channels", "filter_ids", "model", "path", "producer", "op_set"]
    first = [column for column in (*wanted, "depth", *DESCRIPTIONS) if column in table]
    table = _plain(table[[*first, *(column for column in table if column not in first)]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.PerformanceWarning)  # of the number of columns
        index = [column for column in INDEX if column in table]
        table.set_index(index).to_hdf(scratch, key=name, mode="a", format="table", index=False)
    with h5py.File(scratch, "a") as file:  # pandas before version 3 wants it, and no longer writes it
        file[name].attrs["pandas_version"] = np.bytes_("0.15.2")


def _known(parts: Sequence[Part], size: str) -> int:
    return sum(len(part.tables[size].meta) for part in parts if part.known and size in part.tables)


def _read_back(scratch: Path, known: Mapping[str, int]) -> None:
    """Read the new layers as the published notebook reads them, and compare."""
    for size, skipped in known.items():
        with h5py.File(scratch, "r") as file:
            count = len(file[filters_name(size)])
        if count == 0:
            continue
        meta = pd.read_hdf(scratch, meta_name(size))
        assert isinstance(meta, pd.DataFrame)
        spans = [parse_span(each) for each in meta["filter_ids"]]
        if [start for start, _ in spans] != [0, *(stop for _, stop in spans[:-1])] or spans[-1][1] != count:
            raise UserError(f"{scratch}: the table of {size} filters does not fit them; nothing was changed")
        with h5py.File(scratch, "r") as file:
            filters = file[filters_name(size)]
            rows = max(READ_WEIGHTS // int(np.prod(filters.shape[1:])), 1)
            for (start, stop), stored in list(zip(spans, meta.get(HASH, spans)))[skipped:]:
                digest = hashlib.sha256()
                for first in range(start, stop, rows):
                    digest.update(_canonical(filters[first : min(first + rows, stop)]))
                if digest.hexdigest()[:16] != stored:
                    raise UserError(f"{scratch}: filters {start} to {stop} read back otherwise; nothing was changed")


def _canonical(filters: Any) -> bytes:
    """Filters as float32, so that a hash does not depend on how they are stored."""
    return np.ascontiguousarray(filters, dtype="<f4").tobytes()


def _check_room(folder: Path, parts: Sequence[Part], itemsize: int) -> None:
    weights = sum(table.count * int(np.prod(table.shape)) for part in parts for table in part.tables.values())
    needed, free = weights * itemsize + MARGIN, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder} has room for {free / 1e9:.2g} GB, the database needs {needed / 1e9:.2g} GB")


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """What the file system or HDF5 refuses, as one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot write {path}: {reason}; it is as it was") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
