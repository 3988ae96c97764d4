"""The protocol of revisited Oxford and Paris against a plain loop, and its ground truth read as data."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from convscope.core.errors import UserError
from convscope.core.plain_pickle import read_plain_pickle
from convscope.eval.revisited import (
    LEVELS,
    LandmarkQuery,
    evaluate_level,
    precision_at,
    read_ground_truth,
    trapezoid_precision,
    without_junk,
)

BOX = (0.0, 0.0, 9.0, 9.0)


def slow_query(order: list[int], positive: set[int], junk: set[int], k: int) -> tuple[float, float]:
    """The official arithmetic, one image of the ranking after the other."""
    kept = [image for image in order if image not in junk]
    ranks = [place for place, image in enumerate(kept) if image in positive]
    area = 0.0
    for found, rank in enumerate(ranks):
        left = 1.0 if rank == 0 else found / rank
        right = (found + 1) / (rank + 1)
        area += (left + right) / 2 / len(positive)
    depth = min(k, ranks[-1] + 1)
    return area, sum(image in positive for image in kept[:depth]) / depth


def test_published_vector() -> None:
    ranks = torch.tensor([0, 2, 5])
    assert trapezoid_precision(ranks, 3) == pytest.approx(0.67778, abs=1e-5)
    relevant = [1, 0, 1, 0, 0, 1]
    assert average_precision_score(relevant, [6, 5, 4, 3, 2, 1]) == pytest.approx(0.72222, abs=1e-5)  # not the same


def test_by_hand() -> None:
    assert trapezoid_precision(torch.tensor([0, 1]), 2) == 1
    assert trapezoid_precision(torch.tensor([1]), 2) == pytest.approx((0 + 1 / 2) / 4)  # another is never found
    assert trapezoid_precision(torch.tensor([], dtype=torch.int64), 2) == 0
    assert precision_at(torch.tensor([0, 2]), 10) == pytest.approx(2 / 3)  # the last positive is third
    assert precision_at(torch.tensor([0, 20]), 10) == pytest.approx(1 / 10)
    assert without_junk(torch.tensor([1, 4, 5]), torch.tensor([0, 2, 3])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("level", list(LEVELS))
def test_levels_against_a_loop(level: str) -> None:
    rng = np.random.default_rng(0)
    queries = []
    for number in range(12):
        easy, hard, junk = np.split(rng.permutation(30)[:15], sorted(rng.integers(0, 16, 2)))
        if number == 3:
            easy = hard = np.array([], dtype=int)  # nothing to find at any level: skipped
        queries.append(LandmarkQuery("q", BOX, {"easy": easy.tolist(), "hard": hard.tolist(), "junk": junk.tolist()}))
    similarity = torch.from_numpy(rng.normal(size=(12, 30)))
    expected = []
    for row, query in zip(similarity.tolist(), queries):
        easy, hard, junk = (set(query.lists[name]) for name in ("easy", "hard", "junk"))
        positive = {"easy": easy, "medium": easy | hard, "hard": hard}[level]
        ignored = {"easy": junk | hard, "medium": junk, "hard": junk | easy}[level]
        if positive:
            expected.append(slow_query(sorted(range(30), key=lambda i: -row[i]), positive, ignored, 5))
    found = evaluate_level(similarity, queries, level, [5])
    assert 5 < len(expected) < 12
    assert found["map"].tolist() == pytest.approx([area for area, _ in expected])
    assert found["mp@5"].tolist() == pytest.approx([share for _, share in expected])


def test_ties_keep_the_order_of_the_gallery() -> None:
    query = LandmarkQuery("q", BOX, {"easy": [2], "hard": [], "junk": []})
    found = evaluate_level(torch.ones(1, 50), [query], "easy", [1])
    assert float(found["map"]) == pytest.approx((0 + 1 / 3) / 2)
    with pytest.raises(UserError, match="level hard"):
        evaluate_level(torch.ones(1, 50), [query], "hard", [1])


def content(make: Callable[[list[int]], Any]) -> dict[str, Any]:
    answers = [
        {"bbx": [1.5, 2.0, 30.25, 40.0], "easy": make([0, 2]), "hard": make([1]), "junk": make([])},
        {"bbx": make([1, 2, 30, 40]), "easy": make([]), "hard": make([3]), "junk": make([0, 1])},
    ]
    return {"imlist": ["a", "b", "c", "d"], "qimlist": ["x", "y"], "gnd": answers}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("make", [list, np.array, lambda v: np.asfortranarray(np.array(v, ">i4")), np.float32])
def test_pickle_and_its_json_twin(tmp_path: Path, protocol: int, make: Callable[[list[int]], Any]) -> None:
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(content(make), protocol))
    (tmp_path / "gnd.json").write_text(json.dumps(content(list)))
    read = read_ground_truth(tmp_path / "gnd.pkl")
    assert read == read_ground_truth(tmp_path / "gnd.json")
    assert read.queries[0].box == (1.5, 2.0, 30.25, 40.0)
    assert read.queries[1].lists == {"easy": [], "hard": [3], "junk": [0, 1]}


def test_numpy_scalars_and_python_2(tmp_path: Path) -> None:
    """numpy's numbers, and strings of bytes as Python 2 wrote them: here 'imlist' with the opcode U."""
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([np.int64(3), np.float32(0.5), {"n": np.arange(6).reshape(2, 3).T}]))
    assert read_plain_pickle(tmp_path / "a.pkl") == [3, 0.5, {"n": [[0, 3], [1, 4], [2, 5]]}]
    (tmp_path / "b.pkl").write_bytes(b"\x80\x02U\x06imlist.")
    assert read_plain_pickle(tmp_path / "b.pkl") == "imlist"


class _Runs:
    """A pickle that calls a function when it is read plainly."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_nothing_in_a_pickle_is_run(tmp_path: Path, protocol: int) -> None:
    file, made = tmp_path / "evil.pkl", tmp_path / "made"
    payloads = [
        _Runs(os.mkdir, str(made)),
        _Runs(eval, f"__import__('os').mkdir({str(made)!r})"),
        _Runs(np.save, str(made), 1),
        np.array([_Runs(os.mkdir, str(made))], dtype=object),
        np.array(["a"]),
        {1, 2},
        Path("a"),
    ]
    for payload in payloads:
        file.write_bytes(pickle.dumps({"imlist": payload}, protocol))
        with pytest.raises(UserError, match=r"evil\.pkl is refused: it names"):
            read_ground_truth(file)
    assert os.listdir(tmp_path) == ["evil.pkl"]
    pickle.loads(pickle.dumps(payloads[0], protocol))  # that they would act is what makes this a test
    assert made.is_dir()


def test_what_is_no_ground_truth(tmp_path: Path) -> None:
    file = tmp_path / "gnd.json"
    whole = content(list)

    def refused(change: dict[str, Any], match: str) -> None:
        file.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=match):
            read_ground_truth(file)

    refused({"gnd": whole["gnd"][:1]}, "2 queries and 1 answers")
    refused({"imlist": ["a", "b", "c"]}, "position 3 is none of the 3 images")
    refused({"imlist": ["../a", "b", "c", "d"]}, "no name of an image")
    refused({"gnd": [whole["gnd"][0] | {"bbx": [5, 5, 1, 9]}, whole["gnd"][1]]}, "query x has the box")
    refused({"gnd": [{"easy": []}, {}]}, "bbx is missing")
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(whole)[:-40])
    with pytest.raises(UserError, match="no pickle that can be read"):
        read_ground_truth(tmp_path / "gnd.pkl")
