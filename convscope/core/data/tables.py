"""Tables of image paths with captions or labels as a source of shards."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from convscope.core.data.decode import IMAGE_SUFFIXES
from convscope.core.data.sources import Columns, EncodedImage, Item, Listing, read_file, suffix_of
from convscope.core.errors import UserError

IMAGE_COLUMNS = ("image", "path", "filepath", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "text", "title")
LABEL_COLUMNS = ("label", "class", "cls", "category")


class TableSource:
    """A CSV, TSV or Parquet table with a column of image paths, relative to the table's folder."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self.path, self.columns = path, columns

    def listing(self) -> Listing:  # noqa: D102
        table = _read_table(self.path)
        image = self._column(table, self.columns.image, IMAGE_COLUMNS)
        caption = self._column(table, self.columns.caption, CAPTION_COLUMNS)
        label = self._column(table, self.columns.label, LABEL_COLUMNS)
        if image is None:
            raise UserError(f"{self.path} has no image column among {', '.join(table)}; name it with --image-column")
        items, ignored = [], []
        for row in range(len(table[image])):
            cells = {column: _scalar(values[row]) for column, values in table.items()}
            name = self._text(cells, image, row)
            size = self._size(name, row)
            if size == 0 or suffix_of(name) not in IMAGE_SUFFIXES:
                ignored.append(name)
                continue
            rest = {c: v for c, v in cells.items() if c not in (image, caption, label) and v is not None}
            label_text = self._text(cells, label, row) if label else None
            caption_text = self._text(cells, caption, row) if caption else None
            items.append(Item(name, size, label_text, caption_text, rest))
        return Listing({"": items}, None, ignored)

    def _column(self, table: Mapping[str, Any], named: str | None, usual: Iterable[str]) -> str | None:
        if named is not None and named not in table:
            raise UserError(f"{self.path} has no column {named!r}; its columns: {', '.join(table)}")
        lower = {name.lower(): name for name in table}
        return named or next((lower[name] for name in usual if name in lower), None)

    def _text(self, cells: Mapping[str, Any], column: str, row: int) -> str:
        value = cells[column]
        if value is None or value == "":
            raise UserError(f"{self.path}: row {row + 1} has no {column}; fill it in or drop the row")
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{self.path}: column {column} holds {type(value).__name__} values, not text")
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    def _size(self, name: str, row: int) -> int:
        try:
            return (self.path.parent / name).stat().st_size
        except OSError as error:
            raise UserError(f"{self.path}: row {row + 1} names {name}: {error.strerror}") from error

    def read(self, item: Item) -> EncodedImage:  # noqa: D102
        return read_file(self.path.parent / item.name)


def _read_table(path: Path) -> dict[str, list[Any]]:
    import pandas

    try:
        if suffix_of(path.name) == "parquet":
            frame = pandas.read_parquet(path)
        else:
            separator = "\t" if suffix_of(path.name) == "tsv" else ","
            frame = pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False)  # "007", "NA" stay text
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the table {path}: {str(error).splitlines()[0]}") from error
    return {str(name): frame[name].tolist() for name in frame.columns}


def _scalar(value: Any) -> Any:
    """A table's cell as JSON holds it; None for a missing one."""
    return None if isinstance(value, float) and value != value else value
