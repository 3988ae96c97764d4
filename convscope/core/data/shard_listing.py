"""shards.json: which shards make up a split that `shards build` has finished."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convscope.core.errors import UserError
from convscope.core.files import read_json, write_json

NAME = "shards.json"
VERSION = 1


@dataclass(frozen=True)
class ShardRecord:
    """One shard."""

    file: str
    samples: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, values: Any) -> "ShardRecord":
        """From a JSON object, of which other fields are ignored.

        Raises:
            KeyError, TypeError, ValueError: it is no record.
        """
        return cls(str(values["file"]), int(values["samples"]), int(values["bytes"]), str(values["sha256"]))


@dataclass(frozen=True)
class ShardListing:
    """A finished split: its shards in order, their samples, and a fingerprint of all their bytes."""

    fingerprint: str
    samples: int
    shards: tuple[ShardRecord, ...]

    @property
    def by_file(self) -> dict[str, ShardRecord]:
        """The shards by file name."""
        return {record.file: record for record in self.shards}


def read_listing(folder: Path) -> ShardListing | None:
    """The listing of the split in `folder`; None where there is none: the shards came from elsewhere or are unfinished.

    Raises:
        UserError: it is not what a build writes.
    """
    path = folder / NAME
    if not path.exists():
        return None
    values = read_json(path)
    try:
        shards = tuple(ShardRecord.of(row) for row in values["shards"])
        return ShardListing(str(values["fingerprint"]), int(values["samples"]), shards)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not what shards build writes: {error!r}") from error


def write_listing(folder: Path, shards: Sequence[ShardRecord]) -> None:
    """Declare the split in `folder` finished."""
    fingerprint = hashlib.sha256("".join(record.sha256 for record in shards).encode()).hexdigest()
    values = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "samples": sum(record.samples for record in shards),
        "shards": [asdict(record) for record in shards],
    }
    write_json(folder / NAME, values)
