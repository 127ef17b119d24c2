"""Verified writes: whatever happened before, a refresh leaves the reference's values, and it writes little."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onelaunch
import pytest
import torch
from onelaunch import MetadataBuffers, Plan
from onelaunch.errors import ArgumentError, ConfigError
from onelaunch.spec import reference
from support import POISON
from torch import Tensor

WIDTH, POOL_ROWS, LARGEST = 1303, 24, 12
BOTH = ("page_indices", "real_page_table")
# Settings of bind(), and the fields, for the plans that write the memory.
KINDS: dict[str, dict[str, Any]] = {
    "tokens and pages": {"fields": ("cache_seqlens", *BOTH), "n": 3},
    "tokens of one backend": {"fields": ("page_indices",), "n": 1},
    "pages alone": {"fields": ("real_page_table",), "n": 2, "page_size": 7, "seqlen_offsets": (1, 40)},
    "filled pages": {"fields": ("real_page_table",), "n": 2, "page_size": 3, "page_fill": -1},
    "offsets": {"fields": BOTH, "n": 3, "page_size": 16, "seqlen_offsets": (1, 2, 300)},
    "rows": {"fields": BOTH, "n": 2, "mode": "target_verify", "next_n": 3},
    "variable rows": {"fields": BOTH, "n": 2, "mode": "draft_extend", "extend": "variable"},
    "all columns": {"fields": BOTH, "n": 2, "extent": "full"},
    "int64": {"fields": BOTH, "n": 2, "page_size": 7, "pool_dtype": torch.int64},
    "other alignments": {"fields": BOTH, "n": 2, "phases": (0, 3)},
    "shared": {"fields": BOTH, "n": 3, "tables": {"page_indices": (0, 0, 0), "real_page_table": (0, 1, 0)}},
    "indices": {"fields": ("kv_indptr", "kv_indices"), "n": 2, "seqlen_offsets": (1, 2)},
}


class World:
    """Tables written by the plans of several batch sizes, and copies of them written by the reference."""

    def __init__(self, device: torch.device, fields: Sequence[str], n: int, **settings: Any) -> None:
        self.device, self.fields, self.settings = device, fields, settings
        pool_dtype = settings.pop("pool_dtype", torch.int32)
        which, phases = settings.pop("tables", {}), settings.pop("phases", (0,))
        self.rows_each = settings.get("next_n", 1) if settings.get("extend") != "variable" else 4
        page_size = settings.get("page_size", 64)
        self.random = random.Random(repr(sorted(settings.items(), key=str)))
        tokens = torch.randint(-9, 2**31 - 9, (POOL_ROWS, WIDTH), generator=torch.Generator().manual_seed(7))
        self.pool = tokens.to(device, pool_dtype)
        rows = LARGEST * self.rows_each
        shapes = {
            "page_indices": (rows, WIDTH + 9),
            "real_page_table": (rows, -(-WIDTH // page_size)),
            "kv_indices": (LARGEST * (WIDTH + 9),),
        }

        def tensor(name: str, phase: int) -> Tensor:
            """A poisoned tensor. An odd row stride makes rows begin at any alignment."""
            shape = shapes.get(name, (LARGEST + 1,))
            if len(shape) == 1:
                return torch.full(shape, POISON, dtype=torch.int32, device=device)
            stride = shape[1] | 1
            storage = torch.full((shape[0] * stride + 8,), POISON, dtype=torch.int32, device=device)
            return storage.as_strided(shape, (stride, 1), phase)

        made = {name: [tensor(name, phases[b % len(phases)]) for b in range(n)] for name in fields}
        self.backends = [
            MetadataBuffers(**{name: made[name][which.get(name, range(n))[b]] for name in fields}) for b in range(n)
        ]
        copies = {id(t): t.clone() for tensors in made.values() for t in tensors}
        self.mirror = [MetadataBuffers(**{f.name: copies[id(t)] for f, t in b.items()}) for b in self.backends]
        self.plans: dict[int, Plan] = {}

    def sliced(self, backends: Sequence[MetadataBuffers], bs: int) -> list[MetadataBuffers]:
        """The destinations of one captured batch size's plan: the first rows of the same memory."""

        def part(name: str, tensor: Tensor) -> Tensor:
            sizes = {"kv_indices": tensor.shape[0], "kv_indptr": bs + 1, "cache_seqlens": bs}
            return tensor[: sizes.get(name, bs * self.rows_each)]

        return [MetadataBuffers(**{f.name: part(f.name, t) for f, t in b.items()}) for b in backends]

    def plan(self, bs: int) -> Plan:
        if bs not in self.plans:
            self.plans[bs] = onelaunch.bind(
                self.sliced(self.backends, bs), req_to_token=self.pool, writes="verified", **self.settings
            )
        return self.plans[bs]

    def step(self, lengths: Sequence[int], rows: Sequence[int], *, bs: int | None = None, **call: Any) -> None:
        """Refreshes with the plan of a batch size and with the reference, and compares every element."""
        bs = len(lengths) if bs is None else bs
        inputs = [torch.tensor(values, dtype=torch.int64, device=self.device) for values in (lengths, rows)]
        if self.settings.get("extend") == "variable":
            counts = [self.random.randint(0, self.rows_each) for _ in lengths]
            call["extend_seq_lens"] = torch.tensor(counts, device=self.device)
        self.plan(bs).run(*inputs, **call)
        settings = {"index_topk": 2048, "page_size": 64, "extent": "live", **self.settings}
        if "kv_indices" in self.fields:
            settings["page_size"] = 1
        settings.pop("extend", None)  # the reference takes it from the extend lengths
        reference.refresh(self.sliced(self.mirror, bs), *inputs, self.pool, **settings, **call)
        self.compare()

    def compare(self) -> None:
        for b, (got, wanted) in enumerate(zip(self.backends, self.mirror, strict=True)):
            for field, tensor in got.items():
                assert torch.equal(tensor, getattr(wanted, field.name)), f"backend {b}, {field.name}"

    def rewrite(self, row: int, first: int, stop: int) -> None:
        """Replaces tokens in a row of req_to_token."""
        self.pool[row, first:stop] = torch.randint(0, 2**31 - 1, (stop - first,)).to(self.pool)


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest, device: torch.device) -> World:
    return World(device, **KINDS[request.param])


# ------------------------------------------------------------------------------------------------ exact


def test_requests_come_and_go_as_a_scheduler_moves_them(world: World) -> None:
    """As in SGLang's batches, requests grow, finished ones leave, later ones move up, and new ones come at the end, in
    reused rows. Result processing rewrites tokens, and a smaller captured batch size is padded."""
    numbers = world.random
    longest = WIDTH - 310
    free, running = list(range(1, POOL_ROWS)), []
    numbers.shuffle(free)
    for turn in range(60):
        for request in running:
            request[0] = min(longest, request[0] + numbers.choice((1, 1, 2, 4, 257)))
            if numbers.random() < 0.1:
                first = numbers.randrange(request[0])
                world.rewrite(request[1], first, first + 1 + numbers.randrange(3))
        for request in [r for r in running if r[0] == longest or numbers.random() < 0.08]:
            running.remove(request)
            free.append(request[1])
        while len(running) < LARGEST and numbers.random() < 0.5:
            row = free.pop(0)
            world.rewrite(row, 0, WIDTH)
            running.append([numbers.choice((0, 1, 63, 64, 255, 256, 257, 512, 700)), row])
        if numbers.random() < 0.1:
            numbers.shuffle(running)
        if numbers.random() < 0.1 and running:
            running[0][0] = numbers.randrange(running[0][0] + 1)  # a retracted request is shorter
        bs = next(size for size in (1, 2, 4, 8, LARGEST) if size >= len(running))
        padding = bs - len(running)
        world.step([r[0] for r in running] + [1] * padding, [r[1] for r in running] + [0] * padding, bs=bs)
        if turn % 20 == 19:
            for plan in world.plans.values():
                plan.forget()


def test_fewer_columns_and_more(world: World) -> None:
    """max_len bounds one call. The next call without it writes the columns that the bound left out."""
    world.step([900, 300, 5], [1, 2, 3])
    for bound in (256, 700, 0, 699):
        world.step([900, 300, 5], [4, 2, 1], max_len=bound)
        world.step([901, 299, 6], [1, 2, 3])


def test_a_request_is_back_that_a_shorter_one_replaced(world: World) -> None:
    """The shorter row ended in a tile that the longer one fills. What that tile held before isn't there any more."""
    world.step([900, 700, 5], [1, 2, 3])
    world.step([300, 257, 5], [4, 1, 3])
    world.step([900, 700, 5], [1, 2, 3])


def test_lengths_out_of_range_leave_nothing_wrong(world: World) -> None:
    for lengths in ([WIDTH + 700, -5, 3], [2, WIDTH, 0], [WIDTH + 1, WIDTH - 1, 3]):
        if "kv_indices" in world.fields:
            lengths = [max(0, min(n, WIDTH)) for n in lengths]
        world.step(lengths, [1, 2, 3])
        world.step(lengths, [1, 2, 3])


def test_poison_is_found_after_forget(world: World) -> None:
    """If something else changes the memory, as a sleep or an eager write does, any of its plans can forget()."""
    world.step([900, 300, 5], [1, 2, 3])
    world.plan(LARGEST)
    for backends in (world.backends, world.mirror):
        for backend in backends:
            for field, tensor in backend.items():
                if field.name in (*BOTH, "kv_indices"):
                    tensor.fill_(77)
    world.plan(LARGEST).forget()
    world.step([900, 300, 5], [1, 2, 3])


def test_a_refused_call_between_two_changes_nothing(world: World) -> None:
    world.step([900, 300], [1, 2])
    with pytest.raises(ArgumentError):
        world.plan(2).run(torch.zeros(3, dtype=torch.int64, device=world.device), None)  # type: ignore[arg-type]
    world.compare()
    world.step([901, 301], [1, 2])


# A process that does a verified refresh of a table in a file, and then waits to be killed.
REFRESHES = """
import sys, torch, onelaunch
lengths, rows = ([int(n) for n in text.split(",")] for text in sys.argv[2:])
table = torch.from_file(sys.argv[1], shared=True, size=3 * 1303, dtype=torch.int32).view(3, 1303)
pool = torch.arange(9 * 1303, dtype=torch.int32).view(9, 1303)
plan = onelaunch.bind([onelaunch.MetadataBuffers(page_indices=table)], req_to_token=pool, writes="verified")
plan.run(torch.tensor(lengths), torch.tensor(rows))
print("refreshed", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_wrote_is_not_known_to_the_next(tmp_path: Path) -> None:
    """The process dies between two calls, and something else writes the memory before the next process refreshes it."""
    file = tmp_path / "table"
    table = torch.from_file(str(file), shared=True, size=3 * 1303, dtype=torch.int32).view(3, 1303)
    table.fill_(POISON)
    wanted = table.clone()
    pool = torch.arange(9 * 1303, dtype=torch.int32).view(9, 1303)
    for lengths, rows in (((900, 300, 5), (1, 2, 3)), ((901, 301, 6), (1, 2, 3))):
        for row in (table, wanted):
            row[:, 100:600] = 77
        arguments = [str(file), *(",".join(map(str, numbers)) for numbers in (lengths, rows))]
        with subprocess.Popen(
            [sys.executable, "-c", REFRESHES, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "refreshed\n"
            process.kill()
        backends, inputs = [MetadataBuffers(page_indices=wanted)], (torch.tensor(lengths), torch.tensor(rows))
        reference.refresh(backends, *inputs, pool, index_topk=2048, page_size=64, extent="live")
        assert torch.equal(table, wanted)


# ------------------------------------------------------------------------------------------------ and little is written


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("indices", "variable rows")])
def test_what_did_not_change_is_not_written(device: torch.device, name: str) -> None:
    """A foreign write stays in an unchanged tile, which isn't written. In a changed tile it is overwritten."""
    world = World(device, **KINDS[name])
    lengths, rows = [900, 900], [1, 2]
    world.step(lengths, rows)
    marked = [next(t for f, t in b.items() if f.name in BOTH) for b in world.backends]
    for table in marked:
        table[0, 0] = table[-1 - (LARGEST - 2) * world.rows_each, 0] = 77
    world.rewrite(2, 0, 1)
    inputs = [torch.tensor(values, dtype=torch.int64, device=device) for values in (lengths, rows)]
    world.plan(2).run(*inputs)
    for table in marked:
        assert table[0, 0] == 77
        assert table[world.rows_each, 0] != 77


def test_an_element_of_indices_that_is_right_is_not_written(device: torch.device) -> None:
    """kv_indices is compared with its own content, so a foreign write is always overwritten."""
    world = World(device, **KINDS["indices"])
    world.step([900, 300], [1, 2])
    for backend in world.backends:
        assert backend.kv_indices is not None
        backend.kv_indices[5] = 77
    world.step([900, 300], [1, 2])


# ------------------------------------------------------------------------------------------------ whose the hashes are


def test_plans_of_the_same_tables_share_the_hashes(device: torch.device) -> None:
    world = World(device, **KINDS["tokens and pages"])
    assert world.plan(1)._hashes is world.plan(LARGEST)._hashes
    other = World(device, **KINDS["tokens and pages"])
    assert other.plan(1)._hashes is not world.plan(1)._hashes


def test_tables_that_other_plans_write_with_others_are_refused(device: torch.device) -> None:
    world = World(device, **KINDS["tokens and pages"])
    world.plan(2)
    for backends, settings in (
        (world.backends[:2], {}),
        ([MetadataBuffers(page_indices=world.backends[0].page_indices)], {}),
        (world.backends, {"page_size": 128}),
    ):
        with pytest.raises(ArgumentError, match=r"another verified plan writes.*writes='all'"):
            onelaunch.bind(backends, req_to_token=world.pool, writes="verified", **settings)
    onelaunch.bind(world.backends[:2], req_to_token=world.pool)  # a plan that writes all needs no hashes
    world.plans.clear()
    gc.collect()
    onelaunch.bind(world.backends[:2], req_to_token=world.pool, writes="verified")


def test_a_plan_that_writes_all_has_nothing_to_forget(device: torch.device) -> None:
    world = World(device, **KINDS["tokens and pages"])
    plan = onelaunch.bind(world.backends, req_to_token=world.pool)
    assert plan._hashes is None
    plan.forget()


def test_other_values_are_refused(device: torch.device) -> None:
    world = World(device, **KINDS["tokens and pages"])
    with pytest.raises(ConfigError, match="writes is 'changed'; allowed: 'all', 'verified', 'audit'"):
        onelaunch.bind(world.backends, req_to_token=world.pool, writes="changed")
