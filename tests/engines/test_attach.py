"""attach() on SGLang's own backends: when the engine's own code runs instead, what is left out, and detach()."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
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
from onelaunch.integrations import sglang
from onelaunch.integrations.sglang import refresher
from onelaunch.integrations.sglang.hooks import Bound
from pairs import Pair, backend

pytestmark = pytest.mark.usefixtures("quick_builds")


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
