"""`analyze all`: what applies is run, what does not is told, and the page holds all of it."""

import dataclasses
import re
from pathlib import Path

import pytest
from torch import nn

from convscope.cli import COMMANDS
from convscope.core.backbone import create_backbone
from convscope.core.errors import UserError
from convscope.core.models import load_backbone
from convscope.core.results import EvalResult, Figure, save_result
from convscope.report import analyze_all
from convscope.report.analyses import ANALYSES, Analysis
from convscope.report.analyze_all import AllCommand, run

MODELS = ("timm:test_resnet@random", "timm:test_vit@random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairCommand:
    """An analysis that takes one model at a time, and cannot take every one."""

    models: tuple[str, ...]
    output_dir: Path
    seed: int = 0
    broken: bool = False


def run_pair(config: PairCommand) -> None:
    if config.broken:
        raise ZeroDivisionError("a mistake\nof ours")
    if len(config.models) > 1 or "vit" in config.models[0]:
        raise UserError(f"pair: {len(config.models)} models, one of them a vit")
    figures = {"seed": Figure(config.seed)}
    save_result(
        config.output_dir / "pair.json",
        EvalResult(task="pair", protocol="pair/1", model={}, data={}, preprocessing={}, figures=figures),
    )


globals()["run"], run_all = run_pair, run  # as an analysis's module has it


def pair(**settings: object) -> Analysis:
    return Analysis(
        title="Pair", module=__name__, config="PairCommand", meaning="Nothing.", captions={}, settings=settings
    )


def test_every_analysis_of_the_command_line_is_in_the_table() -> None:
    commands = {name[1]: command for name, command in COMMANDS.items() if name[0] == "analyze" and name[1] != "all"}
    assert set(ANALYSES) == set(commands)
    for name, analysis in ANALYSES.items():
        assert (analysis.module, analysis.config) == (commands[name].module, commands[name].config)


def test_page_has_pictures_words_figures_and_links_that_lead_somewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"stages": ("last",), "n_images": 2, "size": 32}
    erf = dataclasses.replace(ANALYSES["erf"], settings=small, settings_for=lambda backbones: {})
    table = {"erf": erf, "filters": ANALYSES["filters"], "pair": pair(broken=True)}
    monkeypatch.setattr(analyze_all, "ANALYSES", table)
    run_all(AllCommand(models=MODELS[:1], output_dir=tmp_path, device="cpu"))
    page = (tmp_path / "report.html").read_text()
    assert ANALYSES["erf"].meaning.split(":")[0] in page
    assert page.count("<img src=") == len(list(tmp_path.glob("*/*.png"))) > 1
    links = re.findall(r'<a href="([^#"][^"]*)"', page)
    assert {"erf/erf.csv", "erf/erf.npz", "filters/filters.csv"} <= set(links)
    assert all((tmp_path / link).is_file() for link in links)
    assert "area at 50%" in page
    assert all(f"<caption>{name}</caption>" in page for name in ("erf-spread.csv", "filters-depth.csv"))
    assert "<caption>erf-curves.csv</caption>" not in page  # too long
    assert "failed: ZeroDivisionError: a mistake of ours" in page
    captured = capsys.readouterr()
    assert "analyze pair: timm:test_resnet@random: failed: ZeroDivisionError" in captured.err
    assert "Traceback" not in captured.err


def test_models_that_cannot_stand_side_by_side_are_taken_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyze_all, "ANALYSES", {"pair": pair()})
    run_all(AllCommand(models=(*MODELS, "nowhere.pth"), output_dir=tmp_path, seed=7))
    page = (tmp_path / "report.html").read_text()
    assert [path.parent.name for path in tmp_path.glob("*/pair.json")] == ["pair-timm_test_resnet_random"]
    assert "Pair: timm:test_resnet@random" in page
    assert "skipped: pair: 1 models, one of them a vit" in page
    assert "skipped: no model nowhere.pth" in page
    assert "<td>done</td>" in page


def test_what_does_not_apply_is_told() -> None:
    backbone = create_backbone("test_resnet", seed=0)
    assert ANALYSES["filters"].applies(backbone) is None
    backbone.model = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert ANALYSES["filters"].applies(backbone) == "it has no convolution larger than 1x1"


def test_models_of_one_size_are_shown_images_of_it() -> None:
    small, large = create_backbone("resnet18_cifar", {"channels": (4, 4, 8, 8)}, seed=0), load_backbone(MODELS[0])
    assert ANALYSES["erf"].settings_for([small]) == {"size": small.preprocessing.size[0]}
    assert ANALYSES["erf"].settings_for([small, large]) == {"size": 224}


def test_nothing_to_show_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="at least one MODEL"):
        AllCommand(models=())
    with pytest.raises(UserError, match="no analysis nonsense"):
        AllCommand(models=MODELS, only=("nonsense",))
    with pytest.raises(UserError, match="no model nowhere"):
        run_all(AllCommand(models=("nowhere.pth",), output_dir=tmp_path))
    monkeypatch.setattr(analyze_all, "ANALYSES", {"pair": pair(broken=True)})
    with pytest.raises(UserError, match="no analysis could be run"):
        run_all(AllCommand(models=MODELS, output_dir=tmp_path))
    assert not (tmp_path / "report.html").exists()
