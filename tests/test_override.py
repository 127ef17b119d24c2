"""Hand-edited sources: they run in place of the emitted source, are marked and checked, and never confused with it."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import onelaunch
import pytest
import torch
from click.testing import CliRunner
from onelaunch import CompileError, KernelConfig, StoreError, log, render
from onelaunch.cache.store import Store
from onelaunch.cli.main import app
from onelaunch.emit import override
from onelaunch.emit.override import OVERRIDE_VARIABLE
from onelaunch.inspect import kernels as inspect
from onelaunch.load import loader, pack
from users import MALLORY, public_folder

CPU = KernelConfig(fields=("cache_seqlens",), target="cpu")
TRACE = Path(__file__).parent / "data" / "azure_2023_conversation.csv"


@pytest.fixture
def edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for edits; the default store is new and empty."""
    folder = tmp_path / "edits"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv(OVERRIDE_VARIABLE, str(folder))
    store = Store(tmp_path / "cache")
    monkeypatch.setattr(loader, "default_store", lambda: store)
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr("onelaunch.log._warned", set())
    return folder


def edit(folder: Path, config: KernelConfig, old: str, new: str) -> Path:
    path = folder / f"{config.symbol}.cu"
    text = render(config)
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def lengths_of(kernel_edited: bool) -> list[int]:
    """What a refresh writes for the lengths 5 and 6."""
    buffers = onelaunch.MetadataBuffers(cache_seqlens=torch.zeros(2, dtype=torch.int32))
    plan = onelaunch.bind([buffers], req_to_token=torch.zeros((2, 8), dtype=torch.int32))
    assert plan.config == CPU
    assert plan.kernel.edited is kernel_edited
    assert ("edited by hand" in repr(plan.kernel)) is kernel_edited
    plan.run(torch.tensor([5, 6]), torch.tensor([0, 1]))
    assert buffers.cache_seqlens is not None
    return list(buffers.cache_seqlens.tolist())


def test_an_edit_runs_and_is_marked_everywhere(
    edits: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "onelaunch")
    plain = loader.load(CPU)
    assert lengths_of(False) == [5, 6]
    path = edit(edits, CPU, "request, seq_len);", "request, seq_len + 100);")
    capfd.readouterr()
    caplog.clear()
    with pytest.warns(UserWarning, match=f"{CPU.symbol} is edited by hand: {path} runs in place"):
        assert lengths_of(True) == [105, 106]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns once per process
        assert lengths_of(True) == [105, 106]
    assert "has no build of it yet (edited by hand: " in capfd.readouterr().err
    assert [line.message.split()[0] for line in caplog.records if "edited by hand" in line.message] == [
        "build", "load", "bind", "bind",
    ]  # fmt: skip
    edited = loader.load(CPU)
    assert edited.key != plain.key
    assert edited.source == path.read_text(encoding="utf-8") != plain.source
    shown = CliRunner().invoke(app, ["show", "--set", CPU.settings()])
    assert (shown.stdout, shown.stderr) == (edited.source, f"onelaunch: {CPU.symbol} is edited by hand: {path}\n")
    for verb in (["list"], ["cache", "list"]):
        lines = CliRunner().invoke(app, verb).stdout.splitlines()
        marked = {line for line in lines if "edited by hand" in line}
        assert [edited.key[:12] in line for line in marked] == [True]
        assert any(plain.key[:12] in line for line in lines)
    assert (
        f"edited by hand  {path}" in CliRunner().invoke(app, ["show", "--set", CPU.settings(), "--what", "key"]).stdout
    )
    entry = inspect.find(edited.key[:16])
    assert (entry.source, entry.edited) == (edited.source, edited.path.parent)


def test_the_cache_never_mixes_them(edits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either order, within a process and in the next one, which has only the index."""
    path = edit(edits, CPU, "request, seq_len);", "request, seq_len + 100);")
    keys = {}
    for folder, wanted in ((str(edits), 105), ("", 5), (str(edits), 105), ("", 5)):
        monkeypatch.setenv(OVERRIDE_VARIABLE, folder)
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert lengths_of(wanted == 105)[0] == wanted
                keys[loader.load(CPU).key] = wanted
            loader._loaded.clear()
    assert sorted(keys.values()) == [5, 105]
    # Another edit has another key. A file that equals the emitted source has the emitted source's key.
    monkeypatch.setenv(OVERRIDE_VARIABLE, str(edits))
    path.write_text(path.read_text().replace("+ 100", "+ 200"))
    log._warned.clear()
    with pytest.warns(UserWarning, match="edited by hand"):
        assert lengths_of(True)[0] == 205
    path.write_text(render(CPU), encoding="utf-8")
    assert lengths_of(False)[0] == 5
    assert len(loader.default_store().stored_keys()) == 3


def test_the_reference_judges_an_edit(edits: Path) -> None:
    """onelaunch replay reports a wrong edit, and accepts one that computes the same."""
    replay = [
        "replay", str(TRACE), "--device", "cpu", "--backends", "1", "--max-batch", "4", "--context-len", "256",
        "--max-steps", "12", "--step-ms", "500", "--verify", "every",
    ]  # fmt: skip
    dumped = CliRunner().invoke(app, ["show", "nsa-decode-1", "--target", "cpu", "-o", f"{edits}/"])
    assert dumped.exit_code == 0, dumped.output
    (path,) = edits.iterdir()
    text = path.read_text(encoding="utf-8")
    minimum = "min(seq_len, kIndexTopk)"
    assert minimum in text
    for new, mismatches in (("min(kIndexTopk, seq_len)", False), (f"{minimum} + 1", True)):
        path.write_text(text.replace(minimum, new), encoding="utf-8")
        log._warned.clear()
        with pytest.warns(UserWarning, match="edited by hand"):
            result = CliRunner().invoke(app, replay)
        assert result.exit_code == int(mismatches), result.output
        assert ("nsa_cache_seqlens[0] is" in result.stdout) is mismatches


def test_an_edit_that_doesnt_compile_is_fixed_by_another(edits: Path) -> None:
    path = edit(edits, CPU, "request, seq_len);", "request, seq_lenn);")
    for _ in range(2):
        with pytest.raises(CompileError, match="seq_lenn") as caught:
            loader.load(CPU)
        assert caught.value.source.read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
    edit(edits, CPU, "request, seq_len);", "request, seq_len + 1);")
    with pytest.warns(UserWarning, match="edited by hand"):
        assert lengths_of(True) == [6, 7]


def test_what_somebody_else_could_have_written_is_refused(edits: Path) -> None:
    path = edit(edits, CPU, "request, seq_len);", "request, seq_len + 1);")
    for place in (path, edits):
        mode = place.stat().st_mode
        place.chmod(0o777)
        said = rf"^{re.escape(str(place))}.* the folder of edited kernels,? can be written"
        with pytest.raises(StoreError, match=said):
            loader.load(CPU)
        place.chmod(mode)
    assert override.edited(CPU) is not None
    assert not loader.default_store().root.exists(), "something was built"


def test_a_folder_above_that_somebody_else_could_exchange(edits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is the cache's. It covers the targets of links, and links that belong to another user."""
    if os.geteuid() != 0:
        pytest.skip("only root can make folders of several users")
    with public_folder() as public:
        hers, mine = public / "hers", public / "hers" / "mine"
        mine.mkdir(parents=True, mode=0o700)
        path = edit(mine, CPU, "request, seq_len);", "request, seq_len + 1);")
        (public / "link").symlink_to(mine)
        (edits / path.name).symlink_to(path)
        places = (mine, public / "link", edits)
        for place in places:
            monkeypatch.setenv(OVERRIDE_VARIABLE, str(place))
            found = override.edited(CPU)
            assert found is not None
            assert found.text == path.read_text()
        os.chown(hers, MALLORY, MALLORY)
        for place in places:
            monkeypatch.setenv(OVERRIDE_VARIABLE, str(place))
            with pytest.raises(StoreError) as caught:
                override.edited(CPU)
            assert str(caught.value) == (
                f"{hers}, which leads to the folder of edited kernels, belongs to user {MALLORY}, and code from it "
                f"would run as user 0. Set {OVERRIDE_VARIABLE} to a folder of your own, or, if you trust everybody who "
                "can write there, set ONELAUNCH_SHARED_CACHE=1."
            )


def test_what_cant_be_read_is_one_sentence(edits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edits / f"{CPU.symbol}.cu"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match=f"{path} can't be read: it isn't UTF-8 text. Name a folder of edited kernels"):
        loader.load(CPU)
    path.unlink()
    path.mkdir(mode=0o700)
    with pytest.raises(StoreError, match=f"{path} can't be read: it isn't UTF-8 text"):
        loader.load(CPU)
    monkeypatch.setenv(OVERRIDE_VARIABLE, str(edits / "no"))
    result = CliRunner().invoke(app, ["show", "nsa-decode-1"])
    assert result.exit_code == 2
    assert result.stderr == (
        f"onelaunch: {OVERRIDE_VARIABLE} is {edits / 'no'} and {edits / 'no'} can't be read: "
        "No such file or directory. Name a folder of edited kernels, or unset the variable.\n"
    )


def test_what_is_built_is_what_was_read_first(edits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load reads the file once. A change during the build takes effect at the next load, under another key."""
    path = edit(edits, CPU, "request, seq_len);", "request, seq_len + 1);")
    obey = loader._obey_policy

    def change(*args: Any) -> None:
        obey(*args)
        path.write_text(path.read_text().replace("+ 1", "+ 2"))

    monkeypatch.setattr(loader, "_obey_policy", change)
    with pytest.warns(UserWarning, match="edited by hand"):
        first = loader.load(CPU)
    assert "request, seq_len + 1);" in first.source
    monkeypatch.undo()
    monkeypatch.setenv(OVERRIDE_VARIABLE, str(edits))
    assert "request, seq_len + 2);" in loader.load(CPU, store=Store(first.path.parents[2])).source


def test_a_pack_of_an_edit_isnt_taken_for_the_emitted_kernel(
    edits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(edits, CPU, "request, seq_len);", "request, seq_len + 1);")
    with pytest.warns(UserWarning, match="edited by hand"):
        kernel = loader.load(CPU)
    data = pack.to_bytes([loader.entry_of(kernel)])
    elsewhere = Store(tmp_path / "elsewhere")
    # With the same edit in place, it is the same kernel.
    assert pack.from_bytes(data, elsewhere).entries[0].key == kernel.key
    monkeypatch.delenv(OVERRIDE_VARIABLE)
    done = pack.from_bytes(data, Store(tmp_path / "third"))
    assert done.entries == ()
    assert done.refused[0][1].startswith("its source was edited by hand")
    assert loader.load(CPU, store=elsewhere).key != kernel.key


def test_an_emitted_file_that_wasnt_changed_is_no_edit(edits: Path) -> None:
    (edits / f"{CPU.symbol}.cu").write_text(render(CPU), encoding="utf-8")
    assert override.edited(CPU) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lengths_of(False) == [5, 6]
    assert os.environ[OVERRIDE_VARIABLE] == str(edits)
