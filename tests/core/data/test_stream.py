"""Streams are a pure function of (seed, position), and evaluation sees every sample exactly once."""

import io
import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from convscope.core.data import stream
from convscope.core.data.order import Shuffled
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.stream import eval_batches, order_of, train_batches
from convscope.core.data.transforms import crop_flip
from convscope.core.errors import UserError
from tests.core.data.tars import write_split, write_tar

PIXELS = v2.PILToTensor()


def random_pixels(image) -> torch.Tensor:
    """The sample's number, and draws from both generators, as an image."""
    draws = [torch.randint(256, ()).item(), random.randrange(256), torch.randint(256, ()).item()]
    return torch.cat([PIXELS(image)[:, :1, :1], torch.tensor(draws, dtype=torch.uint8).view(3, 1, 1)], dim=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return open_shards(str(write_split(tmp_path_factory.mktemp("d") / "train", [7, 1, 12, 5])), "train")  # 25 samples


def images(batches) -> torch.Tensor:
    return torch.cat([batch["image"] for batch in batches])


def children() -> int:
    return len(multiprocessing.active_children())


def test_a_batch(shards):
    first, *_, last = train_batches(shards, PIXELS, batch_size=4, seed=1, stop=10, label="cls")
    order = Shuffled(25, seed=1)(np.arange(4))
    assert first.keys() == {"image", "index", "label", "position", "skipped"}
    assert (first["image"].dtype, first["image"].shape) == (torch.uint8, (4, 3, 8, 8))
    assert first["index"].dtype == first["label"].dtype == torch.int64
    assert first["position"].tolist() == [0, 1, 2, 3]
    assert first["index"].tolist() == order.tolist() == first["image"][:, 0, 0, 0].tolist()
    assert first["label"].tolist() == (order % 3).tolist()
    assert first["skipped"] == []
    assert len(last["image"]) == 2
    assert "label" not in next(train_batches(shards, PIXELS, batch_size=4, seed=1, stop=10))


def test_resumes_anywhere_with_any_workers_and_processes(shards):
    """Images and draws at each position, over three epochs, from one run of one process."""
    whole = images(train_batches(shards, random_pixels, batch_size=8, seed=3, stop=72))
    assert len(torch.unique(whole, dim=0)) == 72
    for start, workers, world in ((0, 2, 1), (24, 0, 2), (48, 2, 4), (40, 1, 8), (16, 2, 2)):
        ranks = [
            images(
                train_batches(
                    shards,
                    random_pixels,
                    batch_size=8 // world,
                    seed=3,
                    start=start,
                    stop=72,
                    workers=workers,
                    rank=rank,
                    world=world,
                )
            )
            for rank in range(world)
        ]
        assert torch.equal(torch.stack(ranks, dim=1).flatten(0, 1), whole[start:])


def test_seeds_differ(shards):
    one, two = (images(train_batches(shards, random_pixels, batch_size=25, seed=s, stop=25)) for s in (0, 1))
    assert (one[..., 1] == two[..., 1]).float().mean() < 0.1
    assert (one[:, 0, :, 0] == two[:, 0, :, 0]).float().mean() < 0.2


def test_an_epoch_is_every_sample_once(shards):
    batches = train_batches(shards, PIXELS, batch_size=10, seed=0, stop=50)
    index = torch.cat([batch["index"] for batch in batches])
    assert index[:25].sort().values.tolist() == index[25:].sort().values.tolist() == list(range(25))
    assert index[:25].tolist() != index[25:].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_process_keeps_its_own_random_state(shards, workers):
    torch.manual_seed(7)
    random.seed(7)
    for batches in (
        train_batches(shards, random_pixels, batch_size=5, seed=0, stop=25, workers=workers),
        eval_batches(shards, random_pixels, batch_size=5, workers=workers),
    ):
        assert len(list(batches)) == 5
    found = torch.rand(3), random.random()
    torch.manual_seed(7)
    random.seed(7)
    assert (found[0].tolist(), found[1]) == (torch.rand(3).tolist(), random.random())


def test_real_transform_is_repeated_exactly(shards):
    runs = [
        images(train_batches(shards, crop_flip(6), batch_size=5, seed=2, stop=25, workers=workers))
        for workers in (0, 2)
    ]
    assert torch.equal(*runs)


def test_subset(shards):
    indices = [3, 5, 8, 20]
    batches = list(train_batches(shards, PIXELS, batch_size=4, seed=0, stop=8, indices=indices, label="cls"))
    assert [sorted(batch["index"].tolist()) for batch in batches] == [indices, indices]
    batch = next(eval_batches(shards, PIXELS, batch_size=9, indices=np.array([20, 3, 3])))
    assert batch["index"].tolist() == batch["image"][:, 0, 0, 0].tolist() == [20, 3, 3]
    assert batch["key"] == ["00020", "00003", "00003"]
    assert batch["label"].tolist() == [2, 0, 0]


COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any)


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, world=st.integers(1, 5), workers=st.sampled_from([0, 0, 0, 2]), batch_size=st.integers(1, 7))
def test_evaluation_sees_every_sample_exactly_once(tmp_path_factory, counts, world, workers, batch_size):
    shards = open_shards(str(write_split(tmp_path_factory.mktemp("d") / "test", counts)), "test")
    ranks = [
        [
            row
            for batch in eval_batches(shards, PIXELS, batch_size=batch_size, workers=workers, rank=rank, world=world)
            for row in zip(
                batch["index"].tolist(), batch["key"], batch["label"].tolist(), batch["image"][:, 0, 0, 0].tolist()
            )
        ]
        for rank in range(world)
    ]
    assert all(rows == sorted(rows) for rows in ranks)
    expected = [(i, f"{i:05d}", i % 3, i) for i in range(sum(counts))]
    assert sorted(row for rows in ranks for row in rows) == expected


def evaluated(shards: ShardSet, workers: int, rank: int, pipe) -> None:
    batches = eval_batches(shards, PIXELS, batch_size=2, workers=workers, rank=rank, world=2)
    pipe.send([row for batch in batches for row in zip(batch["index"].tolist(), batch["image"][:, 0, 0, 0].tolist())])


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_two_processes_share_an_evaluation(tmp_path, workers):
    """Two shards and seven samples: most of five workers have nothing to do."""
    shards = open_shards(str(write_split(tmp_path / "test", [6, 1])), "test")
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    group = [context.Process(target=evaluated, args=(shards, workers, rank, pipes[rank][1])) for rank in range(2)]
    for process in group:
        process.start()
    rows = [row for receiver, _ in pipes for row in receiver.recv()]
    for process in group:
        process.join()
        assert process.exitcode == 0
    assert sorted(rows) == [(i, i) for i in range(7)]


def test_evaluation_draws_are_repeatable(shards):
    runs = [images(eval_batches(shards, random_pixels, batch_size=n, workers=w)) for n, w in ((4, 0), (25, 0), (7, 2))]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> ShardSet:
    folder = write_split(tmp_path_factory.mktemp("d") / "train", [30, 10], corrupt=[3, 11, 12, 30])
    return open_shards(str(folder), "train")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_corrupt_samples_are_replaced_by_the_next_position(damaged, workers, world):
    order = Shuffled(40, seed=6)(np.arange(200)).tolist()
    corrupt = {3, 11, 12, 30}
    expected, skips = [], []
    for position in range(80):
        place = position
        while order[place] in corrupt:
            skips.append(f"{order[place]:05d}")
            place += 1
        expected.append(order[place])
    options = {"seed": 6, "stop": 80, "workers": workers, "world": world, "label": "cls", "max_skipped": 0.5}
    ranks = [list(train_batches(damaged, PIXELS, batch_size=10, rank=r, **options)) for r in range(world)]
    assert {len(batch["image"]) for batches in ranks for batch in batches} == {10}
    index = torch.stack([torch.cat([batch["index"] for batch in batches]) for batches in ranks], dim=1).flatten()
    assert index.tolist() == expected
    label = torch.stack([torch.cat([batch["label"] for batch in batches]) for batches in ranks], dim=1).flatten()
    assert label.tolist() == [i % 3 for i in expected]
    told = [skip for batches in ranks for batch in batches for skip in batch["skipped"]]
    assert sorted(skip.key for skip in told) == sorted(skips)
    assert len(skips) >= 8
    assert {skip.shard for skip in told if skip.key == "00030"} == {str(damaged.shards[1])}
    assert {skip.shard for skip in told if skip.key == "00012"} == {str(damaged.shards[0])}
    assert {skip.cause for skip in told} == {"no image format that Pillow reads"}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_samples_stop_the_run(damaged, workers):
    """Four of forty: with 1e-3 allowed, the sixth one is too many; here it comes with a seventh."""
    before = children()
    batches = train_batches(damaged, PIXELS, batch_size=1, seed=0, stop=1000, workers=workers)
    told = []
    with pytest.raises(UserError, match=r"7 of \d+ samples of .* \(no image format.*--max-skipped") as caught:
        told.extend(skip for batch in batches for skip in batch["skipped"])
    assert len(told) == 5
    assert len(caught.value.skipped) == 2  # of the last batch, which never came
    assert caught.value.skipped[-1].key in str(caught.value)
    assert "\n" not in str(caught.value)
    assert children() == before


def test_share_of_corrupt_samples_is_that_of_all_seen(tmp_path):
    shards = open_shards(str(write_split(tmp_path / "train", [1000], corrupt=range(0, 1000, 50))), "train")
    for limit, enough in ((0.02, True), (0.01, False)):
        batches = train_batches(shards, PIXELS, batch_size=500, seed=0, stop=10_000, max_skipped=limit)
        if enough:
            skipped = sum(len(batch["skipped"]) for batch in batches)
            assert 200 <= skipped < 210  # a substitute may be corrupt too
        else:
            with pytest.raises(UserError, match=r"allowed share 0\.01;"):
                list(batches)
    with pytest.raises(UserError, match=r"\d+ of "):
        list(train_batches(shards, PIXELS, batch_size=500, seed=0, stop=1000, max_skipped=0.0))


def test_nothing_but_corrupt_samples(tmp_path):
    shards = open_shards(str(write_split(tmp_path / "train", [5], corrupt=range(5))), "train")
    with pytest.raises(UserError, match="100 samples in a row"):
        next(train_batches(shards, PIXELS, batch_size=2, seed=0, stop=10))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_stops_at_a_corrupt_image(damaged, workers):
    batches = eval_batches(damaged, PIXELS, batch_size=3, workers=workers)
    assert next(batches)["key"] == ["00000", "00001", "00002"]
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(caught.value).startswith(f"sample 00003: no image format that Pillow reads, in {damaged.shards[0]}; ")


@pytest.mark.parametrize("workers", [0, 2])
def test_missing_label_is_one_line(shards, workers):
    before = children()
    for batches in (
        train_batches(shards, PIXELS, batch_size=3, seed=0, stop=9, workers=workers, label="colour"),
        eval_batches(shards, PIXELS, batch_size=3, workers=workers, label="colour"),
    ):
        with pytest.raises(UserError, match=r"^sample \d{5} has no label 'colour'.*$") as caught:
            next(batches)
        assert "\n" not in str(caught.value)
        assert children() == before


def test_labels_are_optional_and_may_be_json_fields(tmp_path):
    path = write_tar(
        tmp_path / "x.tar", [(n, d) for i in range(4) for n, d in ((f"{i}.ppm", PPM), (f"{i}.json", JSON % i))]
    )
    shards = open_shards(str(path), "test")
    assert next(eval_batches(shards, PIXELS, batch_size=4, label="shape"))["label"].tolist() == [0, 1, 2, 3]
    assert "label" not in next(eval_batches(shards, PIXELS, batch_size=4, label=None))


PPM = b"P6 1 1 255 abc"
JSON = b'{"shape": %d}'


def test_closing_ends_the_workers(shards):
    before = children()
    for batches in (
        train_batches(shards, PIXELS, batch_size=1, seed=0, stop=10**9, workers=2),
        eval_batches(shards, PIXELS, batch_size=1, workers=2),
    ):
        next(batches)
        assert children() == before + 2
        batches.close()
        assert children() == before


def slow(image) -> torch.Tensor:
    time.sleep(0.05)
    return PIXELS(image)


def test_signals_to_all_processes_leave_the_workers_alive(shards):
    """A terminal's Ctrl-C and a cluster's SIGTERM reach workers too, while the parent still wants batches to save."""
    before = set(multiprocessing.active_children())
    batches = train_batches(shards, slow, batch_size=1, seed=0, stop=40, workers=2)
    next(batches)
    workers = [child.pid for child in multiprocessing.active_children() if child not in before]
    for name in ("INT", "TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", *map(str, workers)], check=True)
    assert len(list(batches)) == 39


def test_the_parents_sigterm_ends_a_worker(shards):
    """multiprocessing ends forgotten workers so when the interpreter exits."""
    before = set(multiprocessing.active_children())
    batches = eval_batches(shards, slow, batch_size=1, workers=1)
    next(batches)
    (worker,) = (child for child in multiprocessing.active_children() if child not in before)
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
    batches.close()


def test_workers_use_one_thread(shards):
    def threads(image) -> torch.Tensor:
        return torch.full((3, 1, 1), torch.get_num_threads(), dtype=torch.uint8)

    mine = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert images(eval_batches(shards, threads, batch_size=5, workers=1)).unique().tolist() == [1]
        assert images(eval_batches(shards, threads, batch_size=5)).unique().tolist() == [2]
    finally:
        torch.set_num_threads(mine)


def test_bad_settings_are_told_at_once(shards):
    with pytest.raises(UserError, match="no samples"):
        train_batches(shards, PIXELS, batch_size=1, seed=0, stop=1, indices=[])


def test_works_with_spawned_workers(shards, monkeypatch):
    """macOS starts processes this way: everything a worker needs must survive pickling."""
    expected = images(train_batches(shards, crop_flip(6), batch_size=5, seed=2, stop=10))
    loader = stream.DataLoader
    monkeypatch.setattr(stream, "DataLoader", lambda *a, **k: loader(*a, multiprocessing_context="spawn", **k))
    assert torch.equal(images(train_batches(shards, crop_flip(6), batch_size=5, seed=2, stop=10, workers=1)), expected)


ORPHANS = """
import os, signal, sys
from multiprocessing import active_children
from torchvision.transforms import v2
from convscope.core.data.shard_set import open_shards
from convscope.core.data.stream import train_batches
shards = open_shards(sys.argv[1], "train")
batches = train_batches(shards, v2.PILToTensor(), batch_size=1, seed=0, stop=10**9, workers=2)
next(batches)
print(*(child.pid for child in active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_do_not_outlive_a_killed_parent(shards, tmp_path):
    """They have inherited the lock of its run directory, which the run that continues it must get."""
    source = str(shards.shards[0].parent)
    with open(tmp_path / "pids", "w") as out:  # a pipe would stay open, and this test wait, until they end
        subprocess.run([sys.executable, "-c", ORPHANS, source], stdout=out)
    workers = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 3  # torch's own watchdog would need five seconds
    while any(running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running(pid) for pid in workers)


def running(pid: int) -> bool:
    """Whether the process exists and has not ended (an orphan whose end nobody collects stays as a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def jpeg_split(folder: Path, count: int, damaged: Iterable[int] = ()) -> Path:
    """Smooth JPEG images, the last of which is a PNG."""
    rng, members, broken = np.random.default_rng(0), [], set(damaged)
    for i in range(count):
        file, kind = io.BytesIO(), "PNG" if i == count - 1 else "JPEG"
        image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((120, 90), Image.Resampling.BICUBIC)
        image.save(file, kind)
        data = file.getvalue()
        members.append((f"{i:03d}.{kind.lower()}", data[: len(data) // 2] if i in broken else data))
    write_tar(folder / "train-000000.tar", members)
    return folder


def test_fast_decoding_gives_the_same_crops(tmp_path):
    shards = open_shards(str(jpeg_split(tmp_path / "train", 12)), "train")
    options = {"batch_size": 4, "seed": 1, "stop": 24}
    exact = list(train_batches(shards, crop_flip(32), **options))
    fast = list(train_batches(shards, crop_flip(32), exact=False, **options))
    assert [batch["index"].tolist() for batch in fast] == [batch["index"].tolist() for batch in exact]
    difference = (images(fast).int() - images(exact).int()).abs().float()
    assert 0 < difference.mean() < 1
    assert difference.max() < 40
    png = torch.cat([batch["index"] for batch in exact]) == 11
    assert (difference[png] == 0).all()
    for workers, start in ((0, 8), (2, 0), (2, 12)):
        again = train_batches(shards, crop_flip(32), exact=False, workers=workers, start=start, **options)
        assert torch.equal(images(again), images(fast)[start:])


def test_fast_decoding_skips_what_exact_decoding_skips(tmp_path):
    shards = open_shards(str(jpeg_split(tmp_path / "train", 12, damaged=[2, 5])), "train")
    options = {"batch_size": 6, "seed": 1, "stop": 24, "max_skipped": 1.0}
    exact, fast = (list(train_batches(shards, crop_flip(32), exact=e, **options)) for e in (True, False))
    assert [batch["skipped"] for batch in fast] == [batch["skipped"] for batch in exact]
    assert {skip.key for batch in fast for skip in batch["skipped"]} == {"002", "005"}
    assert [batch["index"].tolist() for batch in fast] == [batch["index"].tolist() for batch in exact]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_lie_in_memory_as_images_do(tmp_path, workers):
    """So that networks in channels-last need no copy."""
    shards = open_shards(str(jpeg_split(tmp_path / "train", 4)), "train")
    for exact in (True, False):
        batch = next(train_batches(shards, crop_flip(32), batch_size=4, seed=0, stop=4, workers=workers, exact=exact))
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    two = next(train_batches(shards, crop_flip(32, views=2), batch_size=4, seed=0, stop=4, exact=False))["image"]
    assert two.shape == (4, 2, 3, 32, 32)


def test_a_mixture_draws_from_each_set_by_weight(tmp_path):
    folders = [write_split(tmp_path / name, counts) for name, counts in (("a", [9]), ("b", [3, 4]))]
    parts = [open_shards(str(folder), "train") for folder in folders]
    whole = ShardSet.joined(parts)
    assert len(whole) == 16
    assert [whole[9 + i] for i in range(7)] == [parts[1][i] for i in range(7)]
    assert whole.fingerprint not in {part.fingerprint for part in parts}
    assert whole.parts == tuple(parts)
    options = {"batch_size": 10, "seed": 3, "stop": 10_000}
    batches = list(train_batches(whole, PIXELS, weights=(1, 4), **options))
    index = torch.cat([batch["index"] for batch in batches])
    assert [(index < 9).sum(), (index >= 9).sum()] == [2000, 8000]
    assert index.tolist() == order_of(whole, 3, weights=(1, 4))(np.arange(10_000)).tolist()
    later = train_batches(whole, PIXELS, weights=(1, 4), start=9_950, workers=2, **options)
    assert torch.cat([batch["index"] for batch in later]).tolist() == index[9_950:].tolist()
    plain = torch.cat([batch["index"] for batch in train_batches(whole, PIXELS, batch_size=8, seed=3, stop=16)])
    assert sorted(plain.tolist()) == list(range(16))
