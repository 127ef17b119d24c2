"""The schedules of DeepGEMM and FlashMLA."""

from __future__ import annotations

from cases import Shape

from .fault import Fault
from .shown_by import FEW_SCHEDULED, MLA, MQA, SCHEDULED, WORK

# Most parts begin with a request, after two parts or four.
SHARED_BY_TWO = Shape("shared by two", tuple(4096 - i * 7 % 128 for i in range(40)), num_sm_parts=90)

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
            "take an end that is one block too far",
            "a part gets more than its share",
            MLA,
            SCHEDULED,
            r"constexpr int kMlaOverhead = 5;",
            "constexpr int kMlaOverhead = 6;",
        ),
        Fault(
            "begin at an end only where nothing has to be paid for it",
            "parts that could end with a request cut the next one",
            MLA,
            SCHEDULED,
            r"distance - kMlaOverhead - 1",
            "distance - 1",
        ),
        Fault(
            "test the ends before an end, too",
            "the end behind isn't found, and parts begin too early",
            MLA,
            Shape("a share of three", (64,) * 40, num_sm_parts=100),
            r"if \(group < end\) near &= [^;]*;",
            "",
        ),
        Fault(
            "take an end that is near in 32 bits only",
            "a part begins at a request that nobody reaches by then",
            MLA,
            Shape("beyond 32 bits", (2**31 - 320,) * 300, num_sm_parts=2),
            r"if \(parts \* share > distance\) continue;",
            "",
        ),
        Fault(
            "join a hop with the ends of the next one, but not its parts",
            "parts behind two ends begin too late",
            MLA,
            SHARED_BY_TWO,
            r"hop % kMlaHop \+ next % kMlaHop",
            "hop % kMlaHop",
        ),
        Fault(
            "begin all parts as if none began at an end",
            "parts behind one that begins with a request begin too early",
            MLA,
            SCHEDULED,
            r"if \(hop == 0 \|\| there > i\) continue;",
            "continue;",
        ),
        Fault(
            "forget the cuts of the requests before the chunk",
            "a combining kernel reads another request's splits",
            MLA,
            SCHEDULED,
            r"last\.cuts \+ i - last\.part",
            "i - last.part",
        ),
        Fault(
            "count one split too many where a request begins with a part",
            "a combining kernel reads another request's split",
            MLA,
            Shape("begins with a part", (2560, 8320), num_sm_parts=4),
            r"\(block - 1\) / share",
            "(block) / share",
        ),
        Fault(
            "join hops before the shorter ones are there",
            "parts begin where shared memory says by chance",
            MLA,
            SCHEDULED,
            r"      __syncthreads\(\);\n(      if \(slot < kMlaChunk\) chunk\.hops\[levels\])",
            r"\1",
            "thread",
        ),
        Fault(
            "go on before the last part of the chunk is known",
            "the next chunk's parts follow another one",
            MLA,
            SCHEDULED,
            r"    __syncthreads\(\);\n(    last = chunk\.last;)",
            r"\1",
            "thread",
        ),
    ],
}
