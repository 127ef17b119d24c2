"""The seams of SGLang's speculative step: one launch against the engine's own producers, copies and refreshes."""

from __future__ import annotations

from typing import Any

import compare
import objects
import pytest
import results
import runner_objects
import torch
from objects import FAMILIES
from onelaunch.integrations import sglang
from runner_objects import CAPTURED, Request
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick_builds")

BATCHES = ((7, 30), (64,), (1, 90, 33, 5, 640), (128, 3, 65))


def poison(runner: Any, names: tuple[str, ...]) -> None:
    for name in names:
        getattr(runner.buffers, name).fill_(compare.POISON)


def snapshot(runner: Any, names: tuple[str, ...], size: int) -> dict[str, Tensor]:
    found = {}
    for name in names:
        tensor = getattr(runner.buffers, name)
        found[name] = tensor[: len(tensor) // max(CAPTURED) * size].clone()
    return found


DRAFT = ("seq_lens", "req_pool_indices", "positions", "out_cache_loc", "topk_index", "topk_p", "hidden_states")


class Draft:
    """The engine's draft runner, and one alike with onelaunch attached."""

    def __init__(self, name: str, page: int, steps: int) -> None:
        self.name, self.page, self.steps = name, page, steps
        pool = objects.token_pool(page, seed=page)
        self.engine, self.mine = (runner_objects.draft_runner(name, pool, page, steps) for _ in range(2))
        self.seam = sglang.attach(self.mine)
        self.replays = 0

    def replay(self, lengths: tuple[int, ...], seed: int) -> None:
        size = next(bs for bs in CAPTURED if bs >= len(lengths))
        found = []
        for runner in (self.engine, self.mine):
            poison(runner, DRAFT[:-1])
            compare.poison(runner.draft_attn_backend)
            Request(lengths, seed).draft(runner, self.page)
            found.append(snapshot(runner, DRAFT, size))
            self._blank(runner.draft_attn_backend, lengths, size)
        self.replays += 1
        wanted, got = found
        for name in DRAFT:
            assert torch.equal(wanted[name], got[name]), f"{name}: engine {wanted[name]}, onelaunch {got[name]}"

    def _blank(self, backend: Any, lengths: tuple[int, ...], size: int) -> None:
        """What isn't defined, or not read: see Pair."""
        if self.name == "dsa":
            live = torch.tensor([*lengths, *[objects.FILL] * (size - len(lengths))])
            compare.blank_dead_columns(backend, "page_table_1", size, live)
            if self.page > 1:
                compare.blank_dead_columns(backend, "real_page_table", size, -(-live // self.page))
        if hasattr(backend, "cuda_graph_kv_indices"):
            for lists in (backend.kv_indptr, backend.cuda_graph_kv_indices):
                lists[len(backend.attn_backends) :] = compare.POISON
            backend.kv_indptr[:, len(lengths) + 1 : size + 1] = compare.POISON

    def check(self) -> None:
        assert not self.seam.failed
        different = compare.differences(self.engine.draft_attn_backend, self.mine.draft_attn_backend)
        assert not different, "\n".join(different)
        assert self.seam.launches == self.replays


@pytest.mark.parametrize("name", FAMILIES)
def test_a_draft_step(name: str) -> None:
    draft = Draft(name, FAMILIES[name].pages[0], steps=3)
    for seed, lengths in enumerate(BATCHES):
        draft.replay(lengths, seed)
        draft.check()
    assert draft.seam._whole is (not FAMILIES[name].in_graph)
    results.record(type(draft.mine).__name__, "", "", "decode", steps=3)
