"""The schedules of DeepGEMM and FlashMLA."""

from __future__ import annotations

from cases import Shape

from .fault import Fault
from .shown_by import MLA, MQA, SCHEDULED, WORK

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
            "begin behind the end where there is nothing to do",
            "multiprocessors take splits of a request that isn't there",
            MQA,
            Shape("all zero", (0, 0, 0)),
            r"\(items \* kAtoms\)",
            "((items + (entry < num_sms)) * kAtoms)",
        ),
        Fault(
            "count units of work as splits",
            "multiprocessors begin behind their first split",
            WORK,
            SCHEDULED,
            r"split /= kSplitCost;",
            "",
        ),
        Fault(
            "let a split cost as much as a request has atoms",
            "multiprocessors get unequal work",
            WORK,
            SCHEDULED,
            r"kSplitCost > 0 \? kSplitCost : kAtoms",
            "kAtoms",
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
