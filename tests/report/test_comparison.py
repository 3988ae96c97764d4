"""Tables of several runs: what stands out, what may be compared, paired differences, and all the formats."""

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest

from convscope.core.errors import UserError
from convscope.core.results import Figure, paired_difference, save_result
from convscope.report.compare import Row, cautions, comparison, differences, paired, paired_table
from convscope.report.latex import escape, latex
from convscope.report.runs import ReportCommand, run
from convscope.report.tables import Table, markdown
from tests.report.test_report import Page, result

HITS = {"a": np.arange(1000) < 500, "b": np.arange(1000) < 520, "c": np.arange(1000) % 2 == 0}


def row(name: str, hits: str | None = None, **changes: object) -> Row:
    if hits is not None:
        changes["figures"] = {"top1": Figure(HITS[hits].mean(), 0.4, 0.6, 1000)}
    return Row(name, result(**changes), {} if hits is None else {"top1": HITS[hits]})


def rows_of(*values: float | None, figure: str = "top1") -> list[Row]:
    return [
        row(str(i), figures={"other": Figure(1.0)} if value is None else {figure: Figure(value)})
        for i, value in enumerate(values)
    ]


def test_the_best_row_stands_out() -> None:
    assert comparison(rows_of(0.5, 0.7, 0.6)).best == {(1, 2)}
    assert comparison(rows_of(0.5, 0.7001, 0.7004)).best == {(1, 2), (2, 2)}  # the same, as they are shown
    assert comparison(rows_of(3.0, 2.0, figure="image-to-text mean rank")).best == {(1, 2)}
    assert comparison(rows_of(3.0, 2.0, figure="layer1 recall@5")).best == {(0, 2)}
    assert comparison(rows_of(3.0, 2.0, figure="train_images")).best == set()  # more is not better
    assert comparison(rows_of(0.5)).best == set()
    assert comparison(rows_of(0.5, None)).best == set()  # nothing to compare with


def test_the_best_is_sought_among_rows_that_may_be_compared() -> None:
    rows = [
        *rows_of(0.5, 0.6),
        row("x", preprocessing={"size": [1, 1]}, figures={"top1": Figure(0.9)}),
        row("y", protocol="holdout/2", figures={"top1": Figure(0.7)}),
        row("z", protocol="holdout/2", figures={"top1": Figure(0.65)}),
    ]
    table = comparison(rows)
    assert [line[2] for line in table.rows] == ["A", "A", "B", "C", "C"]
    assert table.best == {(1, 3), (3, 3)}
    many = {f"top1 k={k}": Figure(k / 100) for k in range(9)}
    turned = comparison([row("p", figures=many), row("q", figures={**many, "top1 k=3": Figure(0.5)})])
    assert turned.header == ["run", "p", "q"]
    assert {at for at in turned.best if at[0] == 4} == {(4, 2)}  # k=3: behind the model and k=0 to 2
    assert turned.rows[4][0] == "top1 k=3"


def test_notes_name_each_setting_once() -> None:
    rows = [row(str(i), preprocessing={"size": [i % 2, 1], "crop_pct": 0.9}) for i in range(40)]
    (line,) = differences(rows)
    assert line == (
        "knn: preprocessing differs, so these rows are not comparable (setting A: size [0, 1]; B: size [1, 1])"
    )
    rows = [row(str(i), protocol=f"holdout/{i}", preprocessing={"size": [i // 2]}) for i in range(4)]
    assert "(setting A, B: size [0]; C, D: size [1])" in differences(rows)[1]
    (line,) = differences([row(str(i), protocol=f"holdout/{i}") for i in range(40)])
    assert line.endswith("; and 34 more)")


def test_weights_that_came_in_part_are_said() -> None:
    rows = [row("a", model={"source": "x.pth", "matched": 0.93}), row("b", model={"source": "y.pth", "matched": 1.0})]
    assert cautions(rows) == ["a: only 93.0% of the weights of x.pth came from its checkpoint"]


def test_paired_differences_are_to_the_first_run_on_the_same_samples() -> None:
    elsewhere = {"train": {"fingerprint": "f1"}, "test": {"fingerprint": "other"}}
    rows = [
        row("a", "a"),
        row("none"),
        row("b", "b", preprocessing={"size": [1, 1]}),  # seen at another size, but the same images
        row("c", "c"),
        row("other protocol", "b", protocol="holdout/2"),
        row("unknown data", "b", data={"source": "somewhere"}),
        row("unknown data too", "a", data={"source": "somewhere"}),
        row("other data", "b", data=elsewhere),
        row("other data too", "c", data=elsewhere),
    ]
    found = paired(rows)
    assert [(each.row.run, each.against.run) for each in found] == [
        ("b", "a"),
        ("c", "a"),
        ("other data too", "other data"),
    ]
    assert found[0].value == paired_difference(HITS["b"], HITS["a"])
    assert [each.excludes_zero for each in found] == [True, False, False]
    table = paired_table(found)
    assert table.rows[0] == ["b", "a", "top1", found[0].value, "yes"]
    assert [line[-1] for line in table.rows] == ["yes", "no", "no"]


def test_of_many_figures_each_layers_first_is_compared() -> None:
    names = [f"{layer} {kind}" for layer in ("a", "b") for kind in ("top1", "top5", "top1 k=5", "top5 k=5")]
    rows = [Row(str(i), result(), dict.fromkeys(names, HITS[hits])) for i, hits in enumerate("ab")]
    assert [each.figure for each in paired(rows)] == ["a top1", "b top1"]


def unescape(text: str) -> str:
    for name, sign in (("textasciitilde", "~"), ("textasciicircum", "^"), ("textless", "<"), ("textgreater", ">")):
        text = text.replace(f"\\{name}{{}}", sign)
    text = text.replace("\\textbar{}", "|").replace("{[}", "[").replace("{]}", "]")
    return "\\".join(re.sub(r"\\(.)", r"\1", part) for part in text.split("\\textbackslash{}"))


def test_latex_sets_any_text_as_it_stands() -> None:
    nasty = r"50% & $x_1$ #2 {a} ~ ^ <b> | [c] \input{x}"
    escaped = escape(nasty)
    assert unescape(escaped) == nasty
    assert not re.search(r"(?<!\\)[&%$#_]", escaped)
    assert escape("two\nlines") == "two lines"


def test_latex_is_a_booktabs_table() -> None:
    table = Table(["run", "top1"], [["[a]_1", Figure(0.5, 0.4, 0.6)], ["b", None]], "k-NN & co", frozenset({(0, 1)}))
    lines = latex(table, ["10% differ"]).splitlines()
    assert lines == [
        r"\begin{table}",
        r"\centering",
        r"\caption{k-NN \& co}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"run & top1 \\",
        r"\midrule",
        r"{[}a{]}\_1 & \textbf{0.500} {\scriptsize {[}0.400, 0.600{]}} \\",
        r"b & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\par{\footnotesize 10\% differ}",
        r"\end{table}",
    ]


def test_markdown_marks_the_best() -> None:
    table = comparison(rows_of(0.5, 0.7))
    assert "| **0.700** |" in markdown(table)
    assert "| 0.500     |" in markdown(table)


def save(folder: Path, hits: str, name: str = "knn", **changes: object) -> Path:
    figures = {"top1": Figure(HITS[hits].mean(), 0.4, 0.6, 1000)}
    save_result(folder / "results" / f"{name}.json", result(figures=figures, samples={"top1": HITS[hits]}, **changes))
    return folder


def test_every_format_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = (save(tmp_path / "one", "a"), save(tmp_path / "two", "b"))
    names = ("page.html", "tables.md", "tables.csv", "tables.tex")
    outputs = tuple(tmp_path / name for name in names)
    run(ReportCommand(runs=runs, output=outputs, format="latex"))
    assert capsys.readouterr().out == outputs[3].read_text()
    page = Page(outputs[0].read_text())
    assert [cell["class"] for cell in page.all("td") if "best" in str(cell.get("class"))] == ["numeric best"]
    for text in (page.text, outputs[1].read_text(), escape_free(outputs[3].read_text())):
        assert "knn: difference on the same test samples, with its paired bootstrap interval" in text
        assert re.search(r"0\.0200\W+0\.01\d+, 0\.02\d+\W+yes", text)
    lines = list(csv.DictReader(io.StringIO(outputs[2].read_text())))
    assert [(line["run"], line["setting"], line["protocol"]) for line in lines] == [
        (str(folder), "A", "holdout/1") for folder in runs
    ]
    assert [(line["against"], line["excludes_0"]) for line in lines] == [("", ""), (str(runs[0]), "True")]
    assert float(lines[1]["difference"]) == pytest.approx(0.02)


def escape_free(text: str) -> str:
    return text.replace("{[}", "[").replace("{]}", "]").replace(r"{\scriptsize ", "")


def test_results_of_one_task_in_one_run_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(save(tmp_path / "one", "a"), "b", "knn-birds", data={"test": {"fingerprint": "birds"}})
    run(ReportCommand(runs=(folder,), output=(tmp_path / "page.html",)))
    said = capsys.readouterr()
    assert f"| {folder} (knn) " in said.out
    assert f"| {folder} (knn-birds) " in said.out
    assert "data differs, so these rows are not comparable" in said.out
    assert "data differs, so these rows are not comparable" in said.err


def test_a_report_is_of_a_kind_that_is_known() -> None:
    with pytest.raises(UserError, match=r"--output table\.xls: a report is written to \.html, \.md, \.csv or \.tex"):
        ReportCommand(runs=(), output=(Path("table.xls"),))
