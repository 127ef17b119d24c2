"""The schedules of DeepGEMM and FlashMLA."""

from __future__ import annotations

from cases import Shape

from .fault import Fault
from .shown_by import FEW_SCHEDULED, MLA, MQA, SCHEDULED, WORK

FAULTS = {
    "device/mqa_schedule.cuh": [
        Fault(
            "read the sums of the other warps before all are there",
            "multiprocessors begin anywhere",
            MQA,
            SCHEDULED,
            r"(of_warp\[slot / kWarpSize\] = end;\n)  __syncthreads\(\);",
            r"\1",
            "thread",
        ),
        Fault(
            "forget the splits of the warps before",
            "multiprocessors take splits that a request doesn't have",
            MQA,
            SCHEDULED,
            r"passed \+= of_warp\[w\];",
            "",
        ),
        Fault(
            "leave out the items behind a thread's first",
            "multiprocessors begin too early, in splits that a request doesn't have",
            MQA,
            SCHEDULED,
            r"i = 1; i < thread_items",
            "i = 2; i < thread_items",
        ),
        Fault(
            "begin with the end of a request",
            "multiprocessors take splits that a request doesn't have",
            MQA,
            FEW_SCHEDULED,
            r"(item \+ step - 1\)) <= wanted",
            r"\1 < wanted",
        ),
        Fault(
            "let a lane without an entry leave a look-up",
            "the lanes of the last entries wait for it, or get nothing from it",
            MQA,
            FEW_SCHEDULED,
            r"entry - static_cast<unsigned>\(lane\) <= shares",
            "entry <= shares",
            "emulation",
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
            Shape("all zero", (0,) * 5),
            r"start < shares\.units",
            "start <= shares.units",
        ),
        Fault(
            "count units of work as splits",
            "multiprocessors begin behind their first split",
            WORK,
            SCHEDULED,
            r"split /= kWorkOfSplit;",
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
            r"entry <= shares\.num_sms; ",
            "entry < shares.num_sms; ",
        ),
    ],
    "device/flashmla_schedule.cuh": [
        Fault(
            "take a whole request where only its blocks fit",
            "a part gets more than its share",
            MLA,
            SCHEDULED,
            r"parts \* share <= distance",
            "parts * share <= distance + 3",
        ),
        Fault(
            "look for the next end in one part more",
            "the ends that a part begins at aren't those that are near",
            MLA,
            Shape("equal", (64,) * 150, num_sm_parts=11),
            r"\(next \* \(2 \* kMlaMaxHop\) \+ parts\)",
            "(next * (2 * kMlaMaxHop) + parts + 1)",
        ),
        Fault(
            "begin all parts of a turn as if none began at an end",
            "parts behind one that begins with a request begin too early",
            MLA,
            SCHEDULED,
            r"first_end < outside \? first_end \+ 1 : outside;",
            "outside;",
        ),
        Fault(
            "count a request's splits from its first part on, cut or not",
            "a combining kernel reads another request's split",
            MLA,
            Shape("begins with a part", (2560, 8320), num_sm_parts=4),
            r"parts\.begin\[found \+ step\] <= begin",
            "parts.begin[found + step] < begin",
        ),
        Fault(
            "derive the parts before the walk is done",
            "parts begin where shared memory says by chance",
            MLA,
            SCHEDULED,
            r"  __syncthreads\(\);\n    part = last_part",
            "  part = last_part",
            "thread",
        ),
        Fault(
            "let every warp walk",
            "all write where the parts begin",
            MLA,
            SCHEDULED,
            r"if \(slot < kWarpSize\) \{",
            "if (slot >= 0) {",
            "thread",
        ),
    ],
}
