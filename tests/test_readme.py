"""Runs what README.md, GUIDE.md, INSTALL.md, ARCHITECTURE.md and CONTRIBUTING.md show; checks that names exist.

The README's Python runs here, except for the lines with attach(): tests/engines/test_attach.py runs those on an
engine's class. The diffs of ARCHITECTURE.md are applied to a copy of the package, on which the Python below them runs.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from onelaunch import PRESETS, AuditError, KernelConfig, MetadataBuffers, bind, render
from onelaunch.cli.main import app
from onelaunch.load import prebuild
from onelaunch.spec import reference

ROOT = Path(__file__).parent.parent
TEXTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "GUIDE.md", "INSTALL.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
}
README, ARCHITECTURE = TEXTS["README.md"], TEXTS["ARCHITECTURE.md"]
# The guide's examples use names that the README's examples define.
GUIDE = README + TEXTS["GUIDE.md"]
ALL = "\n".join(TEXTS.values())


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def spans(text: str) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def commands(text: str, program: str) -> list[list[str]]:
    """The shell lines that call a program, in blocks and in inline code, without comments."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()] + spans(text)
    split = [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]
    return list({tuple(words): words for words in split}.values())


# ------------------------------------------------------------------------------------------------ README


def test_the_python_of_the_readme_refreshes_what_it_says() -> None:
    attach, first, *others = blocks(GUIDE, "python")
    assert attach.startswith("from onelaunch.integrations"), "tests/engines/test_attach.py runs it"
    assert len(first.splitlines()) <= 15
    names: dict[str, Any] = {}
    exec(first, names)
    backends, source = names["backends"], names["req_to_token"]
    inputs = (names["seq_lens"], names["req_pool_indices"], source)

    def assert_refreshed(backends: list[MetadataBuffers], **facts: Any) -> None:
        wanted = [MetadataBuffers(**{f.name: torch.zeros_like(t) for f, t in b.items()}) for b in backends]
        reference.refresh(wanted, *inputs, **{"index_topk": 2048, "page_size": 64, "extent": "live", **facts})
        for backend, want in zip(backends, wanted, strict=True):
            for field, tensor in backend.items():
                assert torch.equal(tensor, getattr(want, field.name)), field.name
                tensor.zero_()

    assert names["plan"].launches == 1
    assert len(list(backends[2].items())) == 6
    assert_refreshed(backends)
    (lists,) = [block for block in others if "lists = " in block]
    exec(lists, names)
    assert_refreshed(backends, extent="full", max_len=4167)
    (indices,) = [block for block in others if "kv_indices" in block]
    exec(indices, names)
    assert_refreshed(names["flat"], seqlen_offsets=(1, 2, 3))
    (declared,) = [block for block in others if "declare=" in block]
    assert declared is others[0], "the first example after the main one"
    exec(declared, names)
    lens, pool_rows, pool = inputs
    bs, columns = len(lens), lens[:, None] + torch.arange(4, device=lens.device)
    assert names["plan"].launches == 1
    assert torch.equal(names["positions"][:bs], lens)
    assert not names["positions"][bs:].any()
    assert torch.equal(names["slots"][:bs], pool[pool_rows[:, None], columns].long())
    assert_refreshed(backends)
    (audit,) = [block for block in others if "audit_every=" in block]
    with pytest.raises(
        AuditError, match=r"^backends\[1\].page_indices\[3, 0\] is -5; a refresh .* writes \d+"
    ) as caught:
        exec(audit, names)
    assert caught.value.expected == pool[pool_rows[3], 0]
    assert str(caught.value).split("; ")[0] in audit
    (seam,) = [block for block in others if "bind_seam" in block]
    exec(seam, names)
    chain = {name: tensor[: bs * 4].view(bs, 4) for name, tensor in names["chain"].items()}
    assert torch.equal(chain["positions"], columns)
    assert torch.equal(chain["out_cache_loc"], pool[pool_rows[:, None], columns].long())
    assert chain["retrieve_next_token"].tolist() == [[1, 2, 3, -1]] * bs
    assert [block for block in others if block not in (lists, indices, declared, audit, seam)] == []


def test_the_arguments_that_the_guide_names_are_bind_s() -> None:
    section = GUIDE.split("## Modes and lengths")[1].split("\n## ")[0]
    named = [span for span in spans(section) if re.match(r"[a-z_]+=", span)]
    assert len(named) >= 6
    emitted = set()
    for span in named:
        facts = eval(f"dict({span})", {"n": 4, "k": 4})
        assert set(facts) <= set(inspect.signature(bind).parameters), span
        fields = ("cache_seqlens", "real_page_table", *(() if "page_fill" in facts else ("pooled_cache_seqlens",)))
        config = KernelConfig(num_backends=3, fields=(*fields, *(() if "page_fill" in facts else ("page_indices",))))
        emitted.add(render(config.replace(**facts)))
    assert len(emitted) == len(named), "two arguments lead to the same kernel"


def test_the_matrix_of_the_readme_is_read(tmp_path: Path) -> None:
    (toml,) = blocks(GUIDE, "toml")
    file = tmp_path / "kernels.toml"
    file.write_text(toml, encoding="utf-8")
    jobs = prebuild.read_matrix(file)
    assert {(job.config.page_size, job.config.num_backends) for job in jobs} == {
        (p, n) for p in (16, 64) for n in (1, 2, 3)
    }
    assert {job.archs for job in jobs} == {("90a", "100a")}


@pytest.mark.parametrize("words", commands(ALL, "onelaunch"), ids=" ".join)
def test_every_command_is_understood_and_quick_ones_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command: Any = app
    rest = words[1:]
    while hasattr(command, "commands"):
        name, *rest = rest
        assert name in command.commands, f"there is no verb {name}"
        command = command.commands[name]
    if rest:
        with app.make_context("onelaunch", ["list"]) as parent:
            command.make_context(words[1], list(rest), parent=parent)
    # Machine code and GPU builds need a toolkit; other tests run those commands.
    quick = words[1] in ("show", "describe", "diff", "list", "explain") or words[1:] == ["cache", "path"]
    if not quick or {"sass", "ptx", "resources", "--html"} & set(words):
        return
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*words[1:], *(["--target", "cpu"] if words[1] == "explain" else [])])
    # Exit status 1 is a valid answer: the configurations differ, or the kernel isn't built.
    assert done.exit_code in ((0, 1) if words[1] in ("diff", "explain") else (0,)), done.output
    assert done.output or list(tmp_path.rglob("*.cu"))


def test_make_s_targets_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {words[1] for words in commands(ALL, "make")}
    assert {"demo", "test", "test-long", "check", "engines", "gpu"} <= named <= targets


def test_variables_are_those_that_the_package_reads() -> None:
    sources = [path for folder in ("generator", "cli") for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in sources for name in re.findall(r'"(ONELAUNCH_[A-Z_]+)"', path.read_text(encoding="utf-8"))}
    assert set(re.findall(r"ONELAUNCH_[A-Z_]+", GUIDE)) == read


def test_names_are_there() -> None:
    paths = {span for span in spans(ALL) if re.fullmatch(r"onelaunch(\.\w+)+(\(.*\))?", span)}
    assert len(paths) > 5
    for path in paths:
        first, *names = path.split("(")[0].split(".")
        owner: Any = importlib.import_module(first)
        for name in names:
            if not hasattr(owner, name):
                importlib.import_module(f"{owner.__name__}.{name}")
            owner = getattr(owner, name)
    stems = {re.split("-", name)[0] for name in PRESETS}
    named = {span for span in spans(GUIDE) if re.fullmatch(rf"({'|'.join(stems)})-[a-z0-9-]+", span)}
    assert named <= set(PRESETS)
    assert named


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXTS[name]) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_has_a_picture_of_the_flow_and_of_time() -> None:
    assert len(blocks(GUIDE, "mermaid")) == 1
    assert README.count("](tests/gpu/bench.png)") == 1


# ------------------------------------------------------------------------------------------------ ARCHITECTURE


def test_every_room_has_its_place_in_the_architecture() -> None:
    """ARCHITECTURE.md has an entry for every folder of the package, and every file it names exists."""
    rooms = ARCHITECTURE.split("## Rooms")[1].split("\n## ")[0]
    folders = [path.parent for folder in ("generator", "cli") for path in (ROOT / folder).rglob("__init__.py")]
    top = {f"{path.relative_to(ROOT).parts[1]}/" for path in folders if len(path.relative_to(ROOT).parts) == 2}
    assert {f"`{name}`" for name in top - {"lab/"}} <= set(re.findall(r"`[\w/]+`", rooms))
    files = [path for folder in ("generator", "cli", "templates", "tests") for path in (ROOT / folder).rglob("*.*")]
    there = {str(path.relative_to(ROOT))[-len(name) :] for path in files for name in [path.name]}
    named = {span for span in spans(rooms) if re.fullmatch(r"\w+\.(py|cuh|cpp|j2)", span)}
    assert named - there == set()


def test_every_module_says_first_what_it_is_for() -> None:
    for folder in ("generator", "cli"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.read_text(encoding="utf-8").startswith('"""'), path


def applied(diff: str, root: Path) -> set[str]:
    """Applies a diff to the files below root. Each hunk's old text must occur exactly once. Returns the files."""
    names = set()
    for part in re.split(r"^--- .*\n", diff, flags=re.M)[1:]:
        header, *hunks = re.split(r"^@@.*\n", part, flags=re.M)
        name = header.removeprefix("+++ b/").strip()
        names.add(name)
        path = root / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            assert text.count(old) == 1 if old else not text, f"{name} doesn't have once:\n{old}"
            text = text.replace(old, new, 1) if old else new
        path.write_text(text, encoding="utf-8")
    return names


# Kernels without the new field and the new engine must be emitted as before.
UNCHANGED = """
from pathlib import Path
from onelaunch import PRESETS, render
shipped = {path.stem: path.read_text(encoding="utf-8") for path in Path(GENERATED).glob("*.cu")}
emitted = {name: render(config) for name, config in PRESETS.items()}
assert {name: emitted[name] for name in shipped} == shipped
print(sorted(set(emitted) - set(shipped)))
"""


@pytest.mark.parametrize(
    ("section", "files", "presets"),
    [
        ("Adding a metadata field", {"generator/spec/fields.py", "generator/spec/reference.py"}, []),
        ("Adding a setting", {"generator/spec/parts.py", "templates/copy.cu.j2"}, []),
        ("Adding an engine", {"generator/spec/presets.py", "generator/integrations/mine.py"}, ["mine-decode-2"]),
    ],
)
def test_the_walks_of_the_architecture(section: str, files: set[str], presets: list[str], tmp_path: Path) -> None:
    text = ARCHITECTURE.split(f"## {section}")[1].split("\n## ")[0]
    (diff,), (code,) = blocks(text, "diff"), blocks(text, "python")
    source, package = tmp_path / "source", tmp_path / "installed" / "onelaunch"
    for folder in ("generator", "cli", "templates"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert applied(diff, source) == files
    shutil.copytree(source / "generator", package)
    for folder in ("cli", "templates"):
        shutil.copytree(source / folder, package / folder)
    script = tmp_path / "script.py"
    script.write_text(f"GENERATED = {str(ROOT / 'generated')!r}\n{code}\n{UNCHANGED}", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(presets)
