"""Shards that lie elsewhere: fetched whole into a cache on this machine, and read there like any other.

A source is `pipe:COMMAND`, whose output is the shard, or a URL that fsspec opens (https, s3, gs, hf, ...). All the
processes of a machine share one cache. Where the samples of a shard lie has to be known before anything is read, and
is kept for good: for a URL, `URL.idx` is asked for first; otherwise the shard is fetched once.
"""

import fcntl
import hashlib
import os
import queue
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from convscope.core.data.shard_index import BLOCK, LOOKS, ZEROS, fits, parse_index, scan_open
from convscope.core.errors import UserError
from convscope.core.files import atomic_write, cache_dir, write_bytes
from convscope.core.log import info

PIPE = "pipe:"
ATTEMPTS = 3
PATIENCE = 1.0  # seconds before the second attempt; four times as long before each further one
CHUNK = 1 << 20
TIMEOUT = 60.0  # seconds without an answer
SHARE = 0.5  # of the disk that others leave that the cache may fill, unless CONVSCOPE_CACHE_GB says otherwise


def is_remote(source: str) -> bool:
    """Whether `source` names a command or a URL, not a path."""
    return source.startswith(PIPE) or "://" in source


@dataclass(frozen=True)
class RemoteShard:
    """One shard that lies elsewhere."""

    url: str
    cache: "ShardCache"

    def __str__(self) -> str:
        return self.url

    def open(self) -> int:
        """A descriptor of the fetched file."""
        return self.cache.open(self.url)

    def starts(self) -> NDArray[np.int64]:
        """Offsets of its samples, as `shard_index.scan` gives them."""
        return self.cache.starts(self.url)

    def replaced(self) -> UserError:
        """Forget the shard and its index, which do not fit each other; the error to raise."""
        return self.cache.replaced(self.url)


@dataclass
class ShardCache:
    """Fetched shards on this machine's disk; those not used for longest make room.

    Raises:
        UserError: from every method, where a shard cannot be fetched or the disk is full.
    """

    folder: Path
    limit: int  # bytes
    _prefetcher: "_Prefetcher | None" = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefetcher": None}

    def open(self, url: str) -> int:
        """A descriptor of the shard, which is fetched if need be; it stays valid when the file has to make room."""
        while True:
            self.fetch(url)
            with suppress(FileNotFoundError):  # it has just made room
                descriptor = os.open(self._file(url), os.O_RDONLY)
                with suppress(OSError):
                    os.utime(self._file(url))
                return descriptor

    def starts(self, url: str) -> NDArray[np.int64]:
        """Offsets of the shard's samples and the end of the last one."""
        index = self._index(url)
        if not index.exists():
            offsets = _remote_index(url)
            if offsets is None:
                offsets = self._scan(url)
            write_bytes(index, offsets.astype("<u8").tobytes())
        return parse_index(index.read_bytes(), str(index))

    def _scan(self, url: str) -> NDArray[np.int64]:
        descriptor = self.open(url)  # the file may have to make room at any time
        try:
            offsets, error = scan_open(descriptor)
        finally:
            os.close(descriptor)
        if error is not None:
            self._file(url).unlink(missing_ok=True)
            raise UserError(f"{url} is damaged: {error}")
        return offsets

    def replaced(self, url: str) -> UserError:
        """Forget a shard and its index, which do not fit each other; the error to raise."""
        self._file(url).unlink(missing_ok=True)
        self._index(url).unlink(missing_ok=True)
        return UserError(
            f"{url} does not fit its index: it, or the .idx beside it, was replaced since it was first opened; the "
            f"copies of both are deleted, so start again"
        )

    def prefetch(self, urls: list[str]) -> None:
        """Fetch in the background what will be read soon."""
        if self._prefetcher is None or self._prefetcher.process != os.getpid():  # a thread does not survive a fork
            self._prefetcher = _Prefetcher(self)
        self._prefetcher.ask(urls)

    def fetch(self, url: str, *, wait: bool = True) -> None:
        """See that the shard is on disk; without `wait`, leave it to another process that is fetching it."""
        if self._file(url).exists():
            return
        with _locked(self.folder / f".{_digest(url)}.lock", wait) as mine:
            if not mine or self._file(url).exists():  # by another process
                return
            for attempt in range(ATTEMPTS):
                try:
                    _download(url, self._file(url))
                    break
                except UserError as error:
                    if attempt == ATTEMPTS - 1:
                        raise
                    info(f"warning: {error}; trying again")
                    time.sleep(PATIENCE * 4**attempt)
            if not self._fits_index(url):
                if wait:
                    raise self.replaced(url)
                self._file(url).unlink(missing_ok=True)  # who reads it will fetch it again, and be told
            self._make_room(keep=self._file(url))

    def _fits_index(self, url: str) -> bool:
        """Whether a shard that was just fetched is the one that was indexed, if it was."""
        with suppress(FileNotFoundError):  # no index yet, or the shard had to make room at once
            starts = parse_index(self._index(url).read_bytes(), str(self._index(url)))
            with open(self._file(url), "rb") as file:
                return fits(file.fileno(), starts, LOOKS)
        return True

    def _make_room(self, keep: Path) -> None:
        self._delete_unfinished()
        files = _present(self.folder)
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size

    def _delete_unfinished(self) -> None:
        """What processes left that were killed while they fetched: nobody holds the lock of such a file."""
        for path in self.folder.glob(".*.tmp"):
            with _locked(self.folder / f".{path.name.split('.')[1]}.lock", wait=False) as mine:
                if mine:
                    path.unlink(missing_ok=True)

    def _index(self, url: str) -> Path:
        return self.folder / "index" / f"{_digest(url)}.idx"

    def _file(self, url: str) -> Path:
        return self.folder / f"{_digest(url)}.tar"


class _Prefetcher:
    """A thread that fetches one shard after the other."""

    def __init__(self, cache: ShardCache) -> None:
        self.cache, self.process = cache, os.getpid()
        self.asked: set[str] = set()
        self.wanted: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, urls: list[str]) -> None:
        for url in urls:
            if url not in self.asked:
                self.asked.add(url)
                self.wanted.put(url)

    def _work(self) -> None:
        while True:
            url = self.wanted.get()
            with suppress(UserError):  # who reads it will be told
                self.cache.fetch(url, wait=False)
            self.asked.discard(url)


def shard_cache() -> ShardCache:
    """The cache of this machine: in the cache folder, as large as $CONVSCOPE_CACHE_GB or half of the disk that is left.

    What the cache holds already counts as left.

    Raises:
        UserError: the folder cannot be made, or the variable is no number.
    """
    folder = cache_dir() / "remote"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    stated = os.environ.get("CONVSCOPE_CACHE_GB")
    try:
        held = sum(size for _, size, _ in _present(folder))
        limit = float(stated) * 1e9 if stated else SHARE * (shutil.disk_usage(folder).free + held)
    except ValueError as error:
        raise UserError(f"CONVSCOPE_CACHE_GB must be a number, got {stated!r}") from error
    return ShardCache(folder, int(limit))


def _present(folder: Path) -> list[tuple[float, int, Path]]:
    """When each shard in the cache was last used, its bytes, and the file."""
    files = []
    for path in folder.glob("*.tar"):
        with suppress(OSError):  # another process makes room
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    return files


def _download(url: str, file: Path) -> None:
    with atomic_write(file) as target:
        if url.startswith(PIPE):
            _pipe(url.removeprefix(PIPE), target)
        else:
            try:
                with _opened(url) as source:
                    shutil.copyfileobj(source, target, CHUNK)
            except Exception as error:  # every file system of fsspec has errors of its own
                raise UserError(f"cannot fetch {url}: {_words(error)}") from error
        size = target.seek(0, os.SEEK_END)
        target.flush()
        with open(target.name, "rb") as written:
            written.seek(max(size - BLOCK, 0))
            if written.read() != ZEROS:
                raise UserError(f"{url} gave {size} bytes that are no whole tar: its end mark is missing")


def _pipe(command: str, target: IO[bytes]) -> None:
    done = subprocess.run(command, shell=True, stdout=target, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"{PIPE}{command} ended with {done.returncode}" + (f": {said[-1]}" if said else ""))


def _opened(url: str) -> Any:
    """A file-like object of what the URL names."""
    if url.startswith(("http://", "https://")):  # fsspec would need another package for these
        return urllib.request.urlopen(url, timeout=TIMEOUT)
    return fsspec.open(url, "rb")


def _remote_index(url: str) -> NDArray[np.int64] | None:
    """What `shards build` and `shards index` put beside a shard, if it was copied along."""
    if url.startswith(PIPE):
        return None
    try:
        with _opened(f"{url}.idx") as source:
            return parse_index(source.read(), f"{url}.idx")
    except ImportError as error:
        raise UserError(f"cannot fetch {url}: {_words(error)}") from error
    except Exception:  # not there, in the words of whatever file system, or not an index
        return None


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Whether the lock is ours; the kernel releases it however the process ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a fork has the descriptor too
        os.close(descriptor)


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:24]
