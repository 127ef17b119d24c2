"""Declared vectors and running sums: values computed by hand, and declarations as settings.

test_refresh.py and test_emulation.py compare emitted code with PyTorch for the declared configurations of cases.py.
test_expressions.py does so for random formulas.
"""

from __future__ import annotations

import json
from pathlib import Path

import onelaunch
import pytest
import torch
from declared import LENGTHS, POOL, ROWS, blank, bound
from onelaunch import KernelConfig, Map, MetadataBuffers, into, running_sum, vector
from onelaunch.errors import ArgumentError
from onelaunch.load.prebuild import read_matrix
from onelaunch.spec.settings import parse_settings
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick_builds")


# ------------------------------------------------------------------------------------------------ by hand


def test_a_draft_steps_positions_and_slots() -> None:
    """SGLang's positions and out_cache_loc: int64, padded, each request's rows one after the other."""
    positions, slots = blank(12, dtype=torch.int64), blank(5, 3, dtype=torch.int64)
    plan = bound(
        {
            "positions": into(vector("base_len + row", rows=3, dtype="int64", pad=0), positions),
            "out_cache_loc": into(vector("token(base_len + row)", rows=3, dtype="int64", missing=-1), slots),
        }
    )
    plan.run(LENGTHS, ROWS, captured_size=4)
    assert positions.tolist() == [2, 3, 4, 0, 1, 2, 8, 9, 10, 0, 0, 0]
    assert slots.tolist() == [[32, 33, 34], [10, 11, 12], [28, 29, -1], [-7] * 3, [-7] * 3]
    assert plan.launches == 1


def test_a_step_of_a_strided_buffer_is_each_backends() -> None:
    """[B, K, S] with K = 1: backend i's elements are S apart, with other backends' elements between them."""
    slots = blank(4, 3, dtype=torch.int64)
    declared = vector("token(base_len + step)", "request", dtype="int64")
    bound({"slots": into(declared, [slots[:, step] for step in range(3)])}, count=3).run(LENGTHS, ROWS)
    assert slots.tolist() == [[32, 33, 34], [10, 11, 12], [28, 29, 0], [-7] * 3]


def test_a_transposed_buffer() -> None:
    """mrope's positions are [3, N]: a request's three rows lie along the first dimension."""
    mrope = blank(3, 4, dtype=torch.int64)
    bound({"mrope": into(vector("base_len", rows=3, dtype="int64", pad=0), mrope.T)}).run(
        LENGTHS, ROWS, captured_size=4
    )
    assert mrope.tolist() == [[2, 0, 8, 0]] * 3


def test_inputs_constants_maps_and_sources() -> None:
    """vLLM's slot mapping of a KV group, and SGLang's location in the sliding-window pool."""
    blocks = torch.tensor([[5, 6, 7], [1, 2, 3]], dtype=torch.int32)
    slots, swa, new_lens = blank(3, dtype=torch.int64), blank(3), blank(3, dtype=torch.int64)
    plan = bound(
        {
            "slot_mapping": into(vector("blocks(index, base_len // block) * block + base_len % block", "request"), swa),
            "swa": into(vector("full_to_swa(token(base_len))", "request", dtype="int64"), slots),
            "new_lens": into(vector("min(base_len + accept_lens, most)", "request", dtype="int64"), new_lens),
        },
        inputs={"accept_lens": torch.int32, "index": torch.int64},
        constants={"block": 4, "most": 9},
        sources={"blocks": blocks},
        maps={"full_to_swa": Map(torch.arange(100, 130), outside=-1)},
    )
    accept = torch.tensor([1, 3, 5], dtype=torch.int32)
    plan.run(LENGTHS, ROWS, accept_lens=accept, index=torch.tensor([1, 0, 1]))
    assert swa.tolist() == [1 * 4 + 2, 5 * 4 + 0, 3 * 4 + 0]
    assert slots.tolist() == [-1, 110, 128]
    assert new_lens.tolist() == [3, 3, 9]


def test_sums_over_rows_and_a_last_element_as_padding() -> None:
    starts, lasts = blank(6), blank(5)
    plan = bound(
        {
            "cu_seqlens_q": into(running_sum("rows", pad="last"), starts),
            "pages": into(running_sum("ceil_div(base_len, page_size)", pad="last"), lasts),
        },
        mode="draft_extend",
        extend="variable",
        page_size=4,
    )
    plan.run(LENGTHS, ROWS, torch.tensor([2, 0, 3]), captured_size=4)
    assert starts.tolist() == [0, 2, 2, 5, 5, -7]
    assert lasts.tolist() == [0, 1, 1, 3, 3]


def test_padding_requests_are_like_others_but_for_fields_with_a_pad() -> None:
    """As in SGLang's captured batches: a padding request has length 1, pool row 0 and position 0."""
    lengths, starts, positions, rows = blank(6), blank(7), blank(6, dtype=torch.int64), blank(6)
    pages, last = blank(6, 10), blank(7)
    plan = onelaunch.bind(
        [MetadataBuffers(cache_seqlens=lengths, cu_seqlens_k=starts, page_indices=pages)],
        req_to_token=POOL,
        seqlen_offsets=[1],
        padding_len=1,
        declare={
            "positions": into(vector("base_len", "request", dtype="int64", pad=0), positions),
            "rows_of": into(vector("pool_rows", "request"), rows),
            "counted": into(running_sum("base_len", pad="last"), last),
        },
        inputs={"pool_rows": torch.int64},
    )
    plan.run(LENGTHS, ROWS, captured_size=5, pool_rows=ROWS)
    assert lengths.tolist() == [3, 1, 9, 2, 2, -7]
    assert starts.tolist() == [0, 3, 4, 13, 15, 17, -7]
    assert positions.tolist() == [2, 0, 8, 0, 0, -7]
    assert rows.tolist() == [3, 1, 2, 0, 0, -7]
    assert last.tolist() == [0, 2, 2, 10, 10, 10, -7]
    assert pages[:, :3].tolist() == [[30, 31, 32], [10, -7, -7], [20, 21, 22], [0, 1, -7], [0, 1, -7], [-7] * 3]
    plan.run(LENGTHS[:1], ROWS[:1], pool_rows=ROWS[:1])
    assert lengths.tolist() == [3, 1, 9, 2, 2, -7], "without a captured size there is no padding"


def test_how_many_rows_a_request_has() -> None:
    starts, extends = blank(4), blank(3)
    bound(
        {
            "qo_indptr": into(running_sum("rows"), starts),
            "extend_start": into(vector("request * rows", "request"), extends),
        },
        mode="target_verify",
        next_n=5,
    ).run(LENGTHS, ROWS)
    assert (starts.tolist(), extends.tolist()) == ([0, 5, 10, 15], [0, 5, 10])


def test_a_term_is_named_and_not_written() -> None:
    """A declared vector without a tensor only names a formula for use in others."""
    out = blank(3)
    bound({"half": vector("base_len // 2", "request"), "out": into(vector("half * 10", "request"), out)}).run(
        LENGTHS, ROWS
    )
    assert out.tolist() == [10, 0, 40]


def test_what_no_bound_field_needs_is_not_in_the_key() -> None:
    declared = {"out": into(vector("base_len", "request"), blank(3))}
    more = {"declare": declared | {"unused": vector("accept + most")}, "inputs": {"accept": torch.int32}}
    assert bound(**more, constants={"most": 3}).config == bound(declared).config


def test_bool_stores_whether_the_value_is_not_zero() -> None:
    out = torch.zeros(3, dtype=torch.bool)
    bound({"out": into(vector("base_len * 2", "request", dtype="bool"), out)}).run(LENGTHS, ROWS)
    assert out.tolist() == [True, False, True]


def test_int64_does_not_wrap_where_int32_does() -> None:
    wide, narrow = blank(1, dtype=torch.int64), blank(1)
    formula = "base_len * 4 + raw"
    bound(
        {"wide": into(vector(formula, dtype="int64"), wide), "narrow": into(vector(formula), narrow)},
        inputs={"raw": torch.int64},
    ).run(torch.tensor([2**30]), ROWS[:1], raw=torch.tensor([2**40 + 5]))
    assert (wide.tolist(), narrow.tolist()) == ([2**40 + 2**32 + 5], [5])


def test_a_checked_plan_reports_a_look_up_outside_its_source() -> None:
    out = blank(3)
    plan = bound({"out": into(vector("token(base_len)", "request", missing=-5), out)}, checked=True)
    plan.run(LENGTHS, ROWS)
    plan.check()
    plan.run(torch.tensor([2, 12, 3]), ROWS)
    assert out.tolist() == [32, -5, 23]
    with pytest.raises(ArgumentError, match="looked up place 12 for request 1; its source has 0 to 10 exclusive"):
        plan.check()
    plan.run(LENGTHS, torch.tensor([0, 4, 1]))
    assert out.tolist() == [2, -5, 18]
    with pytest.raises(ArgumentError, match=r"req_pool_indices\[1\] is 4"):
        plan.check()


def test_a_checked_plan_does_not_report_a_look_up_that_a_condition_excludes() -> None:
    """Also in a long formula, which emitted code splits into several local constants."""
    out = blank(3)
    shift = " + ".join(["base_len * base_len"] * 6)
    guarded = f"where(base_len < 5, token(base_len + 0 * ({shift})) + ({shift}), -1)"
    plan = bound({"out": into(vector(guarded, "request"), out)}, checked=True)
    plan.run(torch.tensor([2, 12, 3]), ROWS)
    plan.check()
    assert out.tolist() == [32 + 6 * 4, -1, 23 + 6 * 9]


def test_a_plan_in_a_compiled_function() -> None:
    out = blank(3)
    plan = bound({"out": into(vector("base_len + accept", "request"), out)}, inputs={"accept": torch.int64})

    @torch.compile(backend="eager")
    def step(lengths: Tensor, accept: Tensor) -> Tensor:
        plan.run(lengths, ROWS, accept=accept)
        return out * 2

    assert step(LENGTHS, torch.tensor([1, 2, 3])).tolist() == [6, 4, 22]
    assert step(LENGTHS, torch.tensor([0, 0, 1])).tolist() == [4, 0, 18]


# ------------------------------------------------------------------------------------------------ as settings


def test_a_matrix_declares_fields(tmp_path: Path) -> None:
    path = tmp_path / "kernels.toml"
    path.write_text(
        """
        [[build]]
        target = "cpu"
        set = { fields = "cache_seqlens+slots", num_backends = [1, 2] }
        inputs = { accept = "int32" }
        constants = { most = 9 }
        maps = { full_to_swa = ["int64", -1] }
        [build.declare]
        slots = { formula = "full_to_swa(min(accept,most))", per = "request", dtype = "int64" }
        """
    )
    jobs = read_matrix(path)
    assert [job.config.num_backends for job in jobs] == [1, 2]
    config = jobs[0].config
    assert config == KernelConfig(
        target="cpu",
        fields=("cache_seqlens", "slots"),
        declare={"slots": vector("full_to_swa(min(accept, most))", "request", dtype="int64")},
        inputs={"accept": "int32"},
        constants={"most": 9},
        maps={"full_to_swa": ("int64", -1)},
    )
    out = blank(3, dtype=torch.int64)
    plan = onelaunch.bind(
        [MetadataBuffers(cache_seqlens=blank(3))],
        req_to_token=POOL,
        declare={"slots": into(vector("full_to_swa(min(accept, most))", "request", dtype="int64"), out)},
        inputs={"accept": torch.int32},
        constants={"most": 9},
        maps={"full_to_swa": Map(torch.arange(9), -1)},
    )
    assert plan.config == config, "a plan must bind the kernel that was built ahead of time"


def test_the_banner_says_what_was_declared() -> None:
    config = KernelConfig(declare={"slots": vector("row*2", rows=4, pad=0)}, fields=("slots",))
    source = onelaunch.render(config)
    assert "//   declare                 slots = vector('row * 2', rows=4, pad=0)\n" in source
    assert parse_settings(config.settings()) == config
    assert f"//   onelaunch show --set '{config.settings()}'\n" in source
    assert json.loads(json.dumps(config.to_dict()))["declare"] == {
        "slots": {"kind": "vector", "formula": "row * 2", "rows": 4, "pad": 0}
    }
