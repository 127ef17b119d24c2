"""onelaunch bench: verdicts, summary, tables and figure, from the data of a run; nothing is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benched import DATA, WIDE64, rows_of, some_data
from click.testing import CliRunner
from onelaunch.cli.lab.bench import summary, tables
from onelaunch.cli.lab.bench.cases import Case
from onelaunch.cli.lab.bench.verdicts import verdicts
from onelaunch.cli.main import app

FASTEST = {"fastest, cold": True, "fastest, warm": True}
DECLARED = {"declared, cold": True, "declared, warm": True}
TWENTY = {"20 vectors more, cold": True, "20 vectors more, warm": True}


@pytest.mark.parametrize(
    ("case", "times", "expected"),
    [
        (WIDE64, {"onelaunch": 10.2, "sglang": 400, "sglang_best": 10}, FASTEST),
        (WIDE64, {"onelaunch": 10.3, "sglang": 400, "sglang_best": 10}, dict.fromkeys(FASTEST, False)),
        (WIDE64, {"onelaunch": 1.05, "triton_together": 1.0}, FASTEST),
        (WIDE64, {"onelaunch": 1.08, "triton_together": 1.0}, FASTEST | {"fastest, cold": False}),
        (WIDE64.replace(backends=1), {"onelaunch": 9, "triton": 8}, dict.fromkeys(FASTEST, False)),
        (WIDE64, {"ideal": 1, "listed": 1, "empty": 1, "runtime": 1, "onelaunch": 9}, {}),
        (WIDE64.replace(extent="full"), {"ideal": 85, "onelaunch": 99}, {"whole tables": True}),
        (WIDE64.replace(extent="full"), {"ideal": 84, "onelaunch": 100}, {"whole tables": False}),
        (WIDE64, {"onelaunch": 4, "onelaunch_verified": 3.4, "ideal": 3}, {"verified": True}),
        (WIDE64, {"onelaunch": 4, "onelaunch_verified": 3.5}, {"verified": False}),
        (WIDE64.replace(backends=1), {"onelaunch": 4, "onelaunch_verified": 4.1}, {"verified": True}),
        (WIDE64.replace(backends=1), {"onelaunch": 4, "onelaunch_verified": 4.3}, {"verified": False}),
        (Case(1, 4096), {"onelaunch": 2, "onelaunch_verified": 2.1}, {"verified": True}),
        (Case(1, 4096), {"onelaunch": 2, "onelaunch_verified": 2.2}, {"verified": False}),
        (WIDE64, {"onelaunch": 4, "onelaunch_moved": 5.2}, {"verified, all changed": True}),
        (WIDE64, {"onelaunch": 4, "onelaunch_moved": 5.3}, {"verified, all changed": False}),
        (WIDE64, {"onelaunch": 4, "onelaunch_declared": 4.08}, DECLARED),
        (WIDE64, {"onelaunch": 4, "onelaunch_declared": 4.12}, dict.fromkeys(DECLARED, False)),
        (WIDE64, {"onelaunch": 4, "onelaunch_20_more": 4.3}, TWENTY),
        (WIDE64, {"onelaunch": 4, "onelaunch_20_more": 4.4}, TWENTY | {"20 vectors more, cold": False}),
        (WIDE64.replace(kind="one-long"), {"onelaunch": 4, "onelaunch_verified": 9}, {}),
        (WIDE64, {"ideal": 4, "triton": 9}, {}),
    ],
)
def test_verdicts(case: Case, times: dict[str, float], expected: dict[str, bool]) -> None:
    assert {v["item"]: v["holds"] for v in verdicts(list(rows_of(case, **times)), [])} == expected


def test_verified_writes_are_below_the_ideal_of_all_bytes_where_that_takes_long() -> None:
    for verified, holds in ((5.9, True), (6.1, False)):
        rows = rows_of(Case(128, 32768), ideal=6.0, onelaunch=20.0, onelaunch_verified=verified)
        assert [v["holds"] for v in verdicts(list(rows), [])] == [True, holds]


def test_a_verdict_names_the_fastest_and_by_how_much() -> None:
    rows = list(rows_of(WIDE64, onelaunch=10.0, triton=30.0, sglang_best=8.0))
    cold, warm = verdicts(rows, [])
    assert cold["measured"] == "10.00 us; sglang-best 8.00, 0.80 of ours"
    assert warm["measured"] == "5.00 us; sglang-best 4.00, 0.80 of ours"


def test_a_series_takes_no_verdict_away() -> None:
    rows = list(rows_of(WIDE64, triton=10.0, onelaunch=12.0))
    series = [{**row, "series": "length"} for row in rows_of(WIDE64, triton=10.0, onelaunch=9.0)]
    assert verdicts([*rows, *series], []) == verdicts([*series, *rows], []) == verdicts(rows, []) != []
    assert verdicts(series, []) == []


def test_verdicts_of_host_time() -> None:
    def host(**us: float | None) -> dict[str, bool]:
        said = verdicts([], [{"piece": name.replace("_", "."), "us": value} for name, value in us.items()])
        return {verdict["of"]: verdict["holds"] for verdict in said}

    assert host(raw=2.0, plan_run=2.6, broadcast=5.6, copy=5.7) == {"plan.run": True, "broadcast": True, "copy": False}
    assert host(raw=2.0, plan_run=2.7) == {"plan.run": False}
    assert host(plan_run=None) == {}


# -------------------------------------------------------------------------------------------------- what people see


def test_the_summary_has_a_line_for_each_way() -> None:
    headings, *lines = summary.summary(some_data())
    assert headings[1:] == ["device 1 × 4k", "device 64 × 8k", "eager 1 × 4k", "eager 64 × 8k", "host"]
    assert lines == [
        ["SGLang 9.8, as it runs", "401", "401", "3.00", "3.00", "2.00"],
        ["Triton, a launch a backend", "no such luck"],
        ["Triton, one launch", "12.3", "12.3", "3.00", "3.00", "2.00"],
        ["onelaunch", "5.00", "5.00", "3.00", "3.00", "2.00"],
        ["onelaunch, verified writes", "4.50", "4.50", "3.00", "3.00", "2.00"],
    ]
    markdown = summary.markdown(some_data())
    assert markdown[1] == "|---|--:|--:|--:|--:|--:|"
    assert markdown[3] == "| Triton, a launch a backend | no such luck |  |  |  |  |"
    assert {line.count("|") for line in markdown} == {7}
    device, eager = summary.narrow([headings, *lines])
    assert device[0] == ["device", "1 × 4k", "64 × 8k", "host"]
    assert device[3] == ["Triton, one launch", "12.3", "12.3", "2.00"]
    assert eager[:2] == [["eager", "1 × 4k", "64 × 8k"], ["SGLang 9.8, as it runs", "3.00", "3.00"]]
    assert [line[0] for line in device] == ["device", *(line[0] for line in lines)]
    assert [line[0] for line in eager[1:]] == [line[0] for line in lines if len(line) > 2]


def test_the_summary_takes_one_configuration_of_one_run() -> None:
    data = some_data()
    for change in ({"backends": 7}, {"page_size": 1}, {"extent": "full"}, {"kind": "one-long"}, {"width": 8192}):
        data["rows"] = list(rows_of(WIDE64.replace(**change), onelaunch=1.0))
        assert summary.summary(data) == []


@pytest.mark.parametrize("columns", ["80", "200"])
def test_verdicts_come_first_and_are_never_cut(columns: str, kept: Path) -> None:
    text = CliRunner().invoke(app, ["bench", "--from", str(kept)], env={"COLUMNS": columns}).stdout
    lines = text.splitlines()
    judged = [line for line in lines if line.startswith(("yes ", "NO "))]
    assert len(judged) == len(some_data()["verdicts"])
    assert all(any(line.endswith(verdict["measured"]) for line in judged) for verdict in some_data()["verdicts"])
    # The summary, the verdicts, the rows.
    assert text.index("\ndevice ") < text.index("\neager ") < text.index("targets are met") < text.index("cold us")


def test_a_row_is_compared_with_ours_of_the_same_series() -> None:
    data = some_data()
    data["rows"] = [row for row in data["rows"] if row["status"] == "ok"]
    for row in data["rows"]:
        if row["series"] and row["implementation"] == "onelaunch":
            row["cold_us"] = 40.0  # the same case as one that is in no series
    rows = [line.split() for line in tables.lines(data) if " ideal " in line and "page=64" in line]
    assert [row[-1] for row in rows if "ideal" in row] == ["0.80", "0.80", "0.10", "0.10"]


def test_the_tables() -> None:
    said = "\n".join(tables.lines(some_data()))
    row = next(line for line in said.splitlines() if " onelaunch " in line and "4.50–5.50" in line)
    assert row.endswith("5.00 (4.50–5.50)  2.50 (2.00–3.00)  3.00 (2.50–3.50)  2.00 (1.50–2.50)     1.25    1.00")
    assert "triton: failed: no such luck" in said
    assert any(line.startswith("NO") and "plan.run" in line for line in said.splitlines())
    assert "The run was interrupted. These are" in said
    cut = list(tables.lines(some_data() | {"not_begun": ["a case", "another"]}))
    assert cut[1] == "Cases that weren't begun, for --seconds: 2. These are its results up to then."


def test_a_brief_table_has_no_verdicts_and_no_rows() -> None:
    said = list(tables.lines(some_data(), brief=True))
    assert "SGLang 9.8, as it runs" in "\n".join(said)
    assert not any(line.startswith(("yes", "NO")) or "targets" in line or "page=64" in line for line in said)
    assert len(said) <= 30
    assert max(map(len, said)) <= 80


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(some_data()))
    return path


def test_the_figure(kept: Path) -> None:
    picture = kept.with_suffix(".png")
    result = invoke("bench", "--from", str(kept), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert invoke("bench", "--from", str(kept), "--quick").output == "\n".join(tables.lines(some_data(), True)) + "\n"
    result = invoke("bench", "--from", str(kept), "--plot", str(kept.parent / "nowhere" / "a.png"))
    assert result.exit_code == 2
    assert "can't be written" in result.stderr
    data = some_data()
    data["rows"] = data["rows"][12:18]  # the series alone
    kept.write_text(json.dumps(data))
    result = invoke("bench", "--from", str(kept), "--plot", str(picture))
    assert result.exit_code == 2
    assert "none was measured" in result.stderr


def test_the_figure_says_what_the_table_says(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *a, **k: drawn.append(figure))
    assert invoke("bench", "--from", str(kept), "--plot", "a.png").exit_code == 0
    *shapes, curves = drawn[0].axes
    assert [axes.get_title() for axes in shapes] == ["1 × 4k", "64 × 8k"]
    headings, *rows = summary.summary(some_data())
    measured = [row for row in rows if len(row) == len(headings)]  # a contender that couldn't be measured has no bar
    for place, axes in enumerate(shapes, 1):
        assert [text.get_text().strip() for text in axes.texts] == [row[place] for row in measured]
        widths = sorted(bar.get_width() for bar in axes.patches if hasattr(bar, "get_width"))
        assert widths[:-1] == [4.5, 5.0, 12.34]
        assert widths[-1] == pytest.approx(1.25 * 12.34)  # not 401: the bar is cut
        assert len({bar.get_facecolor() for bar in axes.patches}) == len(widths) + 1  # and marked with a white gap
    assert [label.get_text() for label in shapes[0].get_yticklabels()] == [row[0] for row in measured]
    assert [text.get_text().strip() for text in curves.texts] == ["onelaunch: 5.00", "onelaunch, verified writes: 4.50"]


def test_without_matplotlib_it_says_what_to_install(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("bench", "--from", str(kept), "--plot", "a.png")
    assert result.exit_code == 2
    assert "pip install 'onelaunch[bench]'" in result.stderr


WITHOUT_NUMPY = """
import json, sys
sys.modules["numpy"] = None
from click.testing import CliRunner
from onelaunch.cli.main import app
results = [CliRunner().invoke(app, words) for words in json.loads(sys.argv[1])]
print(json.dumps([[result.exit_code, result.stderr.splitlines()] for result in results]))
"""


def test_without_numpy_only_traces_say_what_to_install(kept: Path) -> None:
    """In its own process: this one has imported numpy already."""
    trace = str(DATA / "azure_2023_conversation.csv")
    traced = {"--trace": ["bench", "--trace", trace], "onelaunch replay": ["replay", trace]}
    others = [["bench", "--from", str(kept)], ["replay", "--help"], ["explain", "nsa-decode-3", "--target", "cpu"]]
    command = [sys.executable, "-c", WITHOUT_NUMPY, json.dumps([*traced.values(), *others])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    for what, result in zip(traced, results, strict=False):
        wanted = (
            f"onelaunch: {what} needs numpy, which isn't installed. Install it with: pip install 'onelaunch[bench]'."
        )
        assert result == [2, [wanted]]
    for status, said in results[len(traced) :]:
        assert status in (0, 1)
        assert said == []
