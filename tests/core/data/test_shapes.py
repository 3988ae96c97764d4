"""The embedded set: geometry against point-by-point definitions, determinism, the built folder."""

import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from convscope.core.data import shapes_render
from convscope.core.data.shapes import cached, render
from convscope.core.data.shapes_render import SHAPE_NAMES, SHAPES, TEST_START, TEXTURE_NAMES


def in_polygon(x: float, y: float, corners: list[tuple[float, float]]) -> bool:
    inside = False
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        if (ay > y) != (by > y) and x < ax + (y - ay) / (by - ay) * (bx - ax):
            inside = not inside
    return inside


def polar(radius: float, degrees: float) -> tuple[float, float]:
    """Clockwise from the top, y down."""
    return radius * math.sin(math.radians(degrees)), -radius * math.cos(math.radians(degrees))


def in_disc(x: float, y: float, cx: float, cy: float, radius: float) -> bool:
    return (x - cx) ** 2 + (y - cy) ** 2 < radius**2


TRIANGLE = [polar(1, 0), polar(1, 120), polar(1, 240)]
STAR = [polar(1 if i % 2 == 0 else 0.45, 36 * i) for i in range(10)]
MIDDLE = 0.55 / math.sqrt(2)
DIAMOND = [(0, 0.08 - 2 * MIDDLE), (2 * MIDDLE, 0.08), (0, 0.08 + 2 * MIDDLE), (-2 * MIDDLE, 0.08)]
INSIDE = {
    "circle": lambda x, y: in_disc(x, y, 0, 0, 0.9),
    "square": lambda x, y: -0.75 < x < 0.75 and -0.75 < y < 0.75,
    "triangle": lambda x, y: in_polygon(x, y, TRIANGLE),
    "star": lambda x, y: in_polygon(x, y, STAR),
    "cross": lambda x, y: (abs(x) < 0.28 and abs(y) < 0.9) or (abs(x) < 0.9 and abs(y) < 0.28),
    "ring": lambda x, y: in_disc(x, y, 0, 0, 0.88) and not in_disc(x, y, 0, 0, 0.44),
    "heart": lambda x, y: (
        in_polygon(x, y, DIAMOND)
        or in_disc(x, y, MIDDLE, 0.08 - MIDDLE, 0.55)
        or in_disc(x, y, -MIDDLE, 0.08 - MIDDLE, 0.55)
    ),
    "crescent": lambda x, y: in_disc(x, y, 0, 0, 0.9) and not in_disc(x, y, 0.42, 0, 0.72),
}


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_shape_is_where_its_distance_is_negative(name):
    axis = np.linspace(-1.1, 1.1, 57, dtype=np.float32) + np.float32(0.0013)  # no point on an outline
    x, y = np.meshgrid(axis, axis)
    expected = [INSIDE[name](float(a), float(b)) for a, b in zip(x.ravel(), y.ravel())]
    distance = SHAPES[name](x, y)
    assert distance.dtype == np.float32
    np.testing.assert_array_equal((distance < 0).ravel(), expected)


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_distance_is_in_units_of_the_plane(name):
    """Near the outline the slope is 1, so that the antialiased edge is one pixel wide."""
    axis = np.linspace(-1.1, 1.1, 401, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    distance = SHAPES[name](x, y)
    slope = np.hypot(*np.gradient(distance, axis, axis))
    assert np.median(slope[np.abs(distance) < 0.03]) == pytest.approx(1, abs=0.02)


def test_clouds_blend_the_four_values_around_a_pixel():
    rng, cells, size = np.random.default_rng(3), 3, 16
    grid = np.random.default_rng(3).random((cells + 1, cells + 1), dtype=np.float32)
    clouds = shapes_render._clouds(rng, size, cells)
    for row in range(size):
        for column in range(size):
            v, u = (row + 0.5) / size * cells, (column + 0.5) / size * cells
            i, j = int(v), int(u)
            a, b = (f * f * (3 - 2 * f) for f in (v - i, u - j))
            top = grid[i, j] * (1 - b) + grid[i, j + 1] * b
            bottom = grid[i + 1, j] * (1 - b) + grid[i + 1, j + 1] * b
            assert clouds[row, column] == pytest.approx(top * (1 - a) + bottom * a, abs=1e-5)


def test_image_is_a_function_of_seed_and_index():
    image, labels, caption = render(5, size=32, seed=1)
    again, same_labels, same_caption = render(5, size=32, seed=1)
    np.testing.assert_array_equal(image, again)
    assert (labels, caption) == (same_labels, same_caption)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert not np.array_equal(image, render(6, size=32, seed=1)[0])
    assert not np.array_equal(image, render(5, size=32, seed=2)[0])


def test_size_changes_resolution_not_content():
    small, labels, caption = render(9, size=32)
    large, same_labels, same_caption = render(9, size=128)
    assert (labels, caption) == (same_labels, same_caption)
    shrunk = large.reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.abs(shrunk - small).mean() < 12  # noise and edges differ, the picture does not


def test_labels_say_what_is_drawn():
    seen = set()
    for index in range(800):
        scene = shapes_render.draw_scene(index)
        labels = scene.labels()
        assert labels["shape_name"] == SHAPE_NAMES[labels["shape"]]
        assert labels["texture_name"] in scene.caption
        assert labels["shape_name"] in scene.caption
        assert labels["colour_name"] in scene.caption
        assert "a o" not in scene.caption
        assert labels["colour"] != labels["background"]
        name = f"{labels['texture_name']} {labels['shape_name']}"
        assert shapes_render.class_names()[scene.label] == name
        assert scene.label == labels["shape"] * 8 + labels["texture"]
        seen.add((labels["shape"], labels["texture"]))
    assert len(seen) == 64
    assert len(set(shapes_render.class_names())) == len(SHAPE_NAMES) * len(TEXTURE_NAMES)


def test_colour_of_a_solid_object_is_its_label():
    """The hue of the pixel in the middle of a solid square is the labelled one."""
    wanted = [i for i in range(3000) if shapes_render.draw_scene(i).names["texture"] == "solid"]
    wanted = [i for i in wanted if shapes_render.draw_scene(i).names["shape"] == "square"][:20]
    for index in wanted:
        image, labels, _ = render(index)
        hues = np.asarray(Image.fromarray(image).convert("HSV"), dtype=float)[..., 0] / 255
        gap = np.abs((hues - shapes_render.HUES[labels["colour_name"]] + 0.5) % 1 - 0.5)
        assert np.median(gap[28:36, 28:36]) < 0.06


def test_cached_builds_once_and_leaves_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVSCOPE_CACHE", str(tmp_path))
    folder = cached(n_train=12, n_test=5, size=16)
    before = (folder / "train" / "shards.json").stat().st_mtime_ns
    assert cached(n_train=12, n_test=5, size=16) == folder
    assert (folder / "train" / "shards.json").stat().st_mtime_ns == before
    assert cached(n_train=13, n_test=5, size=16) != folder
    assert len(list(tmp_path.iterdir())) == 2
    counts = [json.loads((folder / split / "shards.json").read_text())["samples"] for split in ("train", "test")]
    assert counts == [12, 5]


def test_cached_sample_holds_image_label_caption_and_factors(tmp_path, monkeypatch):
    import tarfile

    monkeypatch.setenv("CONVSCOPE_CACHE", str(tmp_path))
    folder = cached(n_train=0, n_test=6, size=16, seed=4)
    with tarfile.open(folder / "test" / "test-000000.tar") as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()}
    fields = json.loads(members["00000003.json"])
    index = int(fields["file"])
    image, labels, caption = render(index, size=16, seed=4)
    assert TEST_START <= index < TEST_START + 6
    assert {key: fields[key] for key in labels} == labels
    assert members["00000003.txt"].decode() == caption
    assert int(members["00000003.cls"]) == labels["shape"] * 8 + labels["texture"]
    decoded = np.asarray(Image.open(io.BytesIO(members["00000003.jpg"])))
    assert np.abs(decoded.astype(int) - image).mean() < 12


def test_two_processes_building_at_once_do_not_clash(tmp_path):
    program = "from convscope.core.data.shapes import cached; print(cached(n_train=200, n_test=20, size=16))"
    environment = {**os.environ, "CONVSCOPE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=60)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert [str(path) for path in tmp_path.iterdir()] == [printed[0]]
    assert printed[0] == printed[1]
