"""`pretrain spark` from the command line: the flags that choose what is computed."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convscope.cli import main
from tests.core.data.tars import write_tar

NETWORK = (
    "--backbone",
    "resnet18_cifar",
    "--backbone-args",
    "channels=4,8,8,16",
    "--decoder",
    "light",
    "--device",
    "cpu",
)
RUN = (
    "--batch-size",
    "8",
    "--workers",
    "0",
    "--log-every",
    "1",
    "--picture-every",
    "0",
    "--steps",
    "3",
    "--lr",
    "0.05",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixteen images of noise."""
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    members = []
    for i in range(16):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(file, "PNG")
        members.append((f"{i:03d}.png", file.getvalue()))
    write_tar(folder / "train" / "train-000000.tar", members)
    return str(folder)


def losses(data: str, output: Path, *flags: str) -> list[float]:
    main(["pretrain", "spark", "--data", data, "--output-dir", str(output), *NETWORK, *RUN, *flags])
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags", [("--size", "16", "32"), ("--size", "32", "--shared-mask", "--mask-unit", "16")])
def test_the_published_way_trains_alike(data: str, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Rectangular crops, larger mask units and shared masks; two steps of training apart, in fp32."""
    ours = losses(data, tmp_path / "ours", *flags)
    published = losses(data, tmp_path / "published", *flags, "--reference")
    assert published == pytest.approx(ours, rel=1e-4)
    assert len(set(ours)) == 3
    assert losses(data, tmp_path / "other", *flags, "--seed", "1") != pytest.approx(ours, rel=1e-3)
