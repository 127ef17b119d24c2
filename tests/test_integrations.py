"""The engines' helpers against stand-ins of the engines' objects, compared with the reference."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stand_ins
import support
import torch
from onelaunch import ArgumentError, KernelConfig, MetadataBuffers, Plan, bind, preset
from onelaunch.integrations import flashinfer, sglang, vllm
from onelaunch.integrations.sglang.places import PLACES
from onelaunch.integrations.sglang.runners import RUNNERS
from onelaunch.integrations.sglang.worker import WORKER
from onelaunch.spec import reference
from support import POISON
from torch import Tensor

ROOT = Path(__file__).parent.parent
WIDTH = 331
LENGTHS = {1: [97], 4: [0, 5, 331, 64], 3: [1, 200, 77]}


def pool(device: torch.device | str = "cpu", width: int = WIDTH) -> Tensor:
    return support.token_pool(9, width, strides="odd", device=device)


def expected(
    forward: SimpleNamespace, source: Tensor, backends: list[dict[str, Tensor]], **facts: Any
) -> list[dict[str, Tensor]]:
    """What the reference writes to poisoned tensors of these shapes."""
    bs = forward.batch_size
    wanted = [{name: torch.full(t.shape, POISON, dtype=torch.int32) for name, t in b.items()} for b in backends]
    reference.refresh(
        [MetadataBuffers(**b) for b in wanted],
        forward.seq_lens[:bs].cpu(),
        forward.req_pool_indices[:bs].cpu(),
        source.cpu(),
        **{"extent": "live", "index_topk": 70, "page_size": 64, **facts},
    )
    return wanted


def assert_refreshed(forward: SimpleNamespace, source: Tensor, backends: list[dict[str, Tensor]], **facts: Any) -> None:
    wanted = expected(forward, source, backends, **facts)
    for index, (got, want) in enumerate(zip(backends, wanted, strict=True)):
        for name, tensor in got.items():
            assert torch.equal(tensor.cpu(), want[name]), f"backend {index}: {name}"


def dsa_tensors(metadata: Any, prefix: str = "dsa", mode: str = "decode") -> dict[str, Tensor]:
    """The fields of a DSA metadata object. Written out here, so that the test doesn't use the integration's table."""
    found = {
        "cache_seqlens": metadata.cache_seqlens_int32,
        "cu_seqlens_k": metadata.cu_seqlens_k,
        "page_indices": metadata.page_table_1,
        "nsa_cache_seqlens": getattr(metadata, f"{prefix}_cache_seqlens_int32"),
        "nsa_cu_seqlens_k": getattr(metadata, f"{prefix}_cu_seqlens_k"),
    }
    if metadata.page_size > 1:
        found["real_page_table"] = metadata.real_page_table
    if mode != "decode":
        found["seqlens_expanded"] = getattr(metadata, f"{prefix}_seqlens_expanded")
    return found


def mha_tensors(metadata: Any) -> dict[str, Tensor]:
    return {
        "cache_seqlens": metadata.cache_seqlens_int32,
        "cu_seqlens_k": metadata.cu_seqlens_k,
        "real_page_table": metadata.page_table,
    }


def poison(multi: stand_ins.MultiStep) -> None:
    """Fills the tables that batch sizes share, as if another batch size had left its values there."""
    for child in multi.attn_backends[: multi.captured]:
        child.decode_cuda_graph_metadata["page_table"].fill_(POISON)


def lines_of(module: Any) -> list[str]:
    """The code that a module's docstring shows, block by block."""
    found = re.findall(r"::\n\n((?:    .*\n|\n)+)", inspect.getdoc(module) + "\n")
    return [textwrap.dedent(block) for block in found]


# ------------------------------------------------------------------------------------------------ DSA


@pytest.mark.parametrize("prefix", ["dsa", "nsa"])
def test_one_launch_refreshes_all_draft_steps_of_every_captured_batch_size(device: torch.device, prefix: str) -> None:
    source = pool(device)
    multi = stand_ins.dsa(source, prefix=prefix)
    multi.init_cuda_graph_state(max_bs=4)
    for bs in LENGTHS:
        multi.capture(bs)
    refresher = sglang.Refresher(multi)
    for launches, bs in enumerate([4, 1, 3, 4, 1], start=1):
        poison(multi)
        forward = stand_ins.batch(source, LENGTHS[bs], spare=5 - bs)
        pairs = refresher.run(bs, forward.seq_lens, forward.req_pool_indices)
        held = [child.decode_cuda_graph_metadata[bs] for child in multi.attn_backends]
        assert [child for child, _ in pairs] == multi.attn_backends
        assert all(metadata is h for (_, metadata), h in zip(pairs, held, strict=True))
        assert_refreshed(forward, source, [dsa_tensors(m, prefix) for m in held])
        assert sum(plan.launches for plan in refresher.plans.values()) == launches
        table = multi.attn_backends[0].decode_cuda_graph_metadata["page_table"]
        assert bool((table[bs:] == POISON).all()), "rows of other requests were written"
    assert len(refresher.plans) == 3
    plans = refresher.plans.values()
    assert all(plan.config.num_backends == 3 and plan.config.index_topk == 70 for plan in plans)
    assert len({plan.kernel.key for plan in plans}) == 1, "all batch sizes must share one kernel"


def test_pages_of_one_token(device: torch.device) -> None:
    source = pool(device)
    multi = stand_ins.dsa(source, page_size=1)
    multi.init_cuda_graph_state(max_bs=3)
    multi.capture(3)
    forward = stand_ins.batch(source, LENGTHS[3])
    sglang.Refresher(multi).run(3, forward.seq_lens, forward.req_pool_indices)
    held = [child.decode_cuda_graph_metadata[3] for child in multi.attn_backends]
    assert all(m.real_page_table is m.page_table_1 for m in held)
    assert_refreshed(forward, source, [dsa_tensors(m) for m in held], page_size=1)


@pytest.mark.parametrize(
    ("mode", "name"),
    [("target_verify", "TARGET_VERIFY"), ("draft_extend", "DRAFT_EXTEND_V2"), ("draft_extend", "DRAFT_EXTEND")],
)
def test_verification_and_extension_of_a_single_backend(device: torch.device, mode: str, name: str) -> None:
    source = pool(device)
    backend = stand_ins.DSABackend(source, n=3)
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=12)
    backend.capture(4, mode)
    forward = stand_ins.batch(source, LENGTHS[4])
    refresher = sglang.Refresher(backend)
    refresher.run(4, forward.seq_lens, forward.req_pool_indices, mode=stand_ins.ForwardMode(name))
    (plan,) = refresher.plans.values()
    assert (plan.config.mode, plan.config.next_n, plan.launches) == (mode, 3, 1)
    tensors = dsa_tensors(backend.decode_cuda_graph_metadata[4], mode=mode)
    assert_refreshed(forward, source, [tensors], mode=mode, next_n=3)


def test_the_wide_table_may_be_dropped_and_pools_are_found() -> None:
    source = pool(width=640)
    backend = stand_ins.DSABackend(source)
    backend.dsa_index_kpool, backend.physical_page_size, backend.real_page_size = 4, 16, 7
    backend.init_cuda_graph_state(4, 4)
    backend.capture(4)
    metadata = SimpleNamespace(**vars(backend.decode_cuda_graph_metadata[4]))
    metadata.page_table_1 = None
    metadata.real_page_table = stand_ins.new(4, 40)
    metadata.pooled_cache_seqlens_int32, metadata.pooled_real_page_table = stand_ins.new(4), stand_ins.new(4, 10)
    backend.decode_cuda_graph_metadata[4] = metadata
    forward = stand_ins.batch(source, LENGTHS[4])
    sglang.Refresher(backend).run(4, forward.seq_lens, forward.req_pool_indices)
    tensors = {
        "cache_seqlens": metadata.cache_seqlens_int32,
        "nsa_cache_seqlens": metadata.dsa_cache_seqlens_int32,
        "real_page_table": metadata.real_page_table,
        "pooled_cache_seqlens": metadata.pooled_cache_seqlens_int32,
        "pooled_real_page_table": metadata.pooled_real_page_table,
    }
    assert_refreshed(forward, source, [tensors], page_size=16, index_kpool=4)


def test_a_batch_size_captured_again_gets_a_new_plan() -> None:
    source = pool()
    multi = stand_ins.dsa(source)
    multi.init_cuda_graph_state(max_bs=3)
    multi.capture(3)
    refresher = sglang.Refresher(multi)
    before = refresher.prepare(3)
    assert refresher.prepare(3) is before
    multi.capture(3)
    forward = stand_ins.batch(source, LENGTHS[3])
    refresher.run(3, forward.seq_lens, forward.req_pool_indices)
    assert before.launches == 0
    held = [child.decode_cuda_graph_metadata[3] for child in multi.attn_backends]
    assert_refreshed(forward, source, [dsa_tensors(m) for m in held])


def test_precomputed_metadata_is_read_too() -> None:
    tensors = {name: stand_ins.new(4) for name in ("cache_seqlens", "dsa_cache_seqlens", "seqlens_expanded")}
    sums = {name: stand_ins.new(5) for name in ("cu_seqlens_k", "dsa_cu_seqlens_k")}
    tables = {"page_indices": stand_ins.new(4, 64), "real_page_table": None}
    buffers = sglang.buffers_from(SimpleNamespace(**tensors, **sums, **tables, max_len=64))
    assert buffers.nsa_cache_seqlens is tensors["dsa_cache_seqlens"]
    assert buffers.nsa_cu_seqlens_k is sums["dsa_cu_seqlens_k"]
    assert buffers.cu_seqlens_k is sums["cu_seqlens_k"]
    assert buffers.seqlens_expanded is tensors["seqlens_expanded"]
    assert buffers.page_indices is tables["page_indices"]
    assert buffers.real_page_table is None


# ------------------------------------------------------------------------------------------------ FA3, TRTLLM-MHA


@pytest.mark.parametrize("page_size", [16, 1])
def test_every_step_sees_the_tokens_of_the_steps_before_it(device: torch.device, page_size: int) -> None:
    source = pool(device)
    multi = stand_ins.mha(source, page_size=page_size)
    multi.init_cuda_graph_state(max_bs=4)
    multi.capture(4)
    forward = stand_ins.batch(source, LENGTHS[4], spare=2)
    refresher = sglang.Refresher(multi)
    pairs = refresher.run(4, forward.seq_lens, forward.req_pool_indices)
    assert [child for child, _ in pairs] == multi.attn_backends[:3], "the last child captures nothing"
    (plan,) = refresher.plans.values()
    assert (plan.launches, plan.config.seqlen_offsets) == (1, (1, 2, 3))
    tensors = [mha_tensors(metadata) for _, metadata in pairs]
    if page_size == 1:
        tensors = [{**t, "page_indices": t["real_page_table"]} for t in tensors]
        for t in tensors:
            del t["real_page_table"]
    assert_refreshed(forward, source, tensors, page_size=page_size, seqlen_offsets=(1, 2, 3))


# ------------------------------------------------------------------------------------------------ FlashMLA, TRTLLM-MLA


def test_flashmla_block_tables_are_filled_up(device: torch.device) -> None:
    source = pool(device)
    multi = stand_ins.MultiStep([stand_ins.FlashMLABackend(source) for _ in range(4)], 3)
    multi.init_cuda_graph_state(max_bs=4)
    forward = stand_ins.batch(source, LENGTHS[3])
    refresher = sglang.Refresher(multi)
    pairs = refresher.run(3, forward.seq_lens, forward.req_pool_indices)
    assert len(pairs) == 3
    tables = [{"real_page_table": child.cuda_graph_kv_indices} for child in multi.attn_backends[:3]]
    wanted = expected(forward, source, [{"real_page_table": t["real_page_table"][:3]} for t in tables], page_fill=-1)
    for t, want in zip(tables, wanted, strict=True):
        assert torch.equal(t["real_page_table"][:3].cpu(), want["real_page_table"])
        assert bool((t["real_page_table"][3:] == POISON).all())
        assert int(t["real_page_table"][0, -1]) == -1


def test_what_is_given_goes_before_what_the_backend_says() -> None:
    source = pool()
    multi = stand_ins.mha(source)
    multi.init_cuda_graph_state(max_bs=4)
    multi.capture(4)
    facts: dict[str, Any] = {"page_size": 8, "seqlen_offsets": (0, 0, 5), "extent": "full", "max_len": 24}
    plan = sglang.bind_backends(multi, 4, source[:, :160], **facts)
    assert plan.config.page_size == 8
    assert plan.config.seqlen_offsets == (0, 0, 5)
    assert plan.config.extent == "full"


# ------------------------------------------------------------------------------------------------ FlashInfer


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


# ------------------------------------------------------------------------------------------------ presets


def captured(multi: stand_ins.MultiStep) -> stand_ins.MultiStep:
    multi.init_cuda_graph_state(max_bs=4)
    multi.capture(4)
    return multi


def flashinfer_steps(source: Tensor) -> stand_ins.FlashInferMultiStep:
    multi = stand_ins.FlashInferMultiStep(source)
    multi.init_cuda_graph_state(4, 4)
    return multi


# Three draft steps of each engine, by the preset that binds the same fields.
DRAFT_STEPS: dict[str, Callable[[Tensor], Plan]] = {
    "nsa-decode-3": lambda source: sglang.bind_backends(captured(stand_ins.dsa(source, index_topk=2048)), 4),
    "nsa-decode-3-schedule": lambda source: sglang.bind_backends(
        captured(stand_ins.dsa(source, index_topk=2048)), 4, schedules=True
    ),
    "fa3-decode-3": lambda source: sglang.bind_backends(captured(stand_ins.mha(source, page_size=64)), 4),
    "trtllm-mha-decode-3": lambda source: sglang.bind_backends(captured(stand_ins.mha(source, page_size=32)), 4),
    "flashinfer-decode-3": lambda source: flashinfer.bind_backends(flashinfer_steps(source)),
}


def as_shipped(plan: Plan) -> KernelConfig:
    """A plan's configuration, but with the presets' target and launch shape."""
    shape = ("target", "threads", "unroll", "blocks_per_sm")
    return plan.config.replace(**{name: getattr(KernelConfig(), name) for name in shape})


@pytest.mark.parametrize("name", DRAFT_STEPS)
def test_a_preset_is_what_its_engines_helper_binds(device: torch.device, name: str) -> None:
    assert as_shipped(DRAFT_STEPS[name](pool(device))) == preset(name)


def test_the_preset_of_flashmla_has_the_lengths_that_only_an_extension_keeps(device: torch.device) -> None:
    source, shipped = pool(device), preset("flashmla-decode-3")
    backend = stand_ins.TRTLLMMLABackend(source, page_size=64)
    backend.init_cuda_graph_state(4, 4)
    backend.capture(4, "draft_extend")
    extension = sglang.bind_backends(backend, 4, mode="draft_extend")
    assert as_shipped(extension) == shipped.replace(num_backends=1)
    # Draft steps read the batch's own lengths, so their plan doesn't write any.
    multi = stand_ins.MultiStep([stand_ins.FlashMLABackend(source) for _ in range(4)], 3)
    steps = sglang.bind_backends(captured(multi), 4)
    assert as_shipped(steps) == shipped.replace(fields=("real_page_table",))


# ------------------------------------------------------------------------------------------------ schedules, extends


@pytest.mark.parametrize("mode", ["decode", "target_verify", "draft_extend"])
def test_schedules_of_deepgemm_are_refreshed_on_request(device: torch.device, mode: str) -> None:
    source = pool(device)
    backend = stand_ins.DSABackend(source, n=3)
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=12)
    backend.capture(4, mode)
    metadata = backend.decode_cuda_graph_metadata[4]
    forward = stand_ins.batch(source, LENGTHS[4])
    sglang.Refresher(backend).run(4, forward.seq_lens, forward.req_pool_indices, mode=mode)
    assert bool((metadata.paged_mqa_schedule_metadata == POISON).all()), "without schedules=True the engine writes it"
    sglang.Refresher(backend, schedules=True).run(4, forward.seq_lens, forward.req_pool_indices, mode=mode)
    tensors = dsa_tensors(metadata, mode=mode) | {"paged_mqa_schedule_metadata": metadata.paged_mqa_schedule_metadata}
    facts: dict[str, Any] = {} if mode == "decode" else {"next_n": 3, "schedule_per": "row"}
    assert_refreshed(forward, source, [tensors], mode=mode, **facts)


@pytest.mark.parametrize("convention", ["sm90", "sm100"])
def test_a_schedule_of_requests(convention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The convention follows from the device; an argument overrides it."""
    monkeypatch.setattr("onelaunch.integrations.sglang.refresher.convention_of", lambda device: convention)
    source = pool()
    backend = stand_ins.DSABackend(source, n=4)
    backend.sm100 = True
    backend.init_cuda_graph_state(4, 16)
    backend.capture(4, "target_verify")
    given = sglang.bind_backends(backend, 4, mode="target_verify", schedules=True, schedule_atoms=4)
    assert given.config.atoms == 4
    plan = sglang.bind_backends(backend, 4, mode="target_verify", schedules=True)
    assert (plan.config.schedule_per, plan.config.atoms) == ("request", {"sm90": 2, "sm100": 4}[convention])
    facts = {} if convention == "sm90" else {"schedule_remainder": "first", "schedule_split_cost": 4}
    forward = stand_ins.batch(source, LENGTHS[4])
    plan.run(forward.seq_lens, forward.req_pool_indices)
    metadata = backend.decode_cuda_graph_metadata[4]
    tensors = {"paged_mqa_schedule_metadata": metadata.paged_mqa_schedule_metadata}
    assert_refreshed(forward, source, [tensors], mode="target_verify", next_n=4, **facts)


def test_schedules_that_are_not_known_are_refused_and_those_that_are_not_there_left_out() -> None:
    backend = stand_ins.DSABackend(pool())
    backend.dsa_index_kpool = 2
    backend.init_cuda_graph_state(4, 16)
    backend.capture(4, "target_verify")
    with pytest.raises(ArgumentError, match="schedules is True and index_kpool is 2; DSA has a second schedule"):
        sglang.bind_backends(backend, 4, schedules=True)
    backend.dsa_index_kpool = 1
    metadata = SimpleNamespace(**vars(backend.decode_cuda_graph_metadata[4]))
    backend.decode_cuda_graph_metadata[4] = metadata
    metadata.paged_mqa_ctx_lens_2d = metadata.paged_mqa_ctx_lens_2d.view(-1)
    with pytest.raises(ArgumentError, match=r"paged_mqa_ctx_lens_2d isn't 2-D, .*Pass schedule_per="):
        sglang.bind_backends(backend, 4, mode="target_verify", schedules=True)
    plan = sglang.bind_backends(backend, 4, mode="target_verify", schedules=True, schedule_per="row")
    assert plan.config.schedules == ("paged_mqa_schedule_metadata",)
    metadata.paged_mqa_schedule_metadata = None
    assert sglang.bind_backends(backend, 4, mode="target_verify", schedules=True).config.schedules == ()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_extend_lengths_of_each_request(device: torch.device, dtype: torch.dtype) -> None:
    source = pool(device)
    backend = stand_ins.DSABackend(source, n=3)
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=12)
    backend.capture(4, "draft_extend")
    metadata = backend.decode_cuda_graph_metadata[4]
    forward = stand_ins.batch(source, LENGTHS[4])
    refresher = sglang.Refresher(backend)
    plan = refresher.prepare(4, mode="draft_extend", extend_seq_lens_dtype=dtype)
    for extends in ([3, 0, 2, 1], [1, 1, 0, 3]):
        for tensor in dsa_tensors(metadata, mode="draft_extend").values():
            tensor.fill_(POISON)
        rows = torch.tensor([*extends, 77], dtype=dtype, device=device)
        refresher.run(4, forward.seq_lens, forward.req_pool_indices, rows, mode=stand_ins.ForwardMode("DRAFT_EXTEND"))
        tensors = dsa_tensors(metadata, mode="draft_extend")
        assert_refreshed(forward, source, [tensors], mode="draft_extend", extend_seq_lens=torch.tensor(extends))
    assert plan.launches == 2
    refresher.run(4, forward.seq_lens, forward.req_pool_indices, mode="draft_extend")
    assert len(refresher.plans) == 2, "one number of rows for all requests needs another kernel"
    with pytest.raises(ArgumentError, match="extend_seq_lens is a tensor and mode is 'decode'; it is for"):
        refresher.run(4, forward.seq_lens, forward.req_pool_indices, rows)
    with pytest.raises(ArgumentError, match=r"extend_seq_lens is \(3,\) and bs is 4"):
        refresher.run(4, forward.seq_lens, forward.req_pool_indices, rows[:3], mode="draft_extend")


def test_extend_lengths_matter_to_cu_seqlens_q_alone_where_tables_have_a_row_a_request() -> None:
    source = pool()
    backend = stand_ins.MHABackend(source)
    backend.init_cuda_graph_state(4, 4)
    backend.capture(4, "draft_extend")
    forward = stand_ins.batch(source, LENGTHS[4])
    extends = torch.tensor([1, 0, 2, 3])
    metadata = backend.draft_extend_metadata[4]
    before = metadata.cu_seqlens_q.tolist()
    refresher = sglang.Refresher(backend, leave=("cu_seqlens_q",))
    refresher.run(4, forward.seq_lens, forward.req_pool_indices, extends, mode="draft_extend")
    assert_refreshed(forward, source, [mha_tensors(metadata)], page_size=16)
    assert metadata.cu_seqlens_q.tolist() == before
    sglang.Refresher(backend).run(4, forward.seq_lens, forward.req_pool_indices, extends, mode="draft_extend")
    assert_refreshed(forward, source, [mha_tensors(metadata)], page_size=16)
    assert metadata.cu_seqlens_q.tolist() == [0, 1, 1, 3, 6]


# ------------------------------------------------------------------------------------------------ refusals


def captured_dsa(**facts: Any) -> stand_ins.MultiStep:
    return captured(stand_ins.dsa(pool(), **facts))


def test_a_missing_attribute_of_the_metadata_is_named() -> None:
    multi = captured_dsa()
    graphs = multi.attn_backends[1].decode_cuda_graph_metadata
    graphs[4] = SimpleNamespace(**{k: v for k, v in vars(graphs[4]).items() if k != "real_page_table"})
    with pytest.raises(ArgumentError, match="metadata has no attribute real_page_table; it is a SimpleNamespace with "):
        sglang.bind_backends(multi, 4)
    with pytest.raises(ArgumentError) as raised:
        sglang.buffers_from(SimpleNamespace(seq_lens=1, tables=2))
    assert str(raised.value) == (
        "metadata has no attribute dsa_cache_seqlens_int32 or nsa_cache_seqlens_int32 or dsa_cache_seqlens or "
        "nsa_cache_seqlens or block_kv_indices or page_table; it is a SimpleNamespace with seq_lens, tables. onelaunch "
        "doesn't know this version of the engine: fill a MetadataBuffers and call onelaunch.bind."
    )
    with pytest.raises(ArgumentError, match="it is a object without attributes"):
        sglang.buffers_from(object())


def test_a_missing_attribute_of_the_backend_is_named_with_the_argument_that_stands_in() -> None:
    multi = captured_dsa()
    del multi.attn_backends[0].dsa_index_topk
    message = (
        "the backend has no attribute dsa_index_topk or nsa_index_topk; it is a DSABackend with .*Pass index_topk="
    )
    with pytest.raises(ArgumentError, match=message):
        sglang.bind_backends(multi, 4)
    assert sglang.bind_backends(multi, 4, index_topk=33).config.index_topk == 33
    del multi.attn_backends[0].req_to_token
    with pytest.raises(ArgumentError, match=r"no attribute req_to_token; .*Pass req_to_token=\."):
        sglang.bind_backends(multi, 4, index_topk=33)


def test_a_batch_size_that_was_not_captured_is_refused() -> None:
    multi = captured_dsa()
    message = (
        r"bs is 3, and backend.attn_backends\[0\].decode_cuda_graph_metadata has 4: there is no decode graph of it"
    )
    with pytest.raises(ArgumentError, match=message):
        sglang.bind_backends(multi, 3)
    del multi.attn_backends[1].decode_cuda_graph_metadata[4]
    with pytest.raises(ArgumentError, match=r"\[1\].* has no batch size: .* But backend.attn_backends\[2\] has it"):
        sglang.bind_backends(multi, 4)
    with pytest.raises(ArgumentError, match="backend has no attribute decode_cuda_graph_metadata; it is a object"):
        sglang.bind_backends(object(), 4)
    with pytest.raises(ArgumentError, match="attn_backends is empty"):
        sglang.bind_backends(SimpleNamespace(attn_backends=[]), 4)


def test_a_child_of_another_kind_behind_the_captured_ones_is_left_out() -> None:
    multi = captured_dsa()
    multi.attn_backends.append(SimpleNamespace(name="never captured"))
    assert sglang.bind_backends(multi, 4).config.num_backends == 3


@pytest.mark.parametrize("name", ["swa_page_table", "swa_out_cache_loc", "scheduler_metadata"])
def test_tensors_that_would_go_stale_are_refused(name: str) -> None:
    source = pool()
    backend = stand_ins.MHABackend(source)
    backend.init_cuda_graph_state(4, 4)
    backend.capture(4)
    setattr(backend.decode_cuda_graph_metadata[4], name, stand_ins.new(4, 21))
    with pytest.raises(ArgumentError, match=rf"metadata\.{name} is set, .* leave=\('{name}',\)"):
        sglang.bind_backends(backend, 4)
    plan = sglang.bind_backends(backend, 4, leave=(name,))
    assert plan.config.fields == ("cache_seqlens", "cu_seqlens_k", "real_page_table")


def test_what_would_be_refreshed_wrongly_is_refused_before_anything_is_bound() -> None:
    multi = stand_ins.mha(pool())
    multi.attn_backends[1].kv_index_translator = SimpleNamespace(is_translating=True)
    with pytest.raises(ArgumentError, match=r"MultiStep isn't served: kv_index_translator\.is_translating is set"):
        sglang.bind_backends(multi, 4)
    with pytest.raises(ArgumentError, match="req_to_token holds virtual ids"):
        sglang.Refresher(multi).prepare(4)
    lists = stand_ins.FlashInferMultiStep(pool())
    lists.draft_window_size = 128
    with pytest.raises(ArgumentError, match="draft_window_size is set: lists leave out the middle of a request"):
        flashinfer.bind_backends(lists)


def test_draft_trees_and_unknown_modes_are_refused() -> None:
    source = pool()
    multi = stand_ins.mha(source, topk=4)
    multi.init_cuda_graph_state(max_bs=4)
    multi.capture(4)
    with pytest.raises(ArgumentError, match="topk is 4; allowed: 0 and 1"):
        sglang.bind_backends(multi, 4)
    assert sglang.bind_backends(multi.attn_backends[0], 4).config.num_backends == 1, "plain decode has no tree"
    with pytest.raises(ArgumentError, match="mode is 'extend'; allowed: 'decode'"):
        sglang.mode_of("extend")
    with pytest.raises(ArgumentError, match="of type ForwardMode; allowed"):
        sglang.mode_of(stand_ins.ForwardMode("EXTEND"))
    assert sglang.mode_of(stand_ins.ForwardMode("IDLE")) == "decode"


def test_inputs_that_are_too_short_are_refused_and_nothing_is_written() -> None:
    multi = captured_dsa()
    refresher = sglang.Refresher(multi)
    forward = stand_ins.batch(multi.attn_backends[0].req_to_token, LENGTHS[3])
    with pytest.raises(ArgumentError, match=r"seq_lens is \(3,\) and bs is 4"):
        refresher.run(4, forward.seq_lens, forward.req_pool_indices)
    with pytest.raises(ArgumentError, match="req_pool_indices is list and bs is 3"):
        refresher.run(3, forward.seq_lens, [1, 2, 3])  # type: ignore[arg-type]
    for child in multi.attn_backends:
        for name, tensor in dsa_tensors(child.decode_cuda_graph_metadata[4]).items():
            assert bool((tensor == POISON).all()), name


# ------------------------------------------------------------------------------------------------ the lines shown


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


def test_no_engine_is_imported_and_onelaunch_alone_imports_no_integration() -> None:
    code = (
        "import sys, onelaunch; before = [m for m in sys.modules if m.startswith('onelaunch.integrations')];"
        "import onelaunch.integrations.flashinfer, onelaunch.integrations.sglang, onelaunch.integrations.vllm;"
        "print(before, [m for m in ('sglang', 'vllm', 'flashinfer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


def test_the_tables_of_engines_are_made_from_the_results_of_make_engines() -> None:
    """The tables list the classes that a test compared with their engine. tests/engines/results.py writes them."""
    sys.path.insert(0, str(ROOT / "tests" / "engines"))
    try:
        import results
    finally:
        sys.path.pop(0)
    made = results.committed()
    assert {result["engine"] for result in made} == {"SGLang", "FlashInfer", "vLLM"}
    for path, text in results.written(made).items():
        assert path.read_text(encoding="utf-8") == text, "run make engines WRITE=1"
    served = {name for result in made if result["engine"] == "SGLang" for name in result["classes"]}
    assert served == {*PLACES, *RUNNERS, WORKER}, "no test compares this class with its engine"


def test_names_that_are_gone_say_what_took_their_place() -> None:
    pool = torch.zeros((2, 8), dtype=torch.int32)
    plan = bind([MetadataBuffers(cache_seqlens=torch.zeros(2, dtype=torch.int32))], req_to_token=pool)
    for owner, name, instead in (
        (plan, "limit_columns", "pass max_len to run()."),
        (flashinfer, "buffers_from", "use plan_inputs()."),
        (vllm, "buffers_from", "use bind_draft_step() or bind_backends()."),
    ):
        with pytest.raises(AttributeError, match=f"'{name}': it is gone since 0.2; {re.escape(instead)}"):
            getattr(owner, name)
        with pytest.raises(AttributeError, match=r"has no attribute 'anything'$"):
            _ = owner.anything
