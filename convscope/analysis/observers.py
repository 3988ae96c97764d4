"""Answers of people and networks to cue-conflict stimuli, from the published tables of responses."""

import csv
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from convscope.analysis.cue_conflict import Numbers, parse_name
from convscope.analysis.sixteen_categories import ABSTAINED, CATEGORIES
from convscope.core.errors import UserError
from convscope.core.files import read_bytes

Kind = Literal["human", "network", "model", "untrained"]

COLUMNS = ("subj", "object_response", "category", "imagename")
NO_ANSWER = ("na", "nan", "none", "")


@dataclass(frozen=True)
class Answers:
    """One observer's decisions, a row a stimulus."""

    kind: Kind
    keys: list[str]  # cat3-elephant2
    shape: Numbers = field(repr=False)  # (N,) category
    texture: Numbers = field(repr=False)
    decisions: Numbers = field(repr=False)  # -1 without one

    def correct(self) -> dict[str, bool]:
        """Whether the decision was the shape, by stimulus."""
        return dict(zip(self.keys, (self.decisions == self.shape).tolist()))


def read_observers(source: str) -> dict[str, Answers]:
    """Observers by name, from a CSV file, a folder of them, or a zip of them.

    A table has the columns subj, object_response, category and imagename; the sessions of an observer are joined.
    Subjects whose name starts with "subject" are people.

    Raises:
        UserError: no such file, a table without these columns, a category that is none of the 16, or two answers of an
            observer to one stimulus.
    """
    found: dict[str, dict[str, tuple[int, int, int]]] = {}
    for name, text in _tables(Path(source)):
        reader = csv.DictReader(io.StringIO(text))
        if absent := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
            raise UserError(f"{name} has no column {', '.join(absent)}; response tables have {', '.join(COLUMNS)}")
        for row in reader:
            key, answer = _answer(row, f"{name}, line {reader.line_num}")
            rows = found.setdefault(row["subj"], {})
            if key in rows:
                raise UserError(f"{name}, line {reader.line_num}: {row['subj']} has answered to {key} before")
            rows[key] = answer
    if not found:
        raise UserError(f"{source} holds no responses")
    return {subject: _joined(subject, rows) for subject, rows in sorted(found.items(), key=_people_first)}


def _tables(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every table; macOS's shadows of files are none."""
    if not path.exists():
        raise UserError(f"--observers {path} does not exist; give a CSV file, or a folder or zip of them")
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if _is_table(name))
            yield from ((f"{path}/{name}", archive.read(name).decode("utf-8-sig", "replace")) for name in names)
    else:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and (file == path or _is_table(file.as_posix())):
                yield str(file), read_bytes(file).decode("utf-8-sig", "replace")


def _is_table(name: str) -> bool:
    return name.lower().endswith(".csv") and not name.rpartition("/")[2].startswith(".") and "__MACOSX" not in name


def _answer(row: dict[str, str], where: str) -> tuple[str, tuple[int, int, int]]:
    """Stimulus, and the categories of its shape, its texture and the answer."""
    if any(row[column] is None for column in COLUMNS):
        raise UserError(f"{where} is cut short")
    shape, response = row["category"], row["object_response"]
    names = parse_name(f"{shape}/{row['imagename']}", CATEGORIES)
    if shape not in CATEGORIES or (response not in CATEGORIES and response.lower() not in NO_ANSWER):
        raise UserError(f"{where}: {shape!r} or {response!r} is none of {', '.join(CATEGORIES)}")
    decision = CATEGORIES.index(response) if response in CATEGORIES else ABSTAINED
    return names.key, (CATEGORIES.index(shape), CATEGORIES.index(names.texture), decision)


def _people_first(item: tuple[str, object]) -> tuple[bool, str]:
    return not item[0].startswith("subject"), item[0]


def _joined(subject: str, rows: dict[str, tuple[int, int, int]]) -> Answers:
    keys = sorted(rows)
    shape, texture, decisions = np.array([rows[key] for key in keys], dtype=np.int64).T
    return Answers("human" if subject.startswith("subject") else "network", keys, shape, texture, decisions)
