"""attach() on SGLang's own classes: what it refuses, when the engine's own code runs instead, and detach()."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import re
import subprocess
import sys
import textwrap
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare
import objects
import onelaunch
import pytest
import torch
from objects import FAMILIES, Batch
from onelaunch import ArgumentError, LaunchError
from onelaunch.integrations import plugin, sglang
from onelaunch.integrations.sglang import refresher
from onelaunch.integrations.sglang.hooks import Bound
from pairs import Pair

pytestmark = pytest.mark.usefixtures("quick_builds")


def backend(name: str, steps: int = 3) -> Any:
    page = FAMILIES[name].pages[0]
    return objects.backend(name, objects.token_pool(page, seed=1), page=page, steps=steps)


def plans_of(pair: Pair) -> list[onelaunch.Plan]:
    """The plans that were bound during the capture."""
    plans = list(pair.attachment._refresh.plans.values())
    assert plans
    return plans


def replace_the_engines_own(pair: Pair, code: Any) -> None:
    """Replaces the engine's code that runs where onelaunch doesn't."""
    for name in pair.attachment.place.methods:
        attached = getattr(pair.mine, name)
        if isinstance(attached, Bound):
            setattr(pair.mine, name, Bound(attached.func, code))
        else:  # a Triton kernel
            attached._original = defaultdict(lambda: code)


def children(made: Any) -> Any:
    return made.attn_backends[0] if hasattr(made, "attn_backends") else made


def set_of_child(name: str, value: Any) -> Any:
    """Sets an attribute that the real class has, so that a refusal names a real attribute."""

    def change(made: Any) -> None:
        assert hasattr(children(made), name), name
        setattr(children(made), name, value)

    return change


def set_of_backend(name: str, value: Any) -> Any:
    def change(made: Any) -> None:
        assert hasattr(made, name), name
        setattr(made, name, value)

    return change


def set_translator(name: str) -> Any:
    """Makes the translator report virtual ids. DSA has no translator, and so no such pool."""

    def change(made: Any) -> None:
        assert getattr(children(made).kv_index_translator, name) is False
        children(made).kv_index_translator = SimpleNamespace(**{name: True})

    return change


def set_updater(made: Any) -> None:
    assert children(made).indices_updater_decode._translate_kv_loc_dense is None
    children(made).indices_updater_decode._translate_kv_loc_dense = object()


REFUSED = [
    ("fa3", 3, set_of_backend("topk", 2), "topk is set: a draft tree"),
    ("fa3", 0, set_of_child("use_sliding_window_kv_pool", True), "use_sliding_window_kv_pool is set"),
    ("trtllm_mha", 3, set_of_child("_swa_kv_pool", object()), "_swa_kv_pool is set"),
    ("fa3", 0, set_of_child("is_prefill_aware_swa", True), "is_prefill_aware_swa is set"),
    ("fa3", 0, set_of_child("has_local_attention", True), "local attention has tables"),
    ("fa3", 0, set_of_child("is_encoder_decoder", True), "is_encoder_decoder is set"),
    ("dsa", 3, set_of_child("hisparse_coordinator", object()), "HiSparse"),
    ("triton", 0, set_of_child("window_kv_indptr", object()), "window_kv_indptr is set: layers with a sliding window"),
    ("triton", 3, set_of_child("dcp_size", 2), "dcp_size is set: decode context parallelism"),
    ("flashinfer", 0, set_of_child("dispatch_reason", object()), "dispatch_reason is set: sliding windows"),
    ("flashinfer", 0, set_of_child("prefill_backend", "fa3"), "prefill_backend is 'fa3': fast_prefill_plan is fa2's"),
]
if objects.HAS_TRANSLATOR:
    REFUSED += [
        ("fa3", 3, set_translator("is_translating"), "is_translating is set: the pool is unified"),
        ("flashinfer", 3, set_translator("reads_are_translated"), "reads_are_translated is set: the pool is unified"),
        ("triton", 3, set_of_backend("window_rail", True), "window_rail is set: layers with a sliding window"),
        ("triton", 0, set_of_child("dllm_attention", object()), "dllm_attention is set: diffusion models"),
        ("flashinfer", 3, set_of_backend("draft_window_size", 128), "draft_window_size is set"),
        ("flashinfer", 3, set_of_backend("draft_sink_size", 4), "draft_sink_size is set"),
        ("trtllm_mha", 0, set_of_child("expand_encoder_only_verify", True), "encoder layers have their own rows"),
        ("dsa", 0, set_of_child("dcp_size", 2), "dcp_size is set: decode context parallelism"),
        ("flashmla", 3, set_of_child("dcp_world_size", 2), "dcp_world_size is set: decode context parallelism"),
        ("dsa", 0, set_of_child("_kv_shard_pool", object()), "the pool is sharded"),
        ("dsa", 3, set_of_child("dsa_index_kpool", 2), "k-pools have write plans"),
    ]
else:
    REFUSED += [
        ("fa3", 3, set_of_child("_unified_hooks", SimpleNamespace(enabled=True)), "the pool is unified"),
        ("trtllm_mla", 0, set_of_child("_v2p_page_table", object()), "the pool is unified"),
        ("triton", 3, set_of_child("_translate_kv_loc", object()), "the pool is unified"),
        ("flashinfer_mla", 3, set_updater, "the pool is unified"),
    ]


@pytest.mark.parametrize(("name", "steps", "change", "reason"), REFUSED, ids=[f"{r[0]}-{r[3]}" for r in REFUSED])
def test_what_a_gather_would_get_wrong_is_refused_by_its_attribute(
    name: str, steps: int, change: Any, reason: str
) -> None:
    made = backend(name, steps)
    change(made)
    before = dict(vars(made))
    with pytest.raises(ArgumentError, match=f"{type(made).__name__} isn't served: .*{reason}.*own code serves it"):
        sglang.attach(made)
    assert vars(made) == before, "a refused backend must stay as it was"


def test_decode_context_parallelism_is_found_in_the_engines_context(monkeypatch: pytest.MonkeyPatch) -> None:
    made = backend("trtllm_mla")
    context = sys.modules["sglang.srt.runtime_context"]
    assert hasattr(type(context.get_parallel()), "dcp_enabled")
    monkeypatch.setattr(context, "get_parallel", lambda: SimpleNamespace(dcp_enabled=True))
    with pytest.raises(ArgumentError, match="dcp_enabled is set"):
        sglang.attach(made)


def test_another_class_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="backend is a FlashInferMLAAttnBackend; allowed: Deepseek"):
        sglang.attach(backend("flashinfer_mla").attn_backends[0])


def test_a_backend_is_attached_once() -> None:
    for name in ("fa3", "flashinfer"):
        made = backend(name)
        attachment = sglang.attach(made)
        with pytest.raises(ArgumentError, match="attached already"):
            sglang.attach(made)
        attachment.detach()
        attachment.detach()
        assert sglang.attach(made).attached


@pytest.mark.parametrize("name", ["fa3", "flashmla", "flashinfer", "triton"])
def test_detach_puts_the_engines_own_code_back(name: str) -> None:
    pair = Pair(name, FAMILIES[name].pages[0], mode="decode", steps=3)
    pair.attachment.detach()
    launches = pair.attachment.launches
    assert not pair.attachment.attached
    assert {n for n in vars(pair.mine)} == {n for n in vars(pair.engine)}
    pair.replay((5, 80), 5, seed=0)
    pair.check()
    assert pair.attachment.launches == launches


def test_detach_says_that_a_graph_keeps_what_it_recorded() -> None:
    pair = Pair("trtllm_mha", 64, mode="decode", steps=3)
    with pytest.warns(UserWarning, match="Capture them again"):
        pair.attachment.detach()
    assert not pair.attachment.attached


def test_the_environment_can_disable_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = backend("fa3")
    before = dict(vars(made))
    monkeypatch.setenv("ONELAUNCH_DISABLE", "1")
    attachment = sglang.attach(made)
    assert vars(made) == before
    assert not attachment.attached
    assert "disabled" in repr(attachment)
    attachment.detach()


def test_nothing_is_bound_or_built_after_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fa3", "trtllm_mha"):
        pair = Pair(name, 64, mode="decode", steps=3)
        monkeypatch.setattr(refresher, "bind", lambda *a, **k: pytest.fail("a plan was bound while serving"))
        pair.replay((7, 300), 5, seed=0)
        pair.check()
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "decode") for name in FAMILIES), ("triton", "target_verify"), ("dsa", "draft_extend")]
)
def test_after_a_failure_the_engines_own_code_runs_and_one_warning_is_given(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(name, 64, mode=mode, steps=3 if mode == "decode" else 0)

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise LaunchError("the launch was refused")

    for plan in plans_of(pair):
        monkeypatch.setattr(plan, "_run", refuse)
    with pytest.warns(RuntimeWarning, match="own code from now on. LaunchError: .*the launch was refused"):
        pair.replay((7, 300), 5, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        pair.replay((640, 300, 2), 5, seed=1)
    assert pair.attachment.failed
    different = compare.differences(pair.engine, pair.mine)
    assert not different, "\n".join(different)


@pytest.mark.parametrize("name", ["dsa", "fa3", "flashmla", "triton", "flashinfer"])
def test_a_failure_behind_the_launch_leaves_nothing_half_written(name: str) -> None:
    """The engine's own code then rewrites everything."""
    pair = Pair(name, 64, mode="decode", steps=3)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("one of the engine's steps failed")

    pair.attachment._place = dataclasses.replace(pair.attachment._place, after=fail)
    with pytest.warns(RuntimeWarning, match="one of the engine's steps failed"):
        pair.replay((7, 300), 5, seed=0)
    assert not compare.differences(pair.engine, pair.mine)


@pytest.mark.parametrize(("name", "mode"), [("fa3", "target_verify"), ("fa3", "decode")])
def test_verified_writes_forget_what_they_know_when_the_engine_wrote(name: str, mode: str) -> None:
    pair = Pair(name, 64, mode=mode, steps=3 if mode == "decode" else 0, writes="verified")
    for plan in pair.attachment._refresh.plans.values():
        plan.forget()  # the pair poisons the tables
    pair.replay((300, 200, 77), 5, seed=0)
    pair.check()
    batch = Batch((64, 9), 5, mode, 4, seed=3).make()
    batch.encoder_lens = None
    batch.spec_info.ragged_verify_layout = object()  # not served, so the engine's own code writes other tables
    replace_the_engines_own(pair, lambda *a, **k: compare.poison(pair.mine))
    pair.mine.init_forward_metadata_out_graph(batch)
    compare.poison(pair.engine)
    batch = Batch((300, 200, 77), 5, mode, 4, 0, pair.drafting).make()
    for made in pair.backends:
        made.init_forward_metadata_out_graph(batch)
    pair.check()


def test_verified_writes_are_refused_where_captured_sizes_share_one_of_two_tables() -> None:
    for steps in (3, 0):
        with pytest.raises(ArgumentError, match=r"share page_table_1, .* Pass leave=\('page_table_1',\)"):
            sglang.attach(backend("dsa", steps), writes="verified")
    for page, leave in ((64, ("page_table_1",)), (1, ())):
        pair = Pair("dsa", page, mode="decode", steps=3, leave=leave, writes="verified")
        assert len(pair.attachment._refresh.plans) == 2
        for size in (5, 2, 5):
            for plan in pair.attachment._refresh.plans.values():
                plan.forget()  # the pair poisons the tables
            pair.replay((77, 300), size, seed=size)
            different = compare.differences(pair.engine, pair.mine)
            assert all(".page_table_1:" in text or "['page_table']:" in text for text in different), different
            assert bool(leave) == bool(different)


def test_verified_writes_are_refused_in_a_graph() -> None:
    with pytest.raises(ArgumentError, match="writes is 'verified', and TRTLLMHAAttnBackend records the launch"):
        sglang.attach(backend("trtllm_mha", 0), writes="verified")


@pytest.mark.parametrize("name", ["fa3", "triton"])
def test_requests_that_are_extended_by_different_numbers_of_tokens(name: str) -> None:
    pair = Pair(name, 64, mode="draft_extend")
    extended = torch.tensor([4, 1, 3, 4, 4], dtype=torch.int32)
    for made in pair.backends:
        compare.poison(made)
        batch = Batch((7, 300, 64), 5, "draft_extend", 4).make()
        batch.spec_info.extend_seq_lens_tensor = extended
        made.init_forward_metadata_out_graph(batch)
        pair.blank(made, batch)
    pair.check()
    assert pair.attachment.launches == 1


@pytest.mark.parametrize(("name", "mode"), [("fa3", "target_verify"), ("triton", "draft_extend")])
def test_a_plan_that_audits_does_so_where_it_is_attached(name: str, mode: str) -> None:
    pair = Pair(name, 64, mode=mode, audit_every=2)
    for seed in range(5):
        pair.replay((77, 300), 5, seed)
        pair.check()
    (plan,) = (plan for plan in plans_of(pair) if plan.launches)
    assert plan._auditor is not None
    assert (plan.launches, plan._auditor.launches) == (5, 2)
    plan.check()


@pytest.mark.skipif(objects.HAS_TRANSLATOR, reason="newer versions have a graph of it")
@pytest.mark.parametrize("page", [1, 64])
def test_a_draft_extension_without_a_graph(page: int) -> None:
    pool = objects.token_pool(page, seed=3)
    engine, mine = (objects.backend("fa3", pool, page=page, steps=0, draft=True) for _ in range(2))
    attachment = sglang.attach(mine)
    assert attachment._extension.capacity == len(pool)
    for lengths in ((7, 300, 64), (5,), (640, 9)):
        extended = torch.tensor([4, 1, 3][: len(lengths)], dtype=torch.int32)
        for made in (engine, mine):
            batch = Batch(lengths, len(lengths), "draft_extend", 4).make()
            batch.extend_seq_lens, batch.extend_seq_lens_cpu = extended, extended.tolist()
            made.init_forward_metadata(batch)
        wanted, got = engine.forward_metadata, mine.forward_metadata
        for name in ("cache_seqlens_int32", "cu_seqlens_k", "cu_seqlens_q"):
            assert getattr(wanted, name).equal(getattr(got, name)), name
        assert (wanted.max_seq_len_k, wanted.max_seq_len_q) == (got.max_seq_len_k, got.max_seq_len_q)
        assert wanted.page_table.shape == got.page_table.shape
        for row, length in enumerate(lengths):
            pages = -(-length // page)
            assert wanted.page_table[row, :pages].equal(got.page_table[row, :pages])
    assert attachment.launches == 3
    attachment._extension.capacity = 1  # larger batches go to the engine's own code
    batch.seq_lens = batch.seq_lens + 1
    mine.init_forward_metadata(batch)
    assert attachment.launches == 3
    assert mine.forward_metadata.cache_seqlens_int32.tolist() == batch.seq_lens.tolist()
    attachment.detach()
    assert {n for n in vars(mine)} == {n for n in vars(engine)}


@pytest.mark.parametrize("name", ["fa3", "triton"])
def test_an_extension_without_its_lengths_on_the_device_runs_the_engines_own_code(name: str) -> None:
    pair = Pair(name, 64, mode="draft_extend")
    for made in pair.backends:
        compare.poison(made)
        batch = Batch((7, 300, 64), 5, "draft_extend", 4).make()
        batch.spec_info.extend_seq_lens_tensor = None
        made.init_forward_metadata_out_graph(batch)
    pair.check()
    assert pair.attachment.launches == 0


def test_a_verification_of_another_number_of_tokens_runs_the_engines_own_code() -> None:
    pair = Pair("triton", 64, mode="target_verify")
    for made in pair.backends:
        compare.poison(made)
        made.init_forward_metadata_out_graph(Batch((7, 300), 5, "target_verify", 3).make())
    pair.check()
    assert pair.attachment.launches == 0


def test_the_mask_of_a_verification_is_copied() -> None:
    pair = Pair("triton", 64, mode="target_verify")
    for made in pair.backends:
        compare.poison(made)
        batch = Batch((7, 300), 2, "target_verify", 4).make()
        batch.spec_info.custom_mask = torch.arange(4 * (7 + 4) + 4 * (300 + 4)) % 3 == 0
        if made.verify_mask is None:
            made._verify_mask = SimpleNamespace(buffer=torch.zeros(5_000, dtype=torch.bool))
        made.init_forward_metadata_out_graph(batch)
        assert made.verify_mask.buffer[: len(batch.spec_info.custom_mask)].equal(batch.spec_info.custom_mask)
    pair.check()
    assert pair.attachment.launches == 1


@pytest.mark.parametrize("name", ["trtllm_mha", "trtllm_mla", "flashmla"])
def test_pages_that_are_not_tested_are_refused_by_the_engine(name: str) -> None:
    """SGLang itself replaces such a page size when it resolves its arguments."""
    from sglang.srt.arg_groups.overrides import _mla_backend_page_constraints

    others = ("decode_attention_backend", "prefill_attention_backend", "speculative_draft_attention_backend")
    for page in objects.PAGES:
        arguments = SimpleNamespace(page_size=page, attention_backend=name, **dict.fromkeys(others))
        kept = _mla_backend_page_constraints(arguments).get("page_size", page) == page
        assert kept == (page in FAMILIES[name].pages), page


@pytest.mark.parametrize(("name", "mode"), [("fa3", "target_verify"), ("trtllm_mha", "target_verify")])
def test_a_batch_that_a_launch_would_get_wrong_runs_the_engines_own_code(name: str, mode: str) -> None:
    pair = Pair(name, 64, mode=mode)
    calls: list[Any] = []
    replace_the_engines_own(pair, lambda *a, **k: calls.append(a))
    launches = pair.attachment.launches
    for change in (
        lambda batch: setattr(batch.spec_info, "ragged_verify_layout", object()),
        lambda batch: setattr(batch, "encoder_lens", batch.seq_lens),
    ):
        batch = Batch((7, 9), 2, mode, 4).make()
        change(batch)
        pair.mine.init_forward_metadata_out_graph(batch)
        pair.mine.init_forward_metadata_in_graph(batch)
    assert len(calls) == 4 if FAMILIES[name].in_graph else 2
    assert pair.attachment.launches == launches
    assert not pair.attachment.failed


@pytest.mark.parametrize(("name", "steps"), [("fa3", 3), ("flashinfer", 3), ("dsa", 3), ("triton", 3), ("triton", 0)])
def test_a_pool_that_was_exchanged_is_bound_again(name: str, steps: int) -> None:
    pair = Pair(name, 64, mode="decode", steps=steps)
    pair.replay((7, 300), 5, seed=0)
    other = objects.token_pool(64, seed=99)
    for made in pair.backends:
        for owner in (made, *getattr(made, "attn_backends", ())):
            for holder in (
                owner,
                getattr(owner, "req_to_token_pool", None),
                getattr(owner, "kv_index_translator", None),
            ):
                if hasattr(holder, "req_to_token"):
                    holder.req_to_token = other
    pair.replay((7, 300), 5, seed=0)
    pair.check()


def test_one_backend_whose_lengths_change_their_dtype() -> None:
    """Triton's lengths are int64 in target_verify, and int32 in draft_extend, which subtracts the extend lengths."""
    pair = Pair("triton", 16, mode="target_verify")
    for mode in ("target_verify", "draft_extend", "target_verify"):
        pair.mode = mode
        launches = pair.attachment.launches
        pair.replay((7, 300), 5, seed=0)
        pair.check()
        assert pair.attachment.launches == launches + 1


@pytest.mark.parametrize(("mode", "steps"), [("decode", 3), ("target_verify", 0), ("draft_extend", 0)])
def test_the_wide_table_can_be_left_out(mode: str, steps: int) -> None:
    pair = Pair("dsa", 64, mode=mode, steps=steps, leave=("page_table_1",))
    pair.replay((77, 300, 640), 5, seed=0)
    wide = [t for path, t in compare.reachable(pair.mine).items() if compare.last_name(path) == "page_table_1"]
    assert wide
    assert all(bool((table == compare.POISON).all()) for table in wide), "it was written"
    different = compare.differences(pair.engine, pair.mine)
    assert different
    for text in different:
        assert ".page_table_1:" in text or "['page_table']:" in text, text
    assert not pair.attachment.failed


@pytest.mark.parametrize(
    ("change", "page", "reason"),
    [
        (set_of_child("use_fused_topk", False), 64, "use_fused_topk is False"),
        (set_of_child("dsa_index_topk", 4096), 64, "dsa_index_topk is 4096"),
        (set_of_child("dsa_topk_backend", SimpleNamespace(should_use_topk_v2=lambda: False)), 64, "top-k v2"),
        (lambda made: None, 1, "pages have one token"),
    ],
)
def test_the_wide_table_stays_where_something_reads_it(change: Any, page: int, reason: str) -> None:
    made = objects.backend("dsa", objects.token_pool(page, seed=1), page=page, steps=3)
    change(made)
    with pytest.raises(ArgumentError, match=f"leave has 'page_table_1'.*{reason}.*Remove it from leave"):
        sglang.attach(made, leave=("page_table_1",))


@pytest.mark.parametrize("source", ["README.md", "the docstring"])
def test_the_lines_that_are_shown(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    if source == "README.md":
        readme = (Path(__file__).parents[2] / source).read_text(encoding="utf-8")
        (block,) = re.findall(r"```python\n(from onelaunch.integrations.*?)```", readme, re.S)
    else:
        (shown,) = re.findall(r"::\n\n((?:    .*\n|\n)+)", inspect.getdoc(sglang) or "")
        block = textwrap.dedent(shown)
    made = backend("fa3")
    before = dict(vars(made))
    exec(block, {"draft_attn_backend": made})
    assert "FlashAttentionMultiStepBackend: one launch refreshes lengths" in capsys.readouterr().out
    assert vars(made) == before


def test_attaching_and_leaving_out_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "onelaunch"):
        sglang.attach(backend("dsa"), leave=("page_table_1",))
    assert "DeepseekSparseAttnMultiStepBackend: one launch refreshes" in caplog.text
    assert "page_table_1 is left out" in caplog.text


# ------------------------------------------------------------------------------------------------ the plugin


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's hook registry, emptied before and after. What the plugin hooks is restored."""
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.speculative.draft_utils import DraftBackendFactory
    from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

    for variable in (plugin.SGLANG_VARIABLE, plugin.SELECTED_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    for owner, name in (
        (DraftBackendFactory, "create_decode_backend"),
        (DraftBackendFactory, "create_draft_extend_backend"),
        (ModelRunner, "init_attention_backends"),
        (EAGLEWorkerV2, "init_cuda_graphs"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    HookRegistry.reset()
    yield HookRegistry
    HookRegistry.reset()


def test_the_plugin_does_nothing_unless_it_is_asked(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.install()
    assert not hooks._hooks
    monkeypatch.setenv(plugin.SELECTED_VARIABLE, "another, onelaunch")
    plugin.install()
    assert len(hooks._hooks) == 4
    hooks.reset()
    monkeypatch.setenv(plugin.SGLANG_VARIABLE, "1")
    plugin.install()
    assert len(hooks._hooks) == 4
    hooks.reset()
    monkeypatch.setenv(plugin.SGLANG_VARIABLE, "backends")
    plugin.install()
    assert len(hooks._hooks) == 3
    hooks.reset()
    monkeypatch.setenv(plugin.SGLANG_VARIABLE, "0")
    plugin.install()
    assert not hooks._hooks


def test_the_engine_loads_the_plugin_and_attaches_what_its_factory_makes(
    hooks: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt import plugins
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    made = iter([backend("fa3"), SimpleNamespace(), None])
    monkeypatch.setattr(DraftBackendFactory, "create_decode_backend", lambda self: next(made))
    monkeypatch.setattr(ModelRunner, "init_attention_backends", lambda self: None)
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    monkeypatch.setenv(plugin.SELECTED_VARIABLE, "onelaunch")
    plugins.load_plugins()
    factory = object.__new__(DraftBackendFactory)
    with caplog.at_level(logging.INFO, "onelaunch"):
        assert "init_forward_metadata_out_graph" in vars(factory.create_decode_backend())
        assert vars(factory.create_decode_backend()) == {}
        assert factory.create_decode_backend() is None
    assert "FlashAttentionMultiStepBackend: one launch refreshes" in caplog.text
    assert "attach backend is a SimpleNamespace; allowed: Deepseek" in caplog.text

    runner = SimpleNamespace(attn_backend=backend("dsa", 0), decode_attn_backend=None)
    ModelRunner.init_attention_backends(runner)
    assert "init_forward_metadata_out_graph" in vars(runner.attn_backend)


def test_backends_that_only_choose_between_others_have_these_attached() -> None:
    """Such a backend holds one for prefill and one for decoding, or one for some of the layers."""
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    one, other = backend("fa3", 0), backend("dsa", 0)
    runner = objects.model_runner(objects.token_pool(64, seed=1), page=64, mla=True, draft=False)
    hybrid = HybridAttnBackend(runner, one, other)
    plugin._initialized(None, SimpleNamespace(attn_backend=hybrid, decode_attn_backend=other))
    for made in (one, other):
        assert "init_forward_metadata_out_graph" in vars(made)
    assert "init_forward_metadata_out_graph" not in vars(hybrid)
    linear = SimpleNamespace(full_attn_backend=backend("fa3", 0))
    plugin._made(linear)
    assert "init_forward_metadata_out_graph" in vars(linear.full_attn_backend)


def test_the_plugin_names_the_backend_that_is_not_served(caplog: pytest.LogCaptureFixture) -> None:
    single = backend("flashinfer", 0)
    assert isinstance(single.decode_backend, str), "decode_backend is a name here, not a backend to attach"
    plugin._made(single)
    assert "init_forward_metadata_out_graph" in vars(single)
    single = backend("flashinfer_mla").attn_backends[0]
    with caplog.at_level(logging.INFO, "onelaunch"):
        plugin._made(single)
    (said,) = caplog.messages
    assert said.startswith("attach backend is a FlashInferMLAAttnBackend; allowed: Deepseek")


def test_the_plugin_never_raises_and_imports_no_torch() -> None:
    code = (
        "import sys; from onelaunch.integrations import plugin; plugin.install(); "
        "print(sorted({'torch', 'jinja2', 'sglang'} & set(sys.modules)))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ONELAUNCH", "SGLANG"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["fa3", "triton", "flashinfer"])
def test_inputs_of_another_length(name: str) -> None:
    """Longer inputs are read up to the batch size. With shorter ones the engine's own code runs."""
    pair = Pair(name, 1, mode="decode", steps=3)
    batch = Batch((7, 30), 2, "decode", 4).make()
    for tensor in ("seq_lens", "req_pool_indices"):
        setattr(batch, tensor, torch.cat([getattr(batch, tensor)] * 2))
    launches = pair.attachment.launches
    for made in pair.backends:
        compare.poison(made)
        one = Batch((7, 30), 2, "decode", 4).make() if made is pair.engine else batch
        made.init_forward_metadata_out_graph(one)
        if name != "fa3":
            pair._blank_unread_lists(made, 2, 2)
    pair.check()
    assert pair.attachment.launches == launches + 1
    batch.seq_lens, batch.req_pool_indices = batch.seq_lens[:1], batch.req_pool_indices[:1]
    replace_the_engines_own(pair, lambda *a, **k: None)
    with pytest.warns(RuntimeWarning, match="seq_lens has 1 elements; the plan is for 2 requests"):
        pair.mine.init_forward_metadata_out_graph(batch)
    assert pair.attachment.launches == launches + 1
