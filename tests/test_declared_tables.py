"""Declared tables and packed fields: values computed by hand, and what is refused."""

from __future__ import annotations

import pytest
import torch
from declared import LENGTHS, POOL, ROWS, blank, bound
from onelaunch import ConfigError, KernelConfig, Map, MetadataBuffers, bind, into, packed, running_sum, table, vector
from onelaunch.inspect.traffic import traffic
from onelaunch.spec.vectors import described

pytestmark = pytest.mark.usefixtures("quick_builds")


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


def test_the_formula_of_a_standard_table_stays_a_look_up() -> None:
    """What isn't in req_to_token is ``missing`` in a declared field. A standard one leaves these elements alone.

    So the formula alone doesn't make a declared field one that the standard fields' strategies could write.
    """
    tokens, listed, standard = blank(3, 12), blank(20), blank(3, 12)
    lengths, rows = torch.tensor([11, 2, 1]), torch.tensor([3, -1, 4])
    bound(
        {
            "tokens": into(table("token(column)", columns="seq_len", missing=-3), tokens),
            "starts": running_sum("max(base_len, 0) + offset"),
            "listed": into(packed("token(column)", at="starts", missing=-3), listed),
        }
    ).run(lengths, rows, max_len=4)
    assert tokens.tolist() == [[*range(30, 40), -3, -7], [-3, -3, *[-7] * 10], [-3, *[-7] * 11]]
    assert listed.tolist() == [*range(30, 40), -3, -3, -3, -3, *[-7] * 6]
    bind([MetadataBuffers(page_indices=standard)], req_to_token=POOL).run(lengths[:2], rows[:2], max_len=4)
    assert standard.tolist() == [[*range(30, 34), *[-7] * 8], [-7] * 12, [-7] * 12]


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
