"""The engines' helpers against stand-ins of the engines' objects, compared with the reference."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stand_ins
import torch
from onelaunch import ArgumentError, KernelConfig, MetadataBuffers, Plan, bind, preset
from onelaunch.integrations import flashinfer, sglang, vllm
from onelaunch.integrations.sglang.places import PLACES
from onelaunch.integrations.sglang.runners import RUNNERS
from onelaunch.integrations.sglang.worker import WORKER
from refreshed import LENGTHS, assert_refreshed, captured, dsa_tensors, expected, mha_tensors, poison, pool
from support import POISON
from torch import Tensor

ROOT = Path(__file__).parent.parent
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


# ------------------------------------------------------------------------------------------------ presets


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


# ------------------------------------------------------------------------------------------------ the package


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
