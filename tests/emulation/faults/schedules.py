"""The schedules of DeepGEMM and FlashMLA."""

from __future__ import annotations

from cases import Shape

from .fault import Fault
from .shown_by import MLA, MQA, SCHEDULED

FAULTS = {
    "device/mqa_schedule.cuh": [
        Fault(
            "read the ends of a chunk before all are there",
            "multiprocessors begin anywhere",
            MQA,
            SCHEDULED,
            r"(ends\[slot\] = split_sum\.add\([^;]*;\n)    __syncthreads\(\);",
            r"\1",
            "thread",
        ),
        Fault(
            "give the remaining splits to the first multiprocessors",
            "a consumer of the other convention reads another request's blocks",
            MQA,
            SCHEDULED,
            r"entry > even \? entry - even : 0",
            "entry < more ? entry : more",
        ),
        Fault(
            "let an empty schedule begin at the end",
            "consumers look up the length of a request that isn't there",
            MQA,
            Shape("all zero", (0, 0, 0)),
            r"kRemainderLast && entry < num_sms && items > 0 \? items - 1 : items",
            "items",
        ),
        Fault(
            "leave out the last entry",
            "the last multiprocessor has no end",
            MQA,
            SCHEDULED,
            r"entry <= num_sms",
            "entry < num_sms",
        ),
    ],
    "device/flashmla_schedule.cuh": [
        Fault(
            "take a whole request where only its blocks fit",
            "a part gets more than its share",
            MLA,
            Shape("equal", (64,) * 150, num_sm_parts=11),
            r"ends\[at \+ step - 1\] <= limit",
            "ends[at + step - 1] <= limit + kMlaOverhead",
        ),
        Fault(
            "forget the cost of splitting",
            "parts take blocks that they can't afford",
            MLA,
            SCHEDULED,
            r"remain - kMlaOverhead\);",
            "remain);",
        ),
        Fault(
            "derive the parts before the walk is done",
            "parts end where shared memory says by chance",
            MLA,
            SCHEDULED,
            r"  __syncthreads\(\);\n\}",
            "}",
            "thread",
        ),
        Fault(
            "let every thread walk",
            "all write where the parts begin",
            MLA,
            SCHEDULED,
            r"slot == 0 && at < count",
            "at < count",
            "thread",
        ),
    ],
}
