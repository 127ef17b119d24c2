"""kv_indptr and kv_indices, the token table of FlashInfer and Triton: values computed by hand, and refusals.

test_refresh.py compares them with the reference; test_checked.py has the violations.
"""

from __future__ import annotations

import onelaunch
import pytest
import support
import torch
from onelaunch import KernelConfig, MetadataBuffers
from onelaunch.errors import ArgumentError, ConfigError
from onelaunch.spec import reference
from support import assert_untouched

BOTH = ("kv_indptr", "kv_indices")


# ------------------------------------------------------------------------------------------------ by hand


def test_by_hand(device: torch.device) -> None:
    pool = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]], dtype=torch.int32, device=device)
    backends = [
        MetadataBuffers(
            kv_indptr=torch.full((4,), -1, dtype=torch.int32, device=device),
            kv_indices=torch.full((9,), -1, dtype=torch.int32, device=device),
        )
        for _ in range(2)
    ]
    plan = onelaunch.bind(backends, req_to_token=pool, seqlen_offsets=(0, 1))
    plan.run(torch.tensor([2, 0, 3], device=device), torch.tensor([2, 0, 1], device=device))
    assert backends[0].kv_indptr is not None
    assert backends[0].kv_indptr.tolist() == [0, 2, 2, 5]
    assert backends[0].kv_indices is not None
    assert backends[0].kv_indices.tolist() == [30, 31, 20, 21, 22, -1, -1, -1, -1]
    assert backends[1].kv_indptr is not None
    assert backends[1].kv_indptr.tolist() == [0, 3, 4, 8]
    assert backends[1].kv_indices is not None
    assert backends[1].kv_indices.tolist() == [30, 31, 32, 10, 20, 21, 22, 23, -1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices_have_the_dtype_of_their_tensors(device: torch.device, dtype: torch.dtype) -> None:
    """Triton reads int64. A token beyond int32 is kept in int64 indices and truncated in int32 ones."""
    pool = torch.tensor([[2**40 + 7, -1, 5]], dtype=torch.int64, device=device)
    indices = torch.full((4,), -9, dtype=dtype, device=device)
    plan = onelaunch.bind([MetadataBuffers(kv_indices=indices)], req_to_token=pool)
    plan.run(torch.tensor([3], device=device), torch.tensor([0], device=device))
    assert indices.tolist() == [2**40 + 7 if dtype == torch.int64 else 7, -1, 5, -9]
    assert plan.config.dtypes == ((("kv_indices", "int64"),) if dtype == torch.int64 else ())


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("table", ["page_indices", "real_page_table", "pooled_real_page_table"])
def test_indices_beside_tables_are_refused(table: str) -> None:
    with pytest.raises(ConfigError, match=f"fields has kv_indices and {table}; .*two plans"):
        KernelConfig(fields=("kv_indices", table))


def test_copies_of_indices_are_refused() -> None:
    with pytest.raises(ConfigError, match="fields has kv_indices and operation is 'copy'"):
        KernelConfig(operation="copy", fields=BOTH)


def test_indices_have_no_dead_columns() -> None:
    config = KernelConfig(fields=BOTH)
    assert config == config.replace(extent="full", vector_bytes=16, page_size=16, index_topk=7)
    assert (config.extent, config.vector_bytes, config.paged_tables) == ("live", 4, ())


def test_backends_of_other_capacities_are_refused() -> None:
    backends = [support.destination(BOTH, 3, 1, 64, shapes={"kv_indices": (n,)}) for n in (9, 8)]
    with pytest.raises(ArgumentError, match=r"has 8 elements and .* has 9; all backends must have the same"):
        onelaunch.bind(support.buffers_of(backends), req_to_token=torch.zeros(2, 9, dtype=torch.int32))
    assert_untouched(backends)


def test_backends_of_other_dtypes_are_refused() -> None:
    backends = [MetadataBuffers(kv_indices=torch.full((9,), -9, dtype=t)) for t in (torch.int32, torch.int64)]
    with pytest.raises(ArgumentError, match=r"backends\[1\]\.kv_indices has dtype int64 and .* has int32; all"):
        onelaunch.bind(backends, req_to_token=torch.zeros(2, 9, dtype=torch.int32))
    wrong = [MetadataBuffers(kv_indices=torch.full((9,), -9, dtype=torch.int16))]
    with pytest.raises(ArgumentError, match="kv_indices has dtype int16; allowed: int32 or int64"):
        onelaunch.bind(wrong, req_to_token=torch.zeros(2, 9, dtype=torch.int32))


def test_shared_indices_of_different_lengths_are_refused() -> None:
    shared = torch.zeros(9, dtype=torch.int32)
    backends = [MetadataBuffers(kv_indices=shared) for _ in range(2)]
    with pytest.raises(ArgumentError, match="can share only a table, and only if all of them share it"):
        onelaunch.bind(backends, req_to_token=torch.zeros(2, 9, dtype=torch.int32), seqlen_offsets=(1, 2))


def test_the_batch_is_bounded_by_the_offsets_tensor_alone() -> None:
    backend = support.destination(BOTH, 3, 1, 64, shapes={"kv_indices": (9,)})
    plan = onelaunch.bind([backend.buffers], req_to_token=torch.zeros(2, 9, dtype=torch.int32))
    assert plan.capacity == 3
    with pytest.raises(ArgumentError, match=r"backends\[0\]\.kv_indptr has room for 3"):
        plan.run(torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))


def test_the_reference_counts_no_token_below_zero() -> None:
    assert reference.kv_lengths(torch.tensor([-5, 0, 3]), 2).tolist() == [2, 2, 5]
