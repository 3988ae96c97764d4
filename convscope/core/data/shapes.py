"""The embedded image-caption set `builtin:shapes`, built once into the cache."""

import os
import secrets
import shutil
from pathlib import Path

from convscope.core.data.shapes_render import render
from convscope.core.files import cache_dir

__all__ = ["cached", "render"]

VERSION = 1  # of the drawing; a new one makes a new cache folder


def cached(n_train: int = 8000, n_test: int = 2000, size: int = 64, seed: int = 0) -> Path:
    """The folder of shards with splits train and test, drawn on first use.

    Args:
        n_train: images in train, the first of the sequence.
        n_test: images in test; the same ones whatever `n_train`.
        size: pixels per side.
        seed: of the sequence.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = cache_dir() / f"shapes-v{VERSION}-{size}px-train{n_train}-test{n_test}-seed{seed}"
    if not folder.exists():
        _build(folder, n_train, n_test, size, seed)
    return folder


def _build(folder: Path, n_train: int, n_test: int, size: int, seed: int) -> None:
    """Build beside `folder` and rename, so that processes that start at once each find a whole set."""
    from convscope.core.data.build import BuildConfig, build
    from convscope.core.data.sources import ShapesSource

    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    source = ShapesSource(n_train=n_train, n_test=n_test, size=size, seed=seed)
    try:
        build(source, BuildConfig(source="builtin:shapes", dest=str(temporary)))
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
