"""Declared fields: look-ups, padding, strides, what formulas are emitted as, tables and packed fields."""

from __future__ import annotations

from cases import Shape
from onelaunch import KernelConfig, packed, running_sum, table, vector

from .fault import Fault

_DECLARE = {
    "slots": vector("token(base_len + row)", rows=3, dtype="int64", pad=-1, missing=-7),
    "swa": vector("full_to_swa(token(base_len - 1))", "request", missing=5),
    "is_live": vector("seq_len > 3", "request", dtype="bool", pad=1),
    "quotient": vector("(base_len - 700) // block", "request"),
    "remainder": vector("(base_len - 700) % block", "request"),
    "pages": vector("ceil_div(base_len - 700, block)", "request"),
    "wraps": vector("base_len * 2000000 + accept * accept", "request"),
    "wide": vector("base_len * 200000000 * block + raw", "request", dtype="int64"),
    "chosen": vector("where(base_len >= 31, clamp(accept, -3, 9), -base_len)", "request"),
    "sums": running_sum("accept + offset", pad="last"),
    "steps": vector("base_len + step", "request"),
}
VECTORS = KernelConfig(
    num_backends=2,
    seqlen_offsets=(1, 9),
    threads=64,
    declare=_DECLARE,
    fields=tuple(_DECLARE),
    strided=("slots", "steps"),
    distinct=(("slots", 1), ("swa", 1)),
    inputs={"accept": "int32", "raw": "int64"},
    constants={"block": 7},
    maps={"full_to_swa": ("int64", -3)},
)
COMPUTED = KernelConfig(
    mode="target_verify",
    next_n=2,
    threads=64,
    page_size=4,
    declare={
        "counts": running_sum("ceil_div(max(base_len, 0), page_size)"),
        "ids": packed("token(column * page_size) // page_size", at="counts"),
        "tab": table("token(column) + row", columns="base_len", fill=-1),
        "live": table("column * request", "request", columns="base_len"),
    },
    fields=("ids", "tab", "live"),
)
# Look-ups before, in and behind a row and a map; the last row of the pool, with nothing behind it.
EDGES = Shape("edges", (0, 88, 89, 90, 91, -5, 31, 2**31 - 1), width=90, spare_rows=3, seed=3)
MANY = Shape("many", tuple(7 * i % 300 for i in range(100)), width=300, spare_rows=2, token_pad=1)

FAULTS = {
    "device/look_up.cuh": [
        Fault(
            "look up behind a row",
            "an element of the next row, or beyond the allocation",
            VECTORS,
            EDGES,
            r"column >= source\.columns",
            "column > source.columns",
        ),
        Fault(
            "look up before a row",
            "an element of the row before",
            VECTORS,
            Shape("before", (-1, 3, 5), width=90),
            r"column < 0 \|\| ",
            "",
        ),
        Fault(
            "look up with the width as the stride",
            "elements of other rows where rows are padded",
            VECTORS,
            MANY,
            r"row \* source\.row_stride",
            "row * source.columns",
        ),
        Fault(
            "yield 0 for what is missing",
            "a slot that exists in place of the declared one",
            VECTORS,
            EDGES,
            r"return missing;",
            "return 0;",
        ),
        Fault(
            "look up outside of a map",
            "a read out of bounds",
            VECTORS,
            EDGES,
            r"index < 0 \|\| index >= map\.size",
            "index < 0",
            "address",
        ),
    ],
    "device/store_once.cuh": [
        Fault(
            "let every backend's block store what all have alike",
            "two blocks write one address",
            VECTORS,
            MANY,
            r"if \(b > 0\) return;",
            "",
            "thread",
        ),
    ],
    "device/strided.cuh": [
        Fault(
            "store rows without their stride",
            "another backend's elements are overwritten",
            VECTORS,
            MANY,
            r"row \* to\[i\]\.row_stride",
            "row",
        ),
        Fault(
            "store requests without their stride",
            "another backend's elements are overwritten",
            VECTORS,
            MANY,
            r"request \* to\[b\]\.request_stride",
            "request",
        ),
    ],
    "vectors.cu.j2": [
        Fault(
            "add up threads without a request in the sum that pads",
            "the padding is larger than the last element",
            VECTORS,
            MANY,
            r"present \? (bits\(user_sums\)) : 0",
            r"\1",
        ),
        Fault(
            "pad one request too few",
            "the last padding request has an older step's slots",
            VECTORS,
            MANY,
            r"request < p\.captured_size",
            "request < p.captured_size - 1",
        ),
        Fault(
            "round the quotient towards zero",
            "negative dividends are one too large",
            VECTORS,
            MANY,
            r"floor_div\(([^;\n]*?), user_block\)",
            r"(\1) / user_block",
        ),
        Fault(
            "take the remainder's sign from the dividend",
            "negative dividends have a negative remainder",
            VECTORS,
            MANY,
            r"floor_mod\(([^;\n]*?), user_block\)",
            r"(\1) % user_block",
        ),
        Fault(
            "multiply with a sign",
            "overflow is undefined, and a compiler may assume that there is none",
            VECTORS,
            MANY,
            r"bits\((user_accept)\) \* user_accept",
            r"\1 * user_accept",
            "undefined",
        ),
        Fault(
            "compute an int64 field in int32",
            "products wrap that have room",
            VECTORS,
            MANY,
            r"bits\(std::int64_t\{base_len\}\) \* 200000000",
            "bits(base_len) * 200000000",
        ),
        Fault(
            "read an int64 input as int32",
            "upper bits are lost",
            VECTORS,
            MANY,
            r"std::int64_t\{user_raw_int64\}|user_raw_int64\)",
            "static_cast<std::int32_t>(user_raw_int64))",
        ),
        Fault(
            "give all backends the first one's number",
            "every step has the first one's values",
            VECTORS,
            MANY,
            r"const std::int32_t step = b;",
            "const std::int32_t step = 0;",
        ),
    ],
    "computed.cu.j2": [
        Fault(
            "store beyond the capacity",
            "a write out of bounds",
            COMPUTED,
            Shape("beyond", (4000, 9), width=90),
            r" \|\| at >= p\.user_ids_capacity",
            "",
            "address",
        ),
        Fault(
            "begin every request where the window does",
            "requests overwrite each other",
            COMPUTED,
            MANY,
            r"at = begins\[slot\] \+ place",
            "at = begins[0] + place",
        ),
        Fault(
            "give all rows of a request the first one's number",
            "rows are alike",
            COMPUTED,
            MANY,
            r"static_cast<int>\(table_row % rows_each\)",
            "0",
        ),
        Fault(
            "write dead columns of a table without a fill",
            "columns that belong to somebody else change",
            COMPUTED,
            MANY,
            r"if \(at >= live\) break;",
            "",
        ),
        Fault(
            "leave a part of a row out",
            "the columns from there on are stale",
            COMPUTED,
            MANY,
            r"kComputedColumns - 1\) / kComputedColumns",
            "kComputedColumns - 1) / kComputedColumns - 1",
        ),
    ],
}
