"""What is refused of declared fields, before anything is written or built: declarations, destinations, runs."""

from __future__ import annotations

from typing import Any

import onelaunch
import pytest
import torch
from declared import LENGTHS, POOL, ROWS, blank, bound
from onelaunch import ConfigError, KernelConfig, Map, MetadataBuffers, into, running_sum, vector
from onelaunch.errors import ArgumentError
from onelaunch.run.checks import check_declared
from onelaunch.spec.fields import Field
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick_builds")


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
