"""Declared fields: values computed by hand, plans, and what is refused before anything is written or built.

test_refresh.py and test_emulation.py compare emitted code with PyTorch for the declared configurations of cases.py.
test_expressions.py does so for random formulas.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onelaunch
import pytest
import torch
from onelaunch import ConfigError, KernelConfig, Map, MetadataBuffers, into, packed, running_sum, table, vector
from onelaunch.errors import ArgumentError
from onelaunch.inspect.traffic import traffic
from onelaunch.load.prebuild import read_matrix
from onelaunch.run.checks import check_declared
from onelaunch.spec.fields import Field
from onelaunch.spec.settings import parse_settings
from onelaunch.spec.vectors import described
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick_builds")

POOL = torch.arange(40, dtype=torch.int32).view(4, 10)
LENGTHS, ROWS = torch.tensor([2, 0, 8]), torch.tensor([3, 1, 2])


def blank(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.full(shape, -7, dtype=dtype)


def bound(declare: dict[str, Any], count: int = 1, **settings: Any) -> onelaunch.Plan:
    return onelaunch.bind([MetadataBuffers()] * count, req_to_token=POOL, declare=declare, **settings)


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


@pytest.mark.parametrize(
    ("declare", "more", "message"),
    [
        ({"seq_len": vector("1")}, {}, "declare has the name 'seq_len', which is another thing's already"),
        ({"cache_seqlens": vector("1")}, {}, "declare has the name 'cache_seqlens', which"),
        ({"a b": vector("1")}, {}, "declare has the name 'a b'; a name is a lower-case letter"),
        ({"x;y": vector("1")}, {}, "declare has the name 'x;y'"),
        ({"mine": vector("1")}, {"constants": {"mine": 3}}, "constants has the name 'mine', which"),
        ({"mine": vector("row", "request")}, {}, "names row, which is per row"),
        ({"mine": vector("1", rows=0)}, {}, "the rows of mine is 0; allowed: 1 to 32768"),
        ({"mine": vector("1", "request", rows=2)}, {}, "mine has rows=2; only a vector with per='row'"),
        ({"mine": vector("1", pad=2**31)}, {}, "the pad of mine is 2147483648"),
        ({"mine": vector("1", missing="x")}, {}, "the missing of mine is 'x'"),
        ({"mine": vector("1", dtype="int16")}, {}, "the dtype of mine is 'int16'"),
        ({"mine": running_sum("1", dtype="bool")}, {}, "the dtype of mine is 'bool'; allowed: 'int32', 'int64'"),
        ({"mine": running_sum("1", "rows")}, {}, "the per of mine is 'rows'"),
        ({"mine": vector("token(1, 2, 3)")}, {}, "token takes 1 to 2 values"),
        ({"mine": vector("seqlen")}, {}, r"there is no 'seqlen' here. Did you mean 'seq_len'\? Allowed: base_len"),
        (
            {"mine": vector("ceildiv(1, 2)")},
            {},
            r"there is no function 'ceildiv'. Did you mean 'ceil_div'\? Allowed",
        ),
        ({"mine": vector("zzzz")}, {}, r"there is no 'zzzz' here. Allowed"),
        ({"mine": vector("seq_len // token(1)")}, {}, "a divisor must be a positive constant"),
        ({"mine": vector("seq_len // most")}, {"constants": {"most": 0}}, "divisor in seq_len // user_most is 0"),
        ({"mine": vector("most")}, {"constants": {"most": 2**40}}, r"constants\[most\] is .*Declare mine with dtype"),
        ({"mine": {"formula": "1", "colour": 3}}, {}, "an argument of mine is 'colour'"),
        ({"mine": {"kind": "matrix", "formula": "1"}}, {}, "the kind of mine is 'matrix'"),
        ({"mine": 3}, {}, r"declare\[mine\] is 3; it must be a declaration such as"),
        ({"mine": vector("given")}, {"inputs": {"given": "int16"}}, r"inputs\[given\] is 'int16'"),
        ({"mine": vector("full(1)")}, {"maps": {"full": "int64"}}, r"maps\[full\] is 'int64'; it must be a dtype and"),
        ({"mine": vector("1")}, {"strided": ("cu_seqlens_k",)}, "strided is 'cu_seqlens_k'"),
        ({"mine": vector("1")}, {"inputs": {f"i{n}": "int32" for n in range(16)}}, "inputs has 16 names; allowed: 15"),
        (
            {"mine": vector("row", pad=0)},
            {"mode": "draft_extend", "extend": "variable"},
            "mine, which has a pad and one",
        ),
        (
            {"mine": vector("row")},
            {"mode": "draft_extend", "extend": "variable", "padding_len": 1},
            "padding_len is 1 and extend is 'variable'",
        ),
        ({"mine": vector("1")}, {"padding_len": -32769}, "padding_len is -32769; allowed: -32768 to"),
        ({"mine": vector("1")}, {"operation": "copy"}, "mine, which is declared, and operation is 'copy'"),
    ],
)
def test_declarations_that_are_refused(declare: Any, more: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KernelConfig(fields=(*declare,), declare=declare, **more)


# ------------------------------------------------------------------------------------------------ refusals of plans


def test_destinations_that_do_not_fit() -> None:
    declared = vector("base_len", rows=2, dtype="int64")
    wide = blank(8, dtype=torch.int64)
    for tensor, message in (
        (blank(8), "has dtype int32; allowed: int64. Declare dtype='int32', or allocate it with dtype=torch.int64"),
        (blank(8).float(), "has dtype float32; allowed: int64. Allocate it with dtype=torch.int64"),
        (wide.view(2, 4), "be \\[bs, W\\] with W the rows that the declaration has, which are 2. Declare rows=4"),
        (wide.view(2, 2, 2), "must have 1 dimension"),
        (wide[:1].expand(8), "has strides \\(0,\\) .* must not share memory"),
        (wide.as_strided((3, 2), (1, 1)), "must not share memory"),
        ("here", "are a str; they must be one tensor for all backends"),
        ([wide, wide], "are a list; they must be one tensor for all backends, or a list of one for each of the 1"),
        ([3], r"declare\['mine'\]\[0\] is a int; it must be a torch.Tensor"),
    ):
        with pytest.raises(ArgumentError, match=message):
            bound({"mine": into(declared, tensor)})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="has stride 2; it must be 1"):
        bound({"mine": into(running_sum("base_len"), blank(8)[::2])})
    assert wide.tolist() == [-7] * 8


def test_a_plan_reads_nothing_that_it_writes() -> None:
    """No field reads a destination: no source, map or input of a call may overlap one."""
    read, lens = blank(4, 10), blank(3, dtype=torch.int64)
    for sources in ({"sources": {"looked_up": read}}, {"maps": {"looked_up": Map(read.flatten())}}):
        with pytest.raises(ArgumentError, match=r"declare\['mine'\] overlaps the source or map 'looked_up' in memory"):
            bound({"mine": into(vector("looked_up(1)", "request"), read[1])}, **sources)
    declared = {"mine": into(vector("base_len + old", "request", dtype="int64"), lens)}
    plan = bound(declared, inputs={"old": torch.int64})
    with pytest.raises(ArgumentError, match=r"old overlaps declare\['mine'\] in memory; the kernel would read"):
        plan.run(LENGTHS, ROWS, old=lens)
    with pytest.raises(ArgumentError, match=r"seq_lens overlaps declare\['mine'\]"):
        plan.run(lens, ROWS, old=LENGTHS)
    with pytest.raises(ArgumentError, match="overlaps req_to_token"):
        bound({"mine": into(vector("1", "request"), POOL[0])})
    with pytest.raises(ArgumentError, match=r"declare\['b'\] overlaps declare\['a'\] in memory"):
        bound({"a": into(vector("1", "request"), read[0, :4]), "b": into(vector("2", "request"), read[0, 3:])})
    assert lens.tolist() == [-7] * 3


def test_backends_share_only_what_they_have_alike() -> None:
    out = blank(3)
    same = {"mine": into(vector("base_len", "request"), out)}
    bound(same, count=2, seqlen_offsets=(1, 2)).run(LENGTHS, ROWS)
    assert out.tolist() == [2, 0, 8]
    for formula in ("seq_len", "offset", "step"):
        with pytest.raises(ConfigError, match=r"distinct\[mine\] is 1"):
            bound({"mine": into(vector(formula, "request"), out)}, count=2, seqlen_offsets=(1, 2))
    with pytest.raises(ConfigError, match=r"distinct\[mine\] is 1"):
        bound({"mine": into(vector("step", "request"), out)}, count=2)


def test_runs_that_are_refused() -> None:
    out = blank(4)
    plan = bound({"mine": into(vector("accept", "request", pad=0), out)}, inputs={"accept": torch.int64})
    accept = torch.ones(3, dtype=torch.int64)
    for arguments, message in (
        ({}, "run\\(\\) got 0 declared inputs and needs 1: accept"),
        ({"accepted": accept}, "got 'accepted', which no formula of the plan reads; .* are accept"),
        (
            {"accept": accept.int()},
            r"accept has dtype int32; allowed: int64. Bind with inputs=\{'accept': torch.int32\}",
        ),
        ({"accept": accept[:2]}, "accept has 2 elements and seq_lens has 3"),
        ({"accept": accept, "captured_size": 2}, "captured_size is 2; allowed: 3 to 4, from the batch to what"),
        ({"accept": accept, "captured_size": 5}, "captured_size is 5; allowed: 3 to 4"),
    ):
        with pytest.raises(ArgumentError, match=message):
            plan.run(LENGTHS, ROWS, **arguments)  # type: ignore[arg-type]
    assert out.tolist() == [-7] * 4
    plan.run(LENGTHS, ROWS, accept=accept)
    assert out.tolist() == [1, 1, 1, -7]
    other = bound({"mine": into(vector("base_len", "request"), out)})
    with pytest.raises(ArgumentError, match="captured_size is 4; no field of the plan has a pad"):
        other.run(LENGTHS, ROWS, captured_size=4)


def test_padding_ends_where_the_padded_fields_end() -> None:
    """vLLM's slot mappings are padded up to their capacity, which exceeds that of other fields."""
    lengths, slots, rows = blank(3), blank(2, 9, dtype=torch.int64), blank(20)
    plan = bound(
        {
            "lengths": into(vector("base_len", "request"), lengths),
            "slots": into(vector("token(base_len)", "request", dtype="int64", pad=-1), slots[1]),
            "twice": into(vector("base_len + row", rows=2, pad=-2), rows),
        }
    )
    with pytest.raises(
        ArgumentError, match=r"captured_size is 10; allowed: 3 to 9, .* declare\['slots'\] has room for"
    ):
        plan.run(LENGTHS, ROWS, captured_size=10)
    plan.run(LENGTHS, ROWS, captured_size=9)
    assert lengths.tolist() == [2, 0, 8]
    assert slots.tolist() == [[-7] * 9, [32, 10, 28, *[-1] * 6]]
    assert rows.tolist() == [2, 3, 0, 1, 8, 9, *[-2] * 12, -7, -7]
    with pytest.raises(ArgumentError, match=r"seq_lens has 4 requests; .* has room for 3"):
        plan.run(torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))


def test_padding_of_rows_ends_where_they_end() -> None:
    rows, starts = blank(11), blank(20)
    plan = bound(
        {
            "verified": into(vector("base_len + row", pad=0), rows),
            "starts": into(running_sum("rows", pad="last"), starts),
        },
        mode="target_verify",
        next_n=2,
    )
    with pytest.raises(
        ArgumentError, match=r"captured_size is 6; allowed: 3 to 5, .* declare\['verified'\] has room for"
    ):
        plan.run(LENGTHS, ROWS, captured_size=6)
    plan.run(LENGTHS, ROWS, captured_size=5)
    assert rows.tolist() == [2, 3, 0, 1, 8, 9, 0, 0, 0, 0, -7]
    assert starts.tolist() == [0, 2, 4, 6, 6, 6, *[-7] * 14]


def test_pinned_memory_beside_tensors_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field in pinned memory is accepted: planning code on the host reads it (test_integrations_flashinfer.py)."""
    field, host, gpu = Field("mine", vector("base_len", "request")), blank(4), torch.device("cuda", 0)
    with pytest.raises(ArgumentError, match=r"host is on cpu; it must be on cuda:0, .* or in pinned memory"):
        check_declared("host", host, field, gpu)
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: True)
    assert check_declared("host", host, field, gpu) is host
    with pytest.raises(ArgumentError, match="host has dtype int64; allowed: int32"):
        check_declared("host", host.long(), field, gpu)
    assert check_declared("host", host, field, host.device) is host


def test_groups_take_standard_fields_only() -> None:
    declare = {"mine": into(vector("step", "request"), blank(3))}
    with pytest.raises(ArgumentError, match="declare has 'mine'; groups take standard fields only"):
        onelaunch.bind_groups([MetadataBuffers()], [[0]], req_to_token=POOL, declare=declare)


@pytest.mark.parametrize(
    ("declaration", "message"),
    [(vector("1", "requests"), "the per of mine is 'requests'"), (vector("1", dtype="int16"), "the dtype of mine is")],
)
def test_bind_names_what_is_wrong_with_a_declaration(declaration: Any, message: str) -> None:
    """The message is about the declaration, not about its tensor."""
    with pytest.raises(ConfigError, match=message):
        onelaunch.bind(
            [MetadataBuffers(cache_seqlens=blank(3))], req_to_token=POOL, declare={"mine": into(declaration, blank(3))}
        )


def test_arguments_of_another_kind() -> None:
    for more, message in (
        ({"declare": [vector("1")]}, "declare is a list; it must be a dict by name"),
        ({"declare": {"mine": "base_len"}}, r"declare\['mine'\] is a str; it must be what onelaunch.vector"),
        ({"inputs": {"accept": "int64"}}, r"inputs\['accept'\] is 'int64'; allowed: torch.int32"),
        ({"maps": {"swa": blank(3)}}, r"maps\['swa'\] is a Tensor; it must be an onelaunch.Map"),
        ({"maps": {"swa": Map(blank(6)[::2])}}, r"maps\['swa'\].table has stride 2"),
        ({"sources": {"blocks": blank(3)}}, r"sources\['blocks'\] has shape \(3,\); it must have 2"),
    ):
        with pytest.raises(ArgumentError, match=message):
            onelaunch.bind([MetadataBuffers(cache_seqlens=blank(3))], req_to_token=POOL, **more)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ tables


def test_a_table_of_pages_and_one_of_another_pool() -> None:
    """FA3's page_table and swa_page_table: dead columns are filled in one and left alone in the other."""
    pages, swa = blank(3, 4), blank(3, 4)
    bound(
        {
            "pages": into(
                table("token(column * page_size) // page_size", columns="ceil_div(seq_len, page_size)"), pages
            ),
            "swa_pages": into(
                table("full_to_swa(token(column * page_size)) // page_size", columns="ceil_div(base_len, 4)", fill=-1),
                swa,
            ),
        },
        page_size=4,
        seqlen_offsets=[1],
        maps={"full_to_swa": Map(torch.arange(29) * 8, -1)},
    ).run(LENGTHS, ROWS)
    assert pages.tolist() == [[7, -7, -7, -7], [2, -7, -7, -7], [5, 6, 7, -7]]
    assert swa.tolist() == [[-1, -1, -1, -1], [-1] * 4, [40, 48, -1, -1]]


def test_pages_one_behind_the_other() -> None:
    """FlashInfer's plan inputs in pages: kv_indptr, kv_indices and last_page_len. Excess pages are dropped."""
    indptr, indices, last = blank(4), blank(2), blank(3)
    bound(
        {
            "page_indptr": into(running_sum("ceil_div(seq_len, page_size)"), indptr),
            "page_ids": into(packed("token(column * page_size) // page_size", at="page_indptr"), indices),
            "last_page_len": into(vector("where(seq_len > 0, (seq_len - 1) % page_size + 1, 0)", "request"), last),
        },
        page_size=4,
    ).run(LENGTHS, ROWS)
    assert indptr.tolist() == [0, 1, 1, 3]
    assert indices.tolist() == [30 // 4, 20 // 4]
    assert last.tolist() == [2, 0, 4]


@pytest.mark.parametrize(
    ("formula", "counts", "starts", "stored"),
    [
        ("known(column)", [6, 2], [0, 6, 8], [100, 101, 102, 103]),
        ("known(column)", [1, 2**31 - 1], [0, 1, -(2**31)], [100, 100, 101, 102]),
        ("known(column - 6)", [-6, 9], [0, -6, 3], [100, 101, 102, -7]),
        ("known(column)", [-3, 2], [0, -3, -1], [-7] * 4),
    ],
)
def test_dropped_elements_are_not_computed(
    formula: str, counts: list[int], starts: list[int], stored: list[int]
) -> None:
    """A look-up for an element that the destination has no room for isn't made, and so isn't reported."""
    sums, ids = blank(3), blank(4)
    plan = bound(
        {"starts": into(running_sum("count"), sums), "ids": into(packed(formula, at="starts"), ids)},
        inputs={"count": torch.int32},
        maps={"known": Map(torch.arange(100, 104), -1)},
        checked=True,
    )
    plan.run(LENGTHS[:2], ROWS[:2], count=torch.tensor(counts, dtype=torch.int32))
    plan.check()
    assert (sums.tolist(), ids.tolist()) == (starts, stored)


def test_a_packed_mask_of_bools() -> None:
    """A packed attention mask: each request has 2 * seq_len elements, stored one request after the other."""
    mask = torch.full((40,), 7, dtype=torch.uint8)
    bound(
        {
            "starts": running_sum("2 * max(seq_len, 0)"),
            "mask": into(packed("column % 3 - 1", at="starts", dtype="bool"), mask.view(torch.bool)),
        }
    ).run(LENGTHS, ROWS)
    counts = [2 * max(length, 0) for length in LENGTHS.tolist()]
    wanted = [int(column % 3 != 1) for count in counts for column in range(count)]
    assert mask.tolist() == [*wanted, *[7] * (40 - len(wanted))]


def test_tables_that_are_refused() -> None:
    for declare, message in (
        ({"mine": table("column", columns="row")}, "names row, which is per row"),
        ({"mine": table("column", columns="column")}, "there is no 'column' here"),
        ({"mine": vector("column")}, "there is no 'column' here"),
        ({"mine": table("column", columns="1", fill=2**31)}, "the fill of mine is 2147483648"),
        ({"mine": table("column", columns="1", dtype="bool")}, "the dtype of mine is 'bool'"),
        ({"mine": packed("column", at="cache_seqlens")}, "the at of mine is 'cache_seqlens'; allowed: 'cu_seqlens_k'"),
        ({"mine": packed("column", at="nsa_cu_seqlens_k")}, "the at of mine is 'nsa_cu_seqlens_k'"),
        ({"mine": {"kind": "table", "formula": "1"}}, "a table has columns, too"),
        ({"mine": {"kind": "packed", "formula": "1"}}, "a packed has at, too"),
    ):
        with pytest.raises(ConfigError, match=message):
            KernelConfig(fields=("mine",), declare=declare)
    with pytest.raises(ConfigError, match="mine, a declared table with a row per row, and extend is 'variable'"):
        KernelConfig(
            fields=("mine",), declare={"mine": table("1", columns="1")}, mode="draft_extend", extend="variable"
        )


def test_describe_knows_declared_fields() -> None:
    declare = {
        "pages": table("token(column)", columns="ceil_div(seq_len, 4)", dtype="int64"),
        "own": vector("1", rows=3),
    }
    config = KernelConfig(fields=("pages", "own"), declare=declare, num_backends=2)
    found = {each.field: (each.shape, each.bytes) for each in traffic(config, [9, 3]).written}
    assert found == {"pages": ((2, 2.0), 2 * 4 * 8), "own": ((6,), 2 * 6 * 4)}
    assert described(config, "pages") == "token(column), for columns below ceil_div(seq_len, 4)"
