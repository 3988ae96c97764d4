"""Shards behind commands and URLs: the same samples as local ones, fetched once, with exact resume."""

import functools
import http.server
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from convscope.core.data import remote, stream
from convscope.core.data.shard_index import index_path
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.stream import eval_batches, order_of, train_batches
from convscope.core.errors import UserError
from tests.core.data.tars import write_split

PIXELS = v2.PILToTensor()
COUNTS = [7, 1, 12, 5]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    return tmp_path / "cache" / "remote"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_split(tmp_path / "there" / "train", COUNTS)


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder, and what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def logged_pipes(folder: Path) -> list[str]:
    return [f"pipe:echo {i} >> {folder}/calls; cat {folder}/train-{i:06d}.tar" for i in range(4)]


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().split()


def remote_set(folder: Path, limit: int = 10**9) -> ShardSet:
    """The four shards behind commands that are logged."""
    kept = remote.shard_cache()
    kept.limit = limit
    shards = [remote.RemoteShard(url, kept) for url in logged_pipes(folder)]
    starts = [shard.starts() for shard in shards]
    return ShardSet(shards, starts, fingerprint="f", classes=None, source="pipes", split="train")


def same(one: ShardSet, other: ShardSet) -> bool:
    return len(one) == len(other) and all(one[i] == other[i] for i in range(len(one)))


def test_commands(folder: Path) -> None:
    local = open_shards(str(folder), "train")
    shards = open_shards(f"pipe:cat {folder}/train-{{000000..000003}}.tar", "train")
    assert same(shards, local)
    assert shards.is_remote
    assert not local.is_remote
    assert shards.fingerprint == open_shards(shards.source, "train").fingerprint != local.fingerprint
    assert shards.without_image(8) == local.without_image(8)


def test_a_shard_is_fetched_once_and_its_index_outlives_it(folder: Path, cache: Path) -> None:
    shards = remote_set(folder)
    assert same(shards, open_shards(str(folder), "train"))
    assert calls(folder) == ["0", "1", "2", "3"]
    for file in cache.glob("*.tar"):
        file.unlink()
    again = remote_set(folder)  # opening needs the indices alone
    assert len(calls(folder)) == 4
    assert again[0]["__key__"] == "00000"
    assert calls(folder)[4:] == ["0"]


def test_urls(server: Server, folder: Path) -> None:
    local = open_shards(str(folder), "train")
    for path in folder.glob("*.idx"):
        path.unlink()
    shards = open_shards(f"{server.url}/train-{{000000..000003}}.tar", "train")
    assert same(shards, local)
    assert server.asked.count("/train-000002.tar") == 1
    assert server.asked.count("/train-000002.tar.idx") == 1


def test_an_index_beside_a_url_saves_the_first_pass(server: Server, folder: Path) -> None:
    local = open_shards(str(folder), "train")  # writes the indices
    assert index_path(folder / "train-000000.tar").exists()
    shards = open_shards(f"{server.url}/train-{{000000..000003}}.tar", "train")
    assert sorted(server.asked) == [f"/train-{i:06d}.tar.idx" for i in range(4)]
    assert shards[9] == local[9]
    assert server.asked[4:] == ["/train-000002.tar"]


def test_other_file_systems(folder: Path) -> None:
    assert same(open_shards(f"file://{folder}/train-00000{{0..3}}.tar", "train"), open_shards(str(folder), "train"))


def test_what_cannot_be_fetched(server: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (folder / "train-000000.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[: len(whole) // 4])
    for source, said in (
        (f"{server.url}/none.tar", r"cannot fetch http.*/none\.tar: .*404"),
        (f"{server.url}/cut.tar", r"cut\.tar gave \d+ bytes that are no whole tar"),
        (f"pipe:cat {folder}/cut.tar", r"cut\.tar gave \d+ bytes that are no whole tar"),
        ("pipe:echo gone >&2; exit 3", r"^pipe:echo gone >&2; exit 3 ended with 3: gone$"),
        ("pipe:true", "gave 0 bytes"),
        ("nosuch://bucket/a.tar", r"cannot fetch nosuch://bucket/a\.tar: .*nosuch"),
        ("http://127.0.0.1:9/a.tar", r"cannot fetch http://127\.0\.0\.1:9/a\.tar: .*refused"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            open_shards(source, "train")
        assert "\n" not in str(caught.value)
    assert capsys.readouterr().err.count("trying again") == 7 * 2


def test_a_second_attempt_is_enough(folder: Path, tmp_path: Path) -> None:
    flaky = f"pipe:mkdir {tmp_path}/tried 2>/dev/null && exit 1; cat {folder}/train-000000.tar"
    assert len(open_shards(flaky, "train")) == 7


def test_the_cache_has_a_limit(folder: Path, cache: Path) -> None:
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    shards, local = remote_set(folder, limit=size // 2), open_shards(str(folder), "train")
    for _ in range(2):
        shards._open = {}  # as in another process
        assert same(shards, local)
        assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= size // 2
    assert len(calls(folder)) > 4
    tiny = remote_set(folder, limit=1)  # a shard always fits
    assert same(tiny, local)
    assert len(list(cache.glob("*.tar"))) == 1


def test_opening_needs_no_more_room_than_one_shard(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are opened several at a time; each may be gone before its samples are found."""
    monkeypatch.setenv("CONVSCOPE_CACHE_GB", "1e-9")
    source = f"pipe:cat {folder}/train-{{000000..000003}}.tar"
    assert same(open_shards(source, "train"), open_shards(str(folder), "train"))
    assert len(list(cache.glob("*.tar"))) == 1


def test_a_damaged_shard_is_not_kept(folder: Path, cache: Path) -> None:
    data = bytearray((folder / "train-000002.tar").read_bytes())
    data[4 * 512] ^= 1
    (folder / "bad.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"^pipe:cat .*bad\.tar is damaged: bad header"):
        open_shards(f"pipe:cat {folder}/bad.tar", "train")
    assert not list(cache.glob("*.tar"))


@pytest.mark.parametrize("noticed", ["when it is fetched", "when it is read"])
def test_a_shard_that_was_replaced_is_told_and_forgotten(folder: Path, cache: Path, noticed: str) -> None:
    source = f"pipe:cat {folder}/train-000002.tar"
    shards, tar = open_shards(source, "train"), folder / "train-000002.tar"
    write_split(folder.parent / "other" / "train", [2, 3, 12])
    other = folder.parent / "other" / "train" / "train-000002.tar"
    if noticed == "when it is fetched":
        other.write_bytes(other.read_bytes()[1024 * 2 :])  # one of its samples less
        tar.write_bytes(other.read_bytes())
        (file,) = cache.glob("*.tar")
        file.unlink()
    else:
        (file,) = cache.glob("*.tar")
        data = bytearray(file.read_bytes())
        data[shards._starts[0][5] + 3] ^= 1  # the name of the sixth sample
        file.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000002\.tar does not fit its index.*start again$") as caught:
        [shards[i] for i in range(12)]
    assert "shards check" not in str(caught.value)
    again = open_shards(source, "train")
    assert same(again, open_shards(str(tar), "train"))
    assert (again.fingerprint == shards.fingerprint) == (noticed == "when it is read")


def test_what_a_killed_process_left_is_deleted(folder: Path, cache: Path) -> None:
    shards = remote_set(folder)
    (file, *others) = cache.glob("*.tar")
    for path in (file, *others):
        path.unlink()
    dead, alive = (cache / f".{name}.tar.0123abcd.tmp" for name in ("0" * 24, "1" * 24))
    for path in (dead, alive):
        path.write_bytes(b"half a shard")
    with remote._locked(cache / f".{'1' * 24}.lock", wait=False):
        assert shards[0]["__key__"] == "00000"
        assert not dead.exists()
        assert alive.exists()


def test_a_fork_does_not_keep_a_lock(tmp_path: Path) -> None:
    with remote._locked(tmp_path / "lock", wait=False) as mine:
        assert mine
        sleeper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        sleeper.start()
    with remote._locked(tmp_path / "lock", wait=False) as mine:
        assert mine
    sleeper.kill()
    sleeper.join()


def test_what_the_cache_holds_counts_as_free(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    (cache / "a.tar").write_bytes(bytes(3000))
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    assert remote.shard_cache().limit == 4000


def test_its_size_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSCOPE_CACHE_GB", "1.5")
    assert remote.shard_cache().limit == 1_500_000_000
    monkeypatch.setenv("CONVSCOPE_CACHE_GB", "much")
    with pytest.raises(UserError, match="CONVSCOPE_CACHE_GB must be a number, got 'much'"):
        remote.shard_cache()


def read_all(shards: ShardSet, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait()
    assert len([shards[i] for i in range(len(shards))]) == sum(COUNTS)


def test_processes_share_what_they_fetch(folder: Path, cache: Path) -> None:
    shards = remote_set(folder)
    for file in cache.glob("*.tar"):
        file.unlink()
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    group = [context.Process(target=read_all, args=(shards, start)) for _ in range(4)]
    for process in group:
        process.start()
    for process in group:
        process.join()
        assert process.exitcode == 0
    assert sorted(calls(folder)[4:]) == ["0", "1", "2", "3"]


def test_can_be_sent_to_workers(folder: Path) -> None:
    shards = remote_set(folder)
    shards.prefetch(np.arange(3))
    assert same(pickle.loads(pickle.dumps(shards)), shards)


def drawn(batches: Iterator[dict[str, torch.Tensor]]) -> list[int]:
    return torch.cat([batch["index"] for batch in batches]).tolist()


def through_memory(folder: Path) -> str:
    """The shards in fsspec's file system in memory, which stands for those that need an account."""
    files = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        files.pipe_file(f"/{folder.parent.parent.name}/{path.name}", path.read_bytes())
    return f"memory://{folder.parent.parent.name}"


@pytest.mark.parametrize(("kind", "workers"), [("pipe", 0), ("pipe", 2), ("http", 0), ("http", 2), ("memory", 2)])
def test_training_order_and_resume(folder: Path, server: Server, kind: str, workers: int, monkeypatch) -> None:
    monkeypatch.setattr(stream, "GROUP", 2)
    place = {"pipe": f"pipe:cat {folder}", "http": server.url, "memory": through_memory(folder)}[kind]
    shards = open_shards(f"{place}/train-{{000000..000003}}.tar", "train")
    options = {"batch_size": 5, "seed": 1, "stop": 50, "workers": workers}
    whole = drawn(train_batches(shards, PIXELS, **options))
    assert whole == order_of(shards, 1)(np.arange(50)).tolist()
    assert sorted(whole[:25]) == sorted(whole[25:]) == list(range(25))
    assert drawn(train_batches(shards, PIXELS, start=15, **options)) == whole[15:]
    ranks = [drawn(train_batches(shards, PIXELS, start=15, rank=r, world=2, **options)) for r in range(2)]
    assert [i for pair in zip(*ranks) for i in pair] + ranks[0][len(ranks[1]) :] == whole[15:]


def test_a_subset_is_read_a_group_of_shards_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "GROUP", 2)
    shards, chosen = remote_set(folder), np.array([0, 3, 6, 7, 9, 12, 15, 20, 24])
    index = np.array(drawn(train_batches(shards, PIXELS, batch_size=4, seed=1, stop=18, indices=chosen)))
    assert sorted(index[:9]) == sorted(index[9:]) == chosen.tolist()
    owner = np.repeat(np.arange(4), COUNTS)[index[:9]]
    first = next(n for n in range(1, 9) if not set(owner[:n]) & set(owner[n:]))  # no shard of the first part returns
    assert {len(set(owner[:first])), len(set(owner[first:]))} == {2}


def test_evaluation_is_in_order(folder: Path) -> None:
    assert drawn(eval_batches(remote_set(folder), PIXELS, batch_size=4)) == list(range(25))


def test_the_next_group_is_fetched_ahead(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "GROUP", 1)
    shards = remote_set(folder)
    for file in cache.glob("*.tar"):
        file.unlink()
    owner = np.repeat(np.arange(4), COUNTS)
    read = {seed: {*owner[order_of(shards, seed)(np.array([0, 6]))].tolist()} for seed in range(10)}  # 6 = 25 // 4
    seed, ahead = next((seed, shards) for seed, shards in read.items() if len(shards) == 2)
    batches = train_batches(shards, PIXELS, batch_size=1, seed=seed, stop=25)
    next(batches)
    deadline = time.monotonic() + 10
    while len(list(cache.glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {int(call) for call in calls(folder)[4:]} == ahead
    batches.close()


def test_a_failed_prefetch_is_told_by_who_reads(folder: Path, cache: Path) -> None:
    shards = remote_set(folder)
    for file in cache.glob("*.tar"):
        file.unlink()
    os.rename(folder / "train-000002.tar", folder / "away.tar")
    shards.prefetch(np.arange(25))
    with pytest.raises(UserError, match=r"^pipe:.* ended with 1: .*No such file or directory$"):
        shards[10]
    os.rename(folder / "away.tar", folder / "train-000002.tar")
    assert shards[10]["__key__"] == "00010"
