"""The helper for FlashInfer's wrappers and draft backend, against stand-ins and by hand."""

from __future__ import annotations

import inspect
import re
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import stand_ins
import torch
from onelaunch import ArgumentError
from onelaunch.integrations import flashinfer
from refreshed import LENGTHS, assert_refreshed, pool
from support import POISON
from torch import Tensor


def lines_of(module: Any) -> list[str]:
    """The code that a module's docstring shows, block by block."""
    found = re.findall(r"::\n\n((?:    .*\n|\n)+)", inspect.getdoc(module) + "\n")
    return [textwrap.dedent(block) for block in found]


def csr_tensors(multi: stand_ins.FlashInferMultiStep, step: int) -> dict[str, Tensor]:
    return {"kv_indptr": multi.kv_indptr[step], "kv_indices": multi.cuda_graph_kv_indices[step]}


def wrapper(bs: int, capacity: int, prefix: str = "_paged", device: Any = "cpu") -> SimpleNamespace:
    names = (f"{prefix}_kv_indptr_buf", f"{prefix}_kv_indices_buf")
    lists = (stand_ins.new(bs + 1, device=device), stand_ins.new(capacity, device=device))
    return SimpleNamespace(**dict(zip(names, lists, strict=True)))


def test_one_plan_refreshes_all_steps_of_flashinfer_for_every_batch_size(device: torch.device) -> None:
    source = pool(device)
    multi = stand_ins.FlashInferMultiStep(source)
    multi.init_cuda_graph_state(4, 4)
    plan = flashinfer.bind_backends(multi)
    for launches, bs in enumerate([4, 1, 3], start=1):
        multi.kv_indptr.fill_(POISON)
        multi.cuda_graph_kv_indices.fill_(POISON)
        forward = stand_ins.batch(source, LENGTHS[bs])
        plan.run(forward.seq_lens, forward.req_pool_indices)
        assert plan.launches == launches
        assert_refreshed(forward, source, [csr_tensors(multi, i) for i in range(3)], seqlen_offsets=(1, 2, 3))
        assert bool((multi.kv_indptr[3] == POISON).all()), "no backend reads the last row"
        assert bool((multi.cuda_graph_kv_indices[3] == POISON).all())
    assert plan.capacity == 4


def test_pages_of_flashinfers_wrappers(device: torch.device) -> None:
    """By hand: lengths of 0 to 9, and one token more, in pages of 4. The host's lists equal the device's."""
    source = pool(device)
    source[:, :12] = torch.arange(48, device=device).view(4, 12).repeat(len(source) // 4 + 1, 1)[: len(source)]
    lengths, rows = torch.tensor([3, 0, 7, 9], device=device), torch.tensor([0, 1, 2, 3], device=device)
    steps = [wrapper(4, 12, "", device) for _ in range(2)]
    for step in steps:
        step._paged_kv_last_page_len_buf, step._qo_indptr_buf = stand_ins.new(4, device=device), None
    host = [flashinfer.on_host(flashinfer.plan_inputs(step)) for step in steps]
    assert all(lists.kv_indptr is not None and lists.kv_indptr.is_pinned() == (device.type == "cuda") for lists in host)
    plan = flashinfer.bind_backends(steps, source, page_size=4, seqlen_offsets=(0, 1), host=host)
    plan.run(lengths, rows)
    if device.type == "cuda":  # pragma: gpu
        torch.cuda.synchronize(device)
    for step, lists, begins, last in (
        (steps[0], host[0], [0, 1, 1, 3, 6], [3, 0, 3, 1]),
        (steps[1], host[1], [0, 1, 2, 4, 7], [4, 1, 4, 2]),
    ):
        assert step._kv_indptr_buf.tolist() == begins
        assert step._paged_kv_last_page_len_buf.tolist() == last
        assert lists.kv_indptr.tolist() == begins  # type: ignore[union-attr]
        assert lists.last_page_len.tolist() == last  # type: ignore[union-attr]
    assert steps[0]._kv_indices_buf.tolist() == [0, 6, 7, 9, 10, 11, *[POISON] * 6]
    assert steps[1]._kv_indices_buf.tolist() == [0, 3, 6, 7, 9, 10, 11, *[POISON] * 5]


def test_what_flashinfers_helper_refuses() -> None:
    source = pool()
    multi = stand_ins.FlashInferMultiStep(source)
    with pytest.raises(ArgumentError, match=r"no attribute cuda_graph_kv_indices; .* after init_cuda_graph_state"):
        flashinfer.bind_backends(multi)
    multi.init_cuda_graph_state(4, 4)
    flat = SimpleNamespace(**{**vars(multi), "kv_indptr": multi.kv_indptr[0]})
    with pytest.raises(ArgumentError, match=r"kv_indptr is of shape \(5,\) and there are 3 attn_backends; it must be"):
        flashinfer.bind_backends(flat)
    listed = SimpleNamespace(**{**vars(multi), "cuda_graph_kv_indices": [1, 2, 3]})
    with pytest.raises(ArgumentError, match="cuda_graph_kv_indices is a list and there are 3 attn_backends"):
        flashinfer.bind_backends(listed)
    few = SimpleNamespace(**{**vars(multi), "kv_indptr": multi.kv_indptr[:2]})
    with pytest.raises(ArgumentError, match=r"kv_indptr is of shape \(2, 5\)"):
        flashinfer.bind_backends(few)
    with pytest.raises(ArgumentError, match="the backend's topk is 4; allowed: 0 and 1"):
        flashinfer.bind_backends(stand_ins.FlashInferMultiStep(source, topk=4))
    del multi.req_to_token_pool
    assert flashinfer.bind_backends(multi).config.num_backends == 3, "the pool wasn't found in the children"
    multi.attn_backends[0].req_to_token = None
    with pytest.raises(ArgumentError, match=r"req_to_token is None. Pass req_to_token="):
        flashinfer.bind_backends(multi)
    with pytest.raises(ArgumentError, match=r"no attribute attn_backends; it is a object without attributes. Give"):
        flashinfer.bind_backends(object(), source)
    with pytest.raises(ArgumentError, match=r"backend\.attn_backends is a NoneType; it must be a list"):
        flashinfer.bind_backends(SimpleNamespace(attn_backends=None))
    with pytest.raises(ArgumentError, match="req_to_token is None; wrappers don't have the pool"):
        flashinfer.bind_backends([wrapper(4, 9)])
    with pytest.raises(ArgumentError, match=r"buffer of kv_indptr is None. Make the wrapper with use_cuda_graph=True"):
        flashinfer.plan_inputs(SimpleNamespace(_paged_kv_indptr_buf=None, _paged_kv_indices_buf=None))
    with pytest.raises(ArgumentError, match="no attribute _paged_kv_indptr_buf or _kv_indptr_buf; it is a object"):
        flashinfer.plan_inputs(object())
    multi.attn_backends[0].req_to_token = source
    for settings in ({"page_size": 16}, {"query_len": 4}, {"host": []}):
        with pytest.raises(ArgumentError, match=r"allowed: 1, None and None\. Give a list of wrappers"):
            flashinfer.bind_backends(multi, source, **settings)  # type: ignore[arg-type]
    paged = wrapper(4, 9)
    with pytest.raises(ArgumentError, match="query_len is 4 and the wrappers have no _qo_indptr_buf"):
        flashinfer.bind_backends([paged], source, query_len=4)
    with pytest.raises(ArgumentError, match="host has 2 entries and there are 1 wrappers"):
        flashinfer.bind_backends([paged], source, host=[flashinfer.PlanInputs()] * 2)
    mla = wrapper(4, 9, "")
    mla._kv_len_arr_buf = stand_ins.new(4)
    with pytest.raises(ArgumentError, match="wrapper 1 has no kv_len_arr and others have one"):
        flashinfer.bind_backends([mla, wrapper(4, 9)], source)
    paged._page_size = 16
    with pytest.raises(ArgumentError, match="page_size is 1 and a wrapper was planned with pages of 16 tokens or more"):
        flashinfer.bind_backends([paged], source)
    for tensors in ([multi.kv_indptr], [multi.cuda_graph_kv_indices]):
        assert all(bool((tensor == POISON).all()) for tensor in tensors), "something was written"


def test_the_lines_for_flashinfer() -> None:
    source = pool()
    forward = stand_ins.batch(source, LENGTHS[4])
    wrappers = [wrapper(3, 500) for _ in range(2)]
    (block,) = lines_of(flashinfer)
    names = {"wrappers": wrappers, "req_to_token": source}
    exec(block, names | {"seq_lens": forward.seq_lens[:3], "req_pool_indices": forward.req_pool_indices[:3]})
    for step, one in enumerate(wrappers, 1):
        begins, pages = [0], []
        for length, row in zip(forward.seq_lens[:3].tolist(), forward.req_pool_indices[:3].tolist(), strict=True):
            pages += (source[row, : length + step : 16] // 16).tolist()
            begins.append(len(pages))
        assert one._paged_kv_indptr_buf.tolist() == begins
        assert one._paged_kv_indices_buf[: len(pages)].tolist() == pages
        assert bool((one._paged_kv_indices_buf[len(pages) :] == POISON).all())
