"""One checker for the CPU target, the emulation and a GPU: poisoned destinations, a run, every word compared.

``check`` binds and runs a case through the public API. The emulation launches the same scene in another process
(emulation/harness.py).
"""

from __future__ import annotations

from typing import Any

import onelaunch
import pytest
import support
import torch
from cases import Shape
from onelaunch import KernelConfig, MetadataBuffers
from onelaunch.errors import ArgumentError
from onelaunch.run.bind import make_plan
from onelaunch.run.copy_plan import CopyPlan
from onelaunch.run.destinations import Destinations, backend_field
from tensors import COPIED_PAGE_SIZE, Tensors, settings_for

# What a message of a checked plan says for each kind of violation.
REPORTED = {
    "pool row": r"req_pool_indices\[{request}\] is {value};",
    "negative length": r"seq_lens\[{request}\] is {value}; allowed: 0 or more",
    "length": r"seq_lens\[{request}\] is {value}; allowed: up to {limit},",
    "extend length": r"extend_seq_lens\[{request}\] is {value};",
    "capacity": r"up to request {request} need {value} elements of kv_indices; the destinations have {limit}",
}
# The numbers that a kernel writes for them.
KINDS = {"pool row": 1, "negative length": 2, "length": 3, "extend length": 4, "capacity": 6}


class Scene(Tensors):
    """The tensors of a case, which can be bound, run and compared."""

    def bind(self, **more: Any) -> onelaunch.Plan | CopyPlan:
        """Binds the destinations, with bind() arguments that aren't settings of the configuration.

        Raises:
            AssertionError: the plan's configuration differs from the case's.
        """
        config = self.config.replace(target=self.device.type)
        standard = [name for name in config.fields if name not in self.declared]
        buffers = [MetadataBuffers(**{n: getattr(b.buffers, n) for n in standard}) for b in self.backends]
        if self.copies:
            destinations = Destinations(buffers, COPIED_PAGE_SIZE, backend_field, config.mode)
            made: Any = CopyPlan(self.source, destinations, keep=True, mode=config.mode)
        else:
            settings = settings_for(onelaunch.bind, config)
            launch = {name: getattr(config, name) for name in _DEFAULT_LAUNCH}
            if config.replace(**_DEFAULT_LAUNCH) == config:
                made = onelaunch.bind(buffers, req_to_token=self.req_to_token, **settings, **self._beside(), **more)
            else:  # bind() has no arguments for these
                made = make_plan(buffers, self.req_to_token, settings | launch | self._beside() | more)
        assert made.config == config, f"bound {made.config.settings()} instead of {config.settings()}"
        return made

    def _beside(self) -> dict[str, Any]:
        """The arguments of bind() besides the buffers."""
        config, declare = self.config, dict(self.config.declare)
        for name in self.declared:
            tensors = [getattr(backend.buffers, name) for backend in self.backends]
            declare[name] = onelaunch.into(declare[name], tensors)
        return {
            "declare": declare,
            "inputs": {name: getattr(torch, dtype) for name, dtype in config.inputs},
            "constants": dict(config.constants),
            "sources": {name: self.tables[name] for name, _ in config.sources},
            "maps": {name: onelaunch.Map(self.tables[name], outside) for name, (_, outside) in config.maps},
        }

    def run(self, plan: Any, method: str = "run") -> None:
        """One launch, by a method of the plan."""
        if self.copies:
            rows = None if self.config.mode == "decode" else self.rows
            bs, max_len = len(self.shape.lengths), self.shape.max_len
            plan.run(bs=bs, rows=rows, max_len=max_len, page_size=COPIED_PAGE_SIZE)
            return
        extends = self.extend_seq_lens if self.config.extend == "variable" else None
        getattr(plan, method)(
            self.seq_lens,
            self.req_pool_indices,
            extends,
            max_len=self.shape.max_len,
            captured_size=self.captured_size,
            **self.inputs,
        )

    def take_inputs(self, other: Scene) -> None:
        """Copies another scene's inputs into this one's memory, and takes over its expected results."""
        for name in ("seq_lens", "req_pool_indices", "req_to_token", "extend_seq_lens"):
            getattr(self, name).copy_(getattr(other, name))
        for name, tensor in {**self.inputs, **self.tables}.items():
            tensor.copy_(other.inputs[name] if name in other.inputs else other.tables[name])
        for field, tensor in other.source.items():
            getattr(self.source, field.name).copy_(tensor)
        self.expected = other.expected

    def compare(self) -> None:
        """Checks every word of every allocation: the destinations, and the poison around them.

        Raises:
            AssertionError: names the backend, the field and the first wrong coordinate.
        """
        try:
            support.assert_same(self.backends, self.expected)
        except AssertionError as error:
            raise AssertionError(f"{self.config.settings()}, {self.shape.name}: {error}") from None

    def compare_violations(self, plan: onelaunch.Plan) -> None:
        """Checks the report of a checked plan: one of the violations, once, or nothing."""
        if not self.violations:
            plan.check()
            return
        allowed = [
            REPORTED[kind].format(request=request, value=value, limit=limit)
            for kind, request, value, limit in self.violations
        ]
        with pytest.raises(ArgumentError, match="|".join(allowed)):
            plan.check()
        plan.check()  # only once


_DEFAULT_LAUNCH = {name: getattr(KernelConfig(), name) for name in ("threads", "unroll", "blocks_per_sm")}


def check(config: KernelConfig, shape: Shape, device: torch.device | str) -> Any:
    """Binds and runs one case, compares every word, and returns the plan.

    Raises:
        AssertionError: a word differs from the reference's, a violation wasn't reported, or another configuration was
            bound.
    """
    scene = Scene(config, shape, device)
    plan = scene.bind()
    scene.run(plan)
    scene.compare()
    if config.checked and not scene.copies:
        scene.compare_violations(plan)  # type: ignore[arg-type]
    return plan
