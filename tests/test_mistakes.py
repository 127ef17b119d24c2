"""Mistakes of known kernels of this kind that no case of the table would show.

The table of cases covers: running sums that begin anew after a block, or don't write their first 0; stale entries
of real_page_table; writes to columns after the live ones; one stride for all destinations, a width taken for a stride;
lengths beyond the table, below zero, off by next_n, of padding requests; more backends or requests than some constant.
Rows that need 64-bit addresses are in the emulation (``cases.FAR``) and in test_gpu.py, as are extra launches,
allocations on the device and calls that can't be captured. test_sass.py sees pointers in local memory.
"""

from __future__ import annotations

import re

import onelaunch
import pytest
import support
import torch
from cases import SIX, batch
from checker import check
from onelaunch import KernelConfig, render
from onelaunch.spec import layout


def below_the_banner(source: str) -> str:
    return source.split("namespace {", 1)[1]


@pytest.mark.parametrize("first", range(0, 257, 32))
def test_a_scan_that_is_right_for_a_few_batch_sizes_only(device: torch.device, first: int) -> None:
    """A down-sweep from stride n/2 gives wrong sums for 230 of the 256 batch sizes up to 256, 6, 7 and 12 among them.

    Tested at powers of two alone it looks right, so every batch size is tested.
    """
    for bs in range(first, min(first + 32, 257)):
        check(KernelConfig(fields=("cu_seqlens_k", "nsa_cu_seqlens_k")), batch(bs, 70), device)


@pytest.mark.parametrize("extent", ["live", "full"])
def test_real_page_table_does_not_read_page_indices(extent: str) -> None:
    """Read from page_indices that other threads were still writing, about half of the entries were stale.

    In the emitted code no destination table is ever read.
    """
    code = re.sub(r"//.*", "", below_the_banner(render(KernelConfig(num_backends=3, extent=extent))))
    assert "page_of(" in code
    assert not re.search(r"__ldg\((?:[^();]|\([^();]*\))*(page_indices|real_page_table|\bdata\b)", code)
    # What is stored to is an element of data: of a table, or of a row whose address was taken before.
    stores, reads = r"\bdata\[[^;]*\] = ", r"(?<![<>=!])=(?!=)[^;=]*\bdata\["
    assert re.search(stores, code)
    assert not re.search(reads, code)
    assert re.search(reads, "const std::int32_t token = to[b].data[row * to[b].row_stride + column];")


def test_the_pool_row_is_read_once_for_all_backends() -> None:
    """A gather inside the loop over backends reads the table N times: N=3 cost 551 us where 5 are enough."""
    for config in (KernelConfig(num_backends=3), KernelConfig(num_backends=3, vector_bytes=4)):
        code = below_the_banner(render(config))
        for loop in re.finditer(
            r"for \(int b = 0;.*?\)(?: \{(?P<block>(?:[^{}]|\{[^{}]*\})*)\}|(?P<line>[^;]*;))", code
        ):
            assert "__ldg" not in (loop["block"] or loop["line"]), loop[0]


def test_one_block_that_gathers_for_everyone() -> None:
    """A single block took 17.6 ms at table width 163911: the grid must grow with the tables, up to the device."""
    code = below_the_banner(render(KernelConfig(num_backends=3)))
    assert re.search(r"\bgrid_blocks\(", code)
    assert re.search(r"\bsm_count \* kBlocksPerSm\b", code)


def test_a_pointer_table_that_is_copied_at_each_call() -> None:
    """Pointers from pageable host memory are a second operation, not capturable. Ours travel in the parameters."""
    config = KernelConfig(num_backends=64)
    code = below_the_banner(render(config))
    assert "const __grid_constant__ Params p" in code
    assert not re.search(r"\bcuda(Memcpy|Malloc|Memset|Free)", code)
    assert layout.param_words(config).count("page_indices") == 2 * 64


def test_a_call_that_allocates() -> None:
    """A temporary a call is an allocation a call, and memory that a graph capture keeps."""
    from torch.profiler import ProfilerActivity, profile

    backend = support.destination(SIX, 9, 100, 64)
    plan = onelaunch.bind([backend.buffers], req_to_token=support.token_pool(9, 100))
    seq_lens, rows = torch.tensor([9, 1, 100]), torch.tensor([1, 2, 0])
    plan.run(seq_lens, rows)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        plan.run(seq_lens, rows)
    # No tensor operation at all, so no allocation by one.
    assert [e.name for e in profiled.events() if e.name.startswith("aten::")] == []


def test_batch_size_as_a_compile_time_constant(device: torch.device) -> None:
    """One recompile for each of 51 captured batch sizes: batches, widths, strides and pointers are arguments."""
    kernels = {
        check(KernelConfig(), batch(bs, width), device).kernel.path
        for bs, width in ((1, 100), (2, 163), (51, 64), (200, 1_001))
    }
    assert len(kernels) == 1
    assert not {"batch_size", "width", "max_len"} & set(KernelConfig().to_dict())
