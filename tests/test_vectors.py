"""The declared formulas: their values equal the reference's, and the code emitted from them is as expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onelaunch import FIELDS, ConfigError, KernelConfig
from onelaunch.spec import reference
from onelaunch.spec.evaluation import evaluate_vectors
from onelaunch.spec.fields import RunningSum, Vector
from onelaunch.spec.scope import Scope
from onelaunch.spec.vectors import described, element, locals_of
from torch import Tensor

VECTORS = tuple(name for name, field in FIELDS.items() if field.kind in ("vector", "running_sum"))
MODES = ("decode", "target_verify", "draft_extend")
LENGTHS = [0, 1, 3, 4, 5, 64, 2047, 2048, 2049, -1, -7, 2**31 - 1, -(2**31), 2**31 - 3]


def by_hand(config: KernelConfig, seq_lens: Tensor, extend_seq_lens: Tensor | None, step: int) -> dict[str, Tensor]:
    """What reference.py computes for buffers of exactly the right size."""
    offset = config.seqlen_offsets[step % len(config.seqlen_offsets)] if config.seqlen_offsets else 0
    values, _ = reference.lengths(
        seq_lens,
        mode=config.mode,
        index_topk=config.index_topk,
        next_n=config.next_n,
        extend_seq_lens=extend_seq_lens,
        seqlen_offset=offset,
        index_kpool=config.index_kpool,
    )
    tokens = reference.kv_lengths(seq_lens, offset + (config.next_n if config.mode == "target_verify" else 0))
    return values | {"kv_indptr": reference.running_sum(tokens)}


def assert_equal(config: KernelConfig, seq_lens: Tensor, extend_seq_lens: Tensor | None) -> None:
    for step in range(config.num_backends):
        wanted = by_hand(config, seq_lens, extend_seq_lens, step)
        found = evaluate_vectors(config, seq_lens, extend_seq_lens, step)
        assert set(found) == set(config.vectors)
        for name, tensor in found.items():
            assert tensor.dtype == torch.int32
            assert torch.equal(tensor, wanted[name]), (config.settings(), name, step)


@pytest.mark.parametrize("mode", [*MODES, "variable"])
@pytest.mark.parametrize("offsets", [(), (3,), (1, 2, 3), (0, 32768, 7)], ids=str)
@pytest.mark.parametrize(("index_topk", "index_kpool"), [(2048, 1), (0, 1), (5, 4), (2048, 64)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_formulas_mean_what_the_reference_says(
    mode: str, offsets: tuple[int, ...], index_topk: int, index_kpool: int, dtype: torch.dtype
) -> None:
    config = KernelConfig(
        num_backends=3,
        fields=VECTORS,
        mode="draft_extend" if mode == "variable" else mode,
        extend="variable" if mode == "variable" else "uniform",
        next_n=3,
        seqlen_offsets=offsets,
        index_topk=index_topk,
        index_kpool=index_kpool,
    )
    wide = [2**40 + 5, -(2**35), 2**31] if dtype == torch.int64 else []
    seq_lens = torch.tensor(LENGTHS + wide, dtype=dtype)
    extends = torch.tensor([0, 1, 5, -2, 3, 0, 2, 1, 7, 2, 2, 3, 3, 1, 4, 2, 0][: len(seq_lens)])
    assert_equal(config, seq_lens, extends if mode == "variable" else None)


@given(st.data())
def test_formulas_mean_what_the_reference_says_of_any_lengths(data: st.DataObject) -> None:
    bs = data.draw(st.integers(0, 6))
    mode = data.draw(st.sampled_from(MODES))
    variable = mode == "draft_extend" and data.draw(st.booleans())
    config = KernelConfig(
        num_backends=2,
        fields=tuple(data.draw(st.sets(st.sampled_from(VECTORS), min_size=1))),
        mode=mode,
        extend="variable" if variable else "uniform",
        next_n=data.draw(st.integers(1, 5)),
        seqlen_offsets=tuple(data.draw(st.lists(st.integers(0, 32768), min_size=2, max_size=2))),
        index_topk=data.draw(st.integers(0, 2**31 - 1)),
        index_kpool=data.draw(st.integers(1, 70) | st.integers(1, 2**31 - 1)),
    )
    seq_lens = data.draw(
        st.lists(st.integers(-(2**63), 2**63 - 1) | st.sampled_from(LENGTHS), min_size=bs, max_size=bs)
    )
    extends = data.draw(st.lists(st.integers(-2, 6), min_size=bs, max_size=bs))
    of_call = torch.tensor(extends, dtype=torch.int64) if config.variable_rows else None
    assert_equal(config, torch.tensor(seq_lens, dtype=torch.int64), of_call)


# --------------------------------------------------------------------------------------------------- emitted code


def emitted(per: str, **settings: Any) -> tuple[dict[str, str], dict[str, str]]:
    """The C++ of the local variables, and of the values of the per-request or per-row fields."""
    config = KernelConfig(**{"fields": VECTORS, **settings})
    of_rows = config.row_fields
    fields = [name for name in config.vectors if (name in of_rows) == (per == "row")]
    found = locals_of(config, fields)
    assert {local.type for local in found} <= {"std::int32_t"}
    return {local.name: local.cpp for local in found}, {name: element(config, name) for name in fields}


def test_in_decode_fields_of_rows_are_those_of_requests() -> None:
    assert emitted("row") == ({}, {})
    assert emitted("request") == (
        {"nsa_cache_seqlens": "min(seq_len, kIndexTopk)", "kv_indptr": "max(base_len, 0)"},
        {
            "cache_seqlens": "seq_len",
            "cu_seqlens_k": "seq_len",
            "nsa_cache_seqlens": "nsa_cache_seqlens",
            "nsa_cu_seqlens_k": "nsa_cache_seqlens",
            "seqlens_expanded": "seq_len",
            "pooled_cache_seqlens": "seq_len",
            "kv_indptr": "kv_indptr",
        },
    )


def test_offsets_and_pools() -> None:
    found, _ = emitted("request", index_kpool=4, seqlen_offsets=(7,))
    assert found == {
        "pool_tail": "floor_mod(seq_len, kIndexKpool)",
        "nsa_cache_seqlens": "wrap(bits(min(wrap(bits(seq_len) - pool_tail), kIndexTopk)) + pool_tail)",
        "pooled_cache_seqlens": "floor_div(seq_len, kIndexKpool)",
        "kv_indptr": "wrap(bits(max(base_len, 0)) + offset)",
    }


def test_what_rows_have_of_their_own() -> None:
    found, values = emitted("row", mode="target_verify", next_n=4)
    expanded = "max(wrap(bits(seq_len) - rows + row + 1), 0)"
    assert found == {"seqlens_expanded": expanded, "nsa_cache_seqlens": "min(seqlens_expanded, kIndexTopk)"}
    assert list(found) == ["seqlens_expanded", "nsa_cache_seqlens"], "a local comes after those it depends on"
    assert values == {
        "nsa_cache_seqlens": "nsa_cache_seqlens",
        "nsa_cu_seqlens_k": "nsa_cache_seqlens",
        "seqlens_expanded": "seqlens_expanded",
    }
    assert emitted("request", mode="target_verify", next_n=4)[1]["cu_seqlens_k"] == "seq_len"
    # A formula may name a vector that isn't a field of the configuration.
    found, _ = emitted("row", mode="draft_extend", fields=("nsa_cu_seqlens_k",), next_n=2)
    assert list(found) == ["seqlens_expanded", "nsa_cache_seqlens"]


def test_what_describe_says() -> None:
    decode, verify = KernelConfig(fields=VECTORS), KernelConfig(fields=VECTORS, mode="target_verify", index_kpool=4)
    assert described(decode, "nsa_cache_seqlens") == "min(seqlens_expanded, index_topk)"
    assert described(decode, "seqlens_expanded") == "seq_len"
    assert described(decode, "kv_indptr") == "0, then the running sum of max(base_len, 0)"
    assert described(decode, "page_indices") == "token(column), for columns below seq_len"
    assert described(KernelConfig(page_size=16), "real_page_table") == (
        "token(column * page_size) // page_size, for columns below ceil_div(seq_len, page_size)"
    )
    assert described(decode, "kv_indices") == "token(column), at kv_indptr[request] + column"
    assert described(verify, "seqlens_expanded") == "max(seq_len - rows + row + 1, 0)"
    tail = "seqlens_expanded % index_kpool"
    assert described(verify, "nsa_cache_seqlens") == f"min(seqlens_expanded - {tail}, index_topk) + {tail}"
    assert described(verify, "nsa_cu_seqlens_k") == "0, then the running sum of nsa_cache_seqlens"


# --------------------------------------------------------------------------------------------------- declarations


STANDARD = Scope()


def test_settings_follow_from_formulas() -> None:
    for mode in MODES:
        assert STANDARD.named(["nsa_cu_seqlens_k"], mode) >= {"index_topk", "index_kpool"}
        assert STANDARD.named(["pooled_cache_seqlens"], mode) >= {"index_kpool"}
        assert STANDARD.named(["pooled_real_page_table"], mode) >= {"page_size", "index_kpool"}
        for name in ("cache_seqlens", "kv_indptr", "page_indices"):
            assert not STANDARD.named([name], mode) & {"page_size", "index_kpool", "index_topk"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VECTORS)
def test_standard_formulas_are_fine(name: str, mode: str) -> None:
    assert STANDARD.substituted(name, mode)


def declare(formula: str, per: str = "row", kind: type[Vector] = Vector) -> Any:
    scope = Scope((("mine", kind(formula, per)),))  # type: ignore[arg-type]
    scope.check()
    return scope.formula("mine", "decode")


def test_a_declaration_of_ones_own() -> None:
    assert declare("cache_seqlens + row", kind=RunningSum)
    for text, reason in (
        ("cu_seqlens_k + 1", "there is no 'cu_seqlens_k' here"),  # a sum, or a table, isn't a vector
        ("page_indices", "there is no 'page_indices' here"),
        ("mine + 1", "there is no 'mine' here"),
        ("threads", "there is no 'threads' here"),
    ):
        with pytest.raises(ConfigError, match=f"formula of mine, column 1 of .*{reason}"):
            declare(text)
    for named in ("row", "seqlens_expanded"):
        with pytest.raises(ConfigError, match=f"formula of mine, '{named} . 1', names {named}, which is per row"):
            declare(f"{named} + 1", "request")


def test_formulas_that_name_each_other() -> None:
    scope = Scope(tuple((name, Vector(f"{other} + 1")) for name, other in zip("abc", "bca", strict=True)))
    with pytest.raises(ConfigError, match="formulas name each other: a names b names c names a"):
        scope.check()


def test_formulas_that_grow() -> None:
    growing = tuple((f"x{n}", Vector(f"x{n - 1} * x{n - 1}")) for n in range(1, 40))
    with pytest.raises(ConfigError, match="has more than 1000 operators"):
        Scope((("x0", Vector("seq_len")), *growing)).check()
