"""Targets: several labels of an image in either notation, numbers to predict."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.errors import UserError
from convscope.eval.targets import read_targets
from tests.core.data.tars import write_tar


def shards(folder: Path, values: list[Any], member: bool = False) -> ShardSet:
    """Samples whose field `t` is each value, in the json member or a member of its own."""
    members = []
    for i, value in enumerate(values):
        text = json.dumps(value if member else {"t": value}).encode()
        members += [(f"{i:04d}.png", b"never read"), (f"{i:04d}.{'t' if member else 'json'}", text)]
    write_tar(folder / "s" / "s-000000.tar", members)
    return open_shards(str(folder), "s")


@pytest.mark.parametrize("member", [False, True])
def test_lists_of_classes(tmp_path: Path, member: bool) -> None:
    train = shards(tmp_path / "a", [[0, 3], [], [2]], member)
    test = shards(tmp_path / "b", [[3]], member)
    found = read_targets((train, test), "t", "multi-label")
    assert [part.tolist() for part in found] == [[[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], [[0, 0, 0, 1]]]
    assert found[0].dtype == torch.float32


def test_a_value_for_each_class(tmp_path: Path) -> None:
    train, test = shards(tmp_path / "a", [[0, 1], [1, 1]]), shards(tmp_path / "b", [[-1, 0]])
    found = read_targets((train, test), "t", "multi-label")
    assert [part.tolist() for part in found] == [[[0, 1], [1, 1]], [[-1, 0]]]
    # the same lists are class numbers where another split cannot be read as a value for each class
    lists = read_targets((train, shards(tmp_path / "c", [[1]])), "t", "multi-label")
    assert [part.tolist() for part in lists] == [[[1, 1], [0, 1]], [[0, 1]]]


@pytest.mark.parametrize("member", [False, True])
def test_numbers(tmp_path: Path, member: bool) -> None:
    train, test = shards(tmp_path / "a", [1, 2.5], member), shards(tmp_path / "b", [-3], member)
    assert [part.tolist() for part in read_targets((train, test), "t", "regression")] == [[[1.0], [2.5]], [[-3.0]]]
    pairs = shards(tmp_path / "c", [[1, 2], [3, 4.5]], member)
    assert read_targets((pairs,), "t", "regression")[0].tolist() == [[1.0, 2.0], [3.0, 4.5]]


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("multi-label", [[0], [-2]], "sample 0001: class -2 is not a whole number"),
        ("multi-label", [[0.5], [1]], "sample 0000: class 0.5 is not a whole number"),
        ("multi-label", [["cat"]], "not a number or a list of numbers"),
        ("regression", [[1, 2], [3]], "sample 0001 has 1 numbers to predict, the first one 2"),
        ("regression", [[], []], "sample 0000 has 0 numbers"),
        ("regression", [1.0, "NaN"], "sample 0001: its 't' is 'NaN', not a number"),
    ],
)
def test_what_cannot_be_a_target_is_told(tmp_path: Path, kind: Any, values: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_targets((shards(tmp_path, values),), "t", kind)


def test_unknown_fields_and_classes_are_told(tmp_path: Path) -> None:
    train = shards(tmp_path / "a", [[0], [1]])
    with pytest.raises(UserError, match="no label 'other'"):
        read_targets((train,), "other", "multi-label")
    with pytest.raises(UserError, match="sample 0000 has class 5; the train split has 2 classes"):
        read_targets((train, shards(tmp_path / "b", [[5]])), "t", "multi-label")
