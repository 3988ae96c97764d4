"""The command on small stimuli and tiny models."""

import csv
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from convscope.analysis.shape_bias_command import ShapeBiasCommand, run
from convscope.analysis.sixteen_categories import CATEGORIES, class_indices
from convscope.core.backbone import create_backbone
from convscope.core.errors import UserError
from convscope.core.models import save_backbone
from convscope.core.pairs.model import save_image_text
from convscope.core.results import load_result
from tests.analysis.test_observers import table
from tests.core.data.tars import noise
from tests.core.pairs.test_model import pair

SIDE = 32


def draw(folder: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(seed, (SIDE, SIDE)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def stimuli(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two of each shape, of which one of the category cat has agreeing cues; and a cat that observers saw too."""
    names = [f"{one}/{one}{i}-{CATEGORIES[(n + i) % 16]}{i}.png" for n, one in enumerate(CATEGORIES) for i in (1, 2)]
    return str(draw(tmp_path_factory.mktemp("stimuli"), [*names, "cat/cat9-cat9.png", "cat/cat1-dog1.png"]))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file whose classifier prefers chairs, whatever it sees."""
    torch.manual_seed(3)
    network = timm.create_model("test_resnet", num_classes=1000)
    with torch.no_grad():
        network.get_classifier().bias[list(class_indices("chair"))] += 20
    file = tmp_path_factory.mktemp("model") / "classifier.pth"
    torch.save(network.state_dict(), file)
    return str(file)


def test_own_classifier_beside_observers_and_twin(
    stimuli: str, classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    responses = tmp_path / "responses.csv"
    responses.write_text(table("subject-01", ["cat"] * 5) + table("alexnet", ["dog"] * 5).partition("\n")[2])
    out = tmp_path / "out"
    run(
        ShapeBiasCommand(
            models=(classifier,), arch="test_resnet", stimuli=stimuli, observers=str(responses), output_dir=out
        )
    )
    names = {path.name for path in out.iterdir()}
    plots = {f"{stem}.{kind}" for stem in ("shape-bias", "shape-bias-consistency") for kind in ("png", "svg")}
    assert names == plots | {"shape-bias.json", "shape-bias.npz", "shape-bias.csv"}

    result = load_result(out / "shape-bias.json")
    rows = result.details["rows"]
    assert list(rows) == ["subject-01", "alexnet", classifier, f"{classifier} (untrained)"]
    assert [row["kind"] for row in rows.values()] == ["human", "network", "model", "untrained"]
    assert result.figures["subject-01: shape bias"].value == 1.0
    assert result.figures["alexnet: shape bias"].value == 0.0
    model = rows[classifier]
    assert model["head"] == "own"
    assert model["shown"] == "as they are, 32 x 32"
    assert model["stimuli"] == 33  # of 34, one has agreeing cues
    assert model["shape_bias"] is None  # chair whatever it sees: two shapes and two textures of 33 stimuli
    assert "not above chance" in model["no_shape_bias"]
    assert f"{classifier}: shape bias" not in result.figures
    assert result.figures[f"{classifier}: coverage"].value == pytest.approx(4 / 33)

    arrays = np.load(out / "shape-bias.npz")
    assert set(arrays["decisions_2"].tolist()) == {CATEGORIES.index("chair")}
    assert arrays["scores_2"].shape == (34, 16)
    assert arrays["kappa"].shape == (4, 4)
    assert arrays["kappa_stimuli"][0, 2] == 2  # cat1-dog1 and cat9-cat9
    lines = list(csv.DictReader((out / "shape-bias.csv").open()))
    assert len(lines) == 4 * 17
    cats = [line["texture_fraction"] for line in lines if line["category"] == "cat"]
    assert cats == ["0.0", "1.0", "", ""]  # no fraction where coverage is at chance
    assert "coverage at chance" in capsys.readouterr().out


def test_observers_alone(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(table("subject-02", ["cat", "dog", "cat", "cat"]))
    run(ShapeBiasCommand(observers=str(tmp_path), output_dir=tmp_path / "out"))
    result = load_result(tmp_path / "out" / "shape-bias.json")
    assert result.figures["shape bias"].value == pytest.approx(2 / 3)
    assert not (tmp_path / "out" / "shape-bias-consistency.png").exists()  # nobody to compare with


def test_random_model_needs_no_twin_and_probes_learn_from_categories(stimuli: str, tmp_path: Path) -> None:
    models = ("timm:test_resnet@random", "timm:test_resnet@random=1")
    run(ShapeBiasCommand(models=models, stimuli=stimuli, train_data=stimuli, output_dir=tmp_path, batch_size=16))
    rows = load_result(tmp_path / "shape-bias.json").details["rows"]
    assert list(rows) == list(models)  # the twin of the second is the first
    assert {row["kind"] for row in rows.values()} == {"untrained"}
    assert {row["head"] for row in rows.values()} == {"probe-16"}
    assert rows[models[0]]["train"]["categories"] == 16
    assert rows[models[0]]["train"]["fingerprint"] == load_result(tmp_path / "shape-bias.json").data["fingerprint"]


def test_a_model_of_another_fixed_size_gets_them_resized(stimuli: str, tmp_path: Path) -> None:
    small = {"depth": 1, "img_size": 48, "embed_dim": 32, "num_heads": 2}
    file = tmp_path / "vit.safetensors"
    save_backbone(file, create_backbone("vit_tiny_patch16_224", small, seed=1))
    run(ShapeBiasCommand(models=(str(file),), stimuli=stimuli, train_data=stimuli, output_dir=tmp_path))
    rows = load_result(tmp_path / "shape-bias.json").details["rows"]
    shown = "resized from 32 x 32 to 48 x 48, the size that the model takes"
    assert [row["shown"] for row in rows.values()] == [shown, shown]


def test_image_text_models_go_by_names(stimuli: str, tmp_path: Path) -> None:
    file = tmp_path / "image_text.safetensors"
    save_image_text(file, pair())
    (tmp_path / "templates.txt").write_text("{}\n")
    templates = str(tmp_path / "templates.txt")
    run(ShapeBiasCommand(models=(str(file),), stimuli=stimuli, templates=templates, output_dir=tmp_path))
    rows = load_result(tmp_path / "shape-bias.json").details["rows"]
    assert [row["head"] for row in rows.values()] == ["zero-shot"] * 2
    assert rows[str(file)]["templates"] == ["{}"]
    arrays = np.load(tmp_path / "shape-bias.npz")
    assert not np.array_equal(arrays["scores_0"], arrays["scores_1"])


def test_toolbox_ties(stimuli: str, tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=1000)
    torch.nn.init.zeros_(network.get_classifier().weight)
    torch.nn.init.zeros_(network.get_classifier().bias)
    torch.save(network.state_dict(), tmp_path / "flat.pth")
    for compat, decision in (("none", -1), ("modelvshuman", CATEGORIES.index("truck"))):
        run(
            ShapeBiasCommand(
                models=(str(tmp_path / "flat.pth"),),
                arch="test_resnet",
                stimuli=stimuli,
                compat=compat,
                output_dir=tmp_path / compat,
            )
        )
        arrays = np.load(tmp_path / compat / "shape-bias.npz")
        assert set(arrays["decisions_0"].tolist()) == {decision}
    assert load_result(tmp_path / "modelvshuman" / "shape-bias.json").protocol == "modelvshuman/1"


def test_builtin_is_a_preference_of_its_own(tmp_path: Path) -> None:
    small = {"per_pair": 4, "pairings": 2, "drawing_size": SIDE}
    run(ShapeBiasCommand(models=("timm:test_resnet@random=5",), output_dir=tmp_path, **small))
    kinds = ("json", "npz", "csv", "png", "svg")
    assert {path.name for path in tmp_path.iterdir()} == {f"cue-preference.{kind}" for kind in kinds}
    result = load_result(tmp_path / "cue-preference.json")
    assert result.protocol == "procedural-cue-preference/1"
    assert not any("shape bias" in name for name in result.figures)
    rows = result.details["rows"]
    assert list(rows) == ["timm:test_resnet@random=5", "timm:test_resnet@random=5 (untrained)"]
    assert len(rows["timm:test_resnet@random=5"]["pairings"]) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "at least one MODEL"),
        ({"models": ("a",), "observers": "x"}, "show them to the models too"),
        ({"models": ("a",), "head": "knn"}, "has a probe of its own"),
        ({"models": ("a", "b"), "stimuli": "x", "probe": Path("p")}, "name one MODEL"),
        ({"models": ("a",), "stimuli": "x", "probe": Path("p"), "head": "knn"}, "no meaning with --head knn"),
        ({"models": ("a",), "k": 0}, "--k must be"),
        ({"models": ("a",), "c": 0.0}, "--c must be above"),
        ({"models": ("a",), "pairings": 0}, "--pairings"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ShapeBiasCommand(**settings)


def test_what_a_model_lacks_is_told(stimuli: str, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "ten.pth")
    ten = {"models": (str(tmp_path / "ten.pth"),), "arch": "test_resnet", "stimuli": stimuli, "output_dir": tmp_path}
    with pytest.raises(UserError, match=r"classifier is of 10 classes.*--train-data"):
        run(ShapeBiasCommand(**ten))
    with pytest.raises(UserError, match="--head knn learns from labelled images"):
        run(ShapeBiasCommand(**ten, head="knn"))
    with pytest.raises(UserError, match="--head linear-probe needs ImageNet's classes"):
        run(ShapeBiasCommand(**ten, head="linear-probe", train_data=stimuli))


def test_two_stimuli_of_one_name_are_told(tmp_path: Path) -> None:
    folder = draw(tmp_path / "s", ["cat/cat1-dog1.png", "dog/1_cat1-dog1.png"])
    with pytest.raises(UserError, match="several stimuli called cat1-dog1"):
        run(ShapeBiasCommand(models=("timm:test_resnet@random",), stimuli=str(folder), output_dir=tmp_path))
