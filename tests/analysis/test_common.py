"""What analyses share: labels, and files that belong together."""

from pathlib import Path

import numpy as np
import pytest

from convscope.analysis.common import one_or_all, short_labels, steps, write_csv, write_result
from convscope.core.results import EvalResult, Figure, load_result
from convscope.plots.curves import draw_loss

STEPS = [f"runs/x/checkpoints/step-{step:08d}.pt" for step in (1500, 0, 20)]


def test_steps_are_those_of_one_run() -> None:
    assert steps(STEPS) == [1500, 0, 20]
    assert steps([*STEPS, "runs/y/checkpoints/step-00000040.pt"]) is None
    assert steps([*STEPS, "timm:resnet18@random"]) is None
    assert steps([*STEPS, STEPS[0]]) is None
    assert steps(STEPS[:1]) is None
    assert steps(["step-00000001.pt", "step-00000002.pt"]) == [1, 2]


@pytest.mark.parametrize(
    ("labels", "short"),
    [
        (STEPS, ["step 1 500", "step 0", "step 20"]),
        (["runs/a/b", "runs/a/c"], ["b", "c"]),
        (["runs/a", "timm:resnet18@random"], ["runs/a", "timm:resnet18@random"]),
        (["runs/a"], ["runs/a"]),
        (["/x/a", "/y/b"], ["x/a", "y/b"]),
    ],
)
def test_short_labels(labels: list[str], short: list[str]) -> None:
    assert short_labels(labels) == short


def test_one_record_where_all_are_the_same() -> None:
    assert one_or_all({"a": {"x": 1}, "b": {"x": 1}}) == {"x": 1}
    assert one_or_all({"a": {"x": 1}, "b": {"x": 2}}, s=0) == {"s": 0, "models": {"a": {"x": 1}, "b": {"x": 2}}}


def test_everything_of_a_result_is_written(tmp_path: Path) -> None:
    result = EvalResult(
        task="t", protocol="t/1", model={}, data={}, preprocessing={}, figures={"f": Figure(1.5)}, details={}
    )
    names = write_result(
        tmp_path,
        "t",
        result,
        arrays={"a": np.arange(3)},
        tables={"t": (["x", "y"], [[1, None], ["a,b", 2.5]])},
        pictures={"t": draw_loss({"a": (np.arange(3), np.ones(3))})},
    )
    assert sorted(names) == sorted(p.name for p in tmp_path.iterdir()) == ["t.csv", "t.json", "t.npz", "t.png", "t.svg"]
    assert load_result(tmp_path / "t.json").figures["f"].value == 1.5
    assert (tmp_path / "t.csv").read_text() == 'x,y\n1,\n"a,b",2.5\n'


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def rows() -> list[list[int]]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_csv(tmp_path / "t.csv", ["x"], (row for row in rows()))
    assert not list(tmp_path.iterdir())
