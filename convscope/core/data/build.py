"""`shards build`: pack images into webdataset shards, reproducibly and resumably."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from convscope.core.config import parse_assignments
from convscope.core.data.shard_listing import ShardRecord, write_listing
from convscope.core.data.shard_writer import ShardJob, finished, report_files, write_shard
from convscope.core.data.sources import Columns, Item, Source, open_source
from convscope.core.errors import UserError
from convscope.core.files import read_json, write_json
from convscope.core.log import progress


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Pack images into shards with a global shuffle; a build that was stopped goes on where it was."""

    source: tyro.conf.Positional[str]
    """Folder, zip, csv/tsv/parquet table, Hugging Face set (arrow, parquet), torchvision:NAME or builtin:shapes."""
    dest: tyro.conf.Positional[str]
    """Folder for the shards: DEST/SPLIT/SPLIT-000000.tar."""
    split: str | None = None
    """Of a source with splits, build only this one; otherwise the name of the one split (train)."""
    splits: tuple[str, ...] = ()
    """Divide a source that has no splits, by class: train=0.9 test=0.1."""
    samples_per_shard: int = 1000
    seed: int = 0
    """Fixes the order, and who goes to which split."""
    shuffle: bool = True
    """Shuffle over all shards; without, samples keep the order of their names."""
    resize: int | None = None
    """Short side in pixels of larger images; they are encoded anew. Otherwise bytes stay as they are."""
    workers: int = 0
    """Shards written at once; 0 chooses by the number of cores."""
    image_column: str | None = None
    caption_column: str | None = None
    label_column: str | None = None
    data_root: str | None = None
    """Where torchvision finds or puts its downloads (default: the cache folder)."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise UserError(f"--samples-per-shard must be at least 1, got {self.samples_per_shard}")
        if self.resize is not None and self.resize < 1:
            raise UserError(f"--resize must be at least 1 pixel, got {self.resize}")
        if min(self.workers, self.seed) < 0:
            raise UserError("--workers and --seed must be at least 0")
        if self.split is not None and self.splits:
            raise UserError("--split and --splits exclude each other")


def run(config: BuildConfig) -> None:
    """Build and print a summary.

    Raises:
        UserError: unusable source or settings, a DEST built from something else, a disk that is full.
    """
    root = Path(config.data_root) if config.data_root else None
    columns = Columns(image=config.image_column, caption=config.caption_column, label=config.label_column)
    source = open_source(config.source, columns=columns, split=config.split, data_root=root)
    built = build(source, config)
    print("; ".join(_summary(split, records) for split, records in built.items()))
    path = Path(config.dest) / "classes.json"
    print(f"{config.dest}: {len(read_json(path)) if path.exists() else 'no'} classes; verify with shards check")


def _summary(split: str, records: Sequence[ShardRecord]) -> str:
    shards = f"{len(records)} shard" + ("s" if len(records) > 1 else "")
    samples, size = sum(record.samples for record in records), sum(record.bytes for record in records)
    return f"{split}: {samples} samples in {shards}, {size / 1e6:.1f} MB"


def build(source: Source, config: BuildConfig) -> dict[str, list[ShardRecord]]:
    """Write every split of `source` under `config.dest`; returns the records of each split's shards."""
    listing = source.listing()
    report_files("skipped", listing.ignored)
    plan = _plan(listing.splits, config)
    dest = Path(config.dest)
    classes = _classes(plan, listing.classes, dest)
    settings = {name: _settings(items, classes, config) for name, items in plan.items()}
    for split in plan:
        _require_same_build(dest / split, settings[split])
    if classes is not None:
        write_json(dest / "classes.json", classes)
    label_of = {name: i for i, name in enumerate(classes or [])}
    jobs = {split: _jobs(dest / split, items, config.samples_per_shard, label_of) for split, items in plan.items()}
    for split in plan:
        write_json(dest / split / ".build.json", settings[split])
    records = _write_shards(source, [job for group in jobs.values() for job in group], config)
    return {split: _finish(dest / split, group, records) for split, group in jobs.items()}


def _plan(splits: Mapping[str, list[Item]], config: BuildConfig) -> dict[str, list[Item]]:
    """The samples of each split to build, in the order in which they are packed."""
    if set(splits) == {""}:
        plan = _divide(splits[""], config) if config.splits else {config.split or "train": splits[""]}
    elif config.splits:
        raise UserError(f"the source has its own splits ({', '.join(splits)}); leave --splits out")
    elif config.split is not None and config.split not in splits:
        raise UserError(f"the source has no split {config.split!r}; it has {', '.join(splits)}")
    else:
        plan = {name: items for name, items in splits.items() if config.split in (None, name)}
    if empty := [name for name, items in plan.items() if not items]:
        raise UserError(f"no images for split {', '.join(empty)}")
    for name in plan:
        if not name or name.startswith(".") or "/" in name or os.sep in name:
            raise UserError(f"{name!r} cannot be the name of a split")
    if not config.shuffle:
        return plan
    shuffled = {}
    for name, items in plan.items():
        rng = np.random.default_rng([config.seed, *name.encode()])
        shuffled[name] = [items[i] for i in rng.permutation(len(items))]
    return shuffled


def _divide(items: Sequence[Item], config: BuildConfig) -> dict[str, list[Item]]:
    """Split by shares: class by class, in random order, each sample goes to the split that most lags its share."""
    shares = parse_assignments(config.splits)
    values = list(shares.values())
    if any(not isinstance(v, (int, float)) or v <= 0 for v in values) or abs(sum(values) - 1) > 1e-6:
        raise UserError(
            f"--splits needs shares that add up to 1, such as train=0.9 test=0.1; got {' '.join(config.splits)}"
        )
    order = np.random.default_rng(config.seed).permutation(len(items)).tolist()
    order.sort(key=lambda i: items[i].label or "")  # stable: random within a class
    divided: dict[str, list[int]] = {name: [] for name in shares}
    for position, i in enumerate(order):
        lag = {name: share * (position + 1) - len(divided[name]) for name, share in shares.items()}
        divided[max(lag, key=lambda name: lag[name])].append(i)
    return {name: [items[i] for i in sorted(chosen)] for name, chosen in divided.items()}


def _classes(plan: Mapping[str, Sequence[Item]], own: list[str] | None, dest: Path) -> list[str] | None:
    """Class names in label order: those DEST has already, the source's own, or those of train, sorted."""
    found = {split: {item.label for item in items if item.label is not None} for split, items in plan.items()}
    present = set().union(*found.values())
    if not present:
        return None
    path = dest / "classes.json"
    if path.exists() and any(dest.glob("*/.build.json")):  # else of a build whose splits are all deleted
        known: list[str] = read_json(path)
        origin = f"{path} (built earlier) lacks"
    else:
        known = own or sorted(found.get("train") or present, key=_natural)
        origin = "train lacks"
    for split, names in found.items():
        if unknown := sorted(names - set(known)):
            raise UserError(
                f"{split} has class {unknown[0]!r}, which {origin} ({len(unknown)} such); build train first"
            )
    return known


def _natural(name: str) -> tuple[bool, int, str]:
    """Order of class names: numbers by value and before words."""
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)


def _settings(items: Sequence[Item], classes: Sequence[str] | None, config: BuildConfig) -> dict[str, Any]:
    """What decides the bytes of a split; kept in DEST/SPLIT/.build.json so that builds are never mixed."""
    digest = hashlib.sha256(json.dumps(classes).encode())
    for item in items:
        row = (item.name, item.size, item.label, item.caption, dict(item.fields))
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return {
        "samples_per_shard": config.samples_per_shard,
        "resize": config.resize,
        "seed": config.seed,
        "shuffle": config.shuffle,
        "images": digest.hexdigest(),
    }


def _require_same_build(folder: Path, settings: Mapping[str, Any]) -> None:
    if not folder.exists() or all(
        path.name.startswith(".") and path.name != ".build.json" for path in folder.iterdir()
    ):
        return
    path = folder / ".build.json"
    if not path.exists():
        raise UserError(f"{folder} holds other files; build into a new folder")
    before = read_json(path)
    for name, value in settings.items():
        if before.get(name) != value:
            change = "other images or labels" if name == "images" else f"{name} {before.get(name)}, not {value}"
            raise UserError(f"{folder} was built from {change}; build into a new folder, or delete this one")


def _jobs(folder: Path, items: Sequence[Item], per_shard: int, label_of: Mapping[str, int]) -> list[ShardJob]:
    starts = range(0, len(items), per_shard)
    paths = [folder / f"{folder.name}-{i:06d}.tar" for i in range(len(starts))]
    return [ShardJob(path, first, items[first : first + per_shard], label_of) for path, first in zip(paths, starts)]


def _write_shards(source: Source, jobs: Sequence[ShardJob], config: BuildConfig) -> dict[Path, ShardRecord]:
    records: dict[Path, ShardRecord] = {}
    futures: dict[Future[ShardRecord], ShardJob] = {}
    # Threads, not processes: reading, hashing, decoding and encoding all release the interpreter lock, and a script
    # that opens builtin:shapes needs no main guard (drawing holds the lock, but takes ten seconds, once).
    pool = ThreadPoolExecutor(config.workers or None)
    try:
        with progress("packing", sum(len(job.items) for job in jobs)) as ticker:
            for job in jobs:
                if record := finished(job):
                    records[job.path] = record
                    ticker.advance(len(job.items))
                else:
                    futures[pool.submit(write_shard, source, job, config.resize)] = job
            for future in as_completed(futures):
                records[futures[future].path] = future.result()
                ticker.advance(len(futures[future].items))
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure or ctrl-c, let the shards in hand end and start no other
    return records


def _finish(folder: Path, jobs: Sequence[ShardJob], written: Mapping[Path, ShardRecord]) -> list[ShardRecord]:
    """Write shards.json, which says that the split is complete."""
    records = [written[job.path] for job in jobs]
    write_listing(folder, records)
    left = folder.glob(".*.tmp")  # by an earlier build that was killed
    for path in (*(job.record_path for job in jobs), *left):
        path.unlink(missing_ok=True)
    return records
