"""Tiles: what one warp moves, and the edges of a row."""

from __future__ import annotations

from cases import Shape

from .fault import Fault
from .shown_by import DECODE, EXACT, EXACT_ALIGNED, FAR, FULL, LONG, OFFSETS, SHORT

FAULTS = {
    "device/tile.cuh": [
        Fault(
            "shift a bound by one: the end of a row's stores",
            "the column behind the live ones is overwritten",
            DECODE,
            SHORT,
            r"if \(column \+ i \* kWarpSize < stop\) put",
            "if (column + i * kWarpSize <= stop) put",
        ),
        Fault(
            "shift a bound by one: the end of a row's loads",
            "reads behind the token table",
            DECODE,
            LONG,
            r"(inside = column \+ i \* kWarpSize) <",
            r"\1 <=",
            "address",
        ),
        Fault(
            "forget that a tile may begin before its row",
            "reads before the token table, writes into the row before",
            DECODE,
            LONG,
            r"column \+ i \* kWarpSize < (static_cast<unsigned>\(end\)|stop)",
            r"static_cast<int>(column + i * kWarpSize) < static_cast<int>(\1)",
            "address",
        ),
        Fault(
            "store single words up to the longest backend's end",
            "shorter backends are overwritten behind their live columns",
            OFFSETS,
            SHORT,
            r"end_of\(to, ends, b\)",
            "end",
        ),
    ],
    "device/aligned_tile.cuh": [
        Fault(
            "realign without looking at the width of the row",
            "reads behind the token table",
            DECODE,
            EXACT,
            r" \|\| first \+ kColumns \+ kVectorWords > width",
            "",
            "address",
        ),
        Fault(
            "realign without looking at the width of equal rows",
            "reads behind the token table",
            FULL,
            EXACT,
            r" \|\| first \+ kColumns \+ behind > width",
            "",
            "address",
        ),
        Fault(
            "realign without looking where equal rows begin",
            "reads before the token table, writes into the row before",
            FULL,
            LONG,
            r"first < shift \|\| ",
            "",
            "address",
        ),
        Fault(
            "read words to realign where there is nothing to realign",
            "reads behind the token table",
            FULL,
            EXACT_ALIGNED,
            r"next = shift > 0 \? 1 : 0",
            "next = 1",
            "address",
        ),
        Fault(
            "32-bit addresses of destination rows",
            "tables beyond 2^31 elements are written elsewhere",
            DECODE,
            FAR,
            r"\brow \* to\[(\w+)\]\.row_stride",
            r"static_cast<int>(row) * static_cast<int>(to[\1].row_stride)",
            "undefined",
        ),
        Fault(
            "16-byte stores that ignore where the row begins",
            "misaligned addresses: the launch dies",
            DECODE,
            LONG,
            r"return static_cast<int>\(reinterpret_cast<std::uintptr_t>\(begin\)[^;]*;",
            "return 0;",
            "undefined",
        ),
        Fault(
            "16-byte loads that ignore where the row begins",
            "misaligned addresses: the launch dies",
            DECODE,
            LONG,
            r"= boundary_before\(source \+ column\);",
            "= reinterpret_cast<const int4*>(source + column);",
            "undefined",
        ),
        Fault(
            "store 16 bytes up to the longest backend's end",
            "shorter backends are overwritten behind their live columns",
            OFFSETS,
            Shape(
                "offsets",
                tuple(990 + 7 * i % 34 for i in range(60)),
                width=1503,
                token_phase=4,
                table_phase=12,
                table_pad=2,
            ),
            r"shortest_end\(to, ends\)",
            "longest_end(ends)",
        ),
    ],
    "device/realign.cuh": [
        Fault(
            "realign by the wrong words",
            "tables of odd phase are shifted",
            DECODE,
            LONG,
            r"low\.w = high\.y;",
            "low.w = high.x;",
        ),
    ],
    "device/token_columns.cuh": [
        Fault(
            "count no alignment offset where rows have one",
            "the end of a row isn't written",
            FULL,
            Shape("offset", (1536, 1530, 1536), width=1536, token_phase=4, table_phase=12, table_pad=2),
            r"\? 0 : kTileAlignment - 1",
            "? 0 : 0",
        ),
    ],
}
