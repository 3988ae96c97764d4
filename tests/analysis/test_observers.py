"""Response tables of the study, in small."""

import zipfile
from pathlib import Path

import pytest

from convscope.analysis.cue_conflict import cue_conflict
from convscope.analysis.observers import read_observers
from convscope.analysis.shape_bias import consistency
from convscope.core.errors import UserError

HEADER = "subj,session,trial,rt,object_response,category,condition,imagename\n"


def table(subject: str, answers: list[str], first: int = 1) -> str:
    """Answers to cat1-dog1, cat2-dog2, ..., and the last to cat9-cat9, whose cues agree."""
    names = [f"cat{first + i}-dog{first + i}" for i in range(len(answers) - 1)] + ["cat9-cat9"]
    rows = [
        f"{subject},1,{i},0.5,{answer},cat,0,{i:04d}_s5n_x_0_cat_00_{name}.png"
        for i, (answer, name) in enumerate(zip(answers, names), 1)
    ]
    return HEADER + "\n".join(rows) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.csv").write_text(table("subject-01", ["cat", "cat", "cat", "dog", "na", "cat"]))
    (tmp_path / "b.csv").write_text(table("alexnet", ["dog", "dog", "cat", "bird", "dog", "cat"]))
    return tmp_path


def test_people_and_networks(folder: Path) -> None:
    found = read_observers(str(folder))
    assert [(label, one.kind) for label, one in found.items()] == [("subject-01", "human"), ("alexnet", "network")]
    human, network = (cue_conflict(one.decisions, one.shape, one.texture, 16) for one in found.values())
    assert (human.stimuli, network.stimuli) == (5, 5)
    assert human.bias is not None
    assert human.bias.value == 3 / 4  # cat, cat, cat, dog; the silent answer and the agreeing cues do not count
    assert human.coverage.value == 4 / 5
    assert network.shape.value == 1 / 5
    assert network.texture.value == 3 / 5


def test_consistency_is_over_all_common_stimuli(folder: Path) -> None:
    found = consistency(read_observers(str(folder)))
    assert found.stimuli.tolist() == [[6, 6], [6, 6]]
    # right: 1 1 1 0 0 1 and 0 0 1 0 0 1: they agree on 4 of 6, expected 4/6 * 2/6 + 2/6 * 4/6
    assert found.kappa[0, 1] == pytest.approx((4 / 6 - 16 / 36) / (1 - 16 / 36))
    assert found.kappa[1, 1] == 1


def test_a_zip_and_a_file_are_the_same(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "responses.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in folder.glob("*.csv"):
            archive.write(file, f"inside/{file.name}")
            archive.writestr(f"__MACOSX/._{file.name}", "no table")
    whole = read_observers(str(packed))
    alone = read_observers(str(folder / "b.csv"))
    assert list(whole) == ["subject-01", "alexnet"]
    assert whole["alexnet"].decisions.tolist() == alone["alexnet"].decisions.tolist()


def test_sessions_are_joined(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text(table("subject-01", ["cat", "dog", "cat"]))
    rows = table("subject-01", ["cat", "cat", "cat"], first=5).splitlines(keepends=True)
    (tmp_path / "2.csv").write_text("".join(rows[:-1]))
    assert len(read_observers(str(tmp_path))["subject-01"].keys) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("subj,category,imagename\n", "no column object_response"),
        (table("s", ["cat", "unicorn", "cat"]), "line 3.*unicorn"),
        (table("s", ["cat", "cat"]) + "s,1,9,0,cat,cat,0,0009_s5n_x_0_cat_00_cat1-dog1.png\n", "answered to cat1-dog1"),
        (HEADER + "s,1,1\n", "cut short"),
        (HEADER, "no responses"),
    ],
)
def test_wrong_tables_are_told(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        read_observers(str(tmp_path / "t.csv"))


def test_a_missing_place_is_told() -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_observers("nowhere.zip")
