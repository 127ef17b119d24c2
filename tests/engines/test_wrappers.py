"""FlashInfer's plans in SGLang get the same lists as in the engine, without its copies. Uses the real classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import compare
import flashinfer_fakes
import pytest
import torch
from objects import FAMILIES, WIDTH
from onelaunch import ArgumentError
from onelaunch.integrations.sglang.wrappers import Wrapper
from pairs import Pair
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.usefixtures("quick_builds")

MODES = (("decode", 3), ("decode", 5), ("decode", 0), ("target_verify", 0), ("draft_extend", 0))
BATCHES = (((77, 300, 640, 64, 1), 5), ((63, 192), 2), ((128, 65, 5), 5), ((640, 639, 2, 130), 5))


def lengths_for(pair: Pair, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The lengths adapted to the pair's mode, as in Pair.replay()."""
    if pair.mode == "target_verify":
        return tuple(min(length, WIDTH - pair.draft_tokens) for length in lengths)
    return tuple(max(length, pair.draft_tokens) for length in lengths) if pair.mode == "draft_extend" else lengths


@contextmanager
def plans() -> Iterator[list[Any]]:
    """Collects the lists and the other arguments of each compiled plan that is called within the `with`."""
    flashinfer_fakes.planned.clear()
    flashinfer_fakes.settings.clear()
    found: list[Any] = []
    yield found
    found += zip(flashinfer_fakes.planned, flashinfer_fakes.settings, strict=True)


def planned(pair: Pair, backend: Any, lengths: tuple[int, ...], bs: int, seed: int) -> list[Any]:
    compare.poison(backend)
    batch = pair.batch(lengths_for(pair, lengths), bs, seed)
    with plans() as found:
        backend.init_forward_metadata_out_graph(batch)
    return found


def same(pair: Pair, wanted: list[Any], got: list[Any], padding: int = 0) -> bool:
    """Whether two rounds of plans are the same.

    In a draft step they may differ for padding requests: these have length 1, but SGLang's sums use their position, 0.
    """
    assert len(wanted) == len(got) == (pair.steps - 1 if pair.steps else 1)
    unread = padding if pair.steps else 0
    for (lists, numbers), (mine, my_numbers) in zip(wanted, got, strict=True):
        assert len(lists) >= 1
        if numbers != my_numbers or [len(one) for one in lists] != [len(one) for one in mine]:
            return False
        if not all(a[: len(a) - unread].equal(b[: len(b) - unread]) for a, b in zip(lists, mine, strict=True)):
            return False
    return True


@pytest.mark.parametrize(("mode", "steps"), MODES)
def test_plans_are_made_of_the_same_lists(mode: str, steps: int) -> None:
    pair = Pair("flashinfer", 1, mode=mode, steps=steps)
    for seed, (lengths, bs) in enumerate(BATCHES):
        wanted, got = (planned(pair, made, lengths, bs, seed) for made in pair.backends)
        assert same(pair, wanted, got, bs - len(lengths))
    assert pair.attachment.launches == len(BATCHES)


@pytest.mark.parametrize(("mode", "steps"), MODES)
def test_a_wrong_length_on_the_host_is_found(mode: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a wrong length of each request in turn."""
    pair = Pair("flashinfer", 1, mode=mode, steps=steps)
    wanted = planned(pair, pair.engine, (77, 300), 2, 0)
    make = pair.batch
    for request in (0, 1):

        def wrong(*arguments: Any, request: int = request) -> Any:
            batch = make(*arguments)
            batch.seq_lens_cpu[request] += 1
            return batch

        monkeypatch.setattr(pair, "batch", wrong)
        assert not same(pair, wanted, planned(pair, pair.mine, (77, 300), 2, 0))


class Touched(TorchDispatchMode):
    """Records operators that read or write given tensors' memory, or results computed from it. Views don't count."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        touched = any(tensor.untyped_storage().data_ptr() in self._storages for tensor in tensors)
        # PyTorch doesn't copy a tensor onto itself.
        nothing = function.overloadpacket is torch.ops.aten.copy_ and tensors[0].data_ptr() == tensors[1].data_ptr()
        if touched and not nothing and not function.is_view:
            self.names.append(function.overloadpacket.__name__)
            made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
            self._storages |= {tensor.untyped_storage().data_ptr() for tensor in made}
        return result


@pytest.mark.parametrize(
    ("mode", "steps", "least"), [("decode", 3, 1), ("target_verify", 0, 15), ("draft_extend", 0, 4)]
)
def test_no_operator_touches_what_is_on_the_device(mode: str, steps: int, least: int) -> None:
    """Only the launch and the packing do. The counts of the engine's operators omit those without an input tensor."""
    pair = Pair("flashinfer", 1, mode=mode, steps=steps)
    packed = []
    for _, wrapper in pair.attachment._refresh._pairs(5, mode):
        assert isinstance(wrapper, Wrapper)
    for _, ready in pair.attachment._ready.values():
        for _, wrapper in ready.pairs:
            wrapper._segments = lambda *arguments: packed.append(arguments)
    counts = []
    for made in pair.backends:
        batch = pair.batch(lengths_for(pair, (77, 300, 640, 64, 9)), 5, 0)
        tensors = [batch.seq_lens, batch.req_pool_indices, batch.positions, pair.pool]
        mask = batch.spec_info.custom_mask
        tensors += [] if mask is None else [mask]
        tensors += [value for value in compare.reachable(made).values() if isinstance(value, torch.Tensor)]
        with Touched(tensors) as touched:
            made.init_forward_metadata_out_graph(batch)
        counts.append(touched.names)
    engine, mine = counts
    assert len(engine) >= least, engine
    assert mine == []
    assert len(packed) == (mode == "target_verify")


@pytest.mark.parametrize("mode", ["target_verify", "draft_extend", "decode"])
def test_what_cannot_be_planned_on_the_host_is_the_engines(mode: str) -> None:
    """Without lengths on the host, or with another number of tokens, another algorithm or another mask."""
    from sglang.srt.speculative.spec_info import SpecInputType

    pair = Pair("flashinfer", 1, mode=mode)
    changes: list[Any] = [] if mode == "draft_extend" else [lambda batch: setattr(batch, "seq_lens_cpu", None)]
    if mode == "target_verify":
        changes.append(lambda batch: setattr(batch.spec_info, "num_tokens_per_req", 3))
        changes.append(lambda batch: setattr(batch.spec_info, "spec_input_type", SpecInputType.NGRAM_VERIFY))
        changes.append(
            lambda batch: setattr(batch.spec_info, "custom_mask", batch.spec_info.custom_mask.view(torch.uint8))
        )
    for change in changes:
        for made in pair.backends:
            compare.poison(made)
            batch = pair.batch((77, 300), 2, 0)
            change(batch)
            made.init_forward_metadata_out_graph(batch)
        pair.check()
    assert pair.attachment.launches == 0


@pytest.mark.parametrize("mode", ["target_verify", "draft_extend", "decode"])
def test_a_batch_size_that_is_captured_again_has_another_wrapper(mode: str) -> None:
    pair = Pair("flashinfer", 1, mode=mode)
    for made in pair.backends:
        made.init_forward_metadata_out_graph(pair.batch((1, 1), 2, 0), in_capture=True)
    (ready,) = (ready for (bs, _), (_, ready) in pair.attachment._ready.items() if bs == 2)
    ((child, wrapper),) = ready.pairs
    (now,) = {
        "decode": child.decode_cuda_graph_metadata,
        "target_verify": child.prefill_cuda_graph_metadata,
        "draft_extend": child.draft_extend_cuda_graph_metadata,
    }[mode][2]
    assert wrapper._wrapper is now
    pair.replay((77, 300), 2, 0)
    pair.check()


def test_a_batch_size_without_a_graph_is_named() -> None:
    pair = Pair("flashinfer", 1, mode="target_verify")
    with pytest.raises(ArgumentError, match=r"bs is 3, and .*prefill_cuda_graph_metadata has 2, 5: .*Capture first"):
        Wrapper(pair.mine, 3, "target_verify")
    assert FAMILIES["flashinfer"].single == type(pair.mine).__name__


@pytest.mark.parametrize("mode", ["target_verify", "draft_extend", "decode"])
def test_a_plan_that_fails_leaves_it_to_the_engine(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair("flashinfer", 1, mode=mode)

    def fail(self: Any, batch: Any) -> None:
        raise RuntimeError("FlashInfer said no")

    monkeypatch.setattr(Wrapper, "plan", fail)
    with pytest.warns(RuntimeWarning, match="runs the engine's own code from now on. RuntimeError: FlashInfer said no"):
        pair.replay((7, 300), 5, seed=0)
    assert not compare.differences(pair.engine, pair.mine)


@pytest.mark.parametrize(("mode", "short"), [("decode", "kv_indices"), ("target_verify", "mask")])
def test_what_does_not_fit_is_left_to_the_engine_to_refuse(mode: str, short: str) -> None:
    pair = Pair("flashinfer", 1, mode=mode, steps=3 if mode == "decode" else 0)
    for _, ready in pair.attachment._ready.values():
        for _, wrapper in ready.pairs:
            if short == "mask":
                wrapper._packed = wrapper._packed[:30]
            else:
                wrapper.lists.kv_indices = wrapper.lists.kv_indices[:300]
    with pytest.warns(RuntimeWarning, match="the mask has 1540 bits, and its buffer has 30 bytes|has 379 tokens, and"):
        pair.replay((77, 300), 2, seed=0)
    assert not compare.differences(pair.engine, pair.mine)


@pytest.mark.parametrize("mode", ["target_verify", "draft_extend", "decode"])
def test_detached_it_is_the_engines(mode: str) -> None:
    pair = Pair("flashinfer", 1, mode=mode)
    pair.replay((77, 300), 2, seed=0)
    pair.check()
    pair.attachment.detach()
    assert vars(pair.mine).keys() == vars(pair.engine).keys()
    pair.replay((5, 80), 5, seed=1)
    pair.check()
    assert pair.attachment.launches == 1


def test_a_mask_that_is_longer_than_the_batch() -> None:
    """The draft worker's launch makes such a mask: it is in a buffer, and includes padding."""
    pair = Pair("flashinfer", 1, mode="target_verify")
    make = pair.batch
    for lengths, size in (((77, 300), 2), ((7, 30, 9), 5)):
        for made in pair.backends:
            compare.poison(made)
            batch = make(lengths, size, 0)
            more = torch.arange(9_000) % 3 == 0
            batch.spec_info.custom_mask = torch.cat([batch.spec_info.custom_mask, more])
            made.init_forward_metadata_out_graph(batch)
        pair.check()
    assert pair.attachment.launches == 2
