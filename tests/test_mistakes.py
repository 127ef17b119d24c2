"""The mistakes that known kernels of this kind made. Each test is named after one, and says what would go wrong."""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onelaunch
import pytest
import support
import torch
from onelaunch import KernelConfig, MetadataBuffers, render
from onelaunch.spec import layout
from support import ALL_FIELDS, POISON, SIX_FIELDS, Poisoned, assert_same
from torch import Tensor

POOL_ROWS, WIDTH, PAGE_SIZE, TOPK = 40, 1_300, 64, 700
FACTS: dict[str, Any] = {"index_topk": TOPK, "page_size": PAGE_SIZE, "extent": "live"}


@dataclasses.dataclass
class Bound:
    """A plan over poisoned backends, with what it needs to be run and checked."""

    plan: onelaunch.Plan
    backends: list[Poisoned]
    pool: Tensor

    def check(self, seq_lens: Tensor, rows: Tensor) -> None:
        assert_same(self.backends, support.expected_refresh(self.backends, seq_lens, rows, self.pool, **FACTS))

    def poison(self) -> None:
        for backend in self.backends:
            for storage in backend.storages.values():
                storage.fill_(POISON)


def bound(device: torch.device, n: int = 3, capacity: int = 256, width: int = WIDTH, **changes: Any) -> Bound:
    pool = support.token_pool(POOL_ROWS, width, strides="odd", device=device)
    backends = [
        support.destination(SIX_FIELDS, capacity, width, PAGE_SIZE, strides="odd", extra_stride=4 * b, device=device)
        for b in range(n)
    ]
    return Bound(
        onelaunch.bind(support.buffers_of(backends), req_to_token=pool, **{**FACTS, **changes}), backends, pool
    )


def inputs(bs: int, device: torch.device, dtype: torch.dtype = torch.int64, seed: int = 0) -> tuple[Tensor, Tensor]:
    lengths = support.lengths(bs, WIDTH, PAGE_SIZE, seed)
    return support.vector(lengths, dtype, device), support.vector(support.pool_rows(bs, POOL_ROWS), dtype, device)


@contextmanager
def only_one_launch() -> Iterator[None]:
    """Everything the device did inside is one kernel of ours: no copy, no fill, no second kernel."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        yield
        torch.cuda.synchronize()
    on_device = [e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_device) == 1, on_device
    assert "onelaunch_" in on_device[0]
    host = " ".join(e.name for e in profiled.events())
    assert "Memcpy" not in host
    assert "cudaMalloc" not in host


def below_the_banner(source: str) -> str:
    return source.split("namespace {", 1)[1]


# ------------------------------------------------------------------------------------------- running sums


@pytest.mark.parametrize("first", range(0, 257, 32))
def test_a_scan_that_is_right_for_a_few_batch_sizes_only(device: torch.device, first: int) -> None:
    """A down-sweep from stride n/2 gives wrong sums for 230 of the 256 batch sizes up to 256, 6, 7 and 12 among them.

    Tested at powers of two alone it looks right, so every batch size is tested.
    """
    b = bound(device, n=1, width=3)
    for bs in range(first, min(first + 32, 257)):
        b.poison()
        seq_lens, rows = inputs(bs, device)
        b.plan.run(seq_lens, rows)
        b.check(seq_lens, rows)


def test_running_sums_that_end_with_the_block(device: torch.device) -> None:
    """Without a carry the sums begin anew after as many requests as a block has threads."""
    b = bound(device, n=1, width=1, capacity=5_000)
    seq_lens, rows = torch.full((5_000,), 3, device=device), torch.zeros(5_000, dtype=torch.int64, device=device)
    b.plan.run(seq_lens, rows)
    cumulative = b.backends[0].buffers.cu_seqlens_k
    assert cumulative is not None
    assert cumulative.tolist() == list(range(0, 15_001, 3))


def test_cu_0_that_nobody_writes(device: torch.device) -> None:
    """A kernel that relies on zeros from the allocation leaves garbage in element 0 of a recycled buffer."""
    for bs in (0, 1, 5):
        b = bound(device)
        b.plan.run(*inputs(bs, device))
        for backend in b.backends:
            for name in ("cu_seqlens_k", "nsa_cu_seqlens_k"):
                assert getattr(backend.buffers, name)[0].item() == 0, (bs, name)


# -------------------------------------------------------------------------------------------- page tables


@pytest.mark.parametrize("bs", [1, 7, 8, 12])
def test_real_page_table_read_back_without_a_barrier(device: torch.device, bs: int) -> None:
    """Read from page_indices that other threads were still writing, about half of the entries were stale.

    What an earlier step left in page_indices must not show in real_page_table.
    """
    b = bound(device)
    for step in range(20):
        seq_lens, rows = inputs(bs, device, seed=step)
        b.poison()
        b.pool.copy_(torch.randint(0, 2**31 - 1, b.pool.shape, dtype=torch.int32))
        b.plan.run(seq_lens, rows)
        b.check(seq_lens, rows)


@pytest.mark.parametrize("extent", ["live", "full"])
def test_real_page_table_does_not_read_page_indices(extent: str) -> None:
    """The same, in the emitted code: no destination table is ever read."""
    code = re.sub(r"//.*", "", below_the_banner(render(KernelConfig(num_backends=3, extent=extent))))
    assert "page_of(" in code
    assert not re.search(r"__ldg\((?:[^();]|\([^();]*\))*(page_indices|real_page_table)", code)
    assert not re.search(r"=[^=;]*\bp\.(page_indices|real_page_table)\[\w+\]\.data\[", code)
    assert not re.search(r"(?<![<>=!])=(?!=)[^;<>=]*\bto\[", code)


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
    assert "const unsigned blocks = grid_blocks(for_tables, split);" in code
    assert "dim3(blocks, 1, 1)" in code
    assert "p.sm_count * kBlocksPerSm" in code


def test_full_width_is_not_written_where_the_data_is_short(device: torch.device) -> None:
    """Full-width temporaries, copied N times, took 105 us where live data needs 5: dead columns stay as they are."""
    b = bound(device, width=1_300, capacity=4)
    seq_lens, rows = torch.tensor([1, 0, 65, 2], device=device), torch.tensor([1, 2, 3, 4], device=device)
    b.plan.run(seq_lens, rows)
    for backend in b.backends:
        table, pages = backend.buffers.page_indices, backend.buffers.real_page_table
        assert table is not None
        assert pages is not None
        assert (table != POISON).sum(dim=1).tolist() == [1, 0, 65, 2]
        assert (pages != POISON).sum(dim=1).tolist() == [1, 0, 2, 1]


# ----------------------------------------------------------------------------------------------- addresses


def test_pool_row_times_stride_beyond_32_bits(device: torch.device) -> None:
    """int32 products overflow at pool row 2048 of a 1M-token context, at 13101 for stride 163911: a wild read.

    The pool is virtual memory here: two of its rows are touched.
    """
    stride, width = 163_911, 200
    rows = 2**31 // stride + 3
    try:
        storage = torch.empty(rows * stride, dtype=torch.int32, device=device)
    except RuntimeError as error:
        pytest.skip(f"no room for a pool of {rows * stride * 4 / 2**30:.1f} GiB: {error}")
    pool = storage.view(rows, stride)
    tokens = torch.arange(64, 64 + width, dtype=torch.int32, device=device)
    last = rows - 1
    assert last * stride > 2**31
    pool[last, :width] = tokens
    pool[1, :width] = tokens + 5
    for dtype in (torch.int32, torch.int64):
        backend = support.destination(SIX_FIELDS, 2, width, PAGE_SIZE, device=device)
        plan = onelaunch.bind(
            [backend.buffers], req_to_token=pool, req_pool_indices_dtype=dtype, extent="full", index_topk=TOPK
        )
        plan.run(torch.tensor([150, 10], device=device), torch.tensor([last, 1], dtype=dtype, device=device))
        assert backend.buffers.page_indices is not None
        assert backend.buffers.real_page_table is not None
        assert torch.equal(backend.buffers.page_indices, torch.stack([tokens, tokens + 5]))
        assert backend.buffers.real_page_table[0].tolist() == [1, 2, 3, 4]
    del storage, pool, plan
    gc.collect()


def test_destination_row_times_stride_beyond_32_bits(device: torch.device) -> None:
    """The same on the side that is written: row 2 of a table with rows 2^30 words apart, in 8 GiB hardly touched."""
    stride, width = 2**30 + 4, 20
    try:
        table = torch.empty(2 * stride + width, dtype=torch.int32, device=device).as_strided((3, width), (stride, 1))
        copied = torch.empty(2 * stride + width, dtype=torch.int32, device=device).as_strided((3, width), (stride, 1))
    except RuntimeError as error:
        pytest.skip(f"no room for two tables of 8 GiB: {error}")
    pool = support.token_pool(4, width, device=device)
    seq_lens, rows = torch.tensor([20, 20, 20], device=device), torch.tensor([3, 1, 2], device=device)
    onelaunch.bind([MetadataBuffers(page_indices=table)], req_to_token=pool).run(seq_lens, rows)
    assert torch.equal(table, pool[[3, 1, 2]])
    onelaunch.fused_metadata_copy_cuda(MetadataBuffers(page_indices=table), MetadataBuffers(page_indices=copied))
    assert torch.equal(copied, table)


def test_one_stride_for_all_destinations(device: torch.device) -> None:
    """Kernels that took destination 0's stride for all wrote the other backends' rows to the wrong places."""
    pool = support.token_pool(POOL_ROWS, 100, device=device)
    backends = [
        support.destination(SIX_FIELDS, 8, 100, PAGE_SIZE, extra_stride=extra, device=device)
        for extra in (0, 8, 400, 3)
    ]
    assert len({b.buffers.page_indices.stride(0) for b in backends if b.buffers.page_indices is not None}) == 4
    plan = onelaunch.bind(support.buffers_of(backends), req_to_token=pool, **FACTS)
    seq_lens, rows = torch.tensor([100, 3, 64, 65, 1], device=device), torch.tensor([1, 2, 3, 4, 5], device=device)
    plan.run(seq_lens, rows)
    assert_same(backends, support.expected_refresh(backends, seq_lens, rows, pool, **FACTS))


def test_shape_1_for_the_row_stride(device: torch.device) -> None:
    """Rows of a column slice lie further apart than they are wide."""
    whole = torch.full((6, 300), POISON, dtype=torch.int32, device=device)
    sliced = whole[:, 100:180]
    pool_whole = support.token_pool(5, 333, device=device)
    pool = pool_whole[:, 7:87]
    plan = onelaunch.bind([MetadataBuffers(page_indices=sliced)], req_to_token=pool, extent="full")
    plan.run(torch.tensor([80, 1, 5], device=device), torch.tensor([4, 0, 2], device=device))
    assert torch.equal(sliced[:3], pool[[4, 0, 2]])
    whole[:3, 100:180] = POISON
    assert (whole == POISON).all()


@pytest.mark.parametrize("extent", ["live", "full"])
def test_max_len_for_the_row_stride(device: torch.device, extent: str) -> None:
    """With a live max_len as the stride, every row after the first is misplaced."""
    b = bound(device, capacity=6, extent=extent)
    seq_lens, rows = torch.tensor([40, 40, 39, 40], device=device), torch.tensor([4, 3, 2, 1], device=device)
    b.plan.run(seq_lens, rows, max_len=40)
    facts = {**FACTS, "extent": extent, "max_len": 40}
    assert_same(b.backends, support.expected_refresh(b.backends, seq_lens, rows, b.pool, **facts))


# --------------------------------------------------------------------------------------- launches and copies


def test_a_pointer_table_that_is_copied_at_each_call(device: torch.device) -> None:
    """Pointers from pageable host memory are a second operation, not capturable. Ours travel in the parameters."""
    config = KernelConfig(num_backends=64)
    code = below_the_banner(render(config))
    assert "const __grid_constant__ Params p" in code
    assert not re.search(r"\bcuda(Memcpy|Malloc|Memset|Free)", code)
    assert layout.param_words(config).count("page_indices") == 2 * 64
    if device.type == "cuda":
        b = bound(device, n=64, capacity=9)
        seq_lens, rows = inputs(9, device)
        b.plan.run(seq_lens, rows)
        with only_one_launch():
            b.plan.run(seq_lens, rows)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_req_pool_indices_cast_by_an_extra_kernel(device: torch.device, dtype: torch.dtype) -> None:
    """A kernel that wants int32 and gets int64 costs a cast a step: a second launch. Ours read what they are given."""
    b = bound(device, capacity=9, seq_lens_dtype=dtype, req_pool_indices_dtype=dtype)
    seq_lens, rows = inputs(9, device, dtype)
    assert b.plan.config.req_pool_indices_dtype == str(dtype).removeprefix("torch.")
    b.plan.run(seq_lens, rows)
    b.check(seq_lens, rows)
    if device.type == "cuda":
        with only_one_launch():
            b.plan.run(seq_lens, rows)
    assert b.plan.launches == 1 + (device.type == "cuda")


def test_a_call_that_allocates(device: torch.device) -> None:
    """A temporary a call is an allocation a call, and memory that a graph capture keeps."""
    b = bound(device, capacity=9)
    seq_lens, rows = inputs(9, device)
    b.plan.run(seq_lens, rows)
    if device.type == "cuda":
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        b.plan.run(seq_lens, rows)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        b.plan.run(seq_lens, rows)
    # No tensor operation at all, so no allocation by one.
    assert [e.name for e in profiled.events() if e.name.startswith("aten::")] == []


LEVEL_1: dict[str, Callable[[Bound, Tensor, Tensor], Any]] = {
    "broadcast": lambda b, seq_lens, rows: onelaunch.fused_metadata_precompute_and_broadcast_cuda(
        seq_lens,
        rows,
        b.pool,
        *[[getattr(backend.buffers, name) for backend in b.backends] for name in SIX_FIELDS],
        max_len=WIDTH,
        nsa_index_topk=TOPK,
        real_page_size=PAGE_SIZE,
    ),
    "precompute": lambda b, seq_lens, rows: onelaunch.precompute_decode_metadata_cuda(
        seq_lens,
        rows,
        b.pool,
        max_len=WIDTH,
        nsa_index_topk=TOPK,
        real_page_size=PAGE_SIZE,
        out=b.backends[0].buffers,
    ),
    "copy": lambda b, seq_lens, rows: onelaunch.fused_metadata_copy_cuda(
        b.backends[0].buffers, support.buffers_of(b.backends[1:]), bs=len(seq_lens)
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", LEVEL_1)
def test_more_than_one_launch(name: str) -> None:
    """Each of the three functions is one kernel and nothing else, for int64 inputs too."""
    device = torch.device("cuda", torch.cuda.current_device())
    b = bound(device, n=4, capacity=9)
    seq_lens, rows = inputs(9, device)
    LEVEL_1[name](b, seq_lens, rows)  # builds, loads
    with only_one_launch():
        LEVEL_1[name](b, seq_lens, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plan", *LEVEL_1])
def test_a_call_that_cannot_be_captured(name: str) -> None:
    """A graph captured once is replayed with other lengths, rows and tokens in the same memory."""
    device = torch.device("cuda", torch.cuda.current_device())
    b = bound(device, n=4, capacity=32)
    seq_lens, rows = inputs(32, device)

    def call() -> None:
        if name == "plan":
            b.plan.run(seq_lens, rows)
        else:
            LEVEL_1[name](b, seq_lens, rows)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for step in range(5):
        new_lengths, new_rows = inputs(32, device, seed=step + 1)
        seq_lens.copy_(new_lengths)
        rows.copy_(new_rows.roll(step))
        b.pool += 64
        if name == "copy":
            b.poison()
            onelaunch.precompute_decode_metadata_cuda(
                seq_lens,
                rows,
                b.pool,
                max_len=WIDTH,
                nsa_index_topk=TOPK,
                real_page_size=PAGE_SIZE,
                out=b.backends[0].buffers,
            )
        else:
            b.poison()
        graph.replay()
        torch.cuda.synchronize()
        checked = {"precompute": b.backends[:1]}.get(name, b.backends)
        facts = FACTS if name == "plan" else {**FACTS, "extent": "full"}
        assert_same(checked, support.expected_refresh(checked, seq_lens, rows, b.pool, **facts))


# ------------------------------------------------------------------------------------------------- lengths


def test_expanded_lengths_of_padding_requests_in_decode(device: torch.device) -> None:
    """Padded rows whose expanded length went negative were read as unsigned: four billion tokens, an illegal access.

    Padding requests have length 1 and pool row 0, or length 0. In decode nothing is subtracted from a length.
    """
    backend = support.destination(ALL_FIELDS, 6, 10, 2, device=device)
    pool = support.token_pool(4, 10, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, index_topk=4, page_size=2)
    plan.run(torch.tensor([9, 1, 0, 1, 1, 0], device=device), torch.tensor([2, 0, 0, 0, 0, 0], device=device))
    buffers = backend.buffers
    assert buffers.seqlens_expanded is not None
    assert buffers.nsa_cache_seqlens is not None
    assert buffers.seqlens_expanded.tolist() == [9, 1, 0, 1, 1, 0]
    assert buffers.nsa_cache_seqlens.tolist() == [4, 1, 0, 1, 1, 0]


def test_lengths_off_by_next_n(device: torch.device) -> None:
    """Lengths that already count the new tokens, with next_n added once more, cost accuracy and raised no error.

    In decode a length is what seq_lens says; another next_n is refused instead of guessed at.
    """
    b = bound(device, capacity=3)
    b.plan.run(torch.tensor([5, 64, 1_300], device=device), torch.tensor([1, 2, 3], device=device))
    for backend in b.backends:
        assert backend.buffers.cache_seqlens is not None
        assert backend.buffers.cache_seqlens.tolist() == [5, 64, 1_300]
    with pytest.raises(onelaunch.ArgumentError, match="next_n is 2"):
        bound(device, next_n=2)


def rows_of(
    device: torch.device, mode: dict[str, Any], lengths: list[int], rows: int, extends: list[int] | None = None
) -> MetadataBuffers:
    """What one refresh makes of a backend with this many rows."""
    backend = support.destination(
        support.SEVEN_FIELDS, rows, WIDTH, PAGE_SIZE, requests=len(lengths), device=device, strides="odd"
    )
    pool = support.token_pool(POOL_ROWS, WIDTH, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, **FACTS, **mode)
    numbers = torch.tensor(lengths, device=device)
    given = None if extends is None else torch.tensor(extends, device=device)
    plan.run(numbers, torch.arange(len(lengths), device=device), given)
    return backend.buffers


def numbers_of(tensor: Tensor | None) -> list[int]:
    assert tensor is not None
    return list(map(int, tensor.tolist()))


def test_expanded_lengths_below_zero(device: torch.device) -> None:
    """A padding request has 1 token and next_n rows; read as unsigned, 1 - 4 + 1 is four billion (SGLang #30378)."""
    made = rows_of(device, {"mode": "draft_extend", "next_n": 4}, [9, 1], 8)
    assert numbers_of(made.seqlens_expanded) == [6, 7, 8, 9, 0, 0, 0, 1]
    assert numbers_of(made.nsa_cu_seqlens_k) == [0, 6, 13, 21, 30, 30, 30, 30, 31]


def test_draft_extend_lengths_off_by_next_n(device: torch.device) -> None:
    """In draft_extend seq_lens counts the new tokens already, in target_verify it doesn't (SGLang #13236)."""
    extend = rows_of(device, {"mode": "draft_extend", "next_n": 2}, [9], 2)
    verify = rows_of(device, {"mode": "target_verify", "next_n": 2}, [9], 2)
    assert (numbers_of(extend.cache_seqlens), numbers_of(extend.seqlens_expanded)) == ([9], [8, 9])
    assert (numbers_of(verify.cache_seqlens), numbers_of(verify.seqlens_expanded)) == ([11], [10, 11])


def test_verify_rows_live_up_to_their_own_length_only(device: torch.device) -> None:
    """Every row of a request is live up to the last token to verify: consumers mask by the expanded lengths."""
    table = rows_of(device, {"mode": "target_verify", "next_n": 3}, [9], 3).page_indices
    assert table is not None
    assert (table != POISON).sum(dim=1).tolist() == [12, 12, 12]


def test_requests_without_rows_take_none(device: torch.device) -> None:
    """Rows start at the sum of the extend lengths before: a request of none must not shift those behind it."""
    made = rows_of(device, {"mode": "draft_extend", "extend": "variable"}, [9, 4, 6], 5, [2, 0, 3])
    assert numbers_of(made.seqlens_expanded) == [8, 9, 4, 5, 6]
    assert numbers_of(made.cu_seqlens_k) == [0, 9, 13, 19]


def test_a_length_beyond_the_table(device: torch.device) -> None:
    """Lengths overshoot the table for a moment: a column loop up to the length wrote behind the row."""
    b = bound(device, capacity=4)
    long = [WIDTH + 1, 2**31 - 1, 10 * WIDTH, WIDTH]
    seq_lens, rows = torch.tensor(long, device=device), torch.tensor([1, 2, 3, 4], device=device)
    b.plan.run(seq_lens, rows)
    b.check(seq_lens, rows)
    cache = b.backends[0].buffers.cache_seqlens
    assert cache is not None
    assert cache.tolist() == long


def test_a_length_below_zero(device: torch.device) -> None:
    """Compared as unsigned, a negative length makes the whole row live."""
    b = bound(device, capacity=3)
    seq_lens, rows = torch.tensor([-1, -(2**31), 2**32 - 5], device=device), torch.tensor([1, 2, 3], device=device)
    b.plan.run(seq_lens, rows)
    b.check(seq_lens, rows)
    table = b.backends[0].buffers.page_indices
    assert table is not None
    assert (table == POISON).all()


def test_fields_of_different_ages(device: torch.device) -> None:
    """A consumer's schedule that is older than its lengths can deadlock it: one call refreshes everything.

    After each call no field may still tell of an earlier step, in any backend.
    """
    b = bound(device, capacity=64)
    for step, bs in enumerate((64, 3, 40, 0, 1)):
        seq_lens, rows = inputs(bs, device, seed=step)
        b.plan.run(seq_lens, rows)
        clamped = seq_lens.clamp(max=TOPK)
        for backend in b.backends:
            x = backend.buffers
            assert x.cache_seqlens is not None
            assert x.cu_seqlens_k is not None
            assert x.nsa_cache_seqlens is not None
            assert x.nsa_cu_seqlens_k is not None
            assert torch.equal(x.cache_seqlens[:bs].long(), seq_lens)
            assert torch.equal(x.cu_seqlens_k[: bs + 1].diff().long(), seq_lens)
            assert torch.equal(x.nsa_cache_seqlens[:bs].long(), clamped)
            assert torch.equal(x.nsa_cu_seqlens_k[: bs + 1].diff().long(), clamped)


# -------------------------------------------------------------------------------------------- specialization


@pytest.mark.nvcc
def test_pointer_arrays_in_local_memory(shared: Path) -> None:
    """An array of pointers passed by value and indexed at run time was copied to the stack: 176 bytes of it."""
    configs = [
        KernelConfig(num_backends=9),
        KernelConfig(num_backends=64, extent="full"),
        KernelConfig(operation="copy"),
    ]
    reports, _ = support.ptxas_reports(configs, shared)
    for config in configs:
        assert reports[config.symbol]["90a"]["stack"] == 0, config
        assert reports[config.symbol]["90a"]["local"] == 0, config


def test_batch_size_as_a_compile_time_constant(device: torch.device, capfd: pytest.CaptureFixture[str]) -> None:
    """One recompile for each of 51 captured batch sizes: batches, widths, strides and pointers are arguments."""
    kernels = set()
    bound(device)
    capfd.readouterr()
    for bs, width in ((1, 100), (2, 163), (51, 64), (200, 1_001)):
        b = bound(device, capacity=bs + 1, width=width)
        seq_lens, rows = inputs(bs, device)
        b.plan.run(seq_lens, rows)
        b.check(seq_lens, rows)
        kernels.add(b.plan.kernel.path)
    assert len(kernels) == 1
    assert "building" not in capfd.readouterr().err
    assert not {"batch_size", "width", "max_len"} & {f.name for f in dataclasses.fields(KernelConfig)}


def test_batch_limits_for_want_of_shared_memory(device: torch.device) -> None:
    """A limit of 1024 requests was blamed on shared memory that wasn't short: ours doesn't depend on the batch."""
    b = bound(device, n=1, capacity=20_000, width=2)
    seq_lens, rows = inputs(20_000, device)
    b.plan.run(seq_lens, rows)
    b.check(seq_lens, rows)
    for line in re.findall(r"__shared__ .*", below_the_banner(render(KernelConfig()))):
        assert re.search(r"\[(kThreads|kWarps)\];", line), line


def test_a_kernel_per_number_of_backends_and_no_cap(device: torch.device) -> None:
    """Three destinations were hard-wired ("multi" meant exactly three). Here 1, 2, 5 and 100 are as good."""
    for n in (1, 2, 5, 100):
        b = bound(device, n=n, capacity=3, width=70)
        seq_lens, rows = torch.tensor([70, 1, 33], device=device), torch.tensor([3, 2, 1], device=device)
        b.plan.run(seq_lens, rows)
        b.check(seq_lens, rows)
