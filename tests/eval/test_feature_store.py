"""Features on disk: mapped and not read, whole or absent, resumed, and shared by processes and commands."""

import contextlib
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from convscope.core import distributed
from convscope.core.data.shard_set import open_shards
from convscope.core.errors import UserError
from convscope.eval import knn, row_writer
from convscope.eval.extraction import share
from convscope.eval.feature_store import FeatureStore, map_rows
from convscope.eval.features import Features, extract
from tests.core.data.tars import write_split
from tests.eval.test_features import resnet, run
from tests.processes import run_on


def test_features_are_a_map_of_their_file_that_writing_never_reaches(small_shards: str, tmp_path: Path) -> None:
    found = run(resnet(), small_shards, tmp_path, layers=["all"])
    for file in tmp_path.glob("*/*.npy"):
        assert str(file) in Path("/proc/self/maps").read_text()
    x = found["pooled"].x
    before = x.clone()
    x.zero_()
    assert torch.equal(run(resnet(), small_shards, tmp_path)["pooled"].x, before)
    np.testing.assert_array_equal(np.load(next(tmp_path.glob("*/pooled.npy"))), before.numpy())


def test_a_file_larger_than_memory_can_be_opened(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rows, file = 2 * memory // 4096, tmp_path / "large.npy"
    with open(file, "wb") as opened:
        np.lib.format.write_array_header_1_0(opened, {"descr": "<f4", "fortran_order": False, "shape": (rows, 1024)})
        start = opened.tell()
        os.truncate(file, start + rows * 4096)  # all holes
        opened.seek(start + (rows - 1) * 4096)
        opened.write(np.arange(1024, dtype="<f4").tobytes())
    x = map_rows(file, rows, np.dtype("<f4"))
    assert x.shape == (rows, 1024)
    assert x[-1].tolist() == list(range(1024))
    assert float(x[rows // 2].sum()) == 0


def test_without_a_cache_nothing_stays(small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = run(resnet(), small_shards)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(found["pooled"].x, run(resnet(), small_shards)["pooled"].x)


@pytest.mark.parametrize("count", [1, 4, 5, 12, 13])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_are_the_batches_of_one_process(count: int, world: int) -> None:
    index = np.arange(count) * 3
    batches = [index[i : i + 4].tolist() for i in range(0, count, 4)]
    shares = [share(index, 4, rank, world).tolist() for rank in range(world)]
    assert shares == [[i for batch in batches[rank::world] for i in batch] for rank in range(world)]
    assert sorted(i for each in shares for i in each) == index.tolist()


def test_what_was_computed_before_a_stop_is_kept(small_shards: str, tmp_path: Path) -> None:
    backbone, sizes = resnet(), list[int]()

    def stop(module: object, given: object, out: Tensor) -> None:
        sizes.append(len(out))
        if sizes == [1, 5, 5]:
            raise KeyboardInterrupt

    handle = backbone.model.conv1.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(backbone, small_shards, tmp_path, layers=["layer1", "pooled"])
    assert not list(tmp_path.glob("*/*.npy"))
    run(backbone, small_shards, tmp_path, layers=["layer1", "last"])  # a layer that has begun, and one that has not
    handle.remove()
    backbone.model.conv1.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    assert sizes == [1, 5, 5, 1, 5, 5, 2]
    del sizes[:]
    found = run(backbone, small_shards, tmp_path, layers=["layer1", "pooled"])
    assert sizes == [1, 5, 2]  # of pooled, the batches that were not written
    fresh = run(resnet(), small_shards, layers=["layer1", "pooled"])
    for name, each in fresh.items():
        assert torch.equal(found[name].x, each.x)
        assert found[name].keys == each.keys


def test_an_image_that_cannot_be_read_costs_nothing_but_itself(tmp_path: Path) -> None:
    data = write_split(tmp_path / "data" / "train", [7], corrupt=[6]).parent
    sizes, backbone = list[int](), resnet()
    backbone.model.conv1.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    for _ in range(2):  # the second time it begins where the first one stopped
        with pytest.raises(UserError, match="00006"):
            extract(
                backbone, open_shards(str(data), "train"), batch_size=3, workers=0, device="cpu", cache=tmp_path / "c"
            )
    assert sizes == [1, 3, 3, 1]
    assert len(list(tmp_path.glob("c/*/pooled.part"))) == 1


def be_killed(data: str, cache: Path) -> None:
    torch.set_num_threads(1)  # a forked process has no others
    row_writer.FLUSH_SECONDS = 0
    backbone, sizes = resnet(), list[int]()

    def kill(module: object, given: object, out: Tensor) -> None:
        sizes.append(len(out))
        if sizes == [1, 5, 5, 2]:
            os.kill(os.getpid(), signal.SIGKILL)

    backbone.model.conv1.register_forward_hook(kill)
    run(backbone, data, cache)


def test_a_killed_command_leaves_nothing_that_reads_as_whole(small_shards: str, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=be_killed, args=(small_shards, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not list(tmp_path.glob("*/*.npy"))
    backbone, sizes = resnet(), list[int]()
    backbone.model.conv1.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    found = run(backbone, small_shards, tmp_path)["pooled"]
    assert sizes == [1, 2]
    assert torch.allclose(found.x, run(resnet(), small_shards)["pooled"].x, rtol=1e-5, atol=1e-6)
    assert found.keys == [f"{i:08d}" for i in range(12)]


def test_two_commands_at_once_compute_once(small_shards: str, tmp_path: Path) -> None:
    sizes, found = list[int](), dict[int, Tensor]()

    backbones = [resnet(), resnet()]  # drawn here, because threads share the generator

    def command(number: int) -> None:
        backbone = backbones[number]
        backbone.model.conv1.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
        found[number] = run(backbone, small_shards, tmp_path, batch_size=1)["pooled"].x

    threads = [threading.Thread(target=command, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sizes) == 13  # a blank image and twelve
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], run(resnet(), small_shards, batch_size=1)["pooled"].x)


def test_a_full_disk_is_told_before_anything_is_computed(small_shards: str, mount: Callable[[str], Path]) -> None:
    disk, backbone, sizes = mount("16k"), resnet(), list[int]()
    backbone.model.conv1.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    with pytest.raises(UserError, match=r"cannot keep features in .*: No space left on device \(.* GB are needed\)"):
        run(backbone, small_shards, disk)
    assert sizes == [1]
    assert sorted(path.name for path in disk.glob("*/*")) == [".lock", "about.json"]


def test_a_disk_that_fills_up_on_the_way_is_told(
    small_shards: str, mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")  # as where it does not exist, and room cannot be taken beforehand
    disk = mount("16k")
    with pytest.raises(UserError, match=r"cannot write .*pooled\.part: No space left on device"):
        run(resnet(), small_shards, disk)
    assert sorted(path.name for path in disk.glob("*/*")) == [".lock", "about.json"]


def test_rows_that_are_missing_are_never_given_a_final_name(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, 4)
    store.begin({"layer": 2}, {})
    with store.writer(["layer"]) as writer:
        writer.write(np.array([3, 0]), {"layer": np.array([[3, 3], [0, 0]], np.float32)})
    assert store.remaining(["layer"]).tolist() == [1, 2]
    with pytest.raises(UserError, match=r"2 of 4 rows in .* are missing"):
        store.finish(["layer"], list("abcd"))
    with store.writer(["layer"]) as writer:
        writer.write(np.array([1, 2]), {"layer": np.array([[1, 1], [2, 2]], np.float32)})
    assert store.missing(["layer"]) == ["layer"]
    store.finish(["layer"], list("abcd"))
    assert store.missing(["layer"]) == []
    assert store.read("layer").tolist() == [[i, i] for i in range(4)]


def several(rank: int, small: str, one: str, cache: Path) -> dict[str, object]:
    """What a process of a group sees: uneven shares, fewer samples than processes, no cache, a whole command."""
    uneven = run(resnet(), small, cache, layers=["layer1", "pooled"])
    single = extract(resnet(), open_shards(one, "train"), device="cpu", workers=0, label=None, cache=cache)
    temporary = run(resnet(), small)
    printed, ended = io.StringIO(), False
    config = knn.KnnCommand(
        model="timm:resnet10t@random", data=small, output=cache / f"knn{rank}.json", workers=0, device="cpu", k=(3,)
    )
    with contextlib.redirect_stdout(printed):
        try:
            knn.run(config)
        except SystemExit as exit_:
            ended = exit_.code == 0
    assert distributed.world() == 2
    return {"uneven": uneven, "single": single, "temporary": temporary, "ended": ended, "out": printed.getvalue()}


@pytest.fixture
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_give_what_one_gives(small_shards: str, tmp_path: Path) -> None:
    one = str(write_split(tmp_path / "data" / "train", [1]).parent)
    cache = tmp_path / "cache"
    first, second = run_on(2, several, tmp_path, small_shards, one, cache)
    alone: dict[str, dict[str, Features]] = {
        "uneven": run(resnet(), small_shards, layers=["layer1", "pooled"]),
        "single": extract(resnet(), open_shards(one, "train"), device="cpu", workers=0, label=None),
        "temporary": run(resnet(), small_shards),
    }
    for name, layers in alone.items():
        for layer, each in layers.items():
            for found in (first[name][layer], second[name][layer]):
                assert torch.equal(found.x, each.x)
                assert found.keys == each.keys
    assert "3" in first["out"]
    assert (first["ended"], second["ended"], second["out"]) == (False, True, "")
    assert sorted(path.name for path in cache.glob("knn*")) == ["knn0.json", "knn0.npz"]
