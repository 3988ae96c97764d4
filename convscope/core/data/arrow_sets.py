"""Hugging Face data sets on disk as a source of shards: Arrow files of `save_to_disk`, Parquet files of the hub."""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from convscope.core.data.sources import Columns, EncodedImage, Item, Listing, suffix_of
from convscope.core.data.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, LABEL_COLUMNS
from convscope.core.errors import UserError

SUFFIXES = (".arrow", ".parquet")
PART = re.compile(r"(?:.*-)?(?P<split>[A-Za-z_]+)-\d+-of-\d+")  # train-00000-of-00010, name-train-00000-of-00010
SIGNATURES = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}


def arrow_files(path: Path) -> list[Path]:
    """The data set's files: `path` itself, or those in a folder and one or two folders below it."""
    if path.is_file():
        return [path] if path.suffix in SUFFIXES else []
    found = [file for pattern in ("*", "*/*", "*/*/*") for suffix in SUFFIXES for file in path.glob(pattern + suffix)]
    return sorted(file for file in found if not file.name.startswith((".", "cache-")))


def holds_images(path: Path) -> bool:
    """Whether a Parquet or Arrow file has images in its cells, and not names of files."""
    return any(_is_image(field.type) for field in _schema(path))


class ArrowSource:
    """Images as `datasets` stores them, {bytes, path} or plain bytes, with labels named by their ClassLabel feature."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self.path, self.columns = path, columns
        self.files: dict[str, list[Path]] = {}
        for file in arrow_files(path):
            self.files.setdefault(_split_of(file, path), []).append(file)
        self.scratch = tempfile.TemporaryDirectory(prefix="convscope-")  # lives as long as the source
        self.images: dict[str, Any] = {}

    def listing(self) -> Listing:  # noqa: D102
        splits: dict[str, list[Item]] = {}
        classes: dict[str, None] = {}  # of all splits, each once and in order
        for split, files in self.files.items():
            schema = _schema(files[0])
            image = self._image_column(schema)
            label = self._column(schema.names, self.columns.label, LABEL_COLUMNS)
            caption = self._column(schema.names, self.columns.caption, CAPTION_COLUMNS)
            names = _class_names(schema, label)
            classes |= dict.fromkeys(names or ())
            self.images[split] = self._open_images(files, image)
            rows = _rows(files, [name for name in schema.names if not _is_image(schema.field(name).type)])
            splits[split] = [self._item(split, i, row, label, caption, names) for i, row in enumerate(rows)]
        return Listing(splits, list(classes) or None)

    def read(self, item: Item) -> EncodedImage:  # noqa: D102
        split, _, row = item.name.rpartition("/")
        cell = self.images[split][int(row)].as_py()
        data, name = (cell.get("bytes"), cell.get("path") or "") if isinstance(cell, dict) else (cell, "")
        if not data:
            raise UserError(f"{self.path}: row {row} of {split or 'the set'} has no image bytes, only {name!r}")
        return EncodedImage(_suffix(data, name), data)

    def _item(
        self,
        split: str,
        number: int,
        row: Mapping[str, Any],
        label: str | None,
        caption: str | None,
        names: Sequence[str] | None,
    ) -> Item:
        fields = {name: value for name, value in row.items() if name not in (label, caption) and value is not None}
        value = row[label] if label else None
        if isinstance(value, int) and value < 0:
            value = None  # how `datasets` marks rows whose label is withheld
        elif value is not None:
            value = names[value] if names is not None and isinstance(value, int) else str(value)
        text = row[caption] if caption else None
        text = text[0] if isinstance(text, list) and text else text  # the first of several captions
        return Item(f"{split}/{number}".removeprefix("/"), -1, value, None if text is None else str(text), fields)

    def _image_column(self, schema: Any) -> str:
        held = [field.name for field in schema if _is_image(field.type)]
        column = self._column(held, self.columns.image, IMAGE_COLUMNS) or (held[0] if len(held) == 1 else None)
        if column is None:
            raise UserError(f"{self.path} has no image column among {', '.join(schema.names)}; name --image-column")
        return column

    def _column(self, present: Sequence[str], named: str | None, usual: Sequence[str]) -> str | None:
        if named is not None and named not in present:
            raise UserError(f"{self.path} has no column {named!r}; its columns: {', '.join(present)}")
        lower = {name.lower(): name for name in present}
        return named or next((lower[name] for name in usual if name in lower), None)

    def _open_images(self, files: Sequence[Path], column: str) -> Any:
        """The column, mapped from disk: Parquet has no random access, so a copy of it is laid out as Arrow."""
        chunks = []
        for number, file in enumerate(files):
            if file.suffix == ".parquet":
                file = _as_arrow(file, column, Path(self.scratch.name) / f"{len(self.images)}-{number}.arrow")
            chunks += _table(file).column(column).chunks
        return pyarrow.chunked_array(chunks)


def _split_of(file: Path, root: Path) -> str:
    """By the folder (`save_to_disk` of several splits) or by the file's name (the hub); "" if neither tells."""
    match = PART.fullmatch(file.stem)
    if match and match["split"] != "data":
        return match["split"]
    folder = file.parent.relative_to(root).name if root.is_dir() else ""
    return "" if folder == "data" else folder


def _schema(file: Path) -> Any:
    try:
        return parquet.read_schema(file) if file.suffix == ".parquet" else _table(file).schema
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {file}: {str(error).splitlines()[0]}") from error


def _table(file: Path) -> Any:
    """An Arrow file, mapped into memory: `datasets` writes streams, other tools files."""
    mapped = pyarrow.memory_map(str(file))
    try:
        return pyarrow.ipc.open_stream(mapped).read_all()
    except pyarrow.ArrowInvalid:
        mapped.seek(0)
        return pyarrow.ipc.open_file(mapped).read_all()


def _as_arrow(file: Path, column: str, target: Path) -> Path:
    with parquet.ParquetFile(file) as source, pyarrow.OSFile(str(target), "wb") as sink:
        schema = pyarrow.schema([source.schema_arrow.field(column)])
        with pyarrow.ipc.new_stream(sink, schema) as writer:
            for batch in source.iter_batches(batch_size=256, columns=[column]):
                writer.write_batch(batch.cast(schema))
    return target


def _rows(files: Sequence[Path], columns: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for file in files:
        if file.suffix == ".parquet":
            count, table = parquet.read_metadata(file).num_rows, parquet.read_table(file, columns=list(columns))
        else:
            whole = _table(file)
            count, table = whole.num_rows, whole.select(list(columns))
        rows += table.to_pylist() if columns else [{} for _ in range(count)]
    return rows


def _class_names(schema: Any, label: str | None) -> list[str] | None:
    """Names of the label's ClassLabel feature, which `datasets` keeps in the schema."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if label is None or stored is None:
        return None
    feature = json.loads(stored).get("info", {}).get("features", {}).get(label, {})
    names = feature.get("names") if isinstance(feature, dict) else None
    return [str(name) for name in names] if names else None


def _is_image(kind: Any) -> bool:
    types = pyarrow.types
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _suffix(data: bytes, name: str) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    found = next((suffix for signature, suffix in SIGNATURES.items() if data.startswith(signature)), None)
    return found or suffix_of(name) or "jpg"
