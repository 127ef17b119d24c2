"""Pages for a browser: `onelaunch show --html` and `onelaunch diff --html`."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from onelaunch import preset, render
from onelaunch.cli.main import app
from onelaunch.inspect import machine_code, occupancy
from onelaunch.inspect.kernels import find

CHROMIUM = shutil.which("chromium")
SMALL = "fields=cache_seqlens+real_page_table,num_backends=2"


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


class Lines(HTMLParser):
    """Collects the lines of each pane as (source line or "", classes, text)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.panes: dict[str, list[list[str]]] = {}
        self.addresses: list[str] = []
        self._pane, self._number = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [str(found[name]) for name in ("src", "href") if name in found]
        if tag == "ol":
            self._pane = str(found["id"])
            self.panes[self._pane] = []
        elif tag == "li":
            self.panes[self._pane].append([found.get("data-line") or "", found.get("class") or "", ""])
        self._number = tag == "s"

    def handle_data(self, data: str) -> None:
        if self._pane and self.panes[self._pane] and not self._number and data != "\n":
            self.panes[self._pane][-1][2] += data
        self._number = False

    def handle_endtag(self, tag: str) -> None:
        if tag == "ol":
            self._pane = ""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "kernel.html"
    result = invoke("show", "--set", SMALL, "--arch", "90a", "--html", str(file))
    assert (result.exit_code, result.output) == (0, "")
    return file


@pytest.mark.nvcc
def test_source_sass_and_ptx_are_whole_and_linked(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    kernel = find(None, SMALL, archs=("90a",))
    found = Lines(text)
    assert [line[2].rstrip() for line in found.panes["source"]] == [
        line.rstrip() for line in kernel.source.splitlines()
    ]
    instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?) *;", machine_code.sass(kernel), re.M)
    shown = [line for line in found.panes["sass"] if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line[2])]
    assert all(instruction in line[2] for line, instruction in zip(shown, instructions, strict=True))
    # Lines without a source line come from headers of the toolkit.
    assert sum(bool(line[0]) for line in shown) > 0.8 * len(shown) > 100
    assert f"<b>SASS instructions</b> {len(instructions)}<" in text
    assert f"<b>registers</b> {machine_code.resources(kernel)['90a']['registers']}<" in text
    (load,) = [n for n, line in enumerate(kernel.source.splitlines(), 1) if "= p.seq_lens[" in line]
    for pane in ("sass", "ptx"):
        assert any(line[0] == str(load) for line in found.panes[pane]), pane
    assert found.addresses == []
    assert "http" not in text
    assert "<td>num_backends</td><td>2</td>" in text


@pytest.mark.nvcc
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_browser_lights_what_belongs_together(page: Path) -> None:
    found = Lines(page.read_text(encoding="utf-8"))
    both = {line[0] for line in found.panes["sass"]} & {line[0] for line in found.panes["ptx"]} - {""}
    line = min(both, key=int)
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{page}#line-{line}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout
    for name, lines in Lines(shown).panes.items():
        held = {each[0] for each in lines if "held" in each[1].split()}
        assert held == {line}, name


def test_a_page_of_a_difference(tmp_path: Path) -> None:
    file = tmp_path / "diff.html"
    result = invoke("diff", "nsa-decode-3", "nsa-decode-3-page16", "--html", str(file))
    assert (result.exit_code, result.output) == (1, "")
    text = file.read_text(encoding="utf-8")
    for name in ("nsa-decode-3", "nsa-decode-3-page16"):
        size = preset(name).page_size
        assert f"kPageSize&nbsp;=&nbsp;{size};" in re.sub(r"</?span[^>]*>", "", text)
        assert f"kPageSize = {size};" in render(preset(name))
    assert "http" not in text
    assert invoke("diff", "nsa-decode-3", "num_backends=3", "--html", str(file)).exit_code == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--set", "fields=cache_seqlens,target=cpu"], "is built for the CPU; a page shows SASS and PTX"),
        (["nsa-decode-3", "--what", "sass"], "--html shows source, SASS and PTX in one page"),
    ],
)
def test_what_has_no_page(words: list[str], sentence: str, tmp_path: Path) -> None:
    result = invoke("show", *words, "--html", str(tmp_path / "x.html"))
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "share"),
    [
        ("90a", 256, 64, 6208, 0.5),  # registers limit it to 4 blocks of 8 warps
        ("90a", 256, 32, 0, 1.0),
        ("80", 1024, 40, 0, 0.5),  # a second block would need 81,920 registers
        ("89", 256, 32, 0, 1.0),
        ("120a", 256, 32, 40_000, 2 / 6),  # two blocks of 41,024 bytes fit into 100 KB
        ("90a", 32, 16, 0, 0.5),  # at most 32 blocks per SM
    ],
)
def test_occupancy(arch: str, threads: int, registers: int, shared: int, share: float) -> None:
    """Known values, worked out from the programming guide's table."""
    assert occupancy.of(arch, threads, registers, shared) == pytest.approx(share)
