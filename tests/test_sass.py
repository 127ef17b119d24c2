"""The machine code of the presets, read without a GPU: wide accesses where they should be, nothing in local memory."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import support
from onelaunch import PRESETS, binary, toolchain

# Registers that each took when it was last looked at; more than these want a look at the template.
REGISTERS = {
    "nsa-decode-3": 48,
    "nsa-decode-3-full": 64,
    "nsa-copy-3": 48,
    "nsa-decode-3-unaligned": 48,
    "vllm-decode-3": 32,
}


def instructions(module: Path) -> Counter[str]:
    """How often each instruction, with its modifiers, is in the SASS of an object file."""
    program = binary.find_cuobjdump(toolchain.find_toolkit().home)
    assert program is not None, "neither the toolkit nor triton brings cuobjdump"
    # cuobjdump runs the nvdisasm that it finds on PATH.
    done = subprocess.run(
        [program, "-sass", module], capture_output=True, text=True, check=True, env={"PATH": str(program.parent)}
    )
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", done.stdout, re.MULTILINE)
    assert "EXIT" in found, done.stdout + done.stderr
    return Counter(found)


def wide(found: Counter[str], access: str) -> int:
    """Accesses of 16 bytes, of LDG or STG."""
    return sum(count for name, count in found.items() if name.startswith(access) and "128" in name.split("."))


@pytest.mark.nvcc
@pytest.mark.parametrize("name", REGISTERS)
def test_the_vector_path_of_a_preset(name: str, shared: Path) -> None:
    config = PRESETS[name]
    report, module = support.ptxas_report(config, shared)
    assert report["spill_stores"] == report["spill_loads"] == report["local"] == report["stack"] == 0
    assert report["registers"] <= REGISTERS[name]
    found = instructions(module)
    # Local memory is where spills, and arrays that are indexed by what only runs know, would be.
    assert not [instruction for instruction in found if re.match(r"(LDL|STL)\b", instruction)]
    if config.vector_bytes == 4:
        assert wide(found, "LDG") == wide(found, "STG") == 0
        return
    # Unrolled, each backend has kUnroll stores of 16 bytes for each table that is copied whole, and as many for each of
    # the tiles that a warp takes at once in large tables.
    tables = 1 if config.operation != "copy" else len(config.tables)
    tables += 2 if config.extent == "full" and config.operation != "copy" else 0
    assert wide(found, "STG") >= tables * config.num_backends * config.unroll
    # Reads are twice that wide at least: aligned rows in one word, others in two.
    assert wide(found, "LDG") >= tables * 2 * config.unroll
