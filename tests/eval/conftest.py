"""A small labelled data set on disk."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.core.data.tars import write_tar


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """32 train and 12 test images of four classes that differ in colour.

    In the json member `parity` has two classes, `tags` lists the bits of the class, `numbers` are two numbers.
    """
    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 12)):
        members = []
        for i in range(count):
            pixels = rng.integers(0, 80, (40, 48, 3), dtype=np.uint8) + np.uint8(40) * np.array(
                [i % 4, 3 - i % 4, 1], dtype=np.uint8
            )
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "PNG")
            tags = [bit for bit in (0, 1) if i % 4 >> bit & 1]
            fields = {"parity": i % 2, "tags": tags, "numbers": [i % 4, 1.5 * (i % 2)]}
            members += [
                (f"{i:08d}.png", encoded.getvalue()),
                (f"{i:08d}.cls", str(i % 4).encode()),
                (f"{i:08d}.json", json.dumps(fields).encode()),
            ]
        write_tar(root / split / f"{split}-000000.tar", members)
    return str(root)
