"""Audits: silent about what a refresh left, and exact about an element that is something else."""

from __future__ import annotations

import pickle
import re
from typing import Any

import onelaunch
import pytest
import torch
from cases import AUDITS, SHAPES, STRATEGIES, Shape, batch
from checker import Scene
from onelaunch import ArgumentError, AuditError, KernelConfig, MetadataBuffers, Plan
from onelaunch.errors import ConfigError
from support import POISON, assert_same
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick_builds")
# One of each strategy and field kind; the others take long and rarely fail.
REFRESHES = [
    pytest.param(name, marks=[pytest.mark.long] * (name not in AUDITS))
    for name, config in STRATEGIES.items()
    if config.operation != "copy"
]
SHAPE = Shape("audited", (7, 0, 290, 33, 512), width=640, spare_rows=2, extends=(2, 0, 1, 3), max_indices=9000)


class Audited:
    """A scene whose plan has the audit, after a refresh."""

    def __init__(self, config: KernelConfig, shape: Shape, device: torch.device) -> None:
        self.scene = Scene(config, shape, device)
        self.plan: Any = self.scene.bind(audit_every=0)
        self.scene.run(self.plan)

    def audit(self) -> None:
        self.scene.run(self.plan, "audit")
        self.plan.check()

    def written(self, name: str, d: int) -> list[tuple[int, ...]]:
        """The elements of a destination that the refresh wrote."""
        tensor, poison = self.scene.destinations[name][d][0], POISON
        if tensor.dtype == torch.bool:
            # Before the copy to the CPU: a copy of a strided bool tensor turns any nonzero byte into 1.
            tensor, poison = tensor.view(torch.uint8), 0xA5
        return [tuple(index) for index in (tensor != poison).nonzero().tolist()]


# ------------------------------------------------------------------------------------------------ nothing to report


@pytest.mark.uncounted
@pytest.mark.parametrize("name", REFRESHES)
def test_what_a_refresh_left_is_right(device: torch.device, name: str) -> None:
    """No false alarm, whatever the lengths; and the audit writes nothing."""
    bounded = batch(33, 517, max_len=400, num_sms=1, num_sm_parts=1, input_stride=2, max_indices=20_000)
    for shape in (SHAPE, bounded.within(320)):
        audited = Audited(STRATEGIES[name], shape, device)
        audited.audit()
        audited.scene.compare()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_any_shape(device: torch.device, shape: Shape) -> None:
    audited = Audited(STRATEGIES["offsets"], shape, device)
    audited.audit()
    audited.scene.compare()


# ------------------------------------------------------------------------------------------------ every element


@pytest.mark.uncounted
@pytest.mark.parametrize("name", REFRESHES)
def test_an_element_of_each_field_is_named(device: torch.device, name: str) -> None:
    """Changes a few elements of each destination in turn, the first and the last among them."""
    audited = Audited(STRATEGIES[name], SHAPE, device)
    scene = audited.scene
    for field, made in scene.destinations.items():
        for d, (tensor, _) in enumerate(made):
            written = audited.written(field, d)
            assert written, f"{field} has no element"
            backend = next(b for b in range(scene.config.num_backends) if scene._which(b, field) == d)
            for index in {written[0], written[len(written) // 2], written[-1]}:
                is_bool = tensor.dtype == torch.bool
                stored = tensor.view(torch.uint8) if is_bool else tensor
                right = int(stored[index])
                wrong = 1 - right if is_bool else right ^ 1 << 30
                stored[index] = wrong
                with pytest.raises(AuditError) as caught:
                    audited.audit()
                stored[index] = right
                error = caught.value
                assert (error.backend, error.field, error.found, error.expected) == (backend, field, wrong, right)
                shown = f"declare[{field!r}]" if field in scene.declared else f"backends[{backend}].{field}"
                assert error.name.startswith(shown)
                row, column = [*index, None][:2]
                assert (error.row, error.column) == (row, column)
    audited.audit()  # reports nothing more: each difference was reported once
    scene.compare()


def test_what_a_refresh_leaves_alone_is_not_audited(device: torch.device) -> None:
    audited = Audited(STRATEGIES["live"], SHAPE, device)
    for name, made in audited.scene.destinations.items():
        for d, (tensor, _) in enumerate(made):
            dead = torch.ones_like(tensor, dtype=torch.bool)
            for index in audited.written(name, d):
                dead[index] = False
            assert dead.any()
            tensor[dead] = 77
    audited.audit()


def test_one_of_many_differences_is_reported(device: torch.device) -> None:
    audited = Audited(STRATEGIES["live"], SHAPE, device)
    table = audited.scene.destinations["page_indices"][1][0]
    table.fill_(77)
    with pytest.raises(
        AuditError, match=r"^backends\[1\].page_indices\[\d+, \d+\] is 77; a refresh .* writes -?\d+"
    ) as e:
        audited.audit()
    assert e.value.expected == int(audited.scene.wanted("page_indices", 1)[e.value.row, e.value.column])
    audited.plan.check()  # the others went unreported
    with pytest.raises(AuditError):
        audited.audit()


def test_a_byte_that_is_no_bool(device: torch.device) -> None:
    flags = torch.zeros(4, dtype=torch.bool, device=device)
    pool = torch.zeros((1, 1), dtype=torch.int32, device=device)
    declare = {"is_live": onelaunch.into(onelaunch.vector("seq_len > 0", "request", dtype="bool"), flags)}
    plan = onelaunch.bind([MetadataBuffers()], req_to_token=pool, declare=declare, audit_every=0)
    inputs = torch.tensor([5, 0, 1], device=device), torch.zeros(3, dtype=torch.int64, device=device)
    plan.run(*inputs)
    flags.view(torch.uint8)[2] = 0xA5
    plan.audit(*inputs)
    with pytest.raises(AuditError, match=r"is_live'\]\[2\] is 165; .* writes 1\."):
        plan.check()


# ------------------------------------------------------------------------------------------------ what it finds


def small(device: torch.device, **settings: Any) -> tuple[Plan, MetadataBuffers, tuple[Tensor, Tensor], Tensor]:
    """A plan of one backend, its buffers, the inputs of a run, and req_to_token.

    Verified writes always write the tile in which a row ends: two of the rows begin with another one.
    """
    pool = torch.zeros((3, 600), dtype=torch.int32, device=device)
    pool[:, :30] = torch.arange(90, dtype=torch.int32, device=device).view(3, 30)
    buffers = MetadataBuffers(
        cache_seqlens=torch.zeros(4, dtype=torch.int32, device=device),
        page_indices=torch.full((4, 600), -7, dtype=torch.int32, device=device),
    )
    inputs = torch.tensor([309, 600, 2], device=device), torch.tensor([1, 0, 2], device=device)
    return onelaunch.bind([buffers], req_to_token=pool, **settings), buffers, inputs, pool


def test_a_foreign_write_that_verified_writes_miss(device: torch.device) -> None:
    """Verified writes know nothing of other writers; the audit does, and forget() is the remedy that it names."""
    plan, buffers, inputs, _ = small(device, writes="verified", audit_every=0)
    assert buffers.page_indices is not None
    plan.run(*inputs)
    buffers.page_indices[1, 17] = 1000
    plan.run(*inputs)
    plan.audit(*inputs)
    with pytest.raises(AuditError, match=re.escape("backends[0].page_indices[1, 17] is 1000;")) as caught:
        plan.check()
    assert caught.value.expected == 17
    assert "forget()" in str(caught.value)
    plan.forget()
    plan.run(*inputs)
    plan.audit(*inputs)
    plan.check()


def test_a_collision_of_verified_writes(device: torch.device) -> None:
    """A changed tile isn't written if the stored hash equals the hash of its new content."""
    plan, _, inputs, pool = small(device, writes="verified", audit_every=0)
    assert plan._hashes is not None
    pool[1, 8] = 4711
    plan.run(*inputs)
    later = plan._hashes.words.clone()
    pool[1, 8] = 38
    plan.run(*inputs)
    plan._hashes.words.copy_(later)
    pool[1, 8] = 4711
    plan.run(*inputs)
    plan.audit(*inputs)
    with pytest.raises(AuditError, match=r"page_indices\[0, 8\] is 38; .* writes 4711\."):
        plan.check()


def test_tokens_that_were_rewritten_without_a_refresh(device: torch.device) -> None:
    plan, _, inputs, pool = small(device, audit_every=0)
    plan.run(*inputs)
    pool[1, 8] = 4711
    plan.audit(*inputs)
    with pytest.raises(AuditError) as caught:
        plan.check()
    error = pickle.loads(pickle.dumps(caught.value))
    found = error.backend, error.field, error.row, error.column, error.found, error.expected
    assert found == (0, "page_indices", 0, 8, 38, 4711)
    assert str(error) == str(caught.value)
    inputs[0][0] = 5  # with these inputs another row is expected: columns after the live ones aren't audited
    plan.audit(*inputs)
    with pytest.raises(AuditError, match=r"cache_seqlens\[0\] is 309; a refresh with the audit's inputs writes 5"):
        plan.check()


def test_tables_that_somebody_else_writes(device: torch.device) -> None:
    """A plan with writes="audit" never writes: an engine's own code does."""
    plan, buffers, inputs, pool = small(device, writes="audit")
    plan.run(*inputs)
    with pytest.raises(AuditError):
        plan.check()
    assert buffers.cache_seqlens is not None
    assert buffers.page_indices is not None
    assert buffers.cache_seqlens.tolist() == [0] * 4
    assert (buffers.page_indices == -7).all()
    buffers.cache_seqlens[:3] = inputs[0]
    buffers.page_indices[:3] = pool[inputs[1]]
    plan.run(*inputs)
    plan.check()


def test_the_inputs_of_an_audit_are_checked_like_those_of_a_run(device: torch.device) -> None:
    plan, _, (lengths, rows), _ = small(device, checked=True, audit_every=0)
    with pytest.raises(ArgumentError, match="req_pool_indices has 2 elements and seq_lens has 3"):
        plan.audit(lengths, rows[:2])
    plan.run(lengths, rows)
    rows[1] = 3
    plan.audit(lengths, rows)
    with pytest.raises(ArgumentError, match=r"req_pool_indices\[1\] is 3; allowed: rows of req_to_token, 0 to 3"):
        plan.check()


def test_an_audit_runs_between_two_graphs(device: torch.device) -> None:
    plan, buffers, inputs, _ = small(device, audit_every=0)
    assert buffers.page_indices is not None

    @torch.compile(backend="eager")
    def step(lengths: Tensor, rows: Tensor) -> Tensor:
        plan.run(lengths + 1, rows)
        plan.audit(lengths + 1, rows)
        return lengths * 2

    lengths, rows = inputs[0] - 1, inputs[1]
    assert torch.equal(step(lengths, rows), lengths * 2)
    plan.check()
    buffers.page_indices[2, 1] = -5
    torch.compile(plan.audit, backend="eager")(*inputs)
    with pytest.raises(AuditError, match=r"page_indices\[2, 1\] is -5;"):
        plan.check()


# ------------------------------------------------------------------------------------------------ canary


def test_every_third_run_audits_and_a_later_one_raises(device: torch.device) -> None:
    plan, buffers, inputs, _ = small(device, writes="verified", audit_every=3)
    assert plan._auditor is not None
    assert buffers.page_indices is not None
    for _ in range(7):
        plan.run(*inputs)
    assert (plan.launches, plan._auditor.launches) == (7, 2)
    buffers.page_indices[0, 3] = -1
    for _ in range(4):  # the ninth audits
        plan.run(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(AuditError, match=r"page_indices\[0, 3\] is -1;"):
        plan.run(*inputs)
    assert plan.launches == 12, "the refresh was launched before"
    plan.forget()
    for _ in range(6):
        plan.run(*inputs)
    plan.check()


def test_a_plan_without_an_audit(device: torch.device) -> None:
    plan, _, inputs, _ = small(device)
    with pytest.raises(ArgumentError, match=r"bound without an audit\. Bind it with audit_every=0"):
        plan.audit(*inputs)
    with pytest.raises(ArgumentError, match="without device checks and without an audit"):
        plan.check()


@pytest.mark.parametrize(("every", "message"), [(-1, "audit_every is -1; allowed: 0 or more"), (True, "a Python int")])
def test_audit_every_is_a_number(device: torch.device, every: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        small(device, audit_every=every)


def test_a_variable_turns_audits_on_in_code_that_knows_nothing_of_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONELAUNCH_AUDIT_EVERY", "2")
    plan, buffers, inputs, _ = small(device, writes="verified")
    assert buffers.page_indices is not None
    plan.run(*inputs)
    buffers.page_indices[0, 3] = -1
    plan.run(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    plan.run(*inputs)
    with pytest.raises(AuditError, match=r"page_indices\[0, 3\] is -1;"):
        plan.run(*inputs)
    assert small(device, audit_every=0)[0]._audit_every == 0
    monkeypatch.setenv("ONELAUNCH_AUDIT_EVERY", "often")
    with pytest.raises(ArgumentError, match=r"\$ONELAUNCH_AUDIT_EVERY is 'often'; allowed: a whole number"):
        small(device)


def test_groups_audit_each_plan(device: torch.device) -> None:
    scene = Scene(STRATEGIES["live"], SHAPE, device)
    buffers = [backend.buffers for backend in scene.backends]
    buffers = [MetadataBuffers(**{f.name: t for f, t in each.items()}) for each in buffers]
    groups = onelaunch.bind_groups(buffers, [[2, 0], [1]], req_to_token=scene.req_to_token, audit_every=1)
    inputs = scene.seq_lens, scene.req_pool_indices
    groups.run(*inputs)
    assert_same(scene.backends, scene.expected)
    for plan in groups.plans:
        plan.check()
    table = buffers[1].page_indices
    assert table is not None
    table[2, 5] = 12345
    groups.plans[1].audit(*inputs)
    with pytest.raises(AuditError, match=r"^backends\[1\].page_indices\[2, 5\] is 12345"):
        groups.plans[1].check()


# ------------------------------------------------------------------------------------------------ the setting


def test_an_audit_is_a_setting_of_its_own() -> None:
    config = KernelConfig(num_backends=3)
    audit = config.replace(writes="audit")
    assert audit.settings() == "num_backends=3,writes=audit"
    assert audit == KernelConfig(num_backends=3, writes="verified", vector_bytes=4).replace(writes="audit")
    vectors = KernelConfig(fields=("cache_seqlens",))
    assert vectors.replace(writes="verified") == vectors != vectors.replace(writes="audit")
    copy = KernelConfig(operation="copy")
    assert copy.replace(writes="audit") == copy
    with pytest.raises(ConfigError, match="writes is 'none'; allowed: 'all', 'verified', 'audit'"):
        KernelConfig(writes="none")  # type: ignore[arg-type]
