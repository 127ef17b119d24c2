"""Faults to plant in emitted kernels, and who has to notice: the proof that the harness sees what it is for.

They are grouped by the template that they are planted in. A new feature of the kernel adds the fault that it invites. A
pattern matches a small distinctive fragment; when the templates change so that it no longer does, the mutation fails
loudly and is to be brought up to date, not removed.
"""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass

from onelaunch.spec.config import KernelConfig
from onelaunch.spec.presets import preset

from .harness import Case

# Few threads, few blocks: a fault doesn't need more, and the sanitizers take their time. The cases below count on tiles
# of 512 columns.
_SMALL = {"threads": 64, "blocks_per_sm": 3, "unroll": 4}
# Tiles of 256 columns, of which a warp may take two at once.
DECODE = preset("nsa-decode-3").replace(threads=64, blocks_per_sm=3, unroll=2)
# The same, which neighbouring warps of few requests take two by two.
WARPS = preset("nsa-decode-3").replace(threads=128, blocks_per_sm=4)
FULL = preset("nsa-decode-3-full").replace(**_SMALL)
# Tiles of 128 columns: so small that a warp takes two at once, or that a request has many blocks.
WIDE = preset("nsa-decode-3-full").replace(threads=64, blocks_per_sm=3, unroll=1)
BLOCKS = preset("nsa-decode-3").replace(threads=64, blocks_per_sm=8, unroll=1)
PAGES_ONLY = preset("nsa-decode-3-pages-only").replace(**_SMALL)
ODD_PAGES = DECODE.replace(page_size=7)
INT64 = preset("nsa-decode-3-int64").replace(**_SMALL)
COPY = preset("nsa-copy-3").replace(**_SMALL)
COPY_ROWS = preset("nsa-copy-3-rows").replace(**_SMALL)
VERIFY = preset("nsa-target-verify-3").replace(num_backends=2, next_n=3, **_SMALL)
EXTEND = preset("nsa-draft-extend-3").replace(num_backends=2, **_SMALL)
VARIABLE = preset("nsa-draft-extend-3-variable").replace(num_backends=2, **_SMALL)
OFFSETS = preset("nsa-decode-3").replace(seqlen_offsets=(1, 80, 3), **_SMALL)
POOLS = preset("nsa-decode-3-kpool").replace(page_size=7, index_topk=512, **_SMALL)
FILLED = preset("flashmla-decode-3").replace(**_SMALL)
CHECKED = preset("nsa-decode-3-checked").replace(**_SMALL)
MQA = KernelConfig(num_backends=2, fields=("paged_mqa_schedule_metadata",), threads=64)
MLA = KernelConfig(num_backends=2, fields=("flashmla_metadata", "num_splits"), threads=64)
INDICES = preset("flashinfer-decode-3").replace(**_SMALL)
CHECKED_INDICES = INDICES.replace(checked=True)

# Rows of several tiles, the last of them to the end of all memory, every phase of source and destination.
LONG = Case("long", (1500, 3, 0, 1503, 700, 1503), width=1503, token_phase=4, table_phase=12, table_pad=2)
# Rows that end before their memory does.
SHORT = Case("short", (3, 1400, 0, 700, 30, 5, 9), width=1503, token_phase=4, table_phase=12, table_pad=2)
# So few that there is a warp for each.
FEW = Case("few", (1400, 0), width=1503, token_phase=4, table_phase=12, table_pad=2)
TWO = Case("two", (1400, 1300), width=1503, token_phase=4, table_phase=12, table_pad=2)
# The same, but one so long that its warp takes two tiles at once, and leaves some.
FEW_LONG = Case("few and long", (2600, 0), width=2603, token_phase=4, table_phase=12, table_pad=2)
UNEVEN = Case("uneven", (3600, 100), width=3603, token_phase=4, table_phase=12, table_pad=2)
# Just as long as a tile, so that with its alignment offset a row takes two.
JUST_ONE = Case("just one", (256, 100), width=3603, token_phase=4, table_phase=12, table_pad=2)
# A request fewer than the warps that belong to requests.
LEFT_OVER = Case("left over", (1400,) * 5, width=2603, sm_count=2, token_phase=4, table_phase=12, table_pad=2)
# Four blocks of two warps leave so much that the other four take two tiles at once; or so little that they take one.
HALF = Case("half", (7000,), width=7003, token_phase=4, table_phase=12, table_pad=2)
LITTLE = Case("little", (1900,), width=7003, token_phase=4, table_phase=12, table_pad=2)
# One for several blocks of several warps, and a few for as many.
ONE = Case("one", (1400,), width=1503, token_phase=4, table_phase=12, table_pad=2)
SHARED = Case("shared", (1400, 700), width=2503, token_phase=4, table_phase=12, table_pad=2)
# Two in each block of four warps.
PACKED = Case("packed", (1400, 700, 900), width=2503, token_phase=4, table_phase=12, table_pad=2)
# Equal rows of an odd number of tiles, enough for all warps of a block.
ODD = Case("odd", (2400,) * 5, width=2403, token_phase=4, table_phase=12, table_pad=2)
# The last tile ends where the row and req_to_token do.
EXACT = Case("exact", (1024, 1024), width=1024, token_phase=4, pool_rows=2)
EXACT_ALIGNED = Case("exact and aligned", (1024, 1024), width=1024, pool_rows=2)
# More requests than threads: several windows, several chunks of the running sums.
MANY = Case("many", tuple(range(170)), width=170, token_pad=1)
# A row that isn't in the pool, for few requests and for many.
BAD_ROW = Case("bad row", (600, 30, 600), width=610, bad_pool_row=4)
BAD_ROW_OF_MANY = Case("bad row of many", (600, 30, 600) * 40, width=610, bad_pool_row=-1)
# More violations than one.
VIOLATIONS = Case("violations", (-1, 1400, 9000, 700, -5, 5, 9), width=1503)
# Lengths that overflow when something is added.
HUGE = Case("huge", (2**31 - 1, 5), width=90)
# Elements from 2^31 on, so that rows are more than 32 bits apart, in elements too.
# Several chunks of requests, of one split or block up to many.
SCHEDULED = Case("scheduled", tuple((i * 977) % 5003 for i in range(150)), num_sms=40, num_sm_parts=11)
# Too little room for the last requests' tokens.
FULL_INDICES = Case("full indices", (300, 0, 600, 31, 600), width=610, most_indices=1000)
FAR = Case("far", (600, 600, 600), width=600, pool_rows=3, sparse_stride=2**30 + 4)


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Attributes:
        name: what is done.
        breaks: what it would break on a GPU.
        config, case: what shows it.
        template: where the fault is: a file of templates/device/, or a Jinja template, which means the whole source.
        pattern, replacement: a regular expression, substituted wherever it matches there.
        sanitizer: what the mutant is built with.
        caught_by: who has to complain, a value of ``Outcome.caught``.
    """

    name: str
    breaks: str
    config: KernelConfig
    case: Case
    template: str
    pattern: str
    replacement: str
    sanitizer: str
    caught_by: str

    def apply(self, source: str) -> str:
        """The faulty source.

        Raises:
            LookupError: the fragment isn't there, so nothing would be tested.
        """
        part = source
        if self.template.endswith(".cuh"):
            text = importlib.resources.files("onelaunch.templates").joinpath(*self.template.split("/"))
            part = text.read_text(encoding="utf-8").rstrip("\n")
        mutant, count = re.subn(self.pattern, self.replacement, part, flags=re.DOTALL)
        if count == 0 or mutant == part or part not in source:
            raise LookupError(
                f"mutation {self.name!r}: its pattern {self.pattern!r} no longer matches {self.template} in the "
                "emitted source; the templates changed, change the mutation with them"
            )
        return source.replace(part, mutant)


def _barrier(function: str, which: int) -> str:
    """Matches up to the barrier number ``which`` of a function, from 0."""
    return (
        rf"(\b{function}\([^;{{]*\) \{{(?:(?!\n\}}).)*?"
        + r"__syncthreads\(\);(?:(?!\n\}).)*?" * which
        + (r")__syncthreads\(\);")
    )


MUTATIONS = [
    # ---- device/running_sum.cuh
    Mutation(
        "drop the barrier before the warps' totals are read",
        "running sums of a block miss warps",
        DECODE,
        MANY,
        "device/running_sum.cuh",
        _barrier("block_running_sum", 0),
        r"\1",
        "thread",
        "thread",
    ),
    Mutation(
        "drop the barrier after the warps' totals are read",
        "the next sum overwrites totals that a slow warp still reads",
        DECODE,
        MANY,
        "device/running_sum.cuh",
        _barrier("block_running_sum", 1),
        r"\1",
        "thread",
        "thread",
    ),
    Mutation(
        "start the scan at the wrong stride",
        "sums miss their neighbours",
        FULL,
        LONG,
        "device/running_sum.cuh",
        r"distance = 1;",
        "distance = 2;",
        "none",
        "mismatch",
    ),
    Mutation(
        "stop the scan one stride early",
        "sums miss half of the warp",
        DECODE,
        MANY,
        "device/running_sum.cuh",
        r"distance < kWarpSize;",
        "distance < kWarpSize / 2;",
        "none",
        "mismatch",
    ),
    Mutation(
        "lose the carry between chunks",
        "sums start again behind the first block of requests",
        DECODE,
        MANY,
        "device/running_sum.cuh",
        r"carry \+= chunk;",
        "carry = chunk;",
        "none",
        "mismatch",
    ),
    # ---- device/window.cuh
    Mutation(
        "drop the barrier before a window's tiles are looked up",
        "tiles go to the wrong request",
        DECODE,
        MANY,
        "device/window.cuh",
        _barrier("count_tiles", 0),
        r"\1",
        "thread",
        "thread",
    ),
    Mutation(
        "vote in a branch that not all lanes take",
        "the warp hangs, or votes are lost",
        DECODE,
        LONG,
        "device/window.cuh",
        r"__popc\(__ballot_sync\(kFullMask, ([^;]*)\)\);",
        r"(lane < 20 ? __popc(__ballot_sync(kFullMask, \1)) : 0);",
        "none",
        "emulation",
    ),
    Mutation(
        "count a warp's requests without those of its own",
        "tiles go to the requests of the next warp",
        DECODE,
        MANY,
        "device/window.cuh",
        r"if \(w <= lane\) warp_end",
        "if (w < lane) warp_end",
        "none",
        "mismatch",
    ),
    # ---- device/live.cuh
    Mutation(
        "drop the barrier at the end of a window",
        "a slow warp looks its tiles up in the next window",
        DECODE,
        MANY,
        "device/live.cuh",
        r"if \(first > 0\) __syncthreads\(\);",
        "",
        "thread",
        "thread",
    ),
    Mutation(
        "a barrier in one branch only",
        "the block hangs, or worse",
        DECODE,
        LONG,
        "device/live.cuh",
        r"(const int slot = static_cast<int>\(threadIdx\.x\);)",
        r"\1 if (slot < 40) __syncthreads();",
        "none",
        "emulation",
    ),
    Mutation(
        "every block takes the same tiles",
        "all stores are done once a block: right, and slow",
        DECODE,
        FEW,
        "device/live.cuh",
        r"std::uint32_t block = blockIdx\.x - kFirstTableBlock;",
        "std::uint32_t block = 0;",
        "thread",
        "thread",
    ),
    Mutation(
        "don't carry tiles over to the next window",
        "requests behind the first window aren't written",
        DECODE,
        MANY,
        "device/live.cuh",
        r"tile -= window_tiles;",
        "",
        "none",
        "mismatch",
    ),
    Mutation(
        "give a tile to a request that has no columns",
        "pages before its first token are looked for, and written",
        DECODE,
        FEW,
        "device/live.cuh",
        r"column < columns && columns > 0",
        "column < columns",
        "none",
        "emulation",
    ),
    Mutation(
        "let the warps without a request take tiles",
        "two warps write the same tiles",
        DECODE,
        LEFT_OVER,
        "device/live.cuh",
        r"if \(tile >= split\.own_tiles\) columns = 0;",
        "",
        "thread",
        "thread",
    ),
    Mutation(
        "share out one remainder tile too few",
        "the end of a long row isn't written",
        DECODE,
        UNEVEN,
        "device/live.cuh",
        r"- begin - 1\) / \(kWideTiles \* kTileColumns\) \+ 1;",
        "- begin - 1) / (kWideTiles * kTileColumns);",
        "none",
        "mismatch",
    ),
    Mutation(
        "begin the remainder where a request's own tiles begin",
        "two warps write the same tiles",
        DECODE,
        UNEVEN,
        "device/live.cuh",
        r"column = begins\[place\.slot\] \+ ",
        "column = begins[place.slot] - own_columns + ",
        "thread",
        "thread",
    ),
    Mutation(
        "count own tiles as remainder tiles",
        "two warps write the same tiles",
        DECODE,
        UNEVEN,
        "device/live.cuh",
        r"kWideTiles \* own_columns : own_columns",
        "own_columns : own_columns",
        "thread",
        "thread",
    ),
    Mutation(
        "forget the alignment offset when the remainder is counted",
        "two warps write the same tiles",
        DECODE,
        JUST_ONE,
        "device/live.cuh",
        r"begin = \(columns \+ offset >",
        "begin = (columns >",
        "thread",
        "thread",
    ),
    Mutation(
        "give every warp the first of two tiles",
        "half of what is left isn't written",
        BLOCKS,
        LITTLE,
        "device/live.cuh",
        r"tile % kWideTiles\)",
        "tile * 0)",
        "none",
        "mismatch",
    ),
    Mutation(
        "look wide tiles up as if they were single ones",
        "half of what is left is written twice, and half isn't",
        BLOCKS,
        HALF,
        "device/live.cuh",
        r"wide \? tile : tile / kWideTiles",
        "tile / kWideTiles",
        "none",
        "mismatch",
    ),
    Mutation(
        "spread the tiles of requests that share a block",
        "a request's first columns aren't written",
        DECODE,
        TWO,
        "device/live.cuh",
        r"spread && share > 0",
        "spread",
        "none",
        "mismatch",
    ),
    Mutation(
        "take all warps of a block for one request's",
        "a request's first columns aren't written",
        WARPS,
        PACKED,
        "device/live.cuh",
        r"\(1u << split\.log2_warps_per_request\) - 1",
        "kWarps - 1",
        "none",
        "mismatch",
    ),
    Mutation(
        "take near tiles from the wrong block",
        "two warps write the same tiles",
        WARPS,
        ONE,
        "device/live.cuh",
        r"\(split\.own_tiles / \(kWarps / kNearWarps\)\)",
        "1",
        "thread",
        "thread",
    ),
    Mutation(
        "divide warps by requests without the one more",
        "a warp looks for a request behind the last",
        WARPS,
        SHARED,
        "device/live.cuh",
        r"__umulhi\(place \+ 1,",
        "__umulhi(place,",
        "address",
        "address",
    ),
    Mutation(
        "leave a shared array as it was",
        "shared memory holds garbage when a block starts",
        DECODE,
        MANY,
        "device/live.cuh",
        r"reaches\[slot\] = reach;",
        "",
        "address",
        "address",
    ),
    Mutation(
        "take one tile of a long request where two are counted",
        "half of the request isn't written",
        DECODE,
        FEW_LONG,
        "device/live.cuh",
        r"copy_tile<kWideTiles>",
        "copy_tile<1>",
        "none",
        "mismatch",
    ),
    Mutation(
        "take one tile alone of a request that is longer",
        "the end of a long request isn't written",
        DECODE,
        FEW_LONG,
        "device/live.cuh",
        r"if \(columns \+ offset > split\.wide_from\)",
        "if (false)",
        "none",
        "mismatch",
    ),
    Mutation(
        "count the blocks that belong to requests among the others",
        "tiles of a long row aren't written",
        BLOCKS,
        HALF,
        "device/live.cuh",
        r"gridDim\.x - kFirstTableBlock - split\.own_blocks",
        "gridDim.x - kFirstTableBlock",
        "none",
        "mismatch",
    ),
    Mutation(
        "spread the remainder over too few blocks",
        "two warps take the same tiles, and nobody the last",
        BLOCKS,
        HALF,
        "device/live.cuh",
        r"warp \* blocks \+ block",
        "warp + block",
        "none",
        "mismatch",
    ),
    Mutation(
        "give every warp of a block the same remainder tile",
        "two warps write the same tiles",
        DECODE,
        UNEVEN,
        "device/live.cuh",
        r"block \* kWarps \+ warp;",
        "block * kWarps;",
        "thread",
        "thread",
    ),
    Mutation(
        "forget the block that writes the lengths",
        "a small batch gets no tables",
        DECODE,
        Case("small", (40, 50), width=100),
        "device/live.cuh",
        r"static_cast<unsigned>\(kFirstTableBlock \+ ",
        "static_cast<unsigned>(",
        "none",
        "mismatch",
    ),
    Mutation(
        "forget the blocks that write the other backends' lengths",
        "a small batch gets no tables",
        OFFSETS,
        Case("small", (40, 50), width=100),
        "device/live.cuh",
        r"static_cast<unsigned>\(kFirstTableBlock \+ ",
        "static_cast<unsigned>(1 + ",
        "none",
        "mismatch",
    ),
    Mutation(
        "report and go on, with few requests",
        "what was reported is read all the same",
        CHECKED,
        BAD_ROW,
        "device/live.cuh",
        r"if \(pool_row < 0\) columns = 0;",
        "",
        "address",
        "address",
    ),
    Mutation(
        "report and go on, with many requests",
        "what was reported is read all the same",
        CHECKED,
        BAD_ROW_OF_MANY,
        "device/live.cuh",
        r" && pool_row >= 0",
        "",
        "address",
        "address",
    ),
    # ---- device/equal.cuh
    Mutation(
        "divide tiles by a row's without the one more",
        "a row's first tile goes to the row before",
        FULL,
        LONG,
        "device/equal.cuh",
        r"std::uint64_t\{tile\} \+ 1",
        "std::uint64_t{tile}",
        "none",
        "mismatch",
    ),
    Mutation(
        "one tile short in rows of equal length",
        "the end of a row isn't written",
        FULL,
        LONG,
        "device/equal.cuh",
        r"- 1\) / tile_columns \+ 1;",
        "- 1) / tile_columns;",
        "none",
        "mismatch",
    ),
    Mutation(
        "take one tile where two are counted",
        "half of every row isn't written",
        WIDE,
        LONG,
        "device/equal.cuh",
        r"copy_tile<kWideTiles>",
        "copy_tile<1>",
        "none",
        "mismatch",
    ),
    Mutation(
        "let warps behind the last equal row take tiles",
        "reads behind the pool indices",
        FULL,
        ODD,
        "device/equal.cuh",
        r"row >= p\.batch_size \|\| ",
        "",
        "address",
        "address",
    ),
    Mutation(
        "take a tile of rows that have no columns",
        "pages are written where nothing is",
        FULL,
        Case("nothing", (700, 30), width=1503, max_len=0, token_phase=4, table_phase=12, table_pad=2),
        "device/equal.cuh",
        r"if \(columns == 0\) warps = 0;",
        "",
        "none",
        "emulation",
    ),
    Mutation(
        "let all warps of a block take tiles where half of them are to",
        "two warps write the same tiles",
        FULL,
        FEW,
        "device/equal.cuh",
        r"if \(warp >= split\.warps\) return;",
        "",
        "thread",
        "thread",
    ),
    Mutation(
        "report and go on, with equal rows",
        "what was reported is read all the same",
        CHECKED.replace(extent="full"),
        BAD_ROW,
        "device/equal.cuh",
        r"if \(pool_row < 0\) return;",
        "",
        "address",
        "address",
    ),
    # ---- device/variable.cuh
    Mutation(
        "give a tile to a request without rows",
        "its tile is nobody's: the rows of a request behind it come late, or never",
        VARIABLE,
        MANY,
        "device/variable.cuh",
        r"\{stop_row - count, stop_row\}",
        "{stop_row - count, stop_row + (count == 0)}",
        "thread",
        "thread",
    ),
    Mutation(
        "lose the rows of the chunks before",
        "rows start again behind the first block of requests",
        VARIABLE,
        MANY,
        "device/variable.cuh",
        r"row_sum\.add\(",
        "RunningSum<std::uint32_t>().add(",
        "none",
        "mismatch",
    ),
    # ---- device/indices.cuh
    Mutation(
        "look tiles up before a window is complete",
        "tiles go to the wrong request",
        INDICES,
        MANY,
        "device/indices.cuh",
        _barrier("write_tables", 0),
        r"\1",
        "thread",
        "thread",
    ),
    Mutation(
        "forget the requests of earlier windows",
        "tokens overwrite those of the first requests",
        INDICES,
        Case("many", tuple(range(170)), width=170, most_indices=20_000),
        "device/indices.cuh",
        r"token_sum\.add\(",
        "RunningSum<std::uint64_t>().add(",
        "none",
        "mismatch",
    ),
    Mutation(
        "forget that offsets add up",
        "the backends of later steps lose tokens",
        INDICES,
        SHORT,
        "device/indices.cuh",
        r"request \* length_offset\(b\)",
        "length_offset(b)",
        "none",
        "mismatch",
    ),
    Mutation(
        "trust the lengths",
        "memory behind the destination is overwritten",
        INDICES,
        FULL_INDICES,
        "device/indices.cuh",
        r" && at < p\.kv_indices_capacity",
        "",
        "address",
        "address",
    ),
    Mutation(
        "add positions in 32 bits",
        "a sum that wrapped overwrites the first requests' tokens",
        INDICES,
        Case("wrapped", (2**31 - 1, 2**31 - 1, 5, 70), width=90),
        "device/indices.cuh",
        r"static_cast<std::int64_t>\(tokens_before\[found\]\)",
        "static_cast<std::int32_t>(tokens_before[found])",
        "none",
        "mismatch",
    ),
    # ---- device/token_columns.cuh
    Mutation(
        "count no alignment offset where rows have one",
        "the end of a row isn't written",
        FULL,
        Case("offset", (1536, 1530, 1536), width=1536, token_phase=4, table_phase=12, table_pad=2),
        "device/token_columns.cuh",
        r"\? 0 : kTileAlignment - 1",
        "? 0 : 0",
        "none",
        "mismatch",
    ),
    # ---- device/tile.cuh
    Mutation(
        "shift a bound by one: the end of a row's stores",
        "the column behind the live ones is overwritten",
        DECODE,
        SHORT,
        "device/tile.cuh",
        r"if \(column \+ i \* kWarpSize < stop\) data",
        "if (column + i * kWarpSize <= stop) data",
        "none",
        "mismatch",
    ),
    Mutation(
        "shift a bound by one: the end of a row's loads",
        "reads behind the token table",
        DECODE,
        LONG,
        "device/tile.cuh",
        r"(inside = column \+ i \* kWarpSize) <",
        r"\1 <=",
        "address",
        "address",
    ),
    Mutation(
        "forget that a tile may begin before its row",
        "reads before the token table, writes into the row before",
        DECODE,
        LONG,
        "device/tile.cuh",
        r"column \+ i \* kWarpSize < (static_cast<unsigned>\(end\)|stop)",
        r"static_cast<int>(column + i * kWarpSize) < static_cast<int>(\1)",
        "address",
        "address",
    ),
    Mutation(
        "write a request's columns to its first row only",
        "the other rows keep what was there",
        VERIFY,
        LONG,
        "device/tile.cuh",
        r"row < rows\.stop",
        "row < rows.first + 1",
        "none",
        "mismatch",
    ),
    Mutation(
        "store single words up to the longest backend's end",
        "shorter backends are overwritten behind their live columns",
        OFFSETS,
        SHORT,
        "device/tile.cuh",
        r"end_of\(to, ends, b\)",
        "end",
        "none",
        "mismatch",
    ),
    # ---- device/aligned_tile.cuh
    Mutation(
        "realign without looking at the width of the row",
        "reads behind the token table",
        DECODE,
        EXACT,
        "device/aligned_tile.cuh",
        r" \|\| first \+ kColumns \+ kVectorWords > width",
        "",
        "address",
        "address",
    ),
    Mutation(
        "realign without looking at the width of equal rows",
        "reads behind the token table",
        FULL,
        EXACT,
        "device/aligned_tile.cuh",
        r" \|\| first \+ kColumns \+ behind > width",
        "",
        "address",
        "address",
    ),
    Mutation(
        "realign without looking where equal rows begin",
        "reads before the token table, writes into the row before",
        FULL,
        LONG,
        "device/aligned_tile.cuh",
        r"first < shift \|\| ",
        "",
        "address",
        "address",
    ),
    Mutation(
        "read words to realign where there is nothing to realign",
        "reads behind the token table",
        FULL,
        EXACT_ALIGNED,
        "device/aligned_tile.cuh",
        r"next = shift > 0 \? 1 : 0",
        "next = 1",
        "address",
        "address",
    ),
    Mutation(
        "32-bit addresses of destination rows",
        "tables beyond 2^31 elements are written elsewhere",
        DECODE,
        FAR,
        "device/aligned_tile.cuh",
        r"\brow \* to\[(\w+)\]\.row_stride",
        r"static_cast<int>(row) * static_cast<int>(to[\1].row_stride)",
        "undefined",
        "undefined",
    ),
    Mutation(
        "16-byte stores that ignore where the row begins",
        "misaligned addresses: the launch dies",
        DECODE,
        LONG,
        "device/aligned_tile.cuh",
        r"return static_cast<int>\(reinterpret_cast<std::uintptr_t>\(begin\)[^;]*;",
        "return 0;",
        "undefined",
        "undefined",
    ),
    Mutation(
        "16-byte loads that ignore where the row begins",
        "misaligned addresses: the launch dies",
        DECODE,
        LONG,
        "device/aligned_tile.cuh",
        r"= boundary_before\(source \+ column\);",
        "= reinterpret_cast<const int4*>(source + column);",
        "undefined",
        "undefined",
    ),
    Mutation(
        "store 16 bytes up to the longest backend's end",
        "shorter backends are overwritten behind their live columns",
        OFFSETS,
        Case(
            "offsets",
            tuple(990 + 7 * i % 34 for i in range(60)),
            width=1503,
            token_phase=4,
            table_phase=12,
            table_pad=2,
        ),
        "device/aligned_tile.cuh",
        r"shortest_end\(to, ends\)",
        "longest_end(ends)",
        "none",
        "mismatch",
    ),
    # ---- device/realign.cuh
    Mutation(
        "realign by the wrong words",
        "tables of odd phase are shifted",
        DECODE,
        LONG,
        "device/realign.cuh",
        r"low\.w = high\.y;",
        "low.w = high.x;",
        "none",
        "mismatch",
    ),
    # ---- device/held_pages.cuh
    Mutation(
        "look for a page's token in the lanes of another page",
        "page numbers of other tokens",
        WIDE,
        LONG,
        "device/held_pages.cuh",
        r"holder = column / kVectorWords",
        "holder = before / kVectorWords",
        "none",
        "mismatch",
    ),
    Mutation(
        "take the first of four words for the one that begins a page",
        "page numbers of other tokens, where rows begin anywhere",
        WIDE,
        LONG,
        "device/held_pages.cuh",
        r"before % kVectorWords\), holder",
        "0), holder",
        "none",
        "mismatch",
    ),
    Mutation(
        "32-bit addresses of token rows",
        "token tables beyond 2^31 elements are read elsewhere",
        DECODE,
        FAR,
        "device/held_pages.cuh",
        r"pool_row \* p\.req_to_token_stride",
        "static_cast<int>(pool_row) * static_cast<int>(p.req_to_token_stride)",
        "undefined",
        "undefined",
    ),
    Mutation(
        "unsigned 32-bit addresses, which wrap without a word",
        "token tables beyond 2^32 elements are read elsewhere",
        DECODE,
        Case("farther", (600,) * 6, width=600, pool_rows=6, sparse_stride=2**30 + 4),
        "device/held_pages.cuh",
        r"pool_row \* p\.req_to_token_stride",
        "static_cast<std::uint32_t>(pool_row * p.req_to_token_stride)",
        "none",
        "mismatch",
    ),
    # ---- device/token_pages.cuh
    Mutation(
        "shift a bound by one: pages",
        "a page behind the live ones is overwritten",
        DECODE,
        SHORT,
        "device/token_pages.cuh",
        r"\(stop - 1\) / kPageSize \+ 1",
        "(stop - 1) / kPageSize + 2",
        "none",
        "mismatch",
    ),
    Mutation(
        "begin with the page before the tile",
        "two warps write one page",
        ODD_PAGES,
        LONG,
        "device/token_pages.cuh",
        r"\(begin \+ kPageSize - 1\) / kPageSize",
        "begin / kPageSize",
        "thread",
        "thread",
    ),
    Mutation(
        "read the table back from memory",
        "pages come from columns that other lanes are writing",
        DECODE,
        LONG,
        "device/token_pages.cuh",
        r"page_of\(token\)",
        "page_of(p.page_indices[0].data[rows.first * p.page_indices[0].row_stride + page * kPageSize])",
        "thread",
        "thread",
    ),
    Mutation(
        "read the table back through the read-only path",
        "the read-only cache may hold what was there before the launch",
        DECODE,
        LONG,
        "device/token_pages.cuh",
        r"page_of\(token\)",
        "page_of(__ldg(p.page_indices[0].data + rows.first * p.page_indices[0].row_stride + page * kPageSize))",
        "none",
        "emulation",
    ),
    Mutation(
        "write the longest backend's pages to all",
        "shorter backends are overwritten behind their live pages",
        OFFSETS,
        SHORT,
        "device/token_pages.cuh",
        r"if \(ends_differ[^;]*continue;",
        "",
        "none",
        "mismatch",
    ),
    Mutation(
        "take every page for the first of a pool",
        "pools come from whichever page was last",
        POOLS,
        LONG,
        "device/token_pages.cuh",
        r"if \(page % pages_per_column != 0\) return;",
        "",
        "thread",
        "thread",
    ),
    Mutation(
        "round pools towards zero",
        "padding pages below zero get pool 0",
        POOLS,
        LONG,
        "device/token_pages.cuh",
        r"floor_div\(number, pages_per_column\)",
        "(number / pages_per_column)",
        "none",
        "mismatch",
    ),
    # ---- device/lone_pages.cuh
    Mutation(
        "shift a bound by one: the pages of tables without tokens",
        "a page behind the live ones is overwritten",
        PAGES_ONLY,
        SHORT,
        "device/lone_pages.cuh",
        r"page < stop &&",
        "page <= stop &&",
        "none",
        "mismatch",
    ),
    Mutation(
        "fill as far as is live",
        "dead columns keep an earlier step's pages",
        FILLED,
        SHORT,
        "device/lone_pages.cuh",
        r"kFillsPages \? row_columns\(p\) : live",
        "live",
        "none",
        "mismatch",
    ),
    Mutation(
        "fill beyond the table",
        "the next row, or other memory, is overwritten",
        FILLED,
        SHORT,
        "device/lone_pages.cuh",
        r"page < stop &&",
        "page <= stop &&",
        "none",
        "emulation",
    ),
    # ---- device/floor_div.cuh
    Mutation(
        "round pages towards zero",
        "padding tokens below zero get page 0",
        ODD_PAGES,
        LONG,
        "device/floor_div.cuh",
        r" - \(value % divisor < 0 \? 1 : 0\)",
        "",
        "none",
        "mismatch",
    ),
    # ---- device/live_ends.cuh
    Mutation(
        "stop at the tokens before the ones to verify",
        "the last columns of every row aren't written",
        VERIFY,
        SHORT,
        "device/live_ends.cuh",
        r" \+ kLongestOffset;",
        ";",
        "none",
        "mismatch",
    ),
    # ---- device/backend_ends.cuh
    Mutation(
        "cut the longest backend's length at the width of the table",
        "shorter backends end before their length does, at the end of the table",
        OFFSETS,
        LONG,
        "device/backend_ends.cuh",
        r"p\.columns \+ \(kLongestOffset - kShortestOffset\)",
        "p.columns",
        "none",
        "mismatch",
    ),
    # ---- device/wrapping.cuh
    Mutation(
        "add to lengths with a sign",
        "overflow isn't defined",
        VERIFY,
        HUGE,
        "device/wrapping.cuh",
        r"std::make_unsigned_t<T> bits\(T value\) \{\n  return [^;]*;",
        "T bits(T value) {\n  return value;",
        "undefined",
        "undefined",
    ),
    # ---- device/mqa_schedule.cuh
    Mutation(
        "read the ends of a chunk before all are there",
        "multiprocessors begin anywhere",
        MQA,
        SCHEDULED,
        "device/mqa_schedule.cuh",
        r"(ends\[slot\] = split_sum\.add\([^;]*;\n)    __syncthreads\(\);",
        r"\1",
        "thread",
        "thread",
    ),
    Mutation(
        "give the remaining splits to the first multiprocessors",
        "a consumer of the other convention reads another request's blocks",
        MQA,
        SCHEDULED,
        "device/mqa_schedule.cuh",
        r"entry > even \? entry - even : 0",
        "entry < more ? entry : more",
        "none",
        "mismatch",
    ),
    Mutation(
        "let an empty schedule begin at the end",
        "consumers look up the length of a request that isn't there",
        MQA,
        Case("all zero", (0, 0, 0)),
        "device/mqa_schedule.cuh",
        r"kRemainderLast && entry < num_sms && items > 0 \? items - 1 : items",
        "items",
        "none",
        "mismatch",
    ),
    Mutation(
        "leave out the last entry",
        "the last multiprocessor has no end",
        MQA,
        SCHEDULED,
        "device/mqa_schedule.cuh",
        r"entry <= num_sms",
        "entry < num_sms",
        "none",
        "mismatch",
    ),
    # ---- device/flashmla_schedule.cuh
    Mutation(
        "take a whole request where only its blocks fit",
        "a part gets more than its share",
        MLA,
        Case("equal", (64,) * 150, num_sm_parts=11),
        "device/flashmla_schedule.cuh",
        r"ends\[at \+ step - 1\] <= limit",
        "ends[at + step - 1] <= limit + kMlaOverhead",
        "none",
        "mismatch",
    ),
    Mutation(
        "forget the cost of splitting",
        "parts take blocks that they can't afford",
        MLA,
        SCHEDULED,
        "device/flashmla_schedule.cuh",
        r"remain - kMlaOverhead\);",
        "remain);",
        "none",
        "mismatch",
    ),
    Mutation(
        "derive the parts before the walk is done",
        "parts end where shared memory says by chance",
        MLA,
        SCHEDULED,
        "device/flashmla_schedule.cuh",
        r"  __syncthreads\(\);\n\}",
        "}",
        "thread",
        "thread",
    ),
    Mutation(
        "let every thread walk",
        "all write where the parts begin",
        MLA,
        SCHEDULED,
        "device/flashmla_schedule.cuh",
        r"slot == 0 && at < count",
        "at < count",
        "thread",
        "thread",
    ),
    # ---- device/checks.cuh
    Mutation(
        "report without looking who was first",
        "the record mixes two violations",
        CHECKED,
        VIOLATIONS,
        "device/checks.cuh",
        r"if \(atomicCAS\(&record->kind, 0ull, kind\) != 0\) return;",
        "record->kind = kind;",
        "thread",
        "thread",
    ),
    Mutation(
        "report the wrong request",
        "the message blames another request",
        CHECKED,
        BAD_ROW,
        "device/checks.cuh",
        r"record->request = request;",
        "record->request = request + 1;",
        "none",
        "mismatch",
    ),
    # ---- device/launch.cuh
    Mutation(
        "leave the plan's device as the current one",
        "the caller goes on, on another device",
        DECODE,
        LONG,
        "device/launch.cuh",
        r"cudaSetDevice\(current\)",
        "cudaSuccess",
        "none",
        "emulation",
    ),
    # ---- settings.cu.j2
    Mutation(
        "leave a lane out of the mask",
        "that lane's value is undefined",
        DECODE,
        LONG,
        "device/running_sum.cuh",
        r"kFullMask = 0xffffffffu",
        "kFullMask = 0x7fffffffu",
        "none",
        "emulation",
    ),
    # ---- accessors.cu.j2
    Mutation(
        "count rows as if they were requests",
        "requests overwrite one another's rows",
        VERIFY,
        LONG,
        "accessors.cu.j2",
        r"\{request \* kNextN, \(request \+ 1\) \* kNextN\}",
        "{request, request + kNextN}",
        "thread",
        "thread",
    ),
    Mutation(
        "take an extend length below zero for what it says",
        "the rows of requests behind it move into those before it",
        VARIABLE,
        SHORT,
        "accessors.cu.j2",
        r"return rows > 0 \? static_cast<int>\(rows\) : 0;",
        "return static_cast<int>(rows);",
        "none",
        "mismatch",
    ),
    Mutation(
        "don't report that the indices don't fit",
        "the consumer reads what was there before",
        CHECKED_INDICES,
        FULL_INDICES,
        "accessors.cu.j2",
        r"tokens > limit",
        "false",
        "none",
        "mismatch",
    ),
    Mutation(
        "shift a bound by one: rows of the pool",
        "the row behind the pool is read",
        CHECKED,
        BAD_ROW,
        "accessors.cu.j2",
        r"row >= p\.pool_rows",
        "row > p.pool_rows",
        "address",
        "address",
    ),
    # ---- vectors.cu.j2 and the formulas of spec/fields.py
    Mutation(
        "let expanded lengths go below zero",
        "a padding request has a length of four billion",
        EXTEND,
        SHORT,
        "vectors.cu.j2",
        r"seqlens_expanded = max\(([^;]*), 0\);",
        r"seqlens_expanded = \1;",
        "none",
        "mismatch",
    ),
    Mutation(
        "give every row of a request its whole length",
        "tokens see those that come after them",
        EXTEND,
        LONG,
        "vectors.cu.j2",
        r" - rows \+ row \+ 1\)",
        " + 0 * (rows + row))",
        "none",
        "mismatch",
    ),
    Mutation(
        "clamp at the wrong value",
        "the NSA lengths are wrong",
        DECODE.replace(index_topk=512),
        LONG,
        "vectors.cu.j2",
        r"min\(seq_len, kIndexTopk\)",
        "min(seq_len, kIndexTopk - 1)",
        "none",
        "mismatch",
    ),
    Mutation(
        "clamp unfinished pools too",
        "the newest tokens are lost from sight",
        POOLS,
        LONG,
        "vectors.cu.j2",
        r"nsa_cache_seqlens = [^;]*;",
        "nsa_cache_seqlens = min(seq_len, kIndexTopk);",
        "none",
        "mismatch",
    ),
    Mutation(
        "return before a barrier",
        "the block hangs, or worse",
        DECODE,
        LONG,
        "vectors.cu.j2",
        r"(const bool present = request < batch_size;)",
        r"\1 if (!present) return;",
        "none",
        "emulation",
    ),
    # ---- copy.cu.j2
    Mutation(
        "copy one length too many",
        "reads and writes behind the lengths",
        COPY,
        LONG,
        "copy.cu.j2",
        r"if \(i == p\.batch_size\) break;",
        "",
        "address",
        "address",
    ),
    Mutation(
        "copy as many rows as there are requests",
        "the other rows aren't copied",
        COPY_ROWS,
        Case("rows", (1,) * 6, width=1503, extends=(3,)),
        "copy.cu.j2",
        r"p\.rows\b",
        "p.batch_size",
        "none",
        "mismatch",
    ),
    # ---- kernel.cu.j2
    Mutation(
        "every block writes the lengths",
        "the fields are written once a block, at the same time",
        DECODE,
        LONG,
        "kernel.cu.j2",
        r"if \(block < kLengthSets\) return refresh_vectors\(p, block\);",
        "refresh_vectors(p, 0);\n  if (block < kLengthSets) return;",
        "thread",
        "thread",
    ),
    # ---- entry.cu.j2
    Mutation(
        "launch on the default stream",
        "the launch isn't ordered with the caller's work",
        DECODE,
        LONG,
        "entry.cu.j2",
        r"config\.stream = [^;]*;",
        "",
        "none",
        "emulation",
    ),
]
