"""The seams of SGLang's speculative step: one launch compared with the engine's producers, copies and refreshes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import compare
import objects
import onelaunch
import pytest
import results
import runner_objects
import torch
from objects import FAMILIES
from onelaunch import ArgumentError
from onelaunch.integrations import sglang
from onelaunch.integrations.sglang import hooks
from onelaunch.integrations.sglang.runners import RUNNERS
from onelaunch.spec.seams import MAX_TOKEN_INPUTS
from request_objects import LENGTHS, WORKER, Request
from runner_objects import CAPTURED, REQUESTS, TOKENS
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick_builds", "detached")


class Seam:
    """An engine's runner, an equal one with onelaunch attached, and the buffers of both before a replay."""

    names: tuple[str, ...]
    mode = ""

    def __init__(self, name: str, page: int, tokens: int) -> None:
        self.name, self.page, self.tokens = name, page, tokens
        pool = objects.token_pool(page, seed=page)
        self.engine, self.mine = (self.runner(pool) for _ in range(2))
        self.seam = sglang.attach(self.mine)
        self.replays = 0
        self.request: Any = Request
        self.spoil: Any = lambda runner: None

    def runner(self, pool: Tensor) -> Any:
        raise NotImplementedError

    def prepare(self, runner: Any, request: Request) -> None:
        raise NotImplementedError

    def replay(self, lengths: tuple[int, ...], seed: int) -> None:
        size = next(bs for bs in CAPTURED if bs >= len(lengths))
        found = []
        for runner in (self.engine, self.mine):
            for name in self.names:
                getattr(runner.buffers, name).fill_(compare.POISON)
            compare.poison(runner.attn_backend)
            self.prepare(runner, self.request(lengths, seed))
            if runner is self.mine:
                self.spoil(runner)
            held = {name: getattr(runner.buffers, name) for name in self.names}
            found.append(
                {
                    n: t[: len(t) // max(CAPTURED) * (len(lengths) if n in UNPADDED else size)].clone()
                    for n, t in held.items()
                }
            )
            self.blank(runner.attn_backend, lengths, size)
        self.replays += 1
        wanted, got = found
        for name in self.names:
            assert torch.equal(wanted[name], got[name]), f"{name}: engine {wanted[name]}, onelaunch {got[name]}"

    def blank(self, backend: Any, lengths: tuple[int, ...], size: int) -> None:
        """Poisons what the engine leaves undefined or doesn't read; see Pair."""
        if self.name == "dsa":
            rows = 1 if self.mode == "decode" else self.tokens
            live = torch.tensor([*lengths, *[objects.FILL] * (size - len(lengths))])
            live = live + {"target_verify": self.tokens, "draft_extend": 0}.get(self.mode, 0)
            if self.mode == "draft_extend":
                live[: len(lengths)] += self.tokens
            live = live.repeat_interleave(rows)
            compare.blank_dead_columns(backend, "page_table_1", size * rows, live)
            if self.page > 1:
                compare.blank_dead_columns(backend, "real_page_table", size * rows, -(-live // self.page))
        if self.name == "fa3" and self.mode == "draft_extend":  # filled up to the longest request or the context
            live = torch.tensor([*(n + self.tokens for n in lengths), *[objects.FILL] * (size - len(lengths))])
            compare.blank_dead_columns(backend, "page_table", size, -(-live // self.page))
        if hasattr(backend, "cuda_graph_kv_indices") and hasattr(backend, "attn_backends"):
            for lists in (backend.kv_indptr, backend.cuda_graph_kv_indices):
                lists[len(backend.attn_backends) :] = compare.POISON
            backend.kv_indptr[:, len(lengths) + 1 : size + 1] = compare.POISON

    def check(self) -> None:
        assert not self.seam.failed
        different = compare.differences(self.engine.attn_backend, self.mine.attn_backend)
        assert not different, "\n".join(different)
        assert self.seam.launches == self.replays


# The engine doesn't write these for padding requests, and nothing reads them there.
UNPADDED = ("input_ids", "select_index")


class Draft(Seam):
    mode = "decode"
    names = (*REQUESTS, "positions", "out_cache_loc", "topk_index", "topk_p", "hidden_states")

    def runner(self, pool: Tensor) -> Any:
        return runner_objects.draft_runner(self.name, pool, self.page, self.tokens)

    def prepare(self, runner: Any, request: Request) -> None:
        request.draft(runner, self.page)


class Verify(Seam):
    mode = "target_verify"
    names = (*REQUESTS, *TOKENS)

    def runner(self, pool: Tensor) -> Any:
        return runner_objects.verify_runner(self.name, pool, self.page, self.tokens)

    def prepare(self, runner: Any, request: Request) -> None:
        request.verify(runner, self.tokens)


class Extend(Seam):
    mode = "draft_extend"
    names = (*REQUESTS, *TOKENS, "extend_seq_lens", "num_correct_drafts", "num_accept_tokens")

    def runner(self, pool: Tensor) -> Any:
        return runner_objects.extend_runner(self.name, pool, self.page, self.tokens)

    def prepare(self, runner: Any, request: Request) -> None:
        # FlashInfer's plan needs lengths on the host.
        request.extend(runner, self.tokens, cpu_lengths=self.name == "flashinfer" or self.replays % 2 == 0)


SINGLE = [name for name, family in FAMILIES.items() if family.single]
KINDS: dict[str, type[Seam]] = {"draft": Draft, "verify": Verify, "extend": Extend}


def seam(kind: str, name: str = "fa3", page: int | None = None, tokens: int = 4) -> Seam:
    return KINDS[kind](name, FAMILIES[name].pages[0] if page is None else page, tokens)


def held(made: Seam) -> None:
    """Replays batches of several sizes on the same buffers, checks and records them."""
    for seed, lengths in enumerate(LENGTHS):
        made.replay(lengths, seed)
        made.check()
    assert made.seam._whole is (not FAMILIES[made.name].in_graph)
    kind, refreshed = type(made.mine).__name__, "input buffers with padding, and what its backend refreshes"
    results.record(kind, refreshed, RUNNERS[kind].stays, made.mode, page=made.page, tokens=made.tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_draft_step(name: str) -> None:
    held(seam("draft", name, tokens=3))


@pytest.mark.parametrize("name", SINGLE)
def test_a_verification(name: str) -> None:
    held(seam("verify", name))


@pytest.mark.parametrize("name", SINGLE)
def test_a_draft_extension(name: str) -> None:
    held(seam("extend", name))


@pytest.mark.parametrize("kind", KINDS)
def test_other_pages_and_numbers_of_tokens(kind: str) -> None:
    for page, tokens in ((1, 2), (16, 6)):
        held(seam(kind, "fa3", page, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_more_tokens_than_inputs_are_the_engines_to_copy(kind: str) -> None:
    made = seam(kind, tokens=MAX_TOKEN_INPUTS + 1)
    held(made)
    assert "input_ids" not in made.seam._buffers


@pytest.mark.parametrize("kind", KINDS)
def test_one_wrong_entry_is_seen(kind: str) -> None:
    """The control: a wrong entry in each buffer, and in each of the backend's tensors."""
    made = seam(kind)
    for name in made.names:
        if name == "hidden_states":
            continue
        made.spoil = lambda runner, name=name: getattr(runner.buffers, name).view(-1)[:1].add_(1)
        with pytest.raises(AssertionError, match=f"^{name}: engine"):
            made.replay((7, 30), 1)
    made.spoil = lambda runner: None
    made.replay((7, 30), 1)
    made.check()
    for path, value in compare.reachable(made.mine.attn_backend).items():
        if (entry := compare.live_entry(path, value)) is not None and "[2]" in path:
            value[entry] += 1
            with pytest.raises(AssertionError):
                made.check()
            value[entry] -= 1


def launched(made: Seam, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the name of each kernel and copy that the engine's own producers launch from now on."""
    names: list[str] = []
    for module, name in (
        (WORKER, "assign_draft_cache_locs_contiguous"),
        (type(made.mine).__module__, "_grouped_foreach_copy_"),
    ):
        owner = sys.modules[module]
        if (hook := getattr(owner, name, None)) is not None and isinstance(hook, hooks.Hook):
            monkeypatch.setattr(hook, "original", _Counting(hook.original, names, name))
    return names


class _Counting:
    """A function or a Triton kernel that records its calls."""

    def __init__(self, original: Any, names: list[str], name: str) -> None:
        self._original, self._names, self._name = original, names, name

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self._names.append(self._name)
        return self._original(*arguments, **keywords)

    def __getitem__(self, grid: Any) -> Any:
        return _Counting(self._original[grid], self._names, self._name)


@pytest.mark.parametrize("kind", ["draft", "extend"])
@pytest.mark.parametrize("lengths", [(7, 30), (9, 2, 11)])
def test_what_the_launch_does_is_not_done_again(
    kind: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the launch, the engine gathers, fills and copies nothing. After a failure it does so again."""
    made = seam(kind)
    names = launched(made, monkeypatch)
    buffers = {getattr(made.mine.buffers, name).data_ptr(): name for name in made.names}
    for method in ("fill_", "zero_"):
        original = getattr(Tensor, method)

        def counted(tensor: Tensor, *value: Any, original: Any = original) -> Any:
            names.append(f"fill {buffers.get(tensor.data_ptr(), '')}")
            return original(tensor, *value)

        monkeypatch.setattr(Tensor, method, counted)
    made.prepare(made.mine, Request(lengths, 1))
    # "fill " is seq_lens_cpu, which is on the host.
    assert set(names) <= {"fill hidden_states", "fill "}
    assert made.seam.launches == 1
    made.seam.failed = "of this test"
    made.prepare(made.mine, Request(lengths, 1))
    assert "_grouped_foreach_copy_" in names
    assert ("fill seq_lens" in names) is (len(lengths) == 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_at_other_addresses_is_not_checked_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No view of its tensors is made either. Another dtype or stride is checked."""
    made = seam(kind)
    kept = []
    made.request = lambda lengths, seed: kept.append(Request(lengths, seed)) or kept[-1]
    made.replay((7, 30), 0)
    checked = []
    for views in made.seam._views.values():
        monkeypatch.setattr(views, "_inputs", lambda *tensors: checked.append(tensors))
    for seed in range(1, 12):  # more address sets than a plan remembers
        made.replay((7 + seed, 30 - seed), seed)
        made.check()
    assert not checked
    monkeypatch.undo()
    made.replay((7, 30, 5), 1)
    made.check()


def test_a_verifications_second_copies_copy_nothing() -> None:
    """load_batch copies input_ids and positions again, but onto themselves, where PyTorch copies nothing."""
    made = seam("verify")
    batch = Request((7, 30, 2), 1).verify(made.mine, made.tokens)
    for name in ("input_ids", "positions"):
        slot = made.mine.buffer_registry.get_slot(name).buffer
        assert getattr(batch, name).data_ptr() == slot.data_ptr()
        assert len(getattr(batch, name)) == 3 * made.tokens


def test_without_a_graph_the_draft_has_its_locations() -> None:
    """A batch larger than the captured sizes is drafted eagerly; the engine's own kernel makes its write locations."""
    made = seam("draft", tokens=3)
    seen = {}
    for which, runner in (("engine", made.engine), ("mine", made.mine)):
        worker = runner.eagle_worker

        def forward(batch: Any, which: str = which) -> Any:
            seen[which] = batch.out_cache_loc.clone()
            return (None,) * 4

        worker.draft_forward = forward
        worker.draft_attn_backend = SimpleNamespace(init_forward_metadata=lambda batch: None)
        Request((7, 30, 2, 9, 11, 64), 3).draft(runner, made.page)
    assert torch.equal(seen["engine"], seen["mine"])
    assert made.seam.launches == 0
    made.engine.eagle_worker.draft_attn_backend = made.engine.draft_attn_backend
    made.mine.eagle_worker.draft_attn_backend = made.mine.draft_attn_backend
    made.replay((5,), 2)
    made.check()


def test_another_runner_of_the_worker_is_the_engines() -> None:
    """Adaptive speculation swaps the worker's runner. An unattached runner gets the engine's own write locations."""
    made = seam("draft", tokens=3)
    other = runner_objects.draft_runner("fa3", made.mine.model_runner.req_to_token_pool.req_to_token, made.page, 3)
    worker = made.mine.eagle_worker
    worker.cuda_graph_runner = other
    other.eagle_worker = worker
    request = Request((7, 30), 1)
    request.draft(other, made.page)
    request.draft(made.engine, made.page)
    assert made.seam.launches == 0
    assert torch.equal(other.buffers.out_cache_loc[:6], made.engine.buffers.out_cache_loc[:6])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_are_not_served_are_the_engines(kind: str) -> None:
    made = seam(kind)
    made.request = lambda lengths, seed: Request(lengths, seed, served=False)
    for lengths in ((7, 30), (9, 2, 11)):
        made.replay(lengths, 1)
    assert made.seam.launches == 0
    made.replays = 0
    made.request = Request
    made.replay((7, 30), 1)
    made.check()


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_failure_the_engines_own_code_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = seam(kind)
    for ready in made.seam._ready.values():
        monkeypatch.setattr(
            ready.plan, "_run", lambda *a, **k: (_ for _ in ()).throw(onelaunch.LaunchError("CUDA said no"))
        )
    with pytest.warns(RuntimeWarning, match=f"{type(made.mine).__name__} runs the engine's own code from now on"):
        made.replay((7, 30), 1)
    monkeypatch.undo()
    made.replay((7, 30), 2)
    assert made.seam.failed == "LaunchError: CUDA said no"
    assert not compare.differences(made.engine.attn_backend, made.mine.attn_backend)


@pytest.mark.parametrize("kind", KINDS)
def test_detached_it_is_the_engines(kind: str) -> None:
    made = seam(kind)
    made.replay((7, 30), 1)
    assert made.seam.attached
    made.seam.detach()
    made.seam.detach()
    for runner in (made.mine, made.mine.attn_backend, getattr(made.mine, "buffer_registry", None)):
        assert not any("onelaunch" in type(value).__module__ for value in vars(runner or SimpleNamespace()).values())
    assert not hooks.Hook.made
    launches = made.seam.launches
    made.replay((9, 2), 2)
    assert made.seam.launches == launches
    again = sglang.attach(made.mine)
    made.replay((9, 2), 3)
    assert again.launches == 1
    again.detach()


def test_a_backend_that_was_attached_keeps_what_it_was_attached_with() -> None:
    pool = objects.token_pool(64, seed=64)
    runner = runner_objects.draft_runner("dsa", pool, 64, 3)
    first = sglang.attach(runner.draft_attn_backend, leave=("page_table_1",)) if objects.HAS_TRANSLATOR else None
    if first is None:  # 0.5.17's DSA reads the wide table
        first = sglang.attach(runner.draft_attn_backend)
    made = sglang.attach(runner)
    plan = made._ready[2].plan
    assert ("page_indices" in plan.config.fields) is (not objects.HAS_TRANSLATOR)
    made.detach()
    assert first.attached, "detaching the runner must not detach a backend attached before it"
    first.detach()


def test_runners_that_are_refused() -> None:
    made = seam("draft").engine
    for change, message in (
        ({"topk": 2}, "the runner's topk is 2; allowed: 1"),
        ({"_metadata_glue": object()}, "_metadata_glue is set"),
    ):
        kept = {name: getattr(made, name) for name in change}
        made.__dict__.update(change)
        with pytest.raises(ArgumentError, match=message):
            sglang.attach(made)
        made.__dict__.update(kept)
    with pytest.raises(ArgumentError, match="Attach the runner's backend with them first"):
        sglang.attach(made, schedules=True)
    made.capture_bs.append(7)
    with pytest.raises(ArgumentError, match=r"bs is 7, and .* there is no decode graph of it"):
        sglang.attach(made)
    made.capture_bs.pop()
    assert "init_forward_metadata_out_graph" not in vars(made.draft_attn_backend), "the backend was attached"
    attached = sglang.attach(made)
    with pytest.raises(ArgumentError, match="attached already"):
        sglang.attach(made)
    attached.detach()
    plain = seam("verify").engine
    plain.captured_req_width = 1
    with pytest.raises(ArgumentError, match="it doesn't verify, it decodes"):
        sglang.attach(plain)


@pytest.mark.parametrize(
    ("kind", "name", "tokens"),
    [("draft", "sglang-draft-2", 3), ("verify", "sglang-verify", 4), ("extend", "sglang-draft-extend", 4)],
)
def test_the_presets_are_what_is_attached(kind: str, name: str, tokens: int) -> None:
    """So a prebuilt kernel of the preset serves the engine."""
    wanted = onelaunch.PRESETS[name].replace(target="cpu")
    made = seam(kind, tokens=tokens)
    if "select_index" in wanted.fields and not objects.HAS_TRANSLATOR:  # SGLang 0.5.17 has no select_index in its graph
        wanted = wanted.replace(fields=tuple(n for n in wanted.fields if n != "select_index"))
    assert made.seam._ready[2].plan.config == wanted
