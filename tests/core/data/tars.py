"""Small shards made on the spot."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

Member = tuple[str, bytes]


def write_tar(path: Path, members: Iterable[Member], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of (name, bytes); a name that ends with a slash is a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name.rstrip("/"))
            info.size = len(data)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(data))
    return path


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """An image whose pixels all tell its number."""
    file = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 0)).save(file, "PNG")
    return file.getvalue()


def noise(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """Random pixels, (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def write_split(folder: Path, counts: Iterable[int], corrupt: Iterable[int] = ()) -> Path:
    """Shards of `counts` numbered samples, label = number % 3; those in `corrupt` hold no image. Returns `folder`."""
    broken, number = set(corrupt), 0
    for shard, count in enumerate(counts):
        members: list[Member] = []
        for i in range(number, number + count):
            members.append((f"{i:05d}.png", b"rubbish" if i in broken else png(i)))
            members.append((f"{i:05d}.cls", str(i % 3).encode()))
        number += count
        write_tar(folder / f"{folder.name}-{shard:06d}.tar", members)
    return folder
