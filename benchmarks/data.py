"""How many images a second reach the training loop, beside what webdataset and torchvision deliver from the same files.

    python benchmarks/data.py --photos PHOTOS    # a folder or zip of photographs; enlarged to a set by cropping

Every way is a process of its own, with data loading as a user would set it up; ways of a row take turns (A B A B ...).
One torch thread everywhere. Batches end as float, normalised: for ours that is one pass over the batch in the training
process ("device"), for the others part of the transform.
"""

import io
import json
import multiprocessing
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from convscope.core.data.build import BuildConfig, build
from convscope.core.data.photometric import PhotometricConfig, draw, photometric
from convscope.core.data.shard_index import scan_sound, write_index
from convscope.core.data.shard_set import open_shards
from convscope.core.data.sources import open_source
from convscope.core.data.stream import train_batches
from convscope.core.data.transforms import Normalize, crop_flip
from convscope.core.memory import keep_freed_memory

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, BATCH = 224, 64
RAW_PASSES = 10  # over the set: one is over in a tenth of a second


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    photos: Path
    """Folder or zip of photographs."""
    images: int = 2000
    """How many JPEGs of 500 pixels on the long side are made of them."""
    rounds: int = 7
    workers: tuple[int, ...] = (1, 2)
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the random crop's area."""
    only: str = ""
    """Rows whose name has this in it."""


@dataclass(frozen=True)
class Places:
    """The same images as files, as shards, and as shards whose images are smaller."""

    folder: Path
    shards: Path
    small: Path


Way = Callable[[Places, Settings, int], Iterator[int]]  # yields how many images have arrived


def open_clip_way(places: Places, settings: Settings, workers: int) -> Iterator[int]:
    """webdataset, PIL and torchvision, as open_clip sets them up."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, settings.scale, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    yield from _webdataset(places, transform, workers)


def simclr_way(places: Places, settings: Settings, workers: int) -> Iterator[int]:
    """The same with SimCLR's augmentation, twice an image."""
    one = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, settings.scale, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    yield from _webdataset(places, lambda image: torch.stack([one(image), one(image)]), workers)


def _webdataset(places: Places, transform: Any, workers: int) -> Iterator[int]:
    urls = sorted(str(path) for path in places.shards.glob("*.tar"))
    data = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple("jpg")
        .map_tuple(transform)
        .batched(BATCH, partial=True)
    )
    for (images,) in webdataset.WebLoader(data, batch_size=None, num_workers=workers, worker_init_fn=_one_thread):
        yield len(images)


def image_folder_way(places: Places, settings: Settings, workers: int) -> Iterator[int]:
    """torchvision's ImageFolder and PIL."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, settings.scale, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    data = ImageFolder(str(places.folder), transform)
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers, worker_init_fn=_one_thread)
    for images, _ in loader:
        yield len(images)


def ours(
    places: Places,
    settings: Settings,
    workers: int,
    *,
    exact: bool = False,
    small: bool = False,
    normalised: bool = True,
) -> Iterator[int]:
    """`convscope pretrain`'s stream, and normalisation where the network is."""
    shards = open_shards(str(places.small if small else places.shards), "train")
    normalize = Normalize(MEAN, STD)
    transform = crop_flip(SIZE, settings.scale)
    for batch in train_batches(
        shards, transform, batch_size=BATCH, seed=0, stop=len(shards), workers=workers, exact=exact
    ):
        yield len(normalize(batch["image"]) if normalised else batch["image"])


def ours_twice(places: Places, settings: Settings, workers: int, *, small: bool = False) -> Iterator[int]:
    """Two views from one decoding, photometric part in batches."""
    shards = open_shards(str(places.small if small else places.shards), "train")
    normalize, config = Normalize(MEAN, STD), PhotometricConfig()
    transform = crop_flip(SIZE, settings.scale, views=2)
    for batch in train_batches(
        shards, transform, batch_size=BATCH, seed=0, stop=len(shards), workers=workers, exact=False
    ):
        images = batch["image"].flatten(0, 1)
        normalize(photometric(images, draw(config, len(images))))
        yield len(batch["image"])


def raw_webdataset(places: Places, settings: Settings, workers: int, *, shuffle: int = 0) -> Iterator[int]:
    """Samples as bytes, in the shards' order or from a shuffle buffer; workers hand over how many they have read."""
    urls = sorted(str(path) for path in places.shards.glob("*.tar"))
    data = webdataset.WebDataset(urls, shardshuffle=len(urls) if shuffle else False, empty_check=False)
    data = data.repeat(RAW_PASSES).shuffle(shuffle).map(lambda sample: (len(sample["jpg"]),))
    loader = webdataset.WebLoader(data.batched(BATCH), batch_size=None, num_workers=workers, worker_init_fn=_one_thread)
    for (batch,) in loader:
        yield len(batch)


class _Raw(torch.utils.data.Dataset[list[int]]):
    def __init__(self, source: str) -> None:
        self.shards = open_shards(source, "train")
        draws = np.random.default_rng(0)
        self.order = np.concatenate([draws.permutation(len(self.shards)) for _ in range(RAW_PASSES)])

    def __len__(self) -> int:
        return -(-len(self.order) // BATCH)

    def __getitem__(self, number: int) -> list[int]:
        chosen = self.order[number * BATCH : (number + 1) * BATCH]
        return [len(self.shards[index]["jpg"]) for index in chosen.tolist()]


def raw_ours(places: Places, settings: Settings, workers: int) -> Iterator[int]:
    """The same in a full random order."""
    loader = DataLoader(_Raw(str(places.shards)), batch_size=None, num_workers=workers, worker_init_fn=_one_thread)
    for batch in loader:
        yield len(batch)


ROWS: dict[str, dict[str, Way]] = {
    "one crop": {
        "ours": ours,
        "ours, up to the uint8 that a GPU gets": lambda p, s, w: ours(p, s, w, normalised=False),
        "ours, exact decoding": lambda p, s, w: ours(p, s, w, exact=True),
        "ours, shards of 256 px": lambda p, s, w: ours(p, s, w, small=True),
        "ours, shards of 256 px, up to uint8": lambda p, s, w: ours(p, s, w, small=True, normalised=False),
        "webdataset + PIL + torchvision": open_clip_way,
        "ImageFolder + PIL + torchvision": image_folder_way,
    },
    "two SimCLR views": {
        "ours": ours_twice,
        "ours, shards of 256 px": lambda p, s, w: ours_twice(p, s, w, small=True),
        "webdataset + PIL + torchvision": simclr_way,
    },
    "raw samples": {
        "ours, in random order": raw_ours,
        "webdataset, in order": raw_webdataset,
        "webdataset, shuffled by 1000": lambda p, s, w: raw_webdataset(p, s, w, shuffle=1000),
    },
}


def main(settings: Settings) -> None:
    """Measure every row; a line of JSON for each."""
    with tempfile.TemporaryDirectory() as scratch:
        places = prepare(settings, Path(scratch))
        for name, ways in ROWS.items():
            for workers in settings.workers:
                if settings.only in name:
                    print(
                        json.dumps({"row": name, "workers": workers} | row(name, ways, places, settings, workers)),
                        flush=True,
                    )
        for name, measure in (("decoding alone", ceiling), ("start and resume", start_up), ("index", indexing)):
            if settings.only in name:
                print(json.dumps({"row": name} | measure(places, settings, Path(scratch))), flush=True)


def prepare(settings: Settings, scratch: Path) -> Places:
    """JPEGs of about 500 x 375, quality 90, cut from the photographs; as a folder and as two sets of shards."""
    source = open_source(str(settings.photos))
    photos = [item for items in source.listing().splits.values() for item in items]
    folder = scratch / "images"
    for kind in range(10):
        (folder / f"class{kind}").mkdir(parents=True)

    def make(number: int) -> None:
        rng = np.random.default_rng(number)
        image = Image.open(io.BytesIO(source.read(photos[number % len(photos)]).data)).convert("RGB")
        width, height = image.size
        share = rng.uniform(0.85, 1.0)
        left, top = rng.uniform(0, 1 - share, 2) * (width, height)
        scale = 500 / max(width, height) / share
        size = (round(share * width * scale), round(share * height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC, (left, top, left + share * width, top + share * height))
        image.save(folder / f"class{number % 10}" / f"{number:06d}.jpg", quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, range(settings.images)))
    for name, resize in (("shards", None), ("small", 256)):
        config = BuildConfig(source=str(folder), dest=str(scratch / name), samples_per_shard=250, resize=resize)
        build(open_source(str(folder)), config)
    return Places(folder, scratch / "shards" / "train", scratch / "small" / "train")


def row(name: str, ways: dict[str, Way], places: Places, settings: Settings, workers: int) -> dict[str, Any]:
    """Images a second of each way, and the median over the rounds of the first one's ratio to it."""
    context = multiprocessing.get_context("fork")
    rates: dict[str, list[float]] = {way: [] for way in ways}
    memory: dict[str, float] = {}
    for _ in range(settings.rounds):
        for way in ways:
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, name, way, places, settings, workers))
            process.start()
            rate, memory[way] = pipe.recv()
            process.join()
            rates[way].append(rate)
    first = next(iter(rates.values()))
    return {
        "ways": {
            way: {
                "images/s": round(statistics.median(values)),
                "ours / it": round(statistics.median(a / b for a, b in zip(first, values)), 2),
                "MB a worker": round(memory[way]),
            }
            for way, values in rates.items()
        }
    }


def serve(pipe: Connection, name: str, way: str, places: Places, settings: Settings, workers: int) -> None:
    """Images a second from the second batch on, and the memory that a worker has for itself."""
    _one_thread(0)
    keep_freed_memory()  # as training does
    batches = ROWS[name][way](places, settings, workers)
    next(batches)
    start, seen, memory = time.perf_counter(), 0, 0.0
    for count in batches:
        seen += count
        if not memory:
            memory = statistics.mean(own_memory(child.pid) for child in multiprocessing.active_children())
    pipe.send((seen / (time.perf_counter() - start), memory))


def own_memory(process: int | None) -> float:
    """MB that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def ceiling(places: Places, settings: Settings, _: Path) -> dict[str, Any]:
    """Decoding whole images on one core and nothing else."""
    import simplejpeg

    _one_thread(0)
    data = [path.read_bytes() for path in sorted(places.folder.rglob("*.jpg"))[:500]]
    ways = {
        "libjpeg-turbo": simplejpeg.decode_jpeg,
        "libjpeg-turbo, quick chroma": lambda one: simplejpeg.decode_jpeg(one, fastupsample=True),
        "PIL": lambda one: np.asarray(Image.open(io.BytesIO(one)).convert("RGB")),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(settings.rounds):
        for name, decode in ways.items():
            start = time.perf_counter()
            for one in data:
                decode(one)
            rates[name].append(len(data) / (time.perf_counter() - start))
    return {name: round(statistics.median(values)) for name, values in rates.items()}


def start_up(places: Places, settings: Settings, scratch: Path) -> dict[str, Any]:
    """Opening 10 000 shards, and the first batch after a resume in the middle of a million samples.

    Each shard is a file of its own: 100 samples of one tiny image, 150 kB, and none is in the page cache.
    """
    many = scratch / "many" / "train"
    many.mkdir(parents=True)
    tiny = io.BytesIO()
    Image.new("RGB", (16, 16)).save(tiny, "JPEG")
    for number in range(10_000):
        path = many / f"train-{number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in range(100):
                member = tarfile.TarInfo(f"{number:06d}{sample:03d}.jpg")
                member.size = tiny.tell()
                tar.addfile(member, io.BytesIO(tiny.getvalue()))
        write_index(path)
    for path in many.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    start = time.perf_counter()
    shards = open_shards(str(many), "train")
    opened = time.perf_counter() - start
    transform = crop_flip(SIZE, settings.scale)
    middle = len(shards) // 2
    start = time.perf_counter()
    batches = train_batches(
        shards, transform, batch_size=BATCH, seed=0, start=middle, stop=len(shards), workers=2, exact=False
    )
    next(batches)
    resumed = time.perf_counter() - start
    batches.close()
    shutil.rmtree(many.parent)
    return {"samples": len(shards), "open 10 000 shards, s": round(opened, 2), "then first batch, s": round(resumed, 2)}


def indexing(places: Places, settings: Settings, _: Path) -> dict[str, Any]:
    """MB of shards indexed a second, from the page cache."""
    paths = sorted(places.shards.glob("*.tar"))
    size = sum(path.stat().st_size for path in paths)
    rates = []
    for _ in range(settings.rounds):
        start = time.perf_counter()
        for path in paths:
            scan_sound(path)
        rates.append(size / 1e6 / (time.perf_counter() - start))
    return {"MB/s": round(statistics.median(rates))}


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


if __name__ == "__main__":
    main(tyro.cli(Settings))
