"""Batches of decoded images, for training and for evaluation.

A training stream is an endless row of positions. Which sample stands at a position, and every random draw made for it,
depend on the seed and the position alone; so any process count, worker count and starting point give the same data.
"""

import random
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from os import _exit, getppid
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from convscope.core.data.crop import RandomCrop
from convscope.core.data.decode import DecodeError, decode, image_bytes
from convscope.core.data.order import Mixed, Order, Shuffled, ShuffledInGroups
from convscope.core.data.shard_set import Sample, ShardSet, label_of
from convscope.core.data.skipped import Skipped, check_skipped
from convscope.core.errors import UserError

Fields = Callable[[Sample], Mapping[str, Tensor]]  # further tensors of a sample
Transform = Callable[[Image.Image], Tensor]  # RGB -> uint8 (3, H, W), or (views, 3, H, W)
Batch = dict[str, Any]
Indices = NDArray[np.int64] | Sequence[int]

MAX_IN_A_ROW = 100  # samples that may fail one after the other before a substitute is found
GROUP = 16  # shards that have to be fetched before samples can be shuffled over them
PARENT_CHECK = 0.5  # seconds between two looks of a worker at whether its parent lives


def train_batches(
    shards: ShardSet,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    stop: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    label: str | None = None,
    fields: Fields | None = None,
    indices: Indices | None = None,
    weights: Sequence[float] | None = None,
    max_skipped: float = 1e-3,
    exact: bool = True,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Batches of this rank: positions start + rank, start + rank + world, ... below `stop`.

    Args:
        shards: where samples come from.
        transform: its draws from torch's and Python's generators are fixed by (seed, position).
        batch_size: images per batch on this rank; only the last one can be shorter.
        seed: of order and draws.
        start: first position of the stream over all ranks; samples already seen.
        stop: end of the stream.
        workers: data-loading processes; 0 loads in this one.
        rank: this process's number.
        world: number of processes that share the stream.
        label: member or json field to yield as `label`.
        fields: further tensors of a sample; its draws are fixed as those of `transform` are, and a DecodeError skips
            the sample.
        indices: samples to train on; default all.
        weights: of the parts of `shards`; without, each sample comes once an epoch.
        max_skipped: share of samples that may be replaced, because they cannot be decoded, by the next position's;
            see `check_skipped`.
        exact: decode whole images and let `transform` work on them; otherwise a RandomCrop is cut straight from the
            bytes where these are JPEG: the same crops, pixels all but the same, twice as fast.
        pin_memory: page-lock the batches, for copies to a GPU that wait for nothing.

    Yields:
        image uint8 (B, 3, H, W), or (B, views, 3, H, W), in channels-last memory, index and position int64 (B,), label
        int64 (B,) if asked for, fields each (B, ...), and skipped [Skipped].

    Raises:
        TooManySkippedError: too many samples cannot be decoded.
        UserError: a label is missing, a shard is damaged.
    """
    order = order_of(shards, seed, weights=weights, indices=indices)
    positions = range(start + rank, stop, world)
    batches = _Batches(shards, transform, positions, batch_size, label, fields, seed, _as_array(indices), order, exact)
    return _limit_skipped(_load(batches, workers, pin_memory), max_skipped, shards.source)


def order_of(
    shards: ShardSet, seed: int, *, weights: Sequence[float] | None = None, indices: Indices | None = None
) -> Order:
    """The order in which `train_batches` sees the samples of `shards`, or those at `indices`.

    It is a shuffle of all samples; of shards that have to be fetched, of a group of them at a time (but for `indices`
    that do not ascend: these are shuffled as a whole).
    """
    if indices is not None:
        chosen = np.asarray(indices, dtype=np.int64)
        if shards.is_remote and (np.diff(chosen) > 0).all():
            return ShuffledInGroups(shards.counts(chosen), seed, GROUP)
        return Shuffled(len(chosen), seed)
    if weights is not None:
        return Mixed([order_of(part, seed) for part in shards.parts], weights, seed)
    if shards.is_remote:
        return ShuffledInGroups(shards.sizes, seed, GROUP)
    return Shuffled(len(shards), seed)


def eval_batches(
    shards: ShardSet,
    transform: Transform,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    label: str | None = "cls",
    indices: Indices | None = None,
) -> Generator[Batch, None, None]:
    """Every sample, or those at `indices`, exactly once over all ranks and in order; see `train_batches`.

    Draws of a random transform depend on a sample's place alone, so each pass gives the same images.

    Yields:
        image uint8 (B, 3, H, W), index int64 (B,), label int64 (B,) if asked for, key [str]; skipped is empty.

    Raises:
        UserError: a sample cannot be decoded, a label is missing, a shard is damaged.
    """
    positions = range(rank, len(shards) if indices is None else len(indices), world)
    batches = _Batches(shards, transform, positions, batch_size, label, None, 0, _as_array(indices), None, exact=True)
    return _load(batches, workers)


def _as_array(indices: Indices | None) -> NDArray[np.int64] | None:
    return None if indices is None else np.asarray(indices, dtype=np.int64)


def _limit_skipped(batches: Generator[Batch, None, None], limit: float, source: str) -> Generator[Batch, None, None]:
    seen = skipped = 0
    with closing(batches):  # an error must not keep the workers alive
        for batch in batches:
            seen += len(batch["image"])
            skipped += len(batch["skipped"])
            check_skipped(skipped, seen, limit, source, batch["skipped"])
            yield batch


@dataclass(frozen=True)
class _Item:
    image: Tensor
    index: int
    label: int | None
    key: str
    fields: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Batches(Dataset[Any]):
    """Whole batches by their number, built where the data loader asks for them."""

    shards: ShardSet
    transform: Transform
    positions: range
    batch_size: int
    label: str | None
    fields: Fields | None
    seed: int
    indices: NDArray[np.int64] | None
    order: Order | None  # None: a position is the index itself, and nothing is ever replaced
    exact: bool

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __getitem__(self, number: int) -> Batch | UserError:
        """The batch; an error is returned, as a data loader would bury a raised one in a traceback."""
        try:
            with _private_draws():
                return self._batch(self.positions[number * self.batch_size : (number + 1) * self.batch_size])
        except UserError as error:
            return error

    def _batch(self, positions: range) -> Batch:
        skipped: list[Skipped] = []
        places = np.asarray(positions, dtype=np.int64)
        if self.shards.is_remote:
            self._prefetch(places)
        indices = self._samples_at(places).tolist()
        items = [self._item(position, index, skipped) for position, index in zip(positions, indices)]
        batch: Batch = {
            # in the memory order of decoded images; in a worker, straight into memory that is shared with the parent
            "image": default_collate([item.image.movedim(-3, -1) for item in items]).movedim(-1, -3),
            "index": torch.tensor([item.index for item in items]),
            "skipped": skipped,
        }
        batch |= default_collate([item.fields for item in items])
        if self.label is not None:
            batch["label"] = torch.tensor([item.label for item in items])
        if self.order is None:
            batch["key"] = [item.key for item in items]
        else:
            batch["position"] = torch.from_numpy(places)
        return batch

    def _samples_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        places = positions if self.order is None else self.order(positions)
        return places if self.indices is None else self.indices[places]

    def _prefetch(self, places: NDArray[np.int64]) -> None:
        """Have the shards fetched that will be read once the present ones are through."""
        if self.order is not None:
            self.shards.prefetch(self._samples_at(places + self.order.reach))
        elif self.indices is None:
            self.shards.prefetch(places + max(self.shards.sizes))

    def _item(self, position: int, index: int, skipped: list[Skipped]) -> _Item:
        """The sample at a position, or the first readable one after it; draws are the position's own in any case."""
        for step in range(1, MAX_IN_A_ROW + 1):
            sample = self.shards[index]
            try:
                image = self._pixels(sample, position)
                fields = self.fields(sample) if self.fields is not None else {}
            except DecodeError as error:
                if self.order is None:
                    raise UserError(
                        f"{error}, in {self.shards.shard_of(index)}; an evaluation leaves no image out: shards check "
                        "lists all such samples"
                    ) from error
                skipped.append(Skipped(error.key, error.cause, str(self.shards.shard_of(index))))
                index = int(self._samples_at(np.array([position + step]))[0])
                continue
            label = None if self.label is None else label_of(sample, self.label)
            return _Item(image, index, label, str(sample["__key__"]), fields)
        raise UserError(f"{MAX_IN_A_ROW} samples in a row cannot be decoded; the last was {skipped[-1].key}")

    def _pixels(self, sample: Sample, position: int) -> Tensor:
        if isinstance(self.transform, RandomCrop) and not self.exact:
            _seed_draws(self.seed, position)
            pixels = self.transform.from_jpeg(image_bytes(sample))
            if pixels is not None:
                return pixels
        image = decode(sample)
        _seed_draws(self.seed, position)
        return self.transform(image)


def _seed_draws(seed: int, position: int) -> None:
    value = int(np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(value)
    random.seed(value)


@contextmanager
def _private_draws() -> Iterator[None]:
    """Leave torch's and Python's generators as they were."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)


def _load(batches: _Batches, workers: int, pin_memory: bool = False) -> Generator[Batch, None, None]:
    loader: DataLoader[Any] = DataLoader(
        batches,
        batch_size=None,
        sampler=range(len(batches)),
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    """One thread each, and no signal but the parent's SIGTERM ends it.

    A terminal or a cluster sends its signals to every process, and the parent may need batches until it has saved.
    """
    torch.set_num_threads(1)
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # macOS has no way to tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, args=(getppid(),), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Wait for the parent to ask, or to be gone: an orphan would go on holding the run directory's lock."""
    while getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK)
        if received is not None and received.si_pid == parent:
            break
    _exit(0)
