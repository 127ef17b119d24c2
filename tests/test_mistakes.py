"""Mistakes of known metadata kernels that the table of cases (cases.py) would not show.

That table covers: running sums that start again after a block or don't write their first 0; stale entries of
real_page_table; writes beyond the live columns; one stride for all destinations; a width used as a stride; lengths
beyond the table, below zero, off by next_n, or of padding requests; more backends or requests than a fixed limit.
The emulation (``cases.FAR``) and test_gpu.py cover rows that need 64-bit addresses. test_gpu.py also covers extra
launches, allocations on the device and calls that can't be captured. test_sass.py sees pointers in local memory.
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
    """A down-sweep from stride n/2 gives wrong sums for 230 of the batch sizes up to 256, for example 6, 7 and 12.

    It is right at powers of two, so this tests every batch size.
    """
    for bs in range(first, min(first + 32, 257)):
        check(KernelConfig(fields=("cu_seqlens_k", "nsa_cu_seqlens_k")), batch(bs, 70), device)


@pytest.mark.parametrize("extent", ["live", "full"])
def test_real_page_table_does_not_read_page_indices(extent: str) -> None:
    """A kernel that read page_indices while other threads wrote it got about half of the entries stale.

    Emitted code reads no destination table.
    """
    code = re.sub(r"//.*", "", below_the_banner(render(KernelConfig(num_backends=3, extent=extent))))
    assert "page_of(" in code
    assert not re.search(r"__ldg\((?:[^();]|\([^();]*\))*(page_indices|real_page_table|\bdata\b)", code)
    # The two patterns work: stores to an element of data are found, and so would be reads.
    stores, reads = r"\bdata\[[^;]*\] = ", r"(?<![<>=!])=(?!=)[^;=]*\bdata\["
    assert re.search(stores, code)
    assert not re.search(reads, code)
    assert re.search(reads, "const std::int32_t token = to[b].data[row * to[b].row_stride + column];")


def test_the_pool_row_is_read_once_for_all_backends() -> None:
    """A gather inside the loop over backends reads the pool N times: N=3 took 551 us where 5 us are enough."""
    for config in (KernelConfig(num_backends=3), KernelConfig(num_backends=3, vector_bytes=4)):
        code = below_the_banner(render(config))
        for loop in re.finditer(
            r"for \(int b = 0;.*?\)(?: \{(?P<block>(?:[^{}]|\{[^{}]*\})*)\}|(?P<line>[^;]*;))", code
        ):
            assert "__ldg" not in (loop["block"] or loop["line"]), loop[0]


def test_one_block_that_gathers_for_everyone() -> None:
    """A single block took 17.6 ms at table width 163911. The grid must grow with the tables, up to a full device."""
    code = below_the_banner(render(KernelConfig(num_backends=3)))
    assert re.search(r"\bgrid_blocks\(", code)
    assert re.search(r"\bsm_count \* kBlocksPerSm\b", code)


def test_a_pointer_table_that_is_copied_at_each_call() -> None:
    """A copy from pageable memory is a second operation and can't be captured. Our pointers are kernel parameters."""
    config = KernelConfig(num_backends=64)
    code = below_the_banner(render(config))
    assert "const __grid_constant__ Params p" in code
    assert not re.search(r"\bcuda(Memcpy|Malloc|Memset|Free)", code)
    assert layout.param_words(config).count("page_indices") == 2 * 64


def test_a_call_that_allocates() -> None:
    """A temporary tensor costs an allocation per call, and a captured graph keeps its memory."""
    from torch.profiler import ProfilerActivity, profile

    backend = support.destination(SIX, 9, 100, 64)
    plan = onelaunch.bind([backend.buffers], req_to_token=support.token_pool(9, 100))
    seq_lens, rows = torch.tensor([9, 1, 100]), torch.tensor([1, 2, 0])
    plan.run(seq_lens, rows)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        plan.run(seq_lens, rows)
    # A call runs no tensor operation, so none can allocate.
    assert [e.name for e in profiled.events() if e.name.startswith("aten::")] == []


def test_batch_size_as_a_compile_time_constant(device: torch.device) -> None:
    """It would cost a build for each of 51 captured sizes. Batch size, widths, strides and pointers are arguments."""
    kernels = {
        check(KernelConfig(), batch(bs, width), device).kernel.path
        for bs, width in ((1, 100), (2, 163), (51, 64), (200, 1_001))
    }
    assert len(kernels) == 1
    assert not {"batch_size", "width", "max_len"} & set(KernelConfig().to_dict())
