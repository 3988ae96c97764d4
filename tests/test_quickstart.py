"""The quickstart at its smallest: every step runs, and the report says what was measured."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from convscope.core.results import Figure, load_result
from convscope.quickstart import NAMES, QuickstartConfig, Results, run, verdict
from convscope.report.tables import shown


class Tags(HTMLParser):
    """Counts tags and checks that they close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "link", "img", "br", "hr", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def shown_percent(share: Figure) -> str:
    """A share as the report's table has it: per cent, three digits, interval."""
    return shown(Figure(100 * share.value, 100 * share.low, 100 * share.high))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, tiny quickstart, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVSCOPE_CACHE", str(folder / "cache"))
        run(tiny(folder))
    return folder / "quickstart"


def tiny(folder: Path) -> QuickstartConfig:
    """A network and images too few to learn anything."""
    return QuickstartConfig(
        output_dir=folder / "quickstart",
        backbone_args=("layers=1,1,1,1", "channels=8,8,16,16", "output_stride=8"),
        images=400,
        test_images=200,
        epochs=0.64,
        per_class=1,
        fine_tune_epochs=2,
        erf_images=3,
        probe_steps=3,
        workers=0,
    )


def test_every_figure_of_both_networks_is_in_the_report(output: Path) -> None:
    html = (output / "report.html").read_text()
    text = " ".join(re.sub("<[^>]*>", " ", html).split())
    parser = Tags()
    parser.feed(html)
    assert parser.open == []
    assert parser.seen.count("img") >= 6  # three probes, the loss, reconstructions, receptive fields
    assert not re.search(r'(src|href)="(?!data:|#)', html)  # self-contained
    for label in ("cls", "shape", "texture"):
        for task in ("linear-probe", "knn"):
            for name in NAMES:
                result = load_result(output / "results" / f"{task}-{label}-{name}.json")
                assert shown_percent(result.figures["top1"]) in text
    for name in NAMES:
        result = load_result(output / f"fine-tune-{name}" / "results" / "fine-tune.json")
        assert shown_percent(result.figures["top1"]) in text
        assert result.figures["train_images"].value == 64


def test_both_networks_start_fine_tuning_from_their_own_weights(output: Path) -> None:
    record = {
        name: load_result(output / f"fine-tune-{name}" / "results" / "fine-tune.json").model["weights_hash"]
        for name in NAMES
    }
    probed = {
        name: load_result(output / "results" / f"linear-probe-cls-{name}.json").model["weights_hash"] for name in NAMES
    }
    assert record == probed
    assert record["pretrained"] != record["untrained"]


def test_again_trains_nothing(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONVSCOPE_CACHE", str(output.parent / "cache"))
    before = (output / "spark" / "metrics.jsonl").read_text()
    run(tiny(output.parent))
    assert (output / "spark" / "metrics.jsonl").read_text() == before
    steps = [json.loads(file.read_text())["step"] for file in sorted((output / "spark" / "attempts").glob("*.json"))]
    assert steps == [0, 2]
    printed = capsys.readouterr().out
    assert "| fine-tune" in printed
    assert str(output / "report.html") in printed


def test_the_verdict_needs_intervals_that_do_not_overlap(output: Path) -> None:
    result = load_result(output / "fine-tune-pretrained" / "results" / "fine-tune.json")

    def said(ours: Figure, twin: Figure) -> str:
        found = {name: replace(result, figures={"top1": figure}) for name, figure in zip(NAMES, (ours, twin))}
        results: Results = {"fine-tune": found}
        return verdict(results)

    assert "do not overlap" in said(Figure(0.5, 0.4, 0.6, 100), Figure(0.3, 0.2, 0.39, 100))
    assert "does not clearly" in said(Figure(0.5, 0.4, 0.6, 100), Figure(0.3, 0.2, 0.41, 100))
    assert "does not clearly" in said(Figure(0.3, 0.2, 0.4, 100), Figure(0.5, 0.45, 0.6, 100))
