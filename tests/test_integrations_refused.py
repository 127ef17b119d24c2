"""What the engines' helpers refuse: the message names the attribute, and nothing is bound or written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import stand_ins
from onelaunch import ArgumentError
from onelaunch.integrations import flashinfer, sglang
from refreshed import LENGTHS, captured, dsa_tensors, pool
from support import POISON


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
