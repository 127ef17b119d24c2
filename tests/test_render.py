"""The emitted text: deterministic, correct about its origin, without code for fields and inputs it doesn't have."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jinja2
import jinja2.nodes
import pytest
from click.testing import CliRunner
from onelaunch import FIELDS, PRESETS, KernelConfig
from onelaunch import render as render_anew
from onelaunch.cli.main import app
from onelaunch.emit.binding import render_binding
from onelaunch.emit.render import device_files, render_baseline
from onelaunch.spec import layout
from onelaunch.spec.declarations import written
from onelaunch.spec.vectors import locals_of
from processes import light_package
from support import ALL_FIELDS

ROOT = Path(__file__).parent.parent

CONFIGS: dict[str, KernelConfig] = {
    **PRESETS,
    **{f"only {name}": KernelConfig(num_backends=2, fields=(name,)) for name in ALL_FIELDS},
    **{f"copy of {name}": KernelConfig(num_backends=2, fields=(name,), operation="copy") for name in ALL_FIELDS},
    **{
        f"without {name}": KernelConfig(num_backends=2, fields=tuple(f for f in ALL_FIELDS if f != name), extent=extent)
        for name, extent in zip(ALL_FIELDS, ("live", "full") * 5, strict=False)
    },
    **{
        f"schedules, {mode}, {per}, {'offsets' if offsets else 'one length'}": KernelConfig(
            num_backends=2,
            mode=mode,
            next_n=3,
            seqlen_offsets=offsets,
            schedule_per=per,
            fields=(*fields, "paged_mqa_schedule_metadata", "flashmla_metadata", "num_splits"),
            checked=bool(offsets),
        )
        for mode, per, offsets, fields in (
            ("decode", "request", (), ("page_indices",)),
            ("decode", "request", (1, 2), ()),
            ("target_verify", "request", (), ALL_FIELDS),
            ("draft_extend", "row", (1, 2), ("cu_seqlens_k",)),
        )
    },
    "schedule of the old kind": KernelConfig(
        fields=("paged_mqa_schedule_metadata",), schedule_remainder="first", index_kpool=4
    ),
    "parts of the old kind": KernelConfig(fields=("flashmla_metadata",), flashmla_order="2025"),
    "indices": KernelConfig(num_backends=2, fields=("kv_indices",)),
    "indices, checked": KernelConfig(
        num_backends=2, fields=("kv_indptr", "kv_indices"), seqlen_offsets=(1, 2), checked=True
    ),
    "indices beside a schedule": KernelConfig(
        num_backends=2, fields=("kv_indices", "paged_mqa_schedule_metadata"), mode="target_verify", next_n=2
    ),
    "page 48": KernelConfig(num_backends=2, page_size=48),
    "full, lengths of their own": KernelConfig(
        num_backends=3, fields=("cache_seqlens", "page_indices"), seqlen_offsets=(1, 2, 3), extent="full"
    ),
    "int64 tokens, 4 bytes": KernelConfig(req_to_token_dtype="int64", vector_bytes=4, extent="full"),
    **{
        f"{mode}{' variable' * (extend == 'variable')}, {extent}, {words} bytes": KernelConfig(
            num_backends=2,
            mode=mode,
            next_n=3,
            extend=extend,
            extent=extent,
            vector_bytes=words,
            fields=ALL_FIELDS,
            index_kpool=3,
        )
        for mode, extend in (("target_verify", "uniform"), ("draft_extend", "uniform"), ("draft_extend", "variable"))
        for extent, words in (("live", 16), ("full", 4))
    },
    "verify, requests only": KernelConfig(mode="target_verify", next_n=3, fields=("cache_seqlens", "cu_seqlens_k")),
    "variable, tables only": KernelConfig(mode="draft_extend", extend="variable", fields=("page_indices",)),
    "variable, one field": KernelConfig(mode="draft_extend", extend="variable", fields=("seqlens_expanded",)),
    "variable, checked": KernelConfig(
        mode="draft_extend", extend="variable", fields=ALL_FIELDS, checked=True, page_size=3
    ),
    "variable, filled": KernelConfig(
        mode="draft_extend", extend="variable", fields=("real_page_table",), page_fill=-1, checked=True
    ),
    "one offset": KernelConfig(num_backends=2, seqlen_offsets=(5, 5)),
    "offsets": KernelConfig(num_backends=3, seqlen_offsets=(1, 0, 7)),
    "offsets, full": KernelConfig(num_backends=3, seqlen_offsets=(1, 0, 7), extent="full"),
    "offsets, checked": KernelConfig(num_backends=3, seqlen_offsets=(1, 0, 7), checked=True, page_size=4),
    "offsets, shared tables": KernelConfig(
        num_backends=3, seqlen_offsets=(1, 2, 7), distinct=(("page_indices", 1), ("real_page_table", 1))
    ),
    "offsets, verify, filled": KernelConfig(
        num_backends=3,
        seqlen_offsets=(1, 2, 7),
        mode="target_verify",
        next_n=2,
        fields=("cache_seqlens", "nsa_cu_seqlens_k", "real_page_table"),
        page_fill=-1,
    ),
    "offsets, lengths only": KernelConfig(num_backends=40, seqlen_offsets=tuple(range(40)), fields=("cu_seqlens_k",)),
    "pools, pages only": KernelConfig(
        num_backends=2, index_kpool=4, fields=("real_page_table", "pooled_real_page_table"), checked=True
    ),
    "pools of two": KernelConfig(num_backends=2, index_kpool=2),
    "schedule of pools of two": KernelConfig(fields=("paged_mqa_schedule_metadata",), index_kpool=2),
    "two offsets": KernelConfig(num_backends=2, seqlen_offsets=(1, 2)),
    "two offsets, pages only": KernelConfig(
        num_backends=2, seqlen_offsets=(1, 2), fields=("cache_seqlens", "real_page_table")
    ),
    "shared": KernelConfig(
        num_backends=9, distinct=tuple((name, 1) for name in FIELDS if name in KernelConfig().fields)
    ),
}
# A few suffice for the CPU: below the prelude both targets have the same text, which a test of its own checks.
ON_A_CPU = (
    "nsa-decode-3",
    "nsa-copy-3",
    "flashinfer-decode-3",
    "flashmla-decode-3",
    "variable, checked",
    "indices, checked",
)
TEXTS = CONFIGS | {f"{name}, cpu": CONFIGS[name].replace(target="cpu") for name in ON_A_CPU}

# Cached, because many tests read each text. A test of its own checks that rendering is deterministic.
render = functools.cache(render_anew)


pytestmark = pytest.mark.uncounted
every_config = pytest.mark.parametrize("config", TEXTS.values(), ids=TEXTS)

FACTS = "// ---- settings"


def below_the_banner(source: str) -> str:
    """The code, without the banner and without the key in the symbols."""
    lines = source.splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if not line.startswith("//"))
    return "".join(lines[end:])


def below_the_prelude(config: KernelConfig) -> list[str]:
    """The text from the settings on, with a placeholder for the symbol, which contains the key."""
    source = render(config)
    return (FACTS + source.split(FACTS, 1)[1]).replace(config.symbol, "SYMBOL").splitlines()


def words(code: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", code))


# ---------------------------------------------------------------------------------------------- deterministic


@every_config
def test_the_same_text_each_time(config: KernelConfig) -> None:
    assert render_anew(config) == render_anew(KernelConfig.from_dict(config.to_dict()))


def test_the_same_text_in_another_process(tmp_path: Path) -> None:
    """The text depends neither on the hash seed, nor on the working directory, nor on the locale."""
    code = (
        "import hashlib; from onelaunch.spec.presets import PRESETS; from onelaunch.emit.render import render; "
        "print(hashlib.sha256(''.join(map(render, PRESETS.values())).encode()).hexdigest())"
    )
    outputs = set()
    for seed, folder, language in (("0", ROOT, "C"), ("7", Path("/"), "C.UTF-8")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": language, "TZ": f"UTC-{seed}"}
        environment["PYTHONPATH"] = str(light_package(tmp_path))
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        outputs.add(done.stdout)
    assert outputs == {hashlib.sha256("".join(map(render, PRESETS.values())).encode()).hexdigest() + "\n"}


@every_config
def test_tidy(config: KernelConfig) -> None:
    source = render(config)
    assert source.endswith("\n")
    assert not source.endswith("\n\n")
    assert "\t" not in source
    assert "\r" not in source
    assert source.isascii()
    assert "\n\n\n" not in source
    code = "\n".join(below_the_prelude(config))
    assert not re.search(r"^\}\n(?!\n)", code, re.M), "a blank line after each function"
    for number, line in enumerate(source.splitlines(), 1):
        assert line == line.rstrip(), f"line {number} ends with blanks: {line!r}"
        # The command isn't wrapped, so that a user can copy it.
        if not line.startswith("//   onelaunch show "):
            assert len(line) <= 120, f"line {number} has {len(line)} columns: {line}"
    assert source.count("{") == source.count("}")


@every_config
def test_nothing_of_the_machine(config: KernelConfig) -> None:
    """No absolute path, no user, no date."""
    for source in (render(config), render_binding(config, "a_module")):
        assert str(ROOT) not in source
        assert str(Path.home()) not in source or Path.home() == Path("/")
        assert not re.search(r"(^|[\s\"'(=])/(?!/|\*)\w", source, re.M), "an absolute path"
        assert not re.search(r"\b20\d\d-\d\d", source)


# ------------------------------------------------------------------------------------------ symbols and banner


@every_config
def test_symbols_carry_the_key(config: KernelConfig) -> None:
    source, binding = render(config), render_binding(config, f"{config.symbol}_binding")
    assert config.symbol.endswith(config.key[:16])
    exported = source.split('extern "C" {', 1)[1]
    names = re.findall(r"^(?:int|const char\*) (\w+)\(", exported, re.M)
    assert names == [f"{config.symbol}{end}" for end in ("_launch", "_prepare", "_error")]
    assert re.search(rf"__global__ void __launch_bounds__\([^)]*\)\s+{config.symbol}\(", source)
    assert f"#define ONELAUNCH_SYMBOL {config.symbol}\n" in binding


@every_config
def test_the_banner(config: KernelConfig) -> None:
    source = render(config)
    banner = source[: source.index("\n\n")]
    assert "templates/kernel.cu.j2" in banner
    assert (ROOT / "templates" / "kernel.cu.j2").is_file()
    assert "Do not edit" in banner
    assert f"key {config.key}" in banner
    text = re.sub(r"\n//\s{20,}", " ", banner)
    # Defaults aren't shown, so that adding a setting doesn't change existing texts.
    for name, value in config.to_dict().items():
        if name not in config.shown_settings():
            assert not re.search(rf"^//   {name} ", text, re.M), name
            continue
        shown = re.search(rf"^//   {name} +(.*)$", text, re.M)
        assert shown is not None, name
        if name == "declare":
            assert shown[1] == "; ".join(f"{field} = {written(declared)}" for field, declared in config.declare)
        elif isinstance(value, list):
            assert shown[1] == ", ".join(map(str, value))
        elif isinstance(value, dict):
            assert shown[1] == (", ".join(f"{field}: {count}" for field, count in value.items()) or "all")
        else:
            assert shown[1] == str(value)


@every_config
def test_the_command_in_the_banner_gives_this_text(config: KernelConfig) -> None:
    source = render(config)
    command = next(line for line in source.splitlines() if line.startswith("//   onelaunch "))
    result = CliRunner().invoke(app, shlex.split(command.removeprefix("//   onelaunch ")))
    assert result.exit_code == 0, result.output
    assert result.stdout == source


# ------------------------------------------------------------------------------------------------- no dead code


@every_config
def test_no_trace_of_a_field_that_is_not_there(config: KernelConfig) -> None:
    code = re.sub(r"//.*", "", below_the_banner(render(config)))
    # A formula computes every vector that it names, whether or not that vector is a field.
    named = {local.name for vector in config.vectors for local in locals_of(config, [vector])}
    for name in FIELDS:
        # Names of NSA and pooled fields end with names of other fields.
        rest = re.sub(rf"(nsa|pooled|write)_{name}", "", code)
        if name == "num_splits" and "flashmla_metadata" in config.fields:
            continue  # the schedule's file has the code for it, under if constexpr
        if name in config.fields:
            assert name in rest
        elif name not in named:
            assert name not in rest, name


@every_config
def test_no_trace_of_an_input_that_is_not_read(config: KernelConfig) -> None:
    code = re.sub(r"//.*", "", "\n".join(below_the_prelude(config)))
    copies = config.operation == "copy"
    # If index_kpool is 1, constant folding removes it from the formulas.
    computes = not copies and bool(config.computed)
    names_pools = config.has_mqa_schedule or bool(config.pooled_tables) or config.index_kpool > 1
    for name, there in (
        ("seq_lens", config.needs_lengths),
        ("req_pool_indices", config.reads_rows),
        ("req_to_token", config.reads_tokens),
        ("kIndexTopk", not copies and any(n.startswith("nsa_") for n in config.fields)),
        ("kPageSize", config.uses("page_size") and config.page_size > 1),
        ("kIndexKpool", config.uses("index_kpool") and names_pools),
        ("p.extend_seq_lens", config.extend == "variable"),
        ("static constexpr std::int32_t offsets", config.needs_lengths and len(config.seqlen_offsets) > 1),
        ("atomicCAS", config.checked),
        ("iolation", config.checked),
        ("report(", config.checked),
        ("int4*", config.vector_bytes == 16),
        ("gridDim.x", config.strategy not in (None, "equal") or (computes and config.strategy is not None)),
        ("from_", copies),
        ("__ballot_sync", config.strategy in ("live", "variable", "indices") or computes),
    ):
        assert (name in code) == there, name


@every_config
def test_files_of_kinds_and_strategies_that_are_not_there_are_left_out(config: KernelConfig) -> None:
    """A kernel includes the files of its fields and of its one strategy as a whole, and no other files."""
    source, files = render(config), device_files(config)
    strategies = {"live", "equal", "variable", "indices"}
    assert set(files) & strategies == {config.strategy} - {"copy", None}
    for path in sorted((ROOT / "templates" / "device").glob("*.cuh")):
        text = path.read_text(encoding="utf-8").rstrip("\n")
        always = path.stem == "launch" or (path.stem == "cpu" and config.target == "cpu")
        computes = path.stem == "computed" and config.operation != "copy" and bool(config.computed)
        there = always or path.stem in files or computes or (path.stem == "checks" and config.checked)
        assert (text in source) == there, path.name
    assert ("mqa_schedule" in files) == ("paged_mqa_schedule_metadata" in config.fields)
    assert ("flashmla_schedule" in files) == ("flashmla_metadata" in config.fields)
    assert ("kv_splits" in files) == ("num_kv_splits" in config.fields)
    assert ("pages" in files) == (config.operation != "copy" and bool(config.paged_tables))


@every_config
def test_no_preprocessor_and_no_constant_condition(config: KernelConfig) -> None:
    """The emitter decides by the configuration, or `if constexpr` does on a named setting; no `#if` remains."""
    code = below_the_banner(render(config))
    assert not re.search(r"^\s*#\s*(if|ifdef|ifndef|else|elif)\b", code, re.M)
    assert not re.search(r"\bif (constexpr )?\((true|false|0|1)\)", code)
    assert not {"extent", "vector_bytes", "mode", "live_tables", "None", "True", "False"} & words(
        re.sub(r"//.*", "", code)
    )


@every_config
def test_every_setting_and_function_is_used(config: KernelConfig) -> None:
    """Compilers warn of unused names too, but not of templates or of names marked as maybe unused."""
    code = re.sub(r"//.*", "", "\n".join(below_the_prelude(config)))
    defined = re.findall(r"^constexpr [\w: ]+ (\w+) =", code, re.M)
    defined += re.findall(r"^using (\w+) =", code, re.M)
    defined += re.findall(r"^(?!template)[^\n]*\n__device__ (?:__forceinline__ )?[\w:]+ (\w+)\(", code, re.M)
    assert "kThreads" in defined
    for name in defined:
        assert len(re.findall(rf"\b{name}\b", code)) > 1, name


DEFINITIONS = re.compile(
    r"constexpr [\w: ]+ (\w+)(?: =|\[)|^using (\w+) =|^struct (\w+)|__device__ (?:__forceinline__ )?[\w:]+ (\w+)\(",
    re.M,
)


def defined_in(code: str) -> set[str]:
    return {name for names in DEFINITIONS.findall(code) for name in names if name}


IN_TEMPLATES = set().union(
    *(
        defined_in(path.read_text(encoding="utf-8"))
        for path in (ROOT / "templates").rglob("*.*")
        if path.suffix in (".j2", ".cuh") and path.stem != "cpu" and "baselines" not in path.parts
    )
)


@every_config
def test_what_a_kernel_uses_it_defines(config: KernelConfig) -> None:
    """A kernel defines the templates' constants, types and functions that it uses. Compilers check this too, slowly."""
    assert {"kBackends", "Token", "Params", "request_row", "block_running_sum"} <= IN_TEMPLATES
    code = re.sub(r"//.*", "", "\n".join(below_the_prelude(config)))
    discarded = set()
    if config.req_to_token_dtype == "int64":
        # Used only in the `if constexpr` branch that int64 tokens discard.
        discarded = defined_in((ROOT / "templates" / "device" / "realign.cuh").read_text(encoding="utf-8"))
    checks = {"report", "Violation"} if config.checked else set()  # these come before the parameter block
    assert IN_TEMPLATES & words(code) <= defined_in(code) | discarded | checks


# ------------------------------------------------------------------------------------------------- two targets


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_both_targets_are_one_text_below_the_prelude(config: KernelConfig) -> None:
    """Only settings of the launch differ."""
    launch = re.compile(r"constexpr int (kThreads|kWarpSize|kBlocksPerSm|kResidentBlocks) = (\d+);")

    def split(lines: list[str]) -> tuple[dict[str, int], list[str]]:
        found = [launch.match(line) for line in lines]
        rest = [line for line, match in zip(lines, found, strict=True) if match is None]
        return {match[1]: int(match[2]) for match in found if match}, rest

    cuda, text = split(below_the_prelude(config))
    cpu, same = split(below_the_prelude(config.replace(target="cpu")))
    assert len(text) > 30
    assert text == same
    assert cuda.keys() == cpu.keys()
    assert cuda["kThreads"] == config.threads
    assert cpu["kThreads"] == cpu.get("kWarpSize", 1) == cpu.get("kBlocksPerSm", 1) == 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_preludes(config: KernelConfig) -> None:
    cuda, cpu = (
        below_the_banner(render(config.replace(target=target))).split(FACTS, 1)[0] for target in ("cuda", "cpu")
    )
    assert re.findall(r"#include .*", cuda) == [
        "#include <cuda_runtime.h>",
        "#include <cstdint>",
        "#include <cstring>",
        "#include <type_traits>",
    ]
    assert "cuda_runtime.h" not in cpu
    assert "#define" not in cuda
    assert not re.search(r"torch|ATen|c10|pybind", cuda + cpu)


# --------------------------------------------------------------------------------------------------- the templates


def test_the_templates_have_few_conditions() -> None:
    """C++ decides what it can. Declarations are emitted where needed, so templates need few conditions."""
    parse = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).parse

    def depth(node: jinja2.nodes.Node) -> int:
        """The nesting depth of `if` blocks. An `elif` is as deep as its `if`."""
        if not isinstance(node, jinja2.nodes.If):
            return max((depth(child) for child in node.iter_child_nodes()), default=0)
        inner = max((depth(child) for child in (*node.body, *node.else_)), default=0)
        return max(inner + 1, *(depth(other) for other in node.elif_), 0)

    count = 0
    for path in (ROOT / "templates").rglob("*.j2"):
        tree = parse(path.read_text())
        count += sum(1 for _ in tree.find_all((jinja2.nodes.If, jinja2.nodes.CondExpr)))
        count += sum(loop.test is not None for loop in tree.find_all(jinja2.nodes.For))
        assert depth(tree) <= 2, path
    assert 0 < count <= 80


@every_config
def test_the_binding_knows_the_size_of_the_parameters(config: KernelConfig) -> None:
    text = render_binding(config, "a_module")
    macros = dict(re.findall(r"^#define (ONELAUNCH_(?:SYMBOL|MODULE|PLAN_WORDS|CALL_WORDS)) (.+)$", text, re.MULTILINE))
    words = str(len(layout.param_words(config))), str(len(layout.call_words(config)))
    assert list(macros.values()) == [config.symbol, "a_module", *words]


def test_the_baselines_of_the_timings() -> None:
    """The baselines that onelaunch is timed against are emitted too, with the same binding as a plan."""
    source, binding = render_baseline("ideal", "floor", ("vectors",), 7, num_backends=5, unroll=4, page_size=1)
    assert "constexpr int kBackends = 5;" in source
    assert "constexpr int kUnroll = 4;" in source
    assert "int floor_launch(" in source
    assert "#define ONELAUNCH_SYMBOL floor\n#define ONELAUNCH_MODULE floor_binding\n" in binding
    assert "#define ONELAUNCH_PLAN_WORDS 7\n" in binding
    # C++ has no empty array, so a kernel without parameters still has one parameter word.
    source, binding = render_baseline("empty", "nothing", (), 0)
    assert "void nothing()" in source
    assert binding == render_baseline("empty", "nothing", (), 1)[1]
    # A baseline of a configuration has that configuration's parameters and settings, whichever words a call sets.
    config = KernelConfig(num_backends=2, extent="full", vector_bytes=4, page_size=16)
    source, binding = render_baseline("single_block", "rival", layout.call_words(config), config.param_words, config)
    assert "void __launch_bounds__(kThreads) rival(const __grid_constant__ Params p)" in source
    assert "constexpr int kPageSize = 16;" in source
    assert f"constexpr int kParamWords = {config.param_words};" in source
    assert config.symbol not in source + binding
    assert "cudaLaunchKernelEx" in source
    for word in layout.call_words(config):
        assert word in binding
