"""onelaunch show, from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from onelaunch import KernelConfig, preset, render
from onelaunch.cache import files
from onelaunch.cli.main import app
from onelaunch.inspect import views
from onelaunch.inspect.kernels import find
from onelaunch.load import loader

CPU = KernelConfig(fields=("cache_seqlens",), target="cpu")


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["show", *words])


def test_it_prints_the_source_and_nothing_else() -> None:
    wanted = preset("nsa-decode-3").replace(page_size=16, extent="full")
    for words, config in (
        (["nsa-decode-3"], preset("nsa-decode-3")),
        ([], KernelConfig()),
        (["nsa-decode-3", "--set", "page_size=16, extent=full"], wanted),
        (["--set", wanted.settings()], wanted),
    ):
        result = invoke(*words)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == render(config)


def test_each_view_is_what_inspect_says() -> None:
    key = loader.load(CPU).key[:12]
    found = find(key)
    for what in ("cuda", "binding", "command", "key"):
        result = invoke(key, "--what", what)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == views.view(found, what)
    for what in ("command", "key"):
        assert json.loads(invoke(key, "--what", what, "--json").stdout) == views.facts(found, what)


@pytest.mark.nvcc
def test_machine_code_of_a_file(tmp_path: Path) -> None:
    file = str(tmp_path / "k.cu")
    assert invoke("--set", "fields=cache_seqlens", "-o", file).exit_code == 0
    sass = invoke(file, "--what", "sass", "--annotate", "--arch", "90a")
    assert sass.exit_code == 0, sass.output
    assert re.search(r"// \d+: .*seq_lens", sass.stdout)


def test_into_a_folder_with_what_editors_want(tmp_path: Path) -> None:
    for place in (f"{tmp_path}/new/", str(tmp_path / "new")):
        for settings in (CPU.settings(), CPU.replace(num_backends=2).settings()):
            result = invoke("--set", settings, "-o", place, "--clangd")
            assert (result.exit_code, result.output) == (0, "")
    names = {f"{CPU.replace(num_backends=n).symbol}.cu" for n in (1, 2)}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"compile_commands.json", *names}
    # The second call keeps the first kernel's entry.
    commands = json.loads((tmp_path / "new" / "compile_commands.json").read_text())
    assert {Path(command["file"]).name for command in commands} == names


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "k.cu"
    file.write_text("mine\n")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", interrupted)
        result = invoke("nsa-decode-1", "-o", str(file))
    assert (result.exit_code, result.stderr) == (130, "onelaunch: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["k.cu"]
    assert file.read_text() == "mine\n"
    # A symbolic link is kept, and a device is written to directly.
    (tmp_path / "link.cu").symlink_to(file)
    assert invoke("nsa-decode-1", "-o", str(tmp_path / "link.cu")).exit_code == 0
    assert (tmp_path / "link.cu").is_symlink()
    assert file.read_text() == render(preset("nsa-decode-1"))
    assert invoke("nsa-decode-1", "-o", "/dev/null").exit_code == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nsa-decode-1", "--json"], "--json is for resources, command and key; cuda is text."),
        (["nsa-decode-1", "--clangd"], "--clangd describes the file that -o writes"),
        (["nsa-decode-1", "--clangd", "--what", "key", "-o", "x"], "--clangd describes the file that -o writes"),
        (["nsa-decode-1", "--annotate"], "--annotate is for ptx and sass"),
        (["--set", CPU.settings(), "--what", "sass"], "is built for the CPU and has no machine code"),
        (["no/such.cu"], "no/such.cu can't be read or written: No such file or directory."),
        (["-o", "no/such/folder.cu"], "no/such/folder.cu can't be read or written: No such file or directory."),
        (["/dev/zero"], "/dev/zero isn't a kernel's source: it isn't a file, or is larger than any source."),
        (["latin-1.cu"], "latin-1.cu isn't a kernel's source: it isn't UTF-8"),
        (["no-such"], "There is no preset 'no-such'.\n`onelaunch list` prints all of them."),
        (["nsa-decod-1"], "There is no preset 'nsa-decod-1'. Did you mean 'nsa-decode-1'?\n`onelaunch list`"),
        (["--set", "page_sise=3"], "There is no setting 'page_sise'. Did you mean 'page_size'?\nAllowed: operation, "),
        (["0123456789abcdef"], "No entry's key begins with '0123456789abcdef'; `onelaunch list` shows them."),
    ],
)
def test_what_it_refuses(words: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin-1.cu").write_bytes("// größer\n".encode("latin-1"))
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("onelaunch: ")
    assert len(result.stderr.splitlines()) == 1 + text.count("\n")
    assert text in result.stderr
