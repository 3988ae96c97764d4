"""`shards check` finds what is wrong with a folder of shards; `shards index` writes missing index files."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from convscope.core.data.decode import DecodeError
from convscope.core.data.decode import decode as decode_image
from convscope.core.data.shard_index import index_path, parse_sample, scan, write_index
from convscope.core.data.shard_listing import ShardRecord, read_listing
from convscope.core.errors import UserError
from convscope.core.files import read_json, sha256_file
from convscope.core.log import progress


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Read every shard of every split, and name what is wrong; exits with an error if anything is."""

    folder: tyro.conf.Positional[str]
    """Folder that `shards build` wrote, or a folder of tars."""
    decode: bool = True
    """Decode every image; without, only headers, counts, labels and hashes are looked at."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Write the index beside every shard that lacks one or has a stale one."""

    folder: tyro.conf.Positional[str]
    """Folder that holds shards, at any depth."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; `shard` is relative to the checked folder, `key` None where it is not about a sample."""

    shard: str
    key: str | None
    message: str

    def __str__(self) -> str:
        return f"{self.shard} {self.key}: {self.message}" if self.key else f"{self.shard}: {self.message}"


@dataclass
class _ShardReport:
    shard: str
    problems: list[Problem] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)

    def add(self, message: str, key: str | None = None) -> None:
        self.problems.append(Problem(self.shard, key, message))


def run(config: CheckConfig) -> None:
    """Check and print one line per problem.

    Raises:
        UserError: anything is wrong.
    """
    problems = check(Path(config.folder), decode=config.decode)
    for problem in problems:
        print(str(problem).encode("utf-8", "backslashreplace").decode())  # names in old tars may be anything
    if problems:
        raise UserError(f"{config.folder}: {len(problems)} problems, listed above")
    splits = ", ".join(path.name for path in _splits(Path(config.folder)))
    print(f"{config.folder}: nothing wrong in {splits}")


def run_index(config: IndexConfig) -> None:
    """Write missing and stale indices.

    Raises:
        UserError: no shards, or a shard that is damaged.
    """
    shards = sorted(Path(config.folder).rglob("*.tar"))
    if not shards:
        raise UserError(f"{config.folder} holds no .tar files")
    written = 0
    with progress("indexing", len(shards)) as ticker:
        for path in shards:
            starts, error = scan(path)
            if error is not None:
                raise UserError(f"{path}: {error}; get or build this shard again")
            if _index_problem(path, starts):
                write_index(path)
                written += 1
            ticker.advance()
    print(f"{config.folder}: {written} of {len(shards)} indices written")


def check(folder: Path, *, decode: bool = True) -> list[Problem]:
    """Everything wrong with the shards of every split under `folder`, in the order of splits, shards and samples.

    Args:
        folder: what `shards build` wrote, or a folder of tars.
        decode: also decode every image.

    Raises:
        UserError: no splits there.
    """
    splits = _splits(folder)
    if not splits:
        raise UserError(f"{folder} holds no splits, that is folders with .tar files")
    classes = read_json(folder / "classes.json") if (folder / "classes.json").exists() else None
    return [problem for split in splits for problem in _check_split(folder, split, classes, decode)]


def _splits(folder: Path) -> list[Path]:
    """Folders with shards: those below `folder`, or `folder` itself for shards made elsewhere."""
    return sorted({path.parent for pattern in ("*.tar", "*/*.tar", "*/.build.json") for path in folder.glob(pattern)})


def _check_split(folder: Path, split: Path, classes: list[str] | None, decode: bool) -> Iterator[Problem]:
    listing = read_listing(split)
    listed = listing.by_file if listing else None
    if listed is None and (split / ".build.json").exists():
        yield Problem(str(split.relative_to(folder)), None, "no shards.json: the build is unfinished; start it again")
    present = sorted(split.glob("*.tar"))
    for name in sorted(set(listed or {}) - {path.name for path in present}):
        yield Problem((split / name).relative_to(folder).as_posix(), None, "in shards.json but missing")

    def look(path: Path) -> _ShardReport:
        report = _check_shard(path, folder, classes, decode)
        if listed is not None:
            _compare(report, path, listed.get(path.name))
        return report

    seen: dict[str, str] = {}
    reports = []
    pool = ThreadPoolExecutor()  # decoding, hashing and reading release the interpreter lock
    try:
        with progress(f"checking {split.name}", len(present)) as ticker:
            for report in pool.map(look, present):
                for key in report.keys:
                    if key in seen:
                        report.add(f"key already in {seen[key]}", key)
                    seen[key] = report.shard
                reports.append(report)
                ticker.advance()
    finally:
        pool.shutdown(cancel_futures=True)
    labelled = any(len(report.unlabelled) < len(report.keys) for report in reports)
    for report in reports:
        yield from report.problems
        if labelled:
            yield from (Problem(report.shard, key, "no label, while others have one") for key in report.unlabelled)


def _check_shard(path: Path, folder: Path, classes: list[str] | None, decode: bool) -> _ShardReport:
    report = _ShardReport(path.relative_to(folder).as_posix())
    starts, error = scan(path)
    if error is not None:
        report.add(error)
    if problem := _index_problem(path, starts):
        report.add(problem)
    with open(path, "rb") as file:
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist()):
            file.seek(start)
            sample = parse_sample(file.read(stop - start))
            key = str(sample["__key__"])
            report.keys.append(key)
            _check_label(report, key, sample.get("cls"), classes)
            if decode:
                try:
                    decode_image(sample)
                except DecodeError as failure:
                    report.add(failure.cause, key)
    return report


def _check_label(report: _ShardReport, key: str, label: bytes | str | None, classes: list[str] | None) -> None:
    if label is None:
        report.unlabelled.append(key)
        return
    text = label if isinstance(label, str) else label.decode(errors="replace")
    if not text.strip().isdecimal():
        report.add(f"label {text!r} is no class index", key)
    elif classes is not None and int(text) >= len(classes):
        report.add(f"label {text} is outside classes.json, which has {len(classes)} classes", key)


def _index_problem(path: Path, starts: Any) -> str | None:
    """What is wrong with a shard's index, given the sample starts that a scan found."""
    index = index_path(path)
    if not index.exists():
        return "no index; write it with shards index"
    if not np.array_equal(np.fromfile(index, "<u8"), starts):
        return "stale index; write it anew with shards index"
    return None


def _compare(report: _ShardReport, path: Path, record: ShardRecord | None) -> None:
    """Hold a shard against its line of shards.json."""
    if record is None:
        report.add("not in shards.json")
        return
    if len(report.keys) != record.samples:
        report.add(f"{len(report.keys)} samples, {record.samples} in shards.json")
    if path.stat().st_size != record.bytes:
        report.add(f"{path.stat().st_size} bytes, {record.bytes} in shards.json")
    elif sha256_file(path) != record.sha256:
        report.add("sha256 differs from shards.json")
