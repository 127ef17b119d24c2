"""Audits, and the function with which they replace all stores."""

from __future__ import annotations

from cases import Shape
from onelaunch import KernelConfig

from .fault import Fault, barrier
from .shown_by import DECODE, LONG, POOLS

AUDIT = DECODE.replace(writes="audit")
# Without running sums: their barriers would hide a missing one.
VECTOR = KernelConfig(fields=("cache_seqlens",), threads=64, writes="audit")
# One element of a table is wrong.
WRONG = Shape("wrong", (1500, 3, 0, 700), width=1503, token_phase=4, table_phase=12, wrong="real_page_table")

FAULTS = {
    "device/put.cuh": [
        Fault(
            "write nothing",
            "fields keep what they held",
            POOLS,
            LONG,
            r"  \*address = value;\n",
            "",
        ),
    ],
    "device/audit.cuh": [
        Fault(
            "compare with what is there",
            "no difference is ever found",
            AUDIT,
            WRONG,
            r"found == static_cast<Stored>\(value\)",
            "found == *address",
        ),
        Fault(
            "report the wrong way round",
            "the message takes what is there for what should be",
            AUDIT,
            WRONG,
            r"found, value\);",
            "value, found);",
        ),
        Fault(
            "write what should be there",
            "an audit heals what it is to find",
            AUDIT,
            WRONG,
            r"(  if \(atomicCAS)",
            r"  *const_cast<T*>(address) = value;\n\1",
            "emulation",
        ),
        Fault(
            "let a block begin without having reported nothing",
            "what shared memory holds decides whether it reports",
            AUDIT,
            WRONG,
            r"    audit_reported = 0;\n",
            "",
        ),
        Fault(
            "drop the barrier before the block's record is read",
            "a fast thread reports to what shared memory holds",
            VECTOR,
            WRONG.replace(wrong="cache_seqlens"),
            barrier("begin_audit", 0),
            r"\1",
            "thread",
        ),
    ],
}
