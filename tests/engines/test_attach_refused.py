"""Backends of SGLang that attach() refuses, since a launch would get something wrong; they stay as they were."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import objects
import pytest
from onelaunch import ArgumentError
from onelaunch.integrations import sglang
from pairs import backend

pytestmark = pytest.mark.usefixtures("quick_builds")


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


def test_verified_writes_are_refused_in_a_graph() -> None:
    with pytest.raises(ArgumentError, match="writes is 'verified', and TRTLLMHAAttnBackend records the launch"):
        sglang.attach(backend("trtllm_mha", 0), writes="verified")


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
