"""onelaunch diff, from the command line: its output and exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from click.testing import CliRunner
from onelaunch import KernelConfig, preset, render
from onelaunch.cli.main import app
from onelaunch.inspect.diff import difference
from onelaunch.inspect.kernels import of_config
from onelaunch.load import loader

CPU = KernelConfig(fields=("cache_seqlens",), target="cpu")


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["diff", *words])


def test_exit_codes_are_those_of_diff() -> None:
    same = invoke("nsa-decode-3", "num_backends=3")
    assert (same.exit_code, same.output) == (0, "no difference in cuda\n")
    differs = invoke("nsa-decode-3", "nsa-decode-3-page16")
    assert (differs.exit_code, differs.stderr) == (1, "")
    one, other = (of_config(name, preset(name)) for name in ("nsa-decode-3", "nsa-decode-3-page16"))
    assert differs.stdout == difference(one, other, "cuda")
    assert differs.stdout.startswith("--- nsa-decode-3 (cuda)\n+++ nsa-decode-3-page16 (cuda)\n")
    assert len(invoke("nsa-decode-3", "nsa-decode-3-page16", "-U", "0").stdout) < len(differs.stdout)
    for words in (["nsa-decode-3", "nsa-decod"], ["page_sise=3", "nsa-decode-3"], ["nsa-decode-3", "no/such.cu"]):
        trouble = invoke(*words)
        assert (trouble.exit_code, trouble.stdout) == (2, "")
        assert len(trouble.stderr.splitlines()) == (
            1 if "no/such.cu" in words else 2
        )  # for an unknown name, also the nearest one
    assert invoke("nsa-decode-3").exit_code == 2


def test_an_entry_against_settings_and_an_edited_file(tmp_path: Path) -> None:
    key = loader.load(CPU).key[:16]
    assert invoke(key, CPU.settings()).exit_code == 0
    file = tmp_path / "edited.cu"
    file.write_text(render(CPU) + "// mine\n", encoding="utf-8")
    result = invoke(key, str(file), "-U", "0")
    assert result.exit_code == 1
    assert result.stderr == f"onelaunch: {CPU.symbol} is edited by hand: {file}\n"
    assert f"+++ {file} (cuda, edited by hand)" in result.stdout
    assert [line for line in result.stdout.splitlines()[2:] if line[0] in "+-"] == ["+// mine"]


def test_targets_and_what_the_cpu_has_not() -> None:
    assert invoke("nsa-decode-1", "nsa-decode-1", "--target", "cpu").exit_code == 0
    result = invoke("nsa-decode-1", "nsa-decode-3", "--target", "cpu", "--what", "resources")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is built for the CPU and has no resources" in result.stderr
