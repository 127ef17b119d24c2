"""The table of cases: the configurations and shapes that are checked on the CPU target, in the emulation and on a GPU.

``CONFIGURATIONS`` has one configuration for each strategy and each field kind, by name. ``SHAPES`` are the batches and
tables that each configuration runs on. Configurations of any two settings are in pairs.py.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from onelaunch import FIELDS, KernelConfig, packed, running_sum, table, vector
from onelaunch.errors import ConfigError

# ------------------------------------------------------------------------------------------------ shapes


@dataclass(frozen=True)
class Shape:
    """The tensors of one launch. Contents are random, drawn from ``seed``.

    Attributes:
        name: for messages.
        lengths: seq_lens, one a request.
        width: columns of req_to_token, and of a copy's precomputed page_indices.
        table_columns: columns of page_indices, ``width`` if None; the other tables have as many as they need.
        max_len: bound on the columns, none if None.
        pool_rows: rows of req_to_token.
        token_phase, table_phase: bytes past a 16-byte boundary where req_to_token and the tables begin.
        token_pad, table_pad: unused elements between rows.
        input_stride: elements from one length or pool index to the next; 0 where all lengths are the same.
        spare_rows: rows of the destinations beyond the batch.
        sparse_stride: if set, elements from row to row of all tables, of which only the columns have memory: so that
            addresses need more than 32 bits. A multiple of 4. Only the emulation knows it.
        extends: rows of the requests in turn, over and over, where extend lengths vary.
        bad_pool_row: what the first request has for a row of req_to_token, if set; for checked kernels.
        sm_count: multiprocessors that the emulation reports.
        num_sms, num_sm_parts: of the schedules.
        max_indices: elements of kv_indices, if the requests need as many.
        seed: of the contents.
        rows: the requests' rows of req_to_token; random if None.
        zero_rows: rows of req_to_token whose tokens are all 0.
        rewritten: columns of req_to_token whose tokens differ from those that ``seed`` makes.
        wrong: a field with one wrong element, which an audit must find. Only the emulation knows it.
        before: the previous launch on the same memory; this launch finds what it left. The memory has room
            for as many requests. Only the emulation knows it.
    """

    name: str
    lengths: tuple[int, ...]
    width: int = 700
    table_columns: int | None = None
    max_len: int | None = None
    pool_rows: int = 4
    token_phase: int = 0
    table_phase: int = 0
    token_pad: int = 0
    table_pad: int = 0
    input_stride: int = 1
    spare_rows: int = 0
    sparse_stride: int | None = None
    extends: tuple[int, ...] = (2, 0, 1, 5, 0, -1)
    bad_pool_row: int | None = None
    sm_count: int = 1
    num_sms: int = 7
    num_sm_parts: int = 5
    max_indices: int = 5_000
    seed: int = 0
    rows: tuple[int, ...] | None = None
    zero_rows: tuple[int, ...] = ()
    rewritten: tuple[int, ...] = ()
    wrong: str | None = None
    before: Shape | None = None

    def replace(self, **changes: Any) -> Shape:
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def then(self, name: str, **changes: Any) -> Shape:
        """The next launch on the same memory, with some attributes changed."""
        changes.setdefault(
            "spare_rows", len(self.lengths) + self.spare_rows - len(changes.get("lengths", self.lengths))
        )
        return self.replace(name=f"{self.name}, {name}", before=self, **changes)

    def within(self, longest: int) -> Shape:
        """The same shape with valid lengths and extend lengths, from 0 to ``longest``."""
        return self.replace(
            name=f"{self.name}, valid",
            lengths=tuple(min(max(n, 0), longest) for n in self.lengths),
            extends=tuple(max(n, 0) for n in self.extends),
        )


def batch(bs: int, width: int = 333, page_size: int = 64, **more: Any) -> Shape:
    """A batch of edge-case lengths, then random ones, in random order."""
    edges = [0, 1, page_size - 1, page_size, page_size + 1, width - 1, width, width + 1, 3 * width, 2 * page_size]
    numbers = random.Random(f"{bs}.{width}.{page_size}")
    lengths = [edges[i % len(edges)] if i % 3 else numbers.randint(0, width + 20) for i in range(bs)]
    numbers.shuffle(lengths)
    if more.get("input_stride") == 0:
        lengths = lengths[:1] * bs
    return Shape(
        f"{bs} requests, width {width}", tuple(lengths), width, **{"pool_rows": 23, "spare_rows": 2, "seed": bs, **more}
    )


# Edges of tiles, empty requests, padding, lengths beyond the table, and lengths whose sum exceeds 31 bits.
RAGGED = Shape(
    "ragged",
    (0, 1, 1603, -4, 511, 512, 513, 2**31 - 1, 2**32 + 5, 1600, 2**31 - 1),
    width=1603,
    token_phase=4,
    table_phase=8,
    table_pad=4,
    spare_rows=1,
)
# More than two tiles for each warp of the emulation.
LONG_ROWS = Shape(
    "long rows", tuple(389 * i % 1700 for i in range(50)), width=1609, token_phase=4, table_phase=12, seed=7
)
# Rows that lie more than 2^32 bytes apart, and elements from 2^31 on.
FAR = Shape("far", (600, 31, 600), width=600, pool_rows=3, sparse_stride=2**30 + 4, spare_rows=1, seed=5)
SHAPES = (
    RAGGED,
    Shape("no requests", (), spare_rows=1),
    Shape("one request", (5,), width=12),
    # Row strides that are odd: every row of source and destination has a different alignment phase.
    Shape("phases", (1541,) * 9, width=1541, pool_rows=5, token_phase=12, table_phase=4, input_stride=0, seed=1),
    # The last whole tile ends at the end of its allocation.
    Shape("exact", (1536, 1024, 1536), width=1536, pool_rows=2, token_phase=8, seed=2),
    Shape("bounded", (40, 900, 1300, 750), width=1300, table_columns=1001, max_len=700, input_stride=3, seed=3),
    Shape("narrow tables", (40, 900, 1300), width=1300, table_columns=770, seed=4),
    # At least as many blocks as requests: each request has one block or several, and the remainder is distributed.
    Shape("few rounds", (1401, 0), width=1401, token_phase=4, table_phase=12, seed=8),
    Shape("one long request", (1402,), width=1403, token_phase=4, table_phase=12, seed=10),
    Shape("a remainder to share", (2500, 90), width=2503, token_phase=12, table_phase=4, seed=9),
    Shape("a remainder for half the blocks", (7000,), width=7003, token_phase=4, table_phase=12, seed=11),
)
# What happens to a request from step to step, one launch after the other on the same memory: it grows; it moves to
# another place in the batch; its tokens are rewritten; it shrinks or is absent; another request takes its row. Row 1
# has only tokens 0, as padding has. In most tiles the last launch finds what the first one left; it must not take
# that as up to date.
_FIRST = Shape("steps", (1290, 31, 600, 190, 0, 1280), width=1303, pool_rows=9, token_phase=4, table_phase=12, seed=12)
_ROWS = (0, 1, 2, 3, 4, 5)
STEPS = (
    _FIRST.replace(rows=_ROWS, zero_rows=(1,))
    .then("again")
    .then("longer", lengths=(1293, 34, 603, 193, 3, 1283))
    .then("moved", rows=(5, 1, 0, 2, 3, 4), lengths=(1283, 34, 1293, 603, 193, 3))
    .then("rewritten", rewritten=(0, 310, 599, 1250))
    .then("shorter", lengths=(20, 35, 1293, 0, 256, 1250))
    .then("fewer", lengths=(1293, 36), rows=(6, 1))
    .then("other rows", lengths=(1290, 31, 600, 190, 0, 1280), rows=(0, 7, 2, 8, 4, 5), rewritten=())
)
# Batches around a warp, a block and a window of the running sums.
BATCHES = (0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 257, 700)
# For the CPU target and the GPU: the widths give odd row strides, the batches cross a warp and a block.
BATCH_SHAPES = (
    batch(1, 130, max_indices=50, num_sms=132, num_sm_parts=132),
    batch(3, 1031, input_stride=2, token_phase=4, token_pad=3),
    batch(33, 517, max_len=400, num_sms=1, num_sm_parts=1),
    batch(257, 70, table_pad=5, num_sms=133, num_sm_parts=512),
    batch(300, 1291, table_columns=1101, max_indices=70_000),
)
# What runs under compute-sanitizer: a strided input with padding, and more requests than a warp has threads.
SANITIZED = BATCH_SHAPES[1:3]

# ------------------------------------------------------------------------------------------------ configurations

TABLES = ("page_indices", "real_page_table")
SIX = KernelConfig().fields
SEVEN = (*SIX, "seqlens_expanded")
BY_BATCH = tuple(name for name, field in FIELDS.items() if field.kind in ("vector", "running_sum", "table"))
VECTORS = tuple(name for name, field in FIELDS.items() if field.kind in ("vector", "running_sum"))
MQA = "paged_mqa_schedule_metadata"
SCHEDULES = (MQA, "flashmla_metadata", "num_splits")
CSR = ("kv_indptr", "kv_indices")
# Every field that one kernel can write: a kernel that writes tables writes no kv_indices.
EVERY = tuple(name for name in FIELDS if name not in CSR)
VERIFY: dict[str, Any] = {"mode": "target_verify", "next_n": 3}
VARIABLE: dict[str, Any] = {"mode": "draft_extend", "extend": "variable"}

# One of each strategy and each field kind: the sanitizers see these.
STRATEGIES = {
    "live": KernelConfig(num_backends=3),
    "live pages": KernelConfig(num_backends=2, fields=("cu_seqlens_k", "real_page_table"), page_size=7),
    "live words": KernelConfig(num_backends=2, vector_bytes=4, req_to_token_dtype="int64", seq_lens_dtype="int32"),
    "equal rows": KernelConfig(num_backends=2, extent="full", page_size=16),
    "filled pages": KernelConfig(fields=("cache_seqlens", "real_page_table"), page_fill=-1, num_backends=2),
    "rows": KernelConfig(num_backends=2, fields=SEVEN, **VERIFY),
    "variable rows": KernelConfig(num_backends=2, fields=SEVEN, **VARIABLE),
    "pools": KernelConfig(
        num_backends=2, index_kpool=3, page_size=2, index_topk=100, fields=BY_BATCH, mode="draft_extend", next_n=2
    ),
    "offsets": KernelConfig(num_backends=3, seqlen_offsets=(0, 700, 5), fields=SEVEN),
    "vectors": KernelConfig(num_backends=2, fields=VECTORS, index_topk=9),
    "schedules": KernelConfig(num_backends=2, fields=(*SIX, *SCHEDULES), schedule_remainder="first"),
    "schedules of rows": KernelConfig(
        num_backends=3,
        seqlen_offsets=(9, 2, 500),
        schedule_per="row",
        flashmla_order="2025",
        fields=("seqlens_expanded", *SCHEDULES),
        **VERIFY,
    ),
    "indices": KernelConfig(num_backends=3, seqlen_offsets=(1, 2, 3), fields=CSR),
    "verified": KernelConfig(num_backends=3, writes="verified"),
    "verified pages": KernelConfig(
        num_backends=2,
        fields=("real_page_table",),
        page_size=7,
        seqlen_offsets=(1, 80),
        page_fill=-1,
        writes="verified",
    ),
    "verified rows": KernelConfig(num_backends=2, fields=SEVEN, writes="verified", **VARIABLE),
    "verified offsets": KernelConfig(
        num_backends=3, seqlen_offsets=(0, 700, 5), page_size=16, vector_bytes=4, writes="verified"
    ),
    "verified indices": KernelConfig(num_backends=2, seqlen_offsets=(3, 1), fields=CSR, writes="verified"),
    "copy": KernelConfig(operation="copy", num_backends=3),
    "checked": KernelConfig(num_backends=2, checked=True),
    "checked variable rows": KernelConfig(num_backends=2, fields=SEVEN, checked=True, **VARIABLE),
    "checked indices": KernelConfig(num_backends=2, seqlen_offsets=(3, 70), fields=CSR, checked=True, **VERIFY),
}
# Declared fields: each kind, dtype, way of writing and operator at least once.
DECLARE = {
    "positions": vector("base_len + row", rows=3, dtype="int64", pad=0),
    "out_cache_loc": vector("token(base_len + row)", rows=4, dtype="int64", pad=-1, missing=-7),
    "last_page_len": vector("where(seq_len > 0, (seq_len - 1) % page_size + 1, 0)", "request"),
    "page_sums": running_sum("ceil_div(max(base_len, 0) + offset, page_size)", pad="last"),
    "accepted": running_sum("accept + 1", dtype="int64", pad=3),
    "is_live": vector("(seq_len > 0) * (accept != request)", "request", dtype="bool", pad=1),
    "swa_loc": vector("full_to_swa(token(base_len - 1))", "request", missing=5),
    "slots": vector("table(base_len // block) * block + base_len % block", "request", dtype="int64", missing=-1),
    "other_rows": vector("table(request % 5, clamp(accept, -2, most))", "request", pad=9),
    "wide_input": vector("raw * 3 - base_len", "request", dtype="int64"),
    "narrow_input": vector("raw * 3 - base_len", "request"),
    "steps": vector("seq_len * 10 + step", "request"),
    "term": vector("nsa_cache_seqlens - rows", "row"),
    "pages": table("token(column * page_size) // page_size + row", columns="ceil_div(seq_len, page_size)"),
    "swa_pages": table("full_to_swa(token(column))", "request", columns="accept", fill=-1, dtype="int64", missing=2),
    "packed_pages": packed("token(column * page_size) // page_size - step", at="page_sums"),
    "packed_slots": packed("full_to_swa(column) + request", at="page_sums", dtype="int64"),
}
DECLARED: dict[str, Any] = {
    "declare": DECLARE,
    "inputs": {"accept": "int32", "raw": "int64"},
    "constants": {"block": 16, "most": 40},
    "sources": {"table": "int32"},
    "maps": {"full_to_swa": ("int64", -3)},
}
DECLARED_NAMES = tuple(DECLARE)
STRATEGIES |= {
    "declared": KernelConfig(fields=(*SEVEN, *DECLARED_NAMES[:-4]), page_size=16, **DECLARED),
    "declared rows": KernelConfig(
        fields=("cu_seqlens_k", *DECLARED_NAMES),
        strided=("positions", "is_live", "term", "swa_loc"),
        declare=DECLARE | {"row_sum": running_sum("seqlens_expanded + accept", "row", pad="last")},
        **{name: value for name, value in DECLARED.items() if name != "declare"},
        **VERIFY,
    ),
    "declared offsets": KernelConfig(
        num_backends=3,
        seqlen_offsets=(0, 3, 1),
        fields=("seqlens_expanded", *DECLARED_NAMES),
        distinct=tuple((n, 1) for n in ("positions", "out_cache_loc", "accepted", "swa_loc", "swa_pages")),
        strided=("out_cache_loc", "steps"),
        **DECLARED,
    ),
    "declared of variable rows": KernelConfig(
        num_backends=2,
        declare={
            "cu_seqlens_q": running_sum("rows", pad="last"),
            "of_row": vector("token(row) - row", dtype="int64"),
            "own": vector("rows * 100 + row + accept", rows=2),
            "row_sum": running_sum("row + accept", "row", dtype="int64"),
            "of_request": table("token(column) * rows", "request", columns="rows * 20"),
        },
        inputs={"accept": "int64"},
        fields=("page_indices", "cu_seqlens_q", "of_row", "own", "row_sum", "of_request"),
        **VARIABLE,
    ),
}
# Padding requests after those of the batch.
STRATEGIES |= {
    "padded": KernelConfig(
        num_backends=3, seqlen_offsets=(1, 2, 3), padding_len=1, fields=(*SEVEN, *DECLARED_NAMES), **DECLARED
    ),
    "padded rows": STRATEGIES["declared rows"].replace(padding_len=70, num_backends=2),
    "padded indices": KernelConfig(num_backends=2, seqlen_offsets=(2, 1), padding_len=1, fields=(*CSR, MQA)),
    "split counts": KernelConfig(
        num_backends=3,
        seqlen_offsets=(1, 2, 3),
        padding_len=1,
        num_head=5,
        num_kv_head=2,
        max_kv_splits=60,
        device_core_count=700,
        fields=(*CSR, "num_kv_splits"),
        distinct=(("num_kv_splits", 2),),
    ),
}
# Audits: of each strategy and each field kind.
AUDITS = {
    name: STRATEGIES[name].replace(writes="audit")
    for name in (
        "live",
        "live pages",
        "filled pages",
        "variable rows",
        "offsets",
        "schedules of rows",
        "indices",
        "declared offsets",
        "padded rows",
        "split counts",
    )
}
# Combinations of these that have code of their own.
CONFIGURATIONS = {
    **STRATEGIES,
    "one token per page": KernelConfig(num_backends=3, page_size=1),
    "pages beyond a tile": KernelConfig(num_backends=2, page_size=1024),
    "pages of int64, equal rows": KernelConfig(page_size=7, req_to_token_dtype="int64", extent="full"),
    "pages alone, equal rows": KernelConfig(num_backends=2, fields=("real_page_table",), extent="full"),
    "page_indices alone": KernelConfig(num_backends=2, fields=("page_indices",)),
    "no clamp": KernelConfig(num_backends=2, fields=("seqlens_expanded", "nsa_cu_seqlens_k"), index_topk=0),
    "shared": KernelConfig(num_backends=4, distinct=(("page_indices", 1), ("cu_seqlens_k", 2), ("real_page_table", 3))),
    "rows of words": KernelConfig(num_backends=2, vector_bytes=4, **VERIFY),
    "equal rows of requests": KernelConfig(num_backends=2, extent="full", page_size=7, fields=SEVEN, **VERIFY),
    "shared rows": KernelConfig(
        num_backends=3, fields=SEVEN, distinct=tuple((name, 1) for name in ("seqlens_expanded", *TABLES)), **VERIFY
    ),
    "pages of rows": KernelConfig(
        mode="draft_extend", next_n=3, fields=("seqlens_expanded", "real_page_table"), page_size=3
    ),
    "variable rows of words": KernelConfig(
        num_backends=2, vector_bytes=4, extend_seq_lens_dtype="int32", fields=SEVEN, **VARIABLE
    ),
    "variable rows, full": KernelConfig(num_backends=2, extent="full", **VARIABLE),
    "variable lengths": KernelConfig(fields=("seqlens_expanded",), **VARIABLE),
    "variable filled checked": KernelConfig(fields=("real_page_table",), page_fill=-1, checked=True, **VARIABLE),
    "one offset": KernelConfig(num_backends=2, seqlen_offsets=(5,)),
    "offsets, full": KernelConfig(
        num_backends=3, fields=("cache_seqlens", "page_indices"), seqlen_offsets=(1, 2, 3), extent="full"
    ),
    "offsets, shared": KernelConfig(
        num_backends=3,
        seqlen_offsets=(9, 2, 5),
        distinct=(("page_indices", 1),),
        fields=("cu_seqlens_k", *TABLES),
        page_size=7,
    ),
    "offsets, filled rows": KernelConfig(
        num_backends=2, seqlen_offsets=(1, 80), fields=("nsa_cu_seqlens_k", "real_page_table"), page_fill=-1, **VERIFY
    ),
    "offsets, filled and shared": KernelConfig(
        num_backends=2,
        seqlen_offsets=(80, 1),
        fields=("real_page_table",),
        distinct=(("real_page_table", 1),),
        page_fill=-1,
        **VERIFY,
    ),
    "pools of pages": KernelConfig(index_kpool=4, page_size=2, fields=("pooled_real_page_table",)),
    "schedules alone": KernelConfig(num_backends=3, fields=SCHEDULES, distinct=(("num_splits", 1),)),
    "schedules of pools": KernelConfig(
        num_backends=3, seqlen_offsets=(9, 2, 500), index_kpool=3, fields=("cu_seqlens_k", *SCHEDULES), **VERIFY
    ),
    "schedules, checked": KernelConfig(
        num_backends=2, fields=("real_page_table", *SCHEDULES), checked=True, page_size=3, **VERIFY
    ),
    "indices of int64": KernelConfig(
        num_backends=3, distinct=(("kv_indices", 2),), fields=("kv_indices",), req_to_token_dtype="int64"
    ),
    "indices into int64": KernelConfig(
        num_backends=2,
        seqlen_offsets=(2, 9),
        fields=CSR,
        dtypes=(("kv_indices", "int64"),),
        req_to_token_dtype="int64",
        checked=True,
    ),
    "indices beside": KernelConfig(num_backends=2, seqlen_offsets=(7,), fields=("cu_seqlens_k", *CSR, *SCHEDULES)),
    "verified rows of requests": KernelConfig(num_backends=2, fields=SEVEN, writes="verified", **VERIFY),
    "verified int64": KernelConfig(num_backends=2, page_size=7, req_to_token_dtype="int64", writes="verified"),
    "verified equal rows": KernelConfig(num_backends=2, extent="full", page_size=16, writes="verified"),
    "verified tokens, shared": KernelConfig(
        num_backends=3,
        seqlen_offsets=(9, 2, 5),
        distinct=(("page_indices", 1),),
        fields=("page_indices",),
        writes="verified",
    ),
    "verified pools": KernelConfig(
        index_kpool=4,
        page_size=2,
        num_backends=2,
        fields=("real_page_table", "pooled_real_page_table"),
        writes="verified",
    ),
    "copy of rows": KernelConfig(operation="copy", mode="target_verify", num_backends=2, fields=BY_BATCH),
    "copy of words": KernelConfig(operation="copy", num_backends=2, vector_bytes=4),
    "copy of vectors": KernelConfig(operation="copy", num_backends=2, fields=("cu_seqlens_k",)),
    # More backends than the unrolled loop handles: the kernel indexes their addresses.
    "every field of 9": KernelConfig(num_backends=9, fields=EVERY),
    "every field of 64": KernelConfig(
        num_backends=64, seqlen_offsets=tuple(range(64)), checked=True, fields=EVERY, page_size=7, **VERIFY
    ),
    "every field of 64, full": KernelConfig(num_backends=64, extent="full", fields=EVERY),
    "copy of every field to 64": KernelConfig(operation="copy", num_backends=64, fields=BY_BATCH),
}


def fullest(config: KernelConfig) -> KernelConfig:
    """The same with as many backends as the kernel's parameters have room for."""
    while True:
        try:
            config = config.replace(num_backends=config.num_backends + 1)
        except ConfigError:
            return config
