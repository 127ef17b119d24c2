"""What SGLang's draft worker computes between its graphs: one launch compared with the engine's own operations."""

from __future__ import annotations

import logging
from collections import Counter
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import objects
import onelaunch
import pytest
import request_objects
import results
import runner_objects
import torch
from onelaunch import ArgumentError
from onelaunch.integrations import plugin, sglang
from onelaunch.integrations.sglang import hooks
from onelaunch.integrations.sglang.worker import Producers
from request_objects import BATCHES, LENGTHS, LOCATE, LOCATIONS, WORKER, Request
from runner_objects import DRAFTER
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("quick_builds", "detached", "tree_of_triton")

RETRIEVED = ("retrieve_index", "retrieve_next_token", "retrieve_next_sibling")


@pytest.fixture
def tree_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's tree kernel is compiled for a GPU, so the tests use the engine's Triton version of it."""
    newer = import_module("sglang.kernels.ops.speculative.spec_tree")
    owner = newer if hasattr(newer, "sgl_build_tree_kernel_triton") else import_module(
        "sglang.srt.speculative.eagle_utils"
    )  # fmt: skip
    monkeypatch.setattr(owner, "sgl_build_tree_kernel_efficient", owner.sgl_build_tree_kernel_triton)


class Workers:
    """An engine's worker, and an equal one with onelaunch attached."""

    def __init__(self, name: str = "fa3", tokens: int = 4, page: int = 1) -> None:
        self.name, self.tokens, self.page = name, tokens, page
        self.pool = objects.token_pool(page, seed=page)
        self.engine, self.mine = (runner_objects.draft_worker(name, self.pool, page, tokens) for _ in range(2))
        self.attachment: Any = sglang.attach(self.mine)
        self.spoil: Any = lambda made: None

    def mask(self, worker: Any) -> Tensor:
        # FlashInfer's backend has no mask buffer.
        verified = worker.target_worker.model_runner.attn_backend.verify_mask
        return self.attachment._mask.buffer if verified is None else verified.buffer

    def batch(self, request: Request, *, cpu_lengths: bool = False) -> Any:
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        lengths = torch.tensor(request.lengths)
        return SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            seq_lens=lengths,
            seq_lens_cpu=lengths.clone() if cpu_lengths else None,
            # FlashInfer's target backend needs lengths on the host.
            seq_lens_sum=sum(request.lengths) if self.name == "flashinfer" else None,
            req_pool_indices=request.rows.clone(),
            req_to_token_pool=SimpleNamespace(req_to_token=self.pool),
            model_config=SimpleNamespace(vocab_size=1000, model_is_mrope=False),
            multimodal_inputs=[None] * len(lengths),
            out_cache_loc=None,
        )

    def verified(self, worker: Any, request: Request, *, topk: int = 1, bonus: torch.dtype = torch.int64) -> Any:
        """The verification input, with write locations from the same call as in eagle_prepare_for_verify."""
        bs, steps, batch = len(request.lengths), self.tokens - 1, self.batch(request)
        # Looked up in the module at each call, because onelaunch's hooks replace the functions there.
        made = import_module(DRAFTER).build_eagle_verify_input(
            batch,
            SimpleNamespace(bonus_tokens=request.tokens[:bs].to(bonus)),
            worker._topk1_parents_prealloc[:bs],
            worker._topk1_score_indices_prealloc[:bs],
            request.tokens[bs : bs + bs * steps].view(bs, steps),
            None,
            target_worker=worker.target_worker,
            topk=topk,
            num_steps=steps,
            num_draft_tokens=self.tokens,
            tree_mask_mode=worker.tree_mask_mode,
            device=objects.device(),
        )
        made.out_cache_loc = getattr(import_module(LOCATIONS), LOCATE)(
            req_pool_indices=batch.req_pool_indices,
            req_to_token=self.pool,
            start_offset=batch.seq_lens,
            batch_size=bs,
            draft_token_num=self.tokens,
            device=objects.device(),
        )
        return made

    def verify(self, lengths: tuple[int, ...], seed: int, **how: Any) -> None:
        found = []
        for worker in (self.engine, self.mine):
            self.mask(worker).fill_(2 if self.mask(worker).dtype == torch.uint8 else 0)
            made = self.verified(worker, Request(lengths, seed), **how)
            if worker is self.mine:
                self.spoil(made)
            cells = sum(self.tokens * (n * (self.name != "fa3") + self.tokens) for n in lengths)
            if self.name != "flashinfer" or worker is self.mine:
                assert made.custom_mask is self.mask(worker)
            names = ("draft_token", "positions", "out_cache_loc", *RETRIEVED)
            found.append(
                {"mask": made.custom_mask[:cells].to(torch.bool), **{name: getattr(made, name) for name in names}}
            )
        same(*found)

    def extended(self, worker: Any, request: Request, *, cpu_lengths: bool = False) -> dict[str, Any]:
        """The inputs of a draft extension's forward pass, and the rows that the worker selects from its results."""
        bs, common = len(request.lengths), import_module(WORKER)
        batch = self.batch(request, cpu_lengths=cpu_lengths)
        result = SimpleNamespace(
            accept_lens=request.accepted.clamp(max=self.tokens),
            next_token_ids=request.tokens[: bs * self.tokens].to(torch.int32),
            logits_output=SimpleNamespace(hidden_states=request.hidden[: bs * self.tokens]),
            next_draft_input=SimpleNamespace(),
            prepared_draft_extend_inputs=None,
        )
        seen: dict[str, Any] = {}
        forward = worker.draft_runner.forward

        def forwarded(batch: Any) -> Any:
            assert type(batch.seq_lens) is Tensor
            seen.update(
                batch=batch,
                **{n: getattr(batch, n) for n in ("input_ids", "seq_lens", "positions", "extend_start_loc")},
            )
            seen.update({n: getattr(batch, n) for n in ("extend_prefix_lens", "extend_seq_lens")})
            seen.update({n: getattr(batch.spec_info, n) for n in ("num_correct_drafts", "num_accept_tokens")})
            return forward(batch)

        kept, common.ForwardBatch = common.ForwardBatch, SimpleNamespace(init_new=request_objects.extension_batch)
        worker.draft_runner.forward = forwarded
        try:
            worker._draft_extend_for_decode(batch, result)
        finally:
            common.ForwardBatch, worker.draft_runner.forward = kept, forward
        assert seen.pop("batch").seq_lens_cpu is None or cpu_lengths
        # Row i of the stand-in's hidden states holds i.
        return {**seen, "select_index": result.next_draft_input.hidden_states[:, 0]}

    def extend(self, lengths: tuple[int, ...], seed: int, **how: Any) -> None:
        found = []
        for worker in (self.engine, self.mine):
            found.append(self.extended(worker, Request(lengths, seed), **how))
            if worker is self.mine:
                self.spoil(SimpleNamespace(**found[-1]))
        same(*found)


def same(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        assert tensor.dtype == got[name].dtype, name
        assert tensor.shape == got[name].shape, name
        assert torch.equal(tensor, got[name]), f"{name}: engine {tensor}, onelaunch {got[name]}"


# Newer versions of SGLang make FA3's chain in one launch of their own.
MASKED = ("triton", "flashinfer") if objects.HAS_TRANSLATOR else ("fa3", "triton", "flashinfer")
MADE = "the chain that is verified; in 0.5.17 the layout of a draft extension"
STAYS = "hidden states; masks that aren't the backend's"
needs_extension = pytest.mark.skipif(
    objects.HAS_TRANSLATOR, reason="newer versions make the layout by one launch of their own, and keep it"
)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("fa3", 4), ("triton", 4), ("triton", 2), ("triton", 6), ("fa3", 8), ("flashinfer", 4), ("flashinfer", 3)],
)
def test_the_chain_that_is_verified(name: str, tokens: int) -> None:
    if name == "fa3" and objects.HAS_TRANSLATOR:
        with pytest.raises(
            ArgumentError, match="itself makes the chain that is verified, by one launch; the layout of a"
        ):
            Workers(name, tokens)
        return
    made = Workers(name, tokens)
    for seed, lengths in enumerate(LENGTHS):
        made.verify(lengths, seed)
    assert made.attachment.launches == len(LENGTHS)
    assert not made.attachment.failed
    results.record("EagleDraftWorker", MADE, STAYS, "target_verify", tokens=tokens)


def test_a_mask_without_room_is_the_engines() -> None:
    made = Workers("flashinfer")
    mask = made.attachment._mask
    for room, launches in ((4 * (37 + 2 * 4), 1), (4 * (37 + 2 * 4) - 1, 0)):
        made.attachment._mask = SimpleNamespace(mode=mask.mode, buffer=mask.buffer[:room])
        before = made.attachment.launches
        request = Request((7, 30), 1)
        wanted, got = (made.verified(worker, request).custom_mask for worker in (made.engine, made.mine))
        assert (got is made.attachment._mask.buffer) is bool(launches)
        assert made.attachment.launches == before + launches
        if not launches:
            assert torch.equal(wanted, got)


def test_bonus_tokens_of_either_dtype() -> None:
    made = Workers("triton")
    for bonus in (torch.int32, torch.int64):
        made.verify((7, 30), 1, bonus=bonus)
    assert made.attachment.launches == 2


def test_padding_requests_see_a_mask_of_their_own() -> None:
    """The captured size is 5. The engine would fill the whole buffer; the launch fills it only for 5 requests."""
    made = Workers("triton")
    made.verified(made.mine, Request((7, 30, 9), 1))
    tokens, first = made.tokens, made.tokens * (7 + 30 + 9 + 3 * made.tokens)
    one = torch.cat([torch.ones(tokens, objects.FILL), torch.ones(tokens, tokens).tril()], 1).flatten()
    padding = made.mask(made.mine)[first : first + 2 * len(one)]
    assert padding.tolist() == [*one.tolist()] * 2


@needs_extension
@pytest.mark.parametrize("tokens", [4, 2, 8])
def test_the_layout_of_a_draft_extension(tokens: int) -> None:
    made = Workers("fa3", tokens)
    for seed, lengths in enumerate(LENGTHS):
        made.extend(lengths, seed, cpu_lengths=seed % 2 == 1)
    assert made.attachment.launches == len(LENGTHS)
    assert not made.attachment.failed
    results.record("EagleDraftWorker", MADE, STAYS, "draft_extend", tokens=tokens)


@pytest.mark.parametrize("name", MASKED)
def test_one_wrong_entry_is_seen(name: str) -> None:
    """The control: a wrong entry in each tensor."""
    made = Workers(name)

    def spoiled(attribute: str) -> Any:
        return lambda found: getattr(found, attribute).view(-1)[:1].add_(1)

    for attribute in ("draft_token", "positions", "out_cache_loc", *RETRIEVED):
        made.spoil = spoiled(attribute)
        with pytest.raises(AssertionError, match=f"^{attribute}: engine"):
            made.verify((7, 30), 1)
    made.spoil = lambda found: found.custom_mask[:1].logical_not_()
    with pytest.raises(AssertionError, match=r"^mask: engine"):
        made.verify((7, 30), 1)
    if objects.HAS_TRANSLATOR:
        return
    for attribute in (
        *("input_ids", "seq_lens", "positions", "extend_start_loc", "extend_prefix_lens", "extend_seq_lens"),
        *("num_correct_drafts", "select_index"),
    ):
        made.spoil = spoiled(attribute)
        with pytest.raises(AssertionError, match=f"^{attribute}: engine"):
            made.extend((7, 30), 1)


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations that launch or copy, by name."""

    VIEWS = ("view", "slice", "select", "unbind", "expand", "squeeze", "unsqueeze", "empty", "empty_like", "detach")

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name not in self.VIEWS:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def test_what_the_launch_makes_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch replaces the engine's operations and kernels between its graphs. After a failure all of them run."""
    made, request, older = Workers("triton"), Request((7, 30), 1), not objects.HAS_TRANSLATOR
    kernels: list[str] = []
    for module, name in ((LOCATIONS, LOCATE), *[(BATCHES, "compute_position")] * older):
        hook = getattr(import_module(module), name)
        assert isinstance(hook, hooks.Hook)

        def noted(*arguments: Any, original: Any = hook.original, name: str = name, **keywords: Any) -> Any:
            kernels.append(name)
            return original(*arguments, **keywords)

        monkeypatch.setattr(hook, "original", noted)

    def make(worker: Any) -> None:
        made.verified(worker, request)
        if older:
            made.extended(worker, request)

    def counted(worker: Any) -> Counter[str]:
        with Operations() as operations:
            make(worker)
        return operations.names

    make(made.mine)  # the first call also makes the views
    kernels.clear()
    mine = counted(made.mine)
    assert not kernels
    engine = counted(made.engine)
    assert sorted(kernels) == sorted([LOCATE, *["compute_position"] * older])
    assert {"cat", "full", "fill_", *["arange", "sub", "add", "clamp", "_to_copy"] * older} <= set(engine - mine)
    assert not set(mine) & {"cat", "full", "fill_", "sub", "add"}, mine
    if older:  # the test itself does one of each
        assert [mine[name] for name in ("clamp", "_to_copy", "arange")] == [1, 1, 1], mine
    made.attachment.failed = "of this test"
    assert counted(made.mine) == engine


def test_a_tree_or_another_number_of_tokens_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Workers("triton")
    with monkeypatch.context() as patched:
        patched.setattr(made.mine, "speculative_num_draft_tokens", 5)
        made.verify((7, 30), 1)
    monkeypatch.setattr(made.mine.req_to_token_pool, "req_to_token", made.pool.clone())
    made.verify((7, 30), 1)
    assert (made.attachment.launches, made.attachment.failed) == (0, "")


def test_another_worker_is_the_engines() -> None:
    made = Workers("triton")
    made.verified(made.engine, Request((7, 30), 1))
    assert made.attachment.launches == 0


def test_after_a_failure_the_engines_own_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Workers("triton")

    def refused(*arguments: Any) -> None:
        raise onelaunch.LaunchError("CUDA said no")

    with monkeypatch.context() as patched:
        patched.setattr(made.attachment._chain, "run", refused)
        with pytest.warns(RuntimeWarning, match="EagleDraftWorker runs the engine's own code from now on"):
            made.verify((7, 30), 1)
    made.verify((7, 30), 2)
    assert made.attachment.failed == "LaunchError: CUDA said no"
    if not objects.HAS_TRANSLATOR:
        made.extend((7, 30), 1)
        made.attachment.failed = ""
        monkeypatch.setattr(made.attachment._extension, "run", refused)
        with pytest.warns(RuntimeWarning, match="EagleDraftWorker runs the engine's own code from now on"):
            made.extend((7, 30), 1)
    assert made.attachment.launches == 0


def test_operations_are_run_again_after_the_engine_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Workers("triton")
    if made.attachment._extension is None:
        assert vars(made.mine).keys() == vars(made.engine).keys()
        return
    monkeypatch.setattr(request_objects, "extension_batch", lambda *a, **k: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        made.extended(made.mine, Request((7, 30), 1))
    assert not torch.overrides._get_current_function_mode_stack()


def test_detached_it_is_the_engines() -> None:
    made = Workers("triton")
    made.verify((7, 30), 1)
    assert made.attachment.attached
    with pytest.raises(ArgumentError, match="attached already"):
        sglang.attach(made.mine)
    made.attachment.detach()
    made.attachment.detach()
    assert not made.attachment.attached
    assert vars(made.mine).keys() == vars(made.engine).keys()
    assert not hooks.Hook.made
    launches = made.attachment.launches
    made.verify((9, 2), 2)
    assert made.attachment.launches == launches
    made.attachment = sglang.attach(made.mine)
    made.verify((9, 2), 3)
    assert made.attachment.launches == 1


def test_workers_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Workers("triton").engine
    for change, message in (
        ({"topk": 2}, "topk is 2: a draft tree isn't a chain"),
        ({"speculative_num_steps": 5}, "speculative_num_draft_tokens is 4: speculative_num_steps is 5"),
        (
            {"speculative_num_draft_tokens": 9, "speculative_num_steps": 8},
            "speculative_num_draft_tokens is 9: at most 8",
        ),
        ({"plan_stream": "another"}, "plan_stream is 'another': another stream prepares batches"),
    ):
        kept = {name: getattr(worker, name) for name in change}
        worker.__dict__.update(change)
        with pytest.raises(ArgumentError, match=message):
            sglang.attach(worker)
        worker.__dict__.update(kept)
    backend = worker.target_worker.model_runner.attn_backend
    monkeypatch.setattr(backend, "is_encoder_decoder", True, raising=False)
    with pytest.raises(ArgumentError, match=r"isn't served: .*encoder tokens lie before"):
        sglang.attach(worker)
    with pytest.raises(ArgumentError, match="are a backend's"):
        sglang.attach(worker, schedules=True)


def test_a_mask_that_is_not_the_backends_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer makes a new mask for each batch."""
    worker = runner_objects.draft_worker("triton", objects.token_pool(1, seed=1), 1, 4)
    monkeypatch.setattr(worker.target_worker.model_runner.attn_backend, "_verify_mask", None)
    if objects.HAS_TRANSLATOR:
        with pytest.raises(
            ArgumentError, match="itself makes the chain that is verified, with a mask of its own; the layout"
        ):
            sglang.attach(worker)
    else:
        made: Any = sglang.attach(worker)
        assert isinstance(made, Producers)
        assert made.refreshed == "the layout of a draft extension"
        assert "the chain that is verified" in made.stays


def test_the_plugin_attaches_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    worker = runner_objects.draft_worker("triton", objects.token_pool(1, seed=1), 1, 4)
    with caplog.at_level(logging.INFO, "onelaunch"):
        plugin._captured(None, SimpleNamespace(_draft_worker=worker))
    assert "EagleDraftWorker: one launch makes the chain that is verified" in caplog.text
