"""Filters of models on their way into a database: plain files that survive a kill.

```
.NAME.part/journal.jsonl    what the filters depend on; then a line a model, once its filters are safe on disk
.NAME.part/3x3.raw ...      filters of each kernel size, one layer after the other
```

A run that was stopped leaves whole models behind, and the next one goes on after them. What lies behind the last line's
end is overwritten.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from convscope import __version__
from convscope.analysis.filter_db import FilterTable
from convscope.analysis.filter_db_rows import ModelFilters, Row, model_key
from convscope.core.errors import UserError
from convscope.core.files import whole_lines, write_bytes
from convscope.core.log import info

Array = NDArray[Any]


class Spool:
    """Models that are not in the database yet.

    Args:
        folder: made when the first model is added.
        dtype: of the filters.
        settings: what they depend on besides; a spool of other settings is started anew.
    """

    def __init__(self, folder: Path, dtype: Any, settings: Mapping[str, Any]) -> None:
        self.folder, self.dtype = folder, np.dtype(dtype)
        self._head = {"convscope": __version__, "dtype": self.dtype.name, **settings}
        self._models: list[dict[str, Any]] = []
        self._begun = False
        lines = whole_lines(self._journal)
        if lines and lines[0] == self._head:
            self._models = [line for line in lines[1:] if self._whole(line["ends"])]
        elif lines:
            info(f"note: {folder} holds unfinished work of a command with other settings; it is discarded")
        if self._models:
            info(f"note: going on after {len(self._models)} model(s) of an earlier attempt")

    @property
    def keys(self) -> list[str]:
        """The models' keys, in order."""
        return [model_key(line["row"]) for line in self._models]

    def add(self, model: ModelFilters) -> None:
        """Append a model's filters.

        Raises:
            UserError: they are not finite, or the file system refuses.
        """
        ends: dict[str, int] = dict(self._models[-1]["ends"]) if self._models else {}
        rows: list[Row] = []
        try:
            if not self._begun:
                self._begin()
            for row, layer in model.layers:
                with np.errstate(over="ignore"):  # told below
                    filters = layer.filters.cpu().double().numpy().astype(self.dtype)
                if not np.isfinite(filters).all():
                    raise UserError(f"{model.row['source']}: {layer.name} holds NaN or infinity as {self.dtype}")
                start = ends.get(layer.size, 0)
                self._append(layer.size, start, filters)
                ends[layer.size] = start + len(filters)
                rows.append({**row, "start": start, "stop": ends[layer.size]})
            self._record({"row": model.row, "layers": rows, "ends": ends})
        except OSError as error:
            raise UserError(f"cannot write into {self.folder}: {error.strerror or error}") from error

    def row(self, index: int) -> Row:
        """What is known of a model."""
        return dict(self._models[index]["row"])

    @property
    def tables(self) -> Mapping[str, FilterTable]:
        """Rows of all models, which are numbered in their order."""
        found: dict[str, list[Row]] = {}
        for number, line in enumerate(self._models):
            for layer in line["layers"]:
                found.setdefault(layer["kernel_size"], []).append({"model_id": number, **layer, **line["row"]})
        tables = {}
        for size, rows in found.items():
            meta = pd.DataFrame(rows)
            spans = meta[["start", "stop"]].to_numpy(dtype=np.int64)
            tables[size] = FilterTable(size, self.dtype, meta.drop(columns=["start", "stop"]), spans)
        return tables

    def read(self, size: str, start: int, stop: int) -> Array:
        """Filters `start` to `stop` (stop - start, height * width)."""
        width = _weights(size)
        values = np.fromfile(
            self._raw(size), self.dtype, (stop - start) * width, offset=start * width * self.dtype.itemsize
        )
        return values.reshape(stop - start, width)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _journal(self) -> Path:
        return self.folder / "journal.jsonl"

    def _raw(self, size: str) -> Path:
        return self.folder / f"{size}.raw"

    def _whole(self, ends: Mapping[str, int]) -> bool:
        """Whether the filters that a line speaks of are there."""
        files = [(self._raw(size), end * _weights(size) * self.dtype.itemsize) for size, end in ends.items()]
        return all(file.exists() and file.stat().st_size >= length for file, length in files)

    def _begin(self) -> None:
        """Write the journal as it is known: without a last line that a kill has cut."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [self._head, *self._models]
        write_bytes(self._journal, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self._begun = True

    def _append(self, size: str, start: int, filters: Array) -> None:
        file = self._raw(size)
        file.touch()
        with file.open("r+b") as raw:
            raw.seek(start * filters.shape[1] * self.dtype.itemsize)
            raw.truncate()
            raw.write(np.ascontiguousarray(filters).tobytes())

    def _record(self, line: dict[str, Any]) -> None:
        for size in line["ends"]:
            with self._raw(size).open("r+b") as raw:
                os.fsync(raw.fileno())
        with self._journal.open("a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self._models.append(line)


def _weights(size: str) -> int:
    height, width = size.split("x")
    return int(height) * int(width)
