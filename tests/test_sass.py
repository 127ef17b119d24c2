"""The presets' machine code, read without a GPU: 16-byte accesses where expected, and nothing in local memory."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import support
from cases import CONFIGURATIONS, EVERY, STRATEGIES, fullest
from filelock import FileLock
from onelaunch import PRESETS, KernelConfig
from onelaunch.build import binary, toolchain

# ARCHS: instructions are read for this architecture alone; all of them take four times as long. ENDS: the oldest and
# the newest, for kernels with many pointers.
ARCHS, ENDS, OTHER_ARCHS = ("90a",), ("80", "120a"), ("80", "89", "100a", "120a")
# Registers per thread on sm_90a when last measured. If a preset needs more, look at its template.
REGISTERS = {
    "nsa-decode-1": 56,
    "nsa-decode-2": 64,
    "nsa-decode-3": 64,
    "nsa-decode-7": 64,
    "nsa-decode-64": 40,
    "nsa-decode-3-full": 54,
    "nsa-decode-3-page1": 56,
    "nsa-decode-3-page16": 64,
    "nsa-decode-3-unaligned": 48,
    "nsa-decode-3-int32": 64,
    "nsa-decode-3-int64": 64,
    "nsa-decode-3-pages-only": 47,
    "nsa-decode-3-lengths-only": 40,
    "nsa-precompute": 48,
    "nsa-copy-1": 32,
    "nsa-copy-3": 40,
    "nsa-copy-3-rows": 40,
    "nsa-target-verify-3": 64,
    "nsa-draft-extend-3": 64,
    "nsa-draft-extend-3-variable": 48,
    "nsa-decode-3-kpool": 64,
    "nsa-decode-3-checked": 64,
    "fa3-decode-3": 40,
    "trtllm-mha-decode-3": 40,
    "flashmla-decode-3": 34,
    "nsa-decode-3-schedule": 64,
    "nsa-target-verify-3-schedule": 64,
    "flashmla-dense-decode-3": 40,
    "vllm-draft-step": 42,
    "flashinfer-pages-3": 56,
    "flashinfer-decode-3": 48,
    "triton-decode-3": 61,
    "sglang-draft-2": 48,
    "sglang-verify": 60,
    "sglang-verify-chain": 32,
    "sglang-draft-extend": 60,
    "sglang-draft-extend-layout": 32,
}


@functools.cache
def machine_code(shared: Path) -> tuple[dict[str, dict[str, dict[str, int]]], dict[str, dict[str, int]]]:
    """For all presets: ptxas's reports, and for each function in the SASS for sm_90a the count of each instruction."""
    reports, module = support.ptxas_reports(list(PRESETS.values()), shared, ARCHS)
    saved = module.with_suffix(".json")
    with FileLock(f"{saved}.lock"):
        if not saved.exists():
            saved.write_text(json.dumps(_instructions(module)), encoding="utf-8")
    return reports, json.loads(saved.read_text(encoding="utf-8"))


def _instructions(module: Path) -> dict[str, Counter[str]]:
    """For each function of an object file, the count of each instruction with its modifiers."""
    program = binary.find_cuobjdump(toolchain.find_toolkit().home)
    assert program is not None, "neither the toolkit nor triton brings cuobjdump"
    # cuobjdump runs the nvdisasm that it finds on PATH.
    command = [program, "-sass", "-arch", "sm_90a", module]
    environment = {"PATH": str(program.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    _, *parts = re.split(r"^\s+Function : (\w+)$", done.stdout, flags=re.MULTILINE)
    instruction = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", re.MULTILINE)
    found = {
        function: Counter(instruction.findall(code)) for function, code in zip(parts[::2], parts[1::2], strict=True)
    }
    assert all("EXIT" in counts for counts in found.values()), done.stdout + done.stderr
    return found


def wide(found: dict[str, int], access: str) -> int:
    """Accesses of 16 bytes, of LDG or STG."""
    return sum(count for name, count in found.items() if name.startswith(access) and "128" in name.split("."))


def test_every_preset_is_looked_at() -> None:
    assert REGISTERS.keys() == PRESETS.keys()


def _unrolled(destinations: int) -> int:
    """How many copies of its body the compiler emits for a loop over the destinations."""
    return destinations if destinations <= 8 else 1


def assert_nothing_in_local_memory(reports: dict[str, dict[str, int]]) -> None:
    """There are no spills, and no arrays of pointers copied to the stack because they are indexed at run time."""
    nothing = {"stack": 0, "spill_stores": 0, "spill_loads": 0, "local": 0}
    for arch, report in reports.items():
        assert {fact: report[fact] for fact in nothing} == nothing, arch


@pytest.mark.nvcc
def test_pointers_of_many_backends_stay_in_the_parameters(shared: Path) -> None:
    """The compiler copied an array of pointers, passed by value and indexed at run time, to the stack (176 bytes)."""
    configs = {name: config for name, config in CONFIGURATIONS.items() if config.num_backends > 8}
    assert {config.num_backends for config in configs.values()} == {9, 64}
    configs["indices of 64"] = STRATEGIES["checked indices"].replace(num_backends=64, seqlen_offsets=(3,))
    # As many backends as the parameters hold: with one more word ptxas refuses the kernel.
    configs["the fullest"] = fullest(KernelConfig(num_backends=250, fields=EVERY))
    configs["the fullest, full"] = fullest(KernelConfig(num_backends=1300, fields=("page_indices",), extent="full"))
    reports, _ = support.ptxas_reports(list(configs.values()), shared, ENDS)
    for name, config in configs.items():
        assert reports[config.symbol].keys() == set(ENDS), name
        assert_nothing_in_local_memory(reports[config.symbol])


@pytest.mark.long
@pytest.mark.nvcc
def test_no_preset_spills_on_any_other_architecture(shared: Path) -> None:
    reports, _ = support.ptxas_reports(list(PRESETS.values()), shared, OTHER_ARCHS)
    for config in PRESETS.values():
        assert_nothing_in_local_memory(reports[config.symbol])


@pytest.mark.nvcc
@pytest.mark.parametrize("name", REGISTERS)
def test_the_machine_code_of_a_preset(name: str, shared: Path) -> None:
    config = PRESETS[name]
    all_reports, code = machine_code(shared)
    reports = all_reports[config.symbol]
    assert_nothing_in_local_memory(reports)
    assert reports["90a"]["registers"] <= REGISTERS[name]
    (found,) = (counts for function, counts in code.items() if config.symbol in function)
    # Spills, and arrays indexed by run-time values, would be in local memory.
    assert not [instruction for instruction in found if re.match(r"(LDL|STL)\b", instruction)]
    if config.vector_bytes == 4 or not config.tables:
        assert wide(found, "LDG") == wide(found, "STG") == 0
        return
    # For each table and each different destination, unrolled code has kUnroll stores of 16 bytes for a single tile, and
    # as many for each of the two tiles that a warp takes at once. If lengths matter, that code exists twice: for the
    # requests' own tiles and for the remainder tiles.
    copied = config.tables if config.operation == "copy" else ["page_indices"]
    times = 3 if config.wide_tiles > 1 else 1
    if not (config.operation == "copy" or config.extend == "variable" or config.equal_rows):
        times *= 2
    stores = sum(_unrolled(config.destinations(table)) for table in copied) * config.unroll * times
    assert wide(found, "STG") >= stores
    if config.req_to_token_dtype == "int32":
        # There are twice as many reads: rows begin at any alignment, so four words are selected out of eight.
        assert wide(found, "LDG") >= len(copied) * 2 * config.unroll * times
