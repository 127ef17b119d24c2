"""The configurations and shapes that show faults."""

from __future__ import annotations

from cases import Shape
from onelaunch import KernelConfig, preset

# Few threads and blocks: a fault needs no more, and the sanitizers are slow. The shapes below assume tiles of 512
# columns.
_SMALL = {"threads": 64, "blocks_per_sm": 3, "unroll": 4}
# Tiles of 256 columns, of which a warp may take two at once.
DECODE = preset("nsa-decode-3").replace(threads=64, blocks_per_sm=3, unroll=2)
# The same tiles; with few requests, neighbouring warps take two each.
WARPS = preset("nsa-decode-3").replace(threads=128, blocks_per_sm=4)
FULL = preset("nsa-decode-3-full").replace(**_SMALL)
# Tiles of 128 columns: small enough that a warp takes two at once, or that a request has many blocks.
WIDE = preset("nsa-decode-3-full").replace(threads=64, blocks_per_sm=3, unroll=1)
BLOCKS = preset("nsa-decode-3").replace(threads=64, blocks_per_sm=8, unroll=1)
PAGES_ONLY = preset("nsa-decode-3-pages-only").replace(**_SMALL)
SHORT_PAGES = PAGES_ONLY.replace(page_size=2)
# Tiles of 32 pages: a long request's own warps take two at once, and so do those that take its remainder.
WIDE_PAGES = PAGES_ONLY.replace(page_size=2, blocks_per_sm=8, unroll=1)
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
WORK = KernelConfig(
    fields=("paged_mqa_schedule_metadata",),
    mode="target_verify",
    next_n=3,
    schedule_remainder="first",
    schedule_split_cost=7,
    threads=64,
)
MLA = KernelConfig(num_backends=2, fields=("flashmla_metadata", "num_splits"), threads=64)
SPLITS = KernelConfig(
    num_backends=2, fields=("num_kv_splits",), max_kv_splits=64, num_head=6, num_kv_head=3, threads=64
)
INDICES = preset("flashinfer-decode-3").replace(**_SMALL)
CHECKED_INDICES = INDICES.replace(checked=True)

# Rows of several tiles, the last one up to the end of the allocation; every phase of source and destination.
LONG = Shape("long", (1500, 3, 0, 1503, 700, 1503), width=1503, token_phase=4, table_phase=12, table_pad=2)
# Rows that end before their allocation does.
SHORT = Shape("short", (3, 1400, 0, 700, 30, 5, 9), width=1503, token_phase=4, table_phase=12, table_pad=2)
# So few requests that each has a warp.
FEW = Shape("few", (1400, 0), width=1503, token_phase=4, table_phase=12, table_pad=2)
TWO = Shape("two", (1400, 1300), width=1503, token_phase=4, table_phase=12, table_pad=2)
# The same, but one request is so long that its warp takes two tiles at once and leaves a remainder.
FEW_LONG = Shape("few and long", (2600, 0), width=2603, token_phase=4, table_phase=12, table_pad=2)
UNEVEN = Shape("uneven", (3600, 100), width=3603, token_phase=4, table_phase=12, table_pad=2)
# Exactly as long as a tile, so that with its alignment offset a row takes two tiles.
JUST_ONE = Shape("just one", (256, 100), width=3603, token_phase=4, table_phase=12, table_pad=2)
# Nearly as long as a tile: of a request's two rows, one takes two tiles and the other takes one.
JUST_TWO = Shape("just two", (496,) * 6, width=3603, token_phase=4, table_pad=2, extends=(2,))
# One request fewer than there are warps for requests.
LEFT_OVER = Shape("left over", (1400,) * 5, width=2603, sm_count=2, token_phase=4, table_phase=12, table_pad=2)
# What four blocks of two warps leave is so long that the other four take two tiles at once; or so short that they take
# one.
HALF = Shape("half", (7000,), width=7003, token_phase=4, table_phase=12, table_pad=2)
LITTLE = Shape("little", (1900,), width=7003, token_phase=4, table_phase=12, table_pad=2)
# One request for several blocks of several warps, and a few requests for as many.
ONE = Shape("one", (1400,), width=1503, token_phase=4, table_phase=12, table_pad=2)
SHARED = Shape("shared", (1400, 700), width=2503, token_phase=4, table_phase=12, table_pad=2)
# Two requests in each block of four warps.
PACKED = Shape("packed", (1400, 700, 900), width=2503, token_phase=4, table_phase=12, table_pad=2)
# Equal rows of an odd number of tiles, enough for all warps of a block.
ODD = Shape("odd", (2400,) * 5, width=2403, token_phase=4, table_phase=12, table_pad=2)
# The last tile ends where the row and req_to_token do.
EXACT = Shape("exact", (1024, 1024), width=1024, token_phase=4, pool_rows=2)
EXACT_ALIGNED = Shape("exact and aligned", (1024, 1024), width=1024, pool_rows=2)
# More requests than threads: several windows, several chunks of the running sums.
MANY = Shape("many", tuple(range(170)), width=170, token_pad=1)
# Three blocks for the remainder of many rows of pages: two groups of one, and one left over. A group counts more rows
# than a block has threads.
GROUPS = Shape("groups", tuple(i * 977 % 1301 for i in range(300)), width=1303, sm_count=3, token_phase=4, table_pad=2)
# A row that isn't in the pool, for few requests and for many.
BAD_ROW = Shape("bad row", (600, 30, 600), width=610, bad_pool_row=4)
BAD_ROW_OF_MANY = Shape("bad row of many", (600, 30, 600) * 40, width=610, bad_pool_row=-1)
# More violations than one.
VIOLATIONS = Shape("violations", (-1, 1400, 9000, 700, -5, 5, 9), width=1503)
# Lengths that overflow when something is added.
HUGE = Shape("huge", (2**31 - 1, 5), width=90)
# Several chunks of requests, from one split or block to many.
SCHEDULED = Shape("scheduled", tuple((i * 977) % 5003 for i in range(150)), num_sms=40, num_sm_parts=11)
# The same with few requests, and entries for more than one warp.
FEW_SCHEDULED = Shape("few scheduled", tuple((i * 977) % 5003 for i in range(20)), num_sms=40)
# Too little room for the last requests' tokens.
FULL_INDICES = Shape("full indices", (300, 0, 600, 31, 600), width=610, max_indices=1000)
# Elements from 2^31 on: row offsets exceed 32 bits, counted in elements as well as in bytes.
FAR = Shape("far", (600, 600, 600), width=600, pool_rows=3, sparse_stride=2**30 + 4)
