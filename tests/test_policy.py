"""Notices of builds, and the policy that refuses them: freeze() and $ONELAUNCH_JIT."""

from __future__ import annotations

import re
import shlex
import threading
from pathlib import Path
from typing import Any

import onelaunch
import pytest
from click.testing import CliRunner
from onelaunch import PRESETS, JitPolicyError, KernelConfig, ToolchainError
from onelaunch.build import toolchain
from onelaunch.cache.store import Store
from onelaunch.cli.main import app
from onelaunch.load import loader
from usable import SMALL

OTHERS = [KernelConfig(fields=("cache_seqlens",), target="cpu", num_backends=n) for n in range(2, 12)]


def test_the_notice_of_a_build(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    loader.load(SMALL, store=store)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"onelaunch: building {SMALL.symbol} for the CPU, because {store.root} has no build of it yet\n"
    )
    loader.load(SMALL, store=store)
    assert capfd.readouterr().err == ""


def test_eight_threads_that_ask_at_once_get_one_build(store: Store, builds: list[str]) -> None:
    barrier = threading.Barrier(8)
    kernels: list[Any] = []

    def ask() -> None:
        barrier.wait()
        kernels.append(loader.load(SMALL, store=store))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernels) == 8
    assert len({id(kernel) for kernel in kernels}) == 1
    assert len(builds) == 1


# Every form a configuration can have on a command line, the default one among them.
FROZEN = {
    "the defaults": (KernelConfig(), ("90a",)),
    "a preset": (PRESETS["nsa-decode-3-lengths-only"], ("90a",)),
    "two architectures": (KernelConfig(num_backends=3), ("90a", "100a")),
    "shared destinations": (OTHERS[1].replace(distinct=(("cache_seqlens", 1),)), ()),
    "the CPU": (KernelConfig(num_backends=5, target="cpu"), ()),
}


def command_in(error: Exception) -> list[str]:
    """The command that a JitPolicyError names, as a shell would split it."""
    found = re.search(r"ahead of time with: (onelaunch build .*?) \(builds are refused", str(error))
    assert found is not None, str(error)
    return shlex.split(found[1])[1:]


@pytest.mark.parametrize("how", ["freeze", "variable"])
@pytest.mark.parametrize("what", FROZEN)
def test_frozen(what: str, how: str, store: Store, monkeypatch: pytest.MonkeyPatch, builds: list[str]) -> None:
    """No build; the error names the command that builds exactly this. Here it runs without its build."""
    config, archs = FROZEN[what]
    if config.target == "cuda":
        try:
            toolchain.find_toolkit()
        except ToolchainError:
            pytest.skip("no CUDA toolkit: a missing one is said first")
    if how == "freeze":
        onelaunch.freeze()
    else:
        monkeypatch.setenv("ONELAUNCH_JIT", "error")
    with pytest.raises(JitPolicyError) as caught:
        loader.load(config, archs, store)
    assert config.symbol in str(caught.value)
    assert builds == []
    asked: list[tuple[KernelConfig, tuple[str, ...] | None]] = []

    def specialize(wanted: KernelConfig, wanted_archs: tuple[str, ...] | None) -> Any:
        asked.append((wanted, wanted_archs))
        raise ToolchainError("stop here")

    with monkeypatch.context() as patch:
        patch.setattr(onelaunch, "specialize", specialize)
        result = CliRunner().invoke(app, command_in(caught.value))
    assert "stop here" in result.output, result.output
    assert asked == [(config, archs or None)]


def test_the_command_in_the_error_builds_what_was_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[str]
) -> None:
    monkeypatch.setenv("ONELAUNCH_CACHE_DIR", str(tmp_path / "cache"))
    store = Store()
    monkeypatch.setattr(loader, "default_store", lambda: store)
    onelaunch.freeze()
    with pytest.raises(JitPolicyError) as caught:
        loader.load(OTHERS[0])
    onelaunch.freeze("allow")
    result = CliRunner().invoke(app, command_in(caught.value))
    assert result.exit_code == 0, result.output
    assert len(builds) == 1
    onelaunch.freeze()
    loader._loaded.clear()
    assert loader.load(OTHERS[0]).path.is_file()
    assert len(builds) == 1


def test_freeze_as_a_warning(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    onelaunch.freeze("warn")
    assert loader.load(SMALL, store=store).path.is_file()
    said = capfd.readouterr().err
    assert "onelaunch: warning:" in said
    assert f"onelaunch build --set {SMALL.settings()}" in said


def test_freeze_lets_loaded_and_stored_kernels_through(store: Store, builds: list[str]) -> None:
    kernel = loader.load(SMALL, store=store)
    onelaunch.freeze()
    assert loader.load(SMALL, store=store) is kernel
    loader._loaded.clear()
    assert loader.load(SMALL, store=store).key == kernel.key
    assert len(builds) == 1


def test_policies_that_do_not_exist(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JitPolicyError, match="'never'"):
        onelaunch.freeze("never")  # type: ignore[arg-type]
    monkeypatch.setenv("ONELAUNCH_JIT", "never")
    with pytest.raises(JitPolicyError, match="ONELAUNCH_JIT is 'never'; allowed: allow, warn, error"):
        loader.load(SMALL, store=store)
