"""FlashInfer's own wrappers plan on one set of buffers, which they fill; one launch fills another set's."""

from __future__ import annotations

import warnings
from typing import Any

import flashinfer
import pytest
import results
import torch
from onelaunch import ArgumentError
from onelaunch.integrations.flashinfer import bind_backends, buffers_from
from torch import Tensor

MAX_BS, CAPACITY, WIDTH, POISON = 6, 4000, 700, -7
HEADS, DIM = 8, 64
# Requests of a graph that was captured for as many; CUDA-graph wrappers take no other number.
LENGTHS = ((77, 300, 640, 64, 1, 5), (128, 65, 5, 1, 1, 1), (2, 2, 2, 2, 2, 2))


def empty(*shape: int) -> Tensor:
    return torch.full(shape, POISON, dtype=torch.int32)


class Decode:
    """BatchDecodeWithPagedKVCacheWrapper."""

    def __init__(self) -> None:
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(1 << 20, dtype=torch.uint8),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self.tensor_cores,
            paged_kv_indptr_buffer=empty(MAX_BS + 1),
            paged_kv_indices_buffer=empty(CAPACITY),
            paged_kv_last_page_len_buffer=torch.ones(MAX_BS, dtype=torch.int32),
        )

    tensor_cores = False

    def plan(self, lengths: Tensor, indptr: Tensor, indices: Tensor, page: int = 1) -> None:
        self.wrapper.plan(indptr, indices, (lengths - 1) % page + 1, HEADS, HEADS, DIM, page)


class TensorCores(Decode):
    """The same with use_tensor_cores."""

    tensor_cores = True


class Prefill:
    """BatchPrefillWithPagedKVCacheWrapper, as verification uses it."""

    def __init__(self) -> None:
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            torch.zeros(1 << 20, dtype=torch.uint8),
            "NHD",
            use_cuda_graph=True,
            backend="fa2",
            qo_indptr_buf=empty(MAX_BS + 1),
            paged_kv_indptr_buf=empty(MAX_BS + 1),
            paged_kv_indices_buf=empty(CAPACITY),
            paged_kv_last_page_len_buf=torch.ones(MAX_BS, dtype=torch.int32),
        )

    def plan(self, lengths: Tensor, indptr: Tensor, indices: Tensor, page: int = 1) -> None:
        starts = torch.arange(len(indptr), dtype=torch.int32) * 4
        self.wrapper.plan(starts, indptr, indices, (lengths - 1) % page + 1, HEADS, HEADS, DIM, page)


class MLA:
    """BatchMLAPagedAttentionWrapper."""

    def __init__(self) -> None:
        self.wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(
            torch.zeros(1 << 20, dtype=torch.uint8),
            use_cuda_graph=True,
            backend="fa2",
            qo_indptr=empty(MAX_BS + 1),
            kv_indptr=empty(MAX_BS + 1),
            kv_indices=empty(CAPACITY),
            kv_len_arr=empty(MAX_BS),
        )

    def plan(self, lengths: Tensor, indptr: Tensor, indices: Tensor, page: int = 1) -> None:
        starts, half = torch.arange(len(indptr), dtype=torch.int32), torch.bfloat16
        with warnings.catch_warnings():  # once: the arguments of flashinfer 0.6, which engines pass
            warnings.simplefilter("ignore", DeprecationWarning)
            self.wrapper.plan(starts, indptr, indices, lengths, HEADS, 512, DIM, page, False, 1.0, half, half)


KINDS = (Decode, TensorCores, Prefill, MLA)


def lists(lengths: Tensor, rows: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """What a caller of plan() makes: kv_indptr and kv_indices."""
    indptr = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    indptr[1:] = torch.cumsum(lengths, 0)
    return indptr, torch.cat(
        [source[row, :length] for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_several_wrappers_of_different_lengths(kind: Any) -> None:
    source = torch.randperm(12 * WIDTH).to(torch.int32).view(12, WIDTH)
    engine, mine = ([kind() for _ in range(3)] for _ in range(2))
    plan = bind_backends([one.wrapper for one in mine], source, seqlen_offsets=(1, 2, 3))
    for seed, numbers in enumerate(LENGTHS):
        rows = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:MAX_BS]
        lengths = torch.tensor(numbers, dtype=torch.int32)
        for one in mine:
            for tensor in (buffers_from(one.wrapper).kv_indptr, buffers_from(one.wrapper).kv_indices):
                assert tensor is not None
                tensor.fill_(POISON)
        plan.run(lengths.long(), rows)
        for step, (theirs, ours) in enumerate(zip(engine, mine, strict=True), 1):
            wanted = buffers_from(theirs.wrapper)
            assert wanted.kv_indices is not None
            wanted.kv_indices.fill_(POISON)
            theirs.plan(lengths + step, *lists(lengths + step, rows, source))
            got = buffers_from(ours.wrapper)
            for name in ("kv_indptr", "kv_indices"):
                assert torch.equal(getattr(got, name), getattr(wanted, name)), (name, step)
    got.kv_indices[0] += 1
    assert not torch.equal(got.kv_indices, wanted.kv_indices), "the control"
    results.record(type(mine[0].wrapper).__name__, "kv_indptr and kv_indices", "its plan on the host", "any mode")


@pytest.mark.parametrize("kind", KINDS)
def test_pages_of_several_tokens_are_refused(kind: Any) -> None:
    one = kind()
    lengths = torch.full((MAX_BS,), 16, dtype=torch.int32)
    one.plan(lengths, torch.arange(MAX_BS + 1, dtype=torch.int32), torch.arange(MAX_BS, dtype=torch.int32), page=16)
    with pytest.raises(ArgumentError, match="pages of 16 tokens or more; allowed: 1"):
        buffers_from(one.wrapper)


def test_a_wrapper_without_buffers_is_refused() -> None:
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.zeros(1 << 20, dtype=torch.uint8), "NHD")
    with pytest.raises(ArgumentError, match=r"kv_indptr is None\. Make the wrapper with use_cuda_graph=True"):
        buffers_from(wrapper)
