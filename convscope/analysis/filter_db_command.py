"""`convscope export filter-db`: convolution filters of any number of models as one database."""

import dataclasses
import fcntl
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pandas as pd
import tyro

from convscope.analysis.filter_db import FilterDatabase, FilterSource, FilterTable, open_filter_db
from convscope.analysis.filter_db_rows import DESCRIPTIONS, Row, model_filters, model_key, read_descriptions
from convscope.analysis.filter_db_spool import Spool
from convscope.analysis.filter_db_writer import Compression, Part, write_filter_db, write_parquet
from convscope.core.errors import UserError
from convscope.core.log import info
from convscope.core.models import load_backbone
from convscope.core.options import AllowPartial, Arch

DATABASES = (".h5", ".hdf5")


@dataclass(frozen=True, kw_only=True)
class FilterDbCommand:
    """Convolution filters as one HDF5 file in the format of CNN Filter DB; what is in it already stays."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """MODELs, and databases (.h5) whose content is added."""
    output: Path
    """The database; models are added where it exists. Its tables go beside it as .parquet."""
    fold_bn: bool = False
    """Scale filters by the BatchNorm that follows, as ONNX exporters do."""
    sizes: tuple[str, ...] = ()
    """Kernel sizes such as 3x3 5x5; by default all but 1x1."""
    dtype: Literal["float32", "float64"] | None = None
    """Of the filters: float64 as published; by default as the database has it, else float32."""
    compression: Compression | None = None
    """gzip saves a seventh and reads many times slower; by default as the database has it, else none."""
    metadata: Path | None = None
    """CSV table with a column model, or YAML by MODEL: further columns such as Task; wins over the flags below."""
    name: str | None = None
    """Name of the MODELs; by default the architecture."""
    task: str | None = None
    """Column Task of the MODELs."""
    training_dataset: str | None = None
    """Column Training-Dataset."""
    pretraining_dataset: str | None = None
    """Column Pretraining-Dataset."""
    visual_category: str | None = None
    """Column Visual Category of the training data."""
    paper: str | None = None
    """Column Paper, a link."""
    accessible: str | None = None
    """Column Accessible: where the weights are from."""
    dataset_url: str | None = None
    """Column Dataset URL."""
    arch: Arch = None
    allow_partial: AllowPartial = 1.0

    def __post_init__(self) -> None:
        if wrong := [size for size in self.sizes if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size)]:
            raise UserError(f"filter-db: {wrong[0]!r} is no kernel size; write height x width, such as 3x3")
        if self.output.suffix not in DATABASES:
            raise UserError(f"filter-db: {self.output} has to end in {' or '.join(DATABASES)}")

    @property
    def descriptions(self) -> Row:
        """Columns given by flags."""
        flags = {name: getattr(self, re.sub(r"[ -]", "_", name).lower()) for name in DESCRIPTIONS}
        return {name: value for name, value in flags.items() if value is not None}


def run(config: FilterDbCommand) -> None:
    """Extract what is missing, write the database, and say what is in it."""
    if not config.models:
        raise UserError("filter-db: name at least one MODEL or database")
    described = read_descriptions(config.metadata) if config.metadata else {}
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with _only_writer(config.output), ExitStack() as stack:
        old = stack.enter_context(open_filter_db(config.output)) if config.output.exists() else None
        added = [_open_other(stack, config, each) for each in dict.fromkeys(config.models) if _is_database(each)]
        config = _as_it_is(config, old or (added[0] if added else None))
        spool = Spool(
            config.output.with_name(f".{config.output.name}.part"),
            config.dtype,
            {"fold_bn": config.fold_bn, "sizes": list(config.sizes)},
        )
        names = _extract(config, spool, _keys(old) if old else {})
        parts = [Part(source=old, tables=old.tables, known=True)] if old else []
        for source in added:
            parts += _part(source, parts, str(source.path))
        parts += _part(_Described(spool, names, config.descriptions, described), parts, "")
        if any(not part.known for part in parts):
            write_filter_db(config.output, parts, dtype=config.dtype, compression=config.compression or "none")
        elif old:
            write_parquet(config.output)
        spool.remove()
    _report(config.output)


def _extract(config: FilterDbCommand, spool: Spool, present: Mapping[str, int]) -> dict[str, str]:
    """Put the filters of all models that are missing into the spool; returns the MODEL of each key."""
    names: dict[str, str] = {}
    for source in dict.fromkeys(each for each in config.models if not _is_database(each)):
        backbone = load_backbone(source, arch=config.arch, allow_partial=config.allow_partial)
        backbone.source = source
        key = model_key({"weights_hash": backbone.weights_hash(), "fold_bn": config.fold_bn})
        if key in present:
            info(f"note: {source} is in {config.output} already, as model_id {present[key]}; it is left out")
        elif key in names:
            info(f"note: {source} has the weights of {names[key]}; it is left out")
        else:
            names[key] = source
            if key not in spool.keys:
                found = model_filters(backbone, fold_bn=config.fold_bn, sizes=config.sizes)
                if not found.layers:
                    wanted = " or ".join(config.sizes) or "any size but 1x1"
                    raise UserError(f"{source} has no convolution with a kernel of {wanted}; leave it out")
                if not any(layer.size == "3x3" for _, layer in found.layers):
                    info(f"note: {source} has no 3x3 filters: it is not in /meta, but in the tables of other kernels")
                spool.add(found)
    return names


class _Described:
    """The spool's models that are wanted, with what the user says of them."""

    def __init__(self, spool: Spool, names: Mapping[str, str], flags: Row, described: Mapping[str, Row]) -> None:
        self._spool = spool
        self.tables = {}
        for size, table in spool.tables.items():
            rows = [(place, row) for place, row in enumerate(table.meta.to_dict("records")) if model_key(row) in names]
            if rows:
                named = [{**row, **flags, **described.get(names[model_key(row)], {})} for _, row in rows]
                spans = table.spans[[place for place, _ in rows]]
                self.tables[size] = dataclasses.replace(table, meta=pd.DataFrame(named), spans=spans)

    def read(self, size: str, start: int, stop: int) -> Any:
        """Filters of the spool."""
        return self._spool.read(size, start, stop)


def _part(source: FilterSource, before: Sequence[Part], name: str) -> list[Part]:
    """The source's models that the parts before it lack, numbered after theirs; empty where there are none."""
    taken = {key for part in before for key in _keys(part)}
    last = max((number for part in before for number in _keys(part).values()), default=-1)
    own = _keys(source)
    kept = {number for key, number in own.items() if key not in taken}
    if len(kept) < len(own):
        left = f"{len(own) - len(kept)} of {len(own)} models of {name}"
        info(f"note: {left} are in the database already; they are left out")
    offset = last + 1 - min(kept, default=0) if before else 0
    names = {name for part in before for table in part.tables.values() for name in table.meta.get("model", ())}
    tables: dict[str, FilterTable] = {}
    for size, table in source.tables.items():
        rows = np.flatnonzero(table.meta["model_id"].isin(kept))
        if len(rows):
            meta = table.meta.iloc[rows].reset_index(drop=True)
            meta = meta.assign(model_id=meta["model_id"] + offset)
            if "model" in meta and "weights_hash" in meta:  # other weights under a name that is taken
                again = meta["model"].isin(names) & meta["weights_hash"].notna()
                meta["model"] = meta["model"].where(~again, meta["model"] + " #" + meta["model_id"].astype(str))
            tables[size] = dataclasses.replace(table, meta=meta, spans=table.spans[rows])
    return [Part(source=source, tables=tables)] if tables else []


def _keys(source: FilterSource | Part) -> dict[str, int]:
    """The model_id of each model, by what makes it the same as another."""
    found: dict[str, int] = {}
    for table in source.tables.values():
        for row in table.meta.drop_duplicates("model_id").to_dict("records"):
            found.setdefault(model_key(row), int(row["model_id"]))
    return found


def _is_database(name: str) -> bool:
    return Path(name).suffix in DATABASES or (Path(name).is_file() and h5py.is_hdf5(name))


def _open_other(stack: ExitStack, config: FilterDbCommand, name: str) -> FilterDatabase:
    path = Path(name)
    if path.exists() and config.output.exists() and path.samefile(config.output):
        raise UserError(f"filter-db: {name} is the output itself; leave it out")
    return stack.enter_context(open_filter_db(path))


def _as_it_is(config: FilterDbCommand, old: FilterDatabase | None) -> FilterDbCommand:
    """What is not given is as in the database that there is."""
    table = next(iter(old.tables.values())) if old else None
    dtype = config.dtype or ("float64" if table is not None and table.dtype == np.float64 else "float32")
    compression = config.compression or ("gzip" if old and old.compressed else "none")
    return dataclasses.replace(config, dtype=dtype, compression=compression)


@contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Refuse a second command that writes the same database."""
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it however we end
        except BlockingIOError:
            raise UserError(f"another command is writing {path}; wait for it, or give another --output") from None
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            info(f"note: no locks in {path.parent} ({reason}); write {path} from one command at a time")
        yield


def _report(path: Path) -> None:
    with open_filter_db(path) as database:
        for size, table in database.tables.items():
            models = table.meta["model_id"].nunique() if len(table.meta) else 0
            print(f"{size}: {table.count} filters, {len(table.meta)} layers, {models} models")
    print(path)
