"""Nothing grows with the number of calls: neither memory nor open descriptors, in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Each activity first runs until its caches are full (the functions remember 256 plans), and then many times more.
SCRIPT = """
import ctypes, gc, json, os, sys
from contextlib import suppress
import torch
import onelaunch
from onelaunch import ArgumentError, MetadataBuffers
from onelaunch.load import loader

factor = int(sys.argv[1])
FIELDS = ("cache_seqlens", "cu_seqlens_k", "page_indices")
pool = torch.arange(64, dtype=torch.int32).view(4, 16)
lengths, rows = torch.tensor([3, 1, 16]), torch.tensor([2, 0, 3])
settings = {"max_len": 16, "nsa_index_topk": 9, "real_page_size": 16}

def buffers():
    shapes = {"cache_seqlens": (3,), "cu_seqlens_k": (4,), "page_indices": (3, 16)}
    return MetadataBuffers(**{name: torch.zeros(shapes[name], dtype=torch.int32) for name in FIELDS})

backends = [buffers(), buffers()]
plan = onelaunch.bind(backends, req_to_token=pool)
checked = onelaunch.bind(backends, req_to_token=pool, checked=True)
store = loader.default_store()
keep = []  # memory that stays taken, so that other tensors lie elsewhere

def run():
    plan.run(lengths, rows)

def run_on_other_tensors():
    plan.run(lengths.clone(), rows[:3])

def refused():
    with suppress(ArgumentError):
        plan.run(lengths, rows[:2])

def run_checked():
    checked.run(lengths, rows)
    checked.check()

def bind():
    onelaunch.bind([buffers(), buffers()], req_to_token=pool).run(lengths, rows)

def broadcast():
    keep[:] = [*keep[-40:], [buffers(), buffers()]]
    cache, sums, tables = ([getattr(b, name) for b in keep[-1]] for name in FIELDS)
    onelaunch.fused_metadata_precompute_and_broadcast_cuda(
        lengths, rows, pool, cache, sums, tables, None, None, None, **settings)

def precompute():
    onelaunch.precompute_decode_metadata_cuda(lengths, rows, pool, **settings)

def copy():
    onelaunch.fused_metadata_copy_cuda(backends[0], [buffers(), buffers()])

def find():
    assert store.find(plan.kernel.key) is not None

ROUNDS = {run: 20_000, run_on_other_tensors: 5_000, refused: 5_000, run_checked: 5_000, bind: 1_100,
          broadcast: 1_100, precompute: 1_100, copy: 1_100, find: 1_100}

def taken():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/self/fd")), sys.getallocatedblocks(), resident

report = {}
for work, rounds in ROUNDS.items():
    for _ in range(min(rounds // 2, 600)):
        work()
    before = taken()
    for _ in range(rounds * factor):
        work()
    after = taken()
    report[work.__name__] = [rounds * factor, *(b - a for a, b in zip(before, after))]
print(json.dumps(report))
"""


@pytest.mark.parametrize("factor", [1, pytest.param(10, marks=pytest.mark.long)], ids=["short", "long"])
def test_memory_and_descriptors_stay_flat(factor: int) -> None:
    # Without coverage, which takes memory and most of the time.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    command = [sys.executable, "-c", SCRIPT, str(factor)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 9
    for work, (rounds, descriptors, objects, resident) in report.items():
        assert descriptors == 0, (work, report)
        # A leak of one object or one KiB per round would exceed these limits.
        assert objects < 500 < rounds, (work, report)
        assert resident < 2**20, (work, report)
