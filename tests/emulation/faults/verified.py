"""Verified writes: the hash, where it is kept, and when."""

from __future__ import annotations

from cases import STEPS, Shape
from onelaunch import KernelConfig

from .fault import Fault
from .shown_by import DECODE, FILLED, OFFSETS

VERIFIED = DECODE.replace(num_backends=2, writes="verified")
ENDS = OFFSETS.replace(writes="verified", unroll=2)
PAGES = ENDS.replace(fields=("real_page_table",), page_size=2)
INT64 = KernelConfig(
    fields=("real_page_table",), page_size=2, req_to_token_dtype="int64", writes="verified", threads=64, unroll=2
)
FILLED_PAGES = FILLED.replace(writes="verified", page_size=4)
# A row that ends in the second of two tiles that a warp takes at once.
ONE_LONG = Shape("one long request", (6999,), width=7003, token_phase=4, table_phase=12)
# Another request's row ends in the second tile of the first one, which then comes back.
BACK = (
    Shape("first", (700,), rows=(0,)).then("another", lengths=(300,), rows=(1,)).then("back", lengths=(700,), rows=(0,))
)

FAULTS = {
    "device/tile_hash.cuh": [
        Fault(
            "leave a lane's words out of a tile's hash",
            "a tile whose other lanes' words are rewritten keeps the old ones",
            VERIFIED,
            STEPS,
            r"(value = std::uint64_t\{)",
            r"if (threadIdx.x % kWarpSize == 13) return;\n    \1",
        ),
        Fault(
            "hash without how many columns there are",
            "a row that grows by tokens that are 0 isn't written",
            VERIFIED,
            STEPS,
            r": value\(counts \* kMixFactor\)",
            ": value(0 * counts)",
        ),
        Fault(
            "keep one hash for the tiles of two rows",
            "two warps write it",
            VERIFIED,
            STEPS,
            r"row \* p\.tile_hashes_stride",
            "row / 2 * p.tile_hashes_stride",
            "thread",
        ),
        Fault(
            "leave out the barrier before a hash is kept",
            "a lane that is late reads the new hash, or the hash is there before the words",
            VERIFIED,
            STEPS,
            r"  __syncwarp\(\);\n",
            "",
            "thread",
        ),
        Fault(
            "leave the hash of a tile in which a row ends",
            "a row that was shorter in between isn't written",
            VERIFIED,
            BACK,
            r"\*kept_hash\(p, row, first\) = 0;",
            ";",
        ),
    ],
    "device/verified_tile.cuh": [
        Fault(
            "write no pages where a row ends",
            "real_page_table keeps the old ones",
            VERIFIED,
            STEPS,
            r"    then\(first\);\n",
            "",
        ),
        Fault(
            "take any hash for the kept one",
            "only what was never written is written",
            VERIFIED,
            STEPS,
            r"known\[t\] == hash",
            "known[t] != 0",
        ),
        Fault(
            "keep the hash of a tile that wasn't written",
            "the tile is never written",
            VERIFIED,
            STEPS,
            r"    store_words\(token_table\(p\), row, words \+ t \* kTileWords, begin, ends\);\n",
            "",
        ),
        Fault(
            "write the words of the first tile to the second",
            "wide tiles hold their first half twice",
            VERIFIED,
            STEPS,
            r"words \+ t \* kTileWords, begin",
            "words, begin",
        ),
        Fault(
            "read behind the token table",
            "the last group of a row lies behind it",
            VERIFIED,
            Shape("exact", (1024, 1024), width=1024, token_phase=4, pool_rows=2),
            r" && first \+ kColumns \+ kVectorWords <= width",
            "",
            "address",
        ),
        Fault(
            "shift a bound by one: the end of a row's stores",
            "the column behind the live ones is overwritten",
            VERIFIED,
            ONE_LONG,
            r"(static_cast<unsigned>\(column \+ word_offset\(i\)\)) < stop",
            r"\1 <= stop",
        ),
    ],
    "device/verified_tokens_and_pages.cuh": [
        Fault(
            "write no pages where a tile changed",
            "real_page_table keeps the old ones",
            VERIFIED,
            STEPS,
            r"read_pages<1>\(p, row, source, begin, ends\);",
            "",
        ),
    ],
    "device/verified_pages.cuh": [
        Fault(
            "hash without the numbers of the pages",
            "pages that move keep their old numbers",
            FILLED_PAGES,
            STEPS,
            r"lane\.add\(number\)",
            "lane.add(number & 0)",
        ),
    ],
    "device/backend_counts.cuh": [
        Fault(
            "count the longest backend's columns only",
            "a shorter backend's new pages aren't written",
            PAGES,
            STEPS,
            r"end_with\(ends, kShortestOffset\)",
            "end_with(ends, kShortestOffset + 79)",
        ),
    ],
}
