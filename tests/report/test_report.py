"""Reports: one file that needs nothing else, honest comparisons, one clear line for what is malformed."""

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from convscope.core.errors import UserError
from convscope.core.results import EvalResult, Figure, save_result
from convscope.plots.reconstruction import draw_reconstruction
from convscope.report.compare import Row, comparison, differences
from convscope.report.html import Image, KeyValues, Section, Text, write_report
from convscope.report.runs import ReportCommand, run
from convscope.report.sources import expand, read_loss
from convscope.report.tables import Table, markdown, number

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Checks nesting and collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def result(task: str = "knn", **changes: object) -> EvalResult:
    values: dict[str, object] = {
        "task": task,
        "protocol": "holdout/1",
        "model": {"source": "timm:resnet18"},
        "data": {"train": {"fingerprint": "f1"}, "test": {"fingerprint": "f2"}},
        "preprocessing": {"size": [64, 64]},
        "figures": {"accuracy": Figure(0.5, 0.4, 0.6, 100)},
        "details": {},
    }
    return EvalResult(**{**values, **changes})  # type: ignore[arg-type]


def make_run(folder: Path, value: float = 0.5, **changes: object) -> Path:
    figures = {"accuracy": Figure(value, value - 0.1, value + 0.1, 100)}
    save_result(folder / "results" / "knn.json", result(figures=figures, **changes))
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (1, 2, 3, 2, 3, 4)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text("objective:\n  mask_ratio: 0.6\n")
    return folder


def picture() -> bytes:
    image = np.zeros((1, 4, 4, 3))
    return draw_reconstruction(image, image, image).render()


def test_page_is_one_wellformed_file_that_loads_nothing(tmp_path: Path) -> None:
    table = Table(["run", "accuracy"], [["a", Figure(0.5, 0.4, 0.6)], ["b", None]], "k-NN")
    parts = [Text("One.\n\nTwo."), table, Image(picture(), "A picture", "black"), KeyValues({"seed": 0}, "How")]
    write_report(tmp_path / "r.html", "Report", [Section("First", parts), Section("Second", [Text("x", warning=True)])])
    html = (tmp_path / "r.html").read_text()
    page = Page(html)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert not page.all("script")
    assert not page.all("link")
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|@import|url\(", html)
    assert "prefers-color-scheme: dark" in html
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.all("img"))
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert all(str(link["href"])[1:] in targets for link in page.all("a"))
    assert "[0.400, 0.600]" in page.text


def test_markup_in_names_is_shown_and_never_run(tmp_path: Path) -> None:
    nasty = '<script>alert(1)</script>"&'
    parts = [
        Text(nasty),
        Table([nasty], [[nasty]], nasty),
        KeyValues({nasty: nasty}, nasty),
        Image(picture(), nasty, nasty),
    ]
    write_report(tmp_path / "r.html", nasty, [Section(nasty, parts)], lead=nasty)
    page = Page((tmp_path / "r.html").read_text())
    assert not page.all("script")
    assert page.all("img")[0]["alt"] == nasty
    assert page.text.count("<script>alert(1)</script>") >= 8


def test_svg_is_embedded_and_other_bytes_are_refused(tmp_path: Path) -> None:
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"></svg>'
    write_report(tmp_path / "r.html", "t", [Section("s", [Image(svg, "c", "a")])])
    assert "data:image/svg+xml;base64," in (tmp_path / "r.html").read_text()
    with pytest.raises(UserError, match="neither PNG nor SVG"):
        write_report(tmp_path / "bad.html", "t", [Section("s", [Image(b"GIF89a", "c", "a")])])
    assert not (tmp_path / "bad.html").exists()


def test_two_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = (make_run(tmp_path / "one", 0.5), make_run(tmp_path / "two", 0.7))
    (tmp_path / "one" / "results" / "knn.png").write_bytes(picture())
    run(ReportCommand(runs=runs, output=(tmp_path / "out.html",)))
    page = Page((tmp_path / "out.html").read_text())
    printed = capsys.readouterr()
    assert "0.700 [0.600, 0.800]" in printed.out
    assert "not comparable" not in page.text + printed.err
    assert len(page.all("img")) == 4  # both losses together, each alone, one picture
    assert "objective.mask_ratio" in page.text


def test_csv_has_one_line_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "one", 0.5)
    run(ReportCommand(runs=(folder,), output=(tmp_path / "out.html",), format="csv"))
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(r["task"], r["figure"], float(r["value"]), float(r["low"]), r["n"]) for r in rows] == [
        ("knn", "accuracy", 0.5, 0.4, "100")
    ]


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        ({"preprocessing": {"size": [224, 224]}}, "preprocessing"),
        ({"data": {"train": {"fingerprint": "other"}, "test": {"fingerprint": "f2"}}}, "data"),
        ({"protocol": "holdout/2"}, "protocol"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path: Path, change: dict[str, object], subject: str) -> None:
    runs = (make_run(tmp_path / "one"), make_run(tmp_path / "two", 0.5, **change))
    run(ReportCommand(runs=runs, output=(tmp_path / "out.html",)))
    assert f"{subject} differs, so these rows are not comparable" in Page((tmp_path / "out.html").read_text()).text


def test_settings_column_groups_rows_that_may_be_compared() -> None:
    rows = [Row("a", result()), Row("b", result(preprocessing={"size": [1, 1]})), Row("c", result())]
    assert [row[2] for row in comparison(rows).rows] == ["A", "B", "A"]
    assert len(differences(rows)) == 1


def test_a_data_set_that_moved_stays_comparable() -> None:
    data = {"source": "/old", "fingerprint": "f"}
    assert differences([Row("a", result(data=data)), Row("b", result(data={**data, "source": "/new"}))]) == []


def test_other_labels_and_other_counts_are_not_comparable() -> None:
    data = {"source": "/data", "train": {"fingerprint": "f", "count": 100}, "label": "cls"}
    for changed in ({**data, "label": "shape"}, {**data, "train": {"fingerprint": "f", "count": 10}}):
        rows = [Row("a", result(data=data)), Row("b", result(data=changed))]
        assert [row[2] for row in comparison(rows).rows] == ["A", "B"]
        assert "data differs" in differences(rows)[0]


def test_many_figures_become_rows() -> None:
    figures = {f"figure {i}": Figure(float(i)) for i in range(9)}
    table = comparison([Row("a", result(figures=figures)), Row("b", result())])
    assert table.header == ["run", "a", "b"]
    assert [row[0] for row in table.rows[:2]] == ["model", "figure 0"]


def test_markdown_is_a_table_even_with_bars_in_names() -> None:
    lines = markdown(Table(["a|b", "n"], [["x", 1.0], ["y", None]])).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("| a\\|b |")
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.123"), (0.5, "0.500"), (25000.4, "25000"), (1e-7, "1.00e-07"), (123.0, "123"), (7, "7"), (0.0, "0")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_loss_counts_a_step_once_and_forgives_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 9}\n\n{"step": 2, "loss": 2}\n{"note": 1}\n{"step": 3, "lo'
    )
    curve = read_loss(path)
    assert curve is not None
    assert curve[0].tolist() == [1, 2]
    assert curve[1].tolist() == [3, 2]


@pytest.mark.parametrize("line", ["{oops", "[1]", '{"loss": 1}', '{"step": "x", "loss": 1}', "3"])
def test_malformed_metrics_name_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 3}}\n{line}\n{{"step": 2, "loss": 3}}\n')
    with pytest.raises(UserError, match="line 2"):
        read_loss(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"figures": 3}'])
def test_malformed_results_are_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "knn.json").write_text(content)
    with pytest.raises(UserError, match=r"knn\.json") as caught:
        run(ReportCommand(runs=(tmp_path,), output=(tmp_path / "out.html",)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.html").exists()


def test_missing_and_empty_places_are_told(tmp_path: Path) -> None:
    for runs, message in (((), "at least one"), ((tmp_path / "no",), "does not exist"), ((tmp_path,), "neither")):
        with pytest.raises(UserError, match=message):
            run(ReportCommand(runs=runs, output=(tmp_path / "out.html",)))


def test_a_result_file_and_a_folder_of_results_can_be_given(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    other = dataclasses.replace(result("erf"), figures={"area at 50%": Figure(0.1)})
    save_result(tmp_path / "one" / "results" / "erf.json", other)
    for given, tasks in ((folder / "results" / "knn.json", {"knn"}), (folder / "results", {"knn", "erf"})):
        run(ReportCommand(runs=(given,), output=(tmp_path / "out.html",)))
        text = Page((tmp_path / "out.html").read_text()).text
        assert {task for task in ("knn", "erf") if f"{task} of" in text} == tasks


def test_a_folder_of_runs_is_its_runs_and_what_waits_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    runs = [make_run(sweep / "seed=0"), make_run(sweep / "seed=1")]
    (sweep / "slurm" / "code").mkdir(parents=True)
    (sweep / "seed=2" / "slurm").mkdir(parents=True)
    (sweep / "seed=2" / "environment.json").write_text("{}")  # it has just begun
    assert expand([sweep]) == runs
    assert expand([runs[0], sweep]) == runs
    assert expand(sorted(sweep.iterdir())) == runs  # a shell's SWEEP/*
    assert f"{sweep / 'seed=2'} holds no results yet" in capsys.readouterr().err
    run(ReportCommand(runs=(sweep,), output=(tmp_path / "report.html",)))
    assert capsys.readouterr().out.count("seed=") == 2
    with pytest.raises(UserError, match="nothing to report"):
        expand([sweep / "seed=2"])
