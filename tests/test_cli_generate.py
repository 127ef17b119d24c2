"""onelaunch generate: writes a folder, checks it, and reports unreadable and unwritable files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from onelaunch import PRESETS
from onelaunch.cli.main import app


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["generate", *arguments])


def test_it_writes_checks_and_repairs_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first = invoke("-o", str(folder))
    assert first.exit_code == 0
    assert first.stdout.splitlines() == [f"wrote {folder / name}.cu" for name in PRESETS]
    assert {path.name for path in folder.iterdir()} == {f"{name}.cu" for name in PRESETS}

    checked = invoke("-o", str(folder), "--check")
    assert (checked.exit_code, checked.stdout) == (0, f"{folder} is up to date\n")
    again = invoke("-o", str(folder))
    assert (again.exit_code, again.output) == (0, "")

    (folder / "nsa-decode-1.cu").unlink()
    (folder / "nsa-decode-2.cu").write_text("// edited\n", encoding="utf-8")
    (folder / "stray.cu").write_text("// of no preset\n", encoding="utf-8")
    (folder / "notes.txt").write_text("mine\n", encoding="utf-8")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    wrong = invoke("-o", str(folder), "--check")
    assert wrong.exit_code == 1
    assert wrong.stderr == f"onelaunch: {folder} is out of date. Run: onelaunch generate\n"
    assert "-// edited" in wrong.stdout
    assert "-// of no preset" in wrong.stdout
    assert "+++ emitted/nsa-decode-1.cu" in wrong.stdout
    assert "nsa-decode-3.cu" not in wrong.stdout
    assert {path: path.read_bytes() for path in folder.iterdir()} == before, "--check wrote"

    repaired = invoke("-o", str(folder))
    assert repaired.stdout.splitlines() == [
        f"wrote {folder / name}" for name in ("stray.cu", "nsa-decode-1.cu", "nsa-decode-2.cu")
    ]
    assert invoke("-o", str(folder), "--check").exit_code == 0
    assert (folder / "notes.txt").read_text() == "mine\n"
    assert not (folder / "stray.cu").exists()


def test_a_folder_that_cant_be_read_or_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "nsa-decode-1.cu").mkdir()
    for words, place, reason in (
        (["-o", str(tmp_path / "no" / "out")], f"{tmp_path}/no/out", "No such file or directory"),
        (["-o", str(tmp_path), "--check"], "nsa-decode-1.cu", "Is a directory"),
    ):
        result = invoke(*words)
        assert (result.exit_code, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert line.startswith("onelaunch: ")
        assert line.endswith(f"{place} can't be read or written: {reason}.")


@pytest.mark.nvcc
def test_editors_get_a_command_for_every_preset(tmp_path: Path) -> None:
    result = invoke("-o", str(tmp_path / "emitted"), "--clangd")
    assert result.exit_code == 0, result.output
    commands = json.loads((tmp_path / "emitted" / "compile_commands.json").read_text())
    assert {Path(command["file"]).stem for command in commands} == set(PRESETS)
