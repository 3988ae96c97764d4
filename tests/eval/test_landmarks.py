"""The command on a small benchmark of drawn landmarks."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from convscope.core.errors import UserError
from convscope.core.results import load_result
from convscope.eval.landmarks import LandmarksCommand, landmarks, run
from convscope.eval.revisited import GroundTruth, LandmarkQuery

FIGURES = ("map", "mp@1", "mp@2")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two landmarks, two images of each and a query that shows one in its left half, the other one in its right."""
    root = tmp_path_factory.mktemp("landmarks")
    rng = np.random.default_rng(0)
    facades = [rng.integers(0, 256, (8, 8, 3)).repeat(8, 0).repeat(8, 1) for _ in range(2)]  # (64, 64, 3)
    for folder in ("images", "others"):
        (root / folder).mkdir()

    def save(name: str, pixels: np.ndarray) -> None:
        noisy = np.clip(pixels + rng.normal(0, 10, pixels.shape), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(root / f"{name}.png")

    for number in range(4):
        save(f"images/view{number}", facades[number // 2])
        save(f"others/{number}", rng.integers(0, 256, (64, 64, 3)))
    save("images/query", np.concatenate(facades, axis=1))
    lists = [{"easy": [0], "hard": [1], "junk": []}, {"easy": [2], "hard": [], "junk": [3]}]
    boxes = [[0.0, 0.0, 64.0, 64.0], [64.0, 0.0, 128.0, 64.0]]
    answers = [{"bbx": np.array(box), **{k: np.array(v) for k, v in row.items()}} for box, row in zip(boxes, lists)]
    names = [f"view{number}" for number in range(4)]
    truth = {"imlist": names, "qimlist": ["query", "query"], "gnd": answers}
    (root / "gnd_small.pkl").write_bytes(pickle.dumps(truth))
    return root


@pytest.mark.parametrize("whiten", [False, True])
def test_command(benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], whiten: bool) -> None:
    """Each box is matched with its own landmark, in front of all distractors."""
    output = tmp_path / "result.json"
    config = LandmarksCommand(
        model="timm:resnet10t@random",
        images=benchmark / "images",
        ground_truth=benchmark / "gnd_small.pkl",
        distractors=benchmark / "others",
        whiten_images=benchmark / "images" if whiten else None,
        scales=(1.0, 2**-0.5),
        precision_at=(1, 2),
        device="cpu",
        workers=0,
        output=output,
    )
    run(config)
    result = load_result(output)
    assert set(result.figures) == {f"{level} {name}" for level in ("easy", "medium", "hard") for name in FIGURES}
    assert all(figure.value == 1 for figure in result.figures.values())
    assert (result.figures["easy map"].n, result.figures["hard map"].n) == (2, 1)  # one has nothing hard
    assert (result.data["train"]["count"], result.data["test"]["count"], result.data["distractors"]) == (8, 2, 4)
    assert "medium mp@2" in capsys.readouterr().out


def test_figures_from_vectors() -> None:
    """Of a gallery on a circle the query's rank is its angle's."""
    angles = torch.arange(5) * 0.2
    gallery = torch.stack([angles.cos(), angles.sin()], 1)
    truth = GroundTruth("abcde", [LandmarkQuery("q", (0, 0, 1, 1), {"easy": [2], "hard": [4], "junk": [0]})])
    config = LandmarksCommand(model="", images=Path(), ground_truth=Path(), precision_at=(2,))
    found = landmarks(F.normalize(torch.tensor([[1.0, 0.0]])), gallery, truth, config)
    assert found["easy map"].value == pytest.approx((0 + 1 / 2) / 2)  # after b; a is junk, e is ignored
    assert found["hard map"].value == pytest.approx((0 + 1 / 3) / 2)  # after b, d; a and c are ignored
    assert found["medium map"].value == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert found["medium mp@2"].value == 1 / 2


def test_images_that_are_missing(benchmark: Path, tmp_path: Path) -> None:
    truth = {"imlist": ["view0", "gone"], "qimlist": ["query"], "gnd": [{"bbx": [0, 0, 9, 9], "easy": [0]}]}
    (tmp_path / "gnd.json").write_text(json.dumps(truth))
    config = {"model": "timm:resnet10t@random", "images": benchmark / "images", "ground_truth": tmp_path / "gnd.json"}
    with pytest.raises(UserError, match="lacks 1 of 2 images, such as gone"):
        run(LandmarksCommand(**config))
    with pytest.raises(UserError, match="--scales"):
        LandmarksCommand(**config, scales=(0.0,))
