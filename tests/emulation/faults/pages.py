"""Pages: which token's page goes where."""

from __future__ import annotations

from cases import Shape

from .fault import Fault
from .shown_by import (
    DECODE,
    FAR,
    FEW_LONG,
    FILLED,
    LONG,
    ODD_PAGES,
    OFFSETS,
    PAGES_ONLY,
    POOLS,
    SHORT,
    WIDE,
    WIDE_PAGES,
)

FAULTS = {
    "device/held_pages.cuh": [
        Fault(
            "look for a page's token in the lanes of another page",
            "page numbers of other tokens",
            WIDE,
            LONG,
            r"holder = column / kVectorWords",
            "holder = before / kVectorWords",
        ),
        Fault(
            "take the first of four words for the one that begins a page",
            "page numbers of other tokens, where rows begin anywhere",
            WIDE,
            LONG,
            r"before % kVectorWords\), holder",
            "0), holder",
        ),
        Fault(
            "32-bit addresses of token rows",
            "token tables beyond 2^31 elements are read elsewhere",
            DECODE,
            FAR,
            r"pool_row \* p\.req_to_token_stride",
            "static_cast<int>(pool_row) * static_cast<int>(p.req_to_token_stride)",
            "undefined",
        ),
        Fault(
            "unsigned 32-bit addresses, which wrap without a word",
            "token tables beyond 2^32 elements are read elsewhere",
            DECODE,
            Shape("farther", (600,) * 6, width=600, pool_rows=6, sparse_stride=2**30 + 4),
            r"pool_row \* p\.req_to_token_stride",
            "static_cast<std::uint32_t>(pool_row * p.req_to_token_stride)",
        ),
    ],
    "device/token_pages.cuh": [
        Fault(
            "shift a bound by one: pages",
            "a page behind the live ones is overwritten",
            DECODE,
            SHORT,
            r"\(stop - 1\) / kPageSize \+ 1",
            "(stop - 1) / kPageSize + 2",
        ),
        Fault(
            "begin with the page before the tile",
            "two warps write one page",
            ODD_PAGES,
            LONG,
            r"\(begin \+ kPageSize - 1\) / kPageSize",
            "begin / kPageSize",
            "thread",
        ),
        Fault(
            "read the table back from memory",
            "pages come from columns that other lanes are writing",
            DECODE,
            LONG,
            r"page_of\(token\)",
            "page_of(p.page_indices[0].data[row * p.page_indices[0].row_stride + page * kPageSize])",
            "thread",
        ),
        Fault(
            "read the table back through the read-only path",
            "the read-only cache may hold what was there before the launch",
            DECODE,
            LONG,
            r"page_of\(token\)",
            "page_of(__ldg(p.page_indices[0].data + row * p.page_indices[0].row_stride + page * kPageSize))",
            "emulation",
        ),
        Fault(
            "write the longest backend's pages to all",
            "shorter backends are overwritten behind their live pages",
            OFFSETS,
            SHORT,
            r"if \(ends_differ[^;]*continue;",
            "",
        ),
        Fault(
            "take every page for the first of a pool",
            "pools come from whichever page was last",
            POOLS,
            LONG,
            r"if \(page % pages_per_column != 0\) return;",
            "",
            "thread",
        ),
        Fault(
            "round pools towards zero",
            "padding pages below zero get pool 0",
            POOLS,
            LONG,
            r"floor_div\(number, pages_per_column\)",
            "(number / pages_per_column)",
        ),
    ],
    "device/lone_pages.cuh": [
        Fault(
            "shift a bound by one: the pages of tables without tokens",
            "a page behind the live ones is overwritten",
            PAGES_ONLY,
            SHORT,
            r"page < stop &&",
            "page <= stop &&",
        ),
        Fault(
            "fill as far as is live",
            "dead columns keep an earlier step's pages",
            FILLED,
            SHORT,
            r"kFillsPages \? row_columns\(p\) : live",
            "live",
        ),
        Fault(
            "fill beyond the table",
            "the next row, or other memory, is overwritten",
            FILLED,
            SHORT,
            r"page < stop &&",
            "page <= stop &&",
            "emulation",
        ),
    ],
    "device/every_page.cuh": [
        Fault(
            "read one tile of pages where two are counted",
            "half of a long request's pages aren't written",
            WIDE_PAGES,
            FEW_LONG,
            r"numbers\[kTiles \* kTileColumns / kWarpSize\]",
            "numbers[kTileColumns / kWarpSize]",
        ),
    ],
    "device/floor_div.cuh": [
        Fault(
            "round pages towards zero",
            "padding tokens below zero get page 0",
            ODD_PAGES,
            LONG,
            r" - \(value % divisor < 0 \? 1 : 0\)",
            "",
        ),
    ],
}
