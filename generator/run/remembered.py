"""Plans by the arguments that they were made for, so that a repeated function call needs no bind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MAX_PLANS = 256


class RememberedPlans:
    """The plans of one function, by the arguments of the call that made them.

    The binding compares arguments by value. The value of a tensor is its address, shape, strides, dtype and device, so
    a tensor whose memory or shape changed is another argument. The plans have addresses only: they don't keep tensors
    alive, because every call passes them again.

    Args:
        passed: the first so many arguments are those of the plan's run, which checks them.
        inputs: the first so many of these are inputs, of which only the dtype distinguishes plans.

    Attributes:
        run: run(arguments...): runs the plan for equal arguments and returns None; if there is none, returns the
            arguments, for keep(). One C call.
    """

    run: Callable[..., tuple[Any, ...] | None]

    def __init__(self, passed: int, inputs: int = 0) -> None:
        self._passed, self._inputs = passed, inputs
        self.clear()

    def clear(self) -> None:
        """Forgets all plans."""
        self._memo: Any = None  # made by the first plan's binding; all bindings compare in the same way
        self.run = lambda *arguments: arguments

    def keep(self, plan: Any, *arguments: Any) -> None:
        """Remembers a plan, and drops the least recently used one if there are too many."""
        if self._memo is None:
            self._memo = plan.kernel.module.memo(_MAX_PLANS, self._passed, self._inputs)
            self.run = self._memo.run
        self._memo.keep(plan, plan._run, *arguments)
