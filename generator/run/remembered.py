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
        inputs: the first so many arguments are inputs of a run, of which only the dtype counts. The plan checks the
            rest of them.

    Attributes:
        find: find(arguments...): the plan for equal arguments, or None. One C call.
    """

    find: Callable[..., Any]

    def __init__(self, inputs: int = 0) -> None:
        self._inputs = inputs
        self.clear()

    def clear(self) -> None:
        """Forgets all plans."""
        self._memo: Any = None  # made by the first plan's binding; all bindings compare in the same way
        self.find = lambda *arguments: None

    def keep(self, plan: Any, *arguments: Any) -> None:
        """Remembers a plan, and drops the least recently used one if there are too many."""
        if self._memo is None:
            self._memo = plan.kernel.module.memo(_MAX_PLANS, self._inputs)
            self.find = self._memo.find
        self._memo.keep(plan, *arguments)
