"""Real photographs through every way of packing and reading them, and how far the fast ways are from torchvision's.

    python benchmarks/photos.py PHOTOS    # a folder or zip of photographs

Ends with an error where a sample is lost or a decoded picture is not the one that was encoded.
"""

import io
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import tyro
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from convscope.core.backbone import Preprocessing
from convscope.core.data.build import BuildConfig, build
from convscope.core.data.check import check
from convscope.core.data.decode import decode, image_bytes
from convscope.core.data.photometric import PhotometricConfig, draw, photometric
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.sources import open_source
from convscope.core.data.statistics import statistics
from convscope.core.data.stream import eval_batches, train_batches
from convscope.core.data.transforms import crop_flip, eval_transform
from convscope.core.pairs.captions import CaptionSource

SIZE, BATCH = 224, 16
SMALL = 480  # long side of the pictures that are encoded anew
PREPROCESSING = Preprocessing(size=(SIZE, SIZE))
FINE: dict[str, Any] = {"quality": 95, "subsampling": 0}  # halved chroma would hide which way a picture is turned
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is read, and how often."""

    photos: tyro.conf.Positional[Path]
    """Folder or zip of photographs."""
    epochs: int = 4
    """Random crops of each photograph."""
    encoded: int = 12
    """Photographs that are encoded in every form."""


def main(settings: Settings) -> None:
    """A line of JSON for each way."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        plain = pack("photos", str(settings.photos), Path(scratch) / "photos")
        small = pack("photos, short side 256", str(settings.photos), Path(scratch) / "small", resize=256)
        crops = [
            fast_and_exact(name, shards, settings.epochs) for name, shards in (("photos", plain), ("256 px", small))
        ]
        for shards in (plain, small):
            evaluate(shards)
        colours(crops[0])
        forms = encode_all(plain, Path(scratch) / "files", settings.encoded)
        shards = pack("other forms", str(Path(scratch) / "files"), Path(scratch) / "forms")
        pack("other forms, short side 128", str(Path(scratch) / "files"), Path(scratch) / "tiny", resize=128)
        compare_forms(shards, forms)
        evaluate(shards)


def report(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def pack(name: str, source: str, dest: Path, resize: int | None = None) -> ShardSet:
    """Build, check and count."""
    opened = open_source(source)
    found = sum(map(len, opened.listing().splits.values()))
    build(opened, BuildConfig(source=source, dest=str(dest), samples_per_shard=25, resize=resize))
    problems = check(dest)
    shards = open_shards(str(dest), "train")
    seen = statistics(shards, CaptionSource())
    report(
        build=name,
        images=found,
        samples=len(shards),
        problems=[str(problem) for problem in problems],
        formats=dict(seen.formats),
        short_sides=[min(map(min, zip(seen.widths, seen.heights))), max(map(min, zip(seen.widths, seen.heights)))],
    )
    require(found == len(shards) == len(seen.widths) and not problems, f"{name}: a sample was lost")
    return shards


def evaluate(shards: ShardSet) -> None:
    """Every sample exactly once, with two workers, and what the transform makes of each."""
    transform = eval_transform(PREPROCESSING)
    keys: Counter[str] = Counter()
    for batch in eval_batches(shards, transform, batch_size=BATCH, workers=2, label=None):
        for row, (index, key) in enumerate(zip(batch["index"].tolist(), batch["key"])):
            require(torch.equal(batch["image"][row], transform(decode(shards[index]))), f"{key}: other pixels")
            keys[key] += 1
    require(len(keys) == len(shards) and set(keys.values()) == {1}, "a sample was not seen exactly once")
    report(eval=shards.source.rsplit("/", 1)[-1], samples=len(keys))


def fast_and_exact(name: str, shards: ShardSet, epochs: int) -> Tensor:
    """The same random crops both ways; returns the exact ones (N, 3, H, W)."""
    stop = epochs * len(shards)
    transform = crop_flip(SIZE, (0.08, 1.0))
    options: dict[str, Any] = {"batch_size": BATCH, "seed": 0, "stop": stop, "workers": 2, "max_skipped": 0.0}
    fast, exact = (list(train_batches(shards, transform, exact=way, **options)) for way in (False, True))
    index = torch.cat([batch["index"] for batch in exact])
    require(torch.equal(index, torch.cat([batch["index"] for batch in fast])), f"{name}: another order")
    require(index.bincount(minlength=len(shards)).eq(epochs).all(), f"{name}: an epoch is not every sample once")
    images = torch.cat([batch["image"] for batch in exact])
    apart = (torch.cat([batch["image"] for batch in fast]).int() - images.int()).abs().float()
    slow = [transform.from_jpeg(image_bytes(shards[i])) is None for i in range(len(shards))]
    each = apart.mean((1, 2, 3))
    report(
        train=name,
        crops=len(images),
        photographs_read_fast=slow.count(False),
        mean=rounded(each.mean()),
        largest=int(apart.max()),
        worst_photograph=rounded(max(each[index == i].mean() for i in range(len(shards)))),
        worst_crop=rounded(each.max()),
    )
    return images


def colours(images: Tensor) -> None:
    """One pass over a batch against torchvision's four steps in random order, with the same factors."""
    config = PhotometricConfig(jitter=1.0, grey=0.0, blur=0.0)
    rng, draws = np.random.default_rng(0), draw(config, len(images), torch.Generator().manual_seed(0))
    apart, changed = [], []
    for image, ours, *factors in zip(
        images, photometric(images, draws), draws.brightness, draws.contrast, draws.saturation, draws.hue
    ):
        steps = dict(zip(("brightness", "contrast", "saturation", "hue"), factors))
        theirs = image
        for step in rng.permutation(list(steps)).tolist():
            theirs = getattr(v2.functional, f"adjust_{step}")(theirs, float(steps[step]))
        apart.append((ours - theirs).abs().mean())
        changed.append((image.float() - theirs).abs().mean())
    report(
        colours=len(images), mean=rounded(torch.stack(apart).mean()), changed_by=rounded(torch.stack(changed).mean())
    )


def encode_all(shards: ShardSet, folder: Path, count: int) -> dict[str, Image.Image]:
    """Some photographs in every form, a class folder for each form; returns what each file should show."""
    shown = {}
    for index in range(count):
        image = decode(shards[index])
        image.thumbnail((SMALL, SMALL))
        for form, (suffix, data, picture) in forms_of(image).items():
            file = folder / form / f"{index:03d}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            shown[f"{form}/{file.name}"] = picture
    return shown


def forms_of(image: Image.Image) -> dict[str, tuple[str, bytes, Image.Image]]:
    """Suffix, bytes and what they should decode to."""
    grey, exif = image.convert("L"), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    turned = image.transpose(Image.Transpose.ROTATE_90)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    inks = image.convert("CMYK")
    ycck = simplejpeg.encode_jpeg(255 - np.asarray(inks), 95, colorspace="CMYK", colorsubsampling="444")
    palette = image.quantize(256)
    return {
        "PNG": ("png", saved(image, "PNG"), image),
        "PNG, 16-bit grey": ("png", saved(deep, "PNG"), grey),
        "PNG, palette": ("png", saved(palette, "PNG"), palette),
        "PNG, transparent": ("png", saved(image.convert("RGBA"), "PNG"), image),
        "TIFF": ("tif", saved(image, "TIFF"), image),
        "WebP, lossless": ("webp", saved(image, "WEBP", lossless=True), image),
        "WebP": ("webp", saved(image, "WEBP", quality=95), image),
        "JPEG": ("jpg", saved(image, "JPEG", **FINE), image),
        "JPEG, progressive": ("jpg", saved(image, "JPEG", **FINE, progressive=True), image),
        "JPEG, grey": ("jpg", saved(grey, "JPEG", quality=95), grey),
        "JPEG, CMYK": ("jpg", saved(inks, "JPEG", quality=95), image),
        "JPEG, YCCK": ("jpg", ycck, image),
        "JPEG, turned by Exif": ("jpg", saved(turned, "JPEG", **FINE, exif=exif), image),
        "JPEG, turned by XMP": ("jpg", saved(turned, "JPEG", **FINE, xmp=XMP), image),
    }


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def compare_forms(shards: ShardSet, shown: dict[str, Image.Image]) -> None:
    """Each form against what it should show, and fast crops of it against exact ones."""
    away: dict[str, list[float]] = {}
    for index in range(len(shards)):
        sample = shards[index]
        name = json.loads(sample["json"])["file"]
        found, picture = decode(sample), shown[name].convert("RGB")
        require(found.size == picture.size, f"{name} is {found.size}, not {picture.size}")
        difference = np.abs(np.asarray(found).astype(int) - np.asarray(picture)).mean()
        away.setdefault(name.split("/")[0], []).append(float(difference))
    options: dict[str, Any] = {"batch_size": BATCH, "seed": 0, "stop": len(shards), "max_skipped": 0.0, "label": "cls"}
    transform = crop_flip(SIZE, (0.08, 1.0))
    pairs = zip(*(train_batches(shards, transform, exact=way, **options) for way in (False, True)))
    apart: dict[str, list[float]] = {}
    for fast, exact in pairs:
        each = (fast["image"].int() - exact["image"].int()).abs().float().mean((1, 2, 3)).tolist()
        for label, value in zip(exact["label"].tolist(), each):
            apart.setdefault((shards.classes or [])[label], []).append(value)
    for form, values in away.items():
        require(max(values) < 15, f"{form}: another picture ({max(values):.1f} levels away)")
        report(
            form=form, samples=len(values), from_original=rounded(np.mean(values)), fast=rounded(np.mean(apart[form]))
        )


def require(holds: Any, otherwise: str) -> None:
    if not holds:
        sys.exit(f"error: {otherwise}")


def rounded(value: Any) -> float:
    return round(float(value), 3)


if __name__ == "__main__":
    main(tyro.cli(Settings))
