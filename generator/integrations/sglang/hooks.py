"""What stands in the place of an engine's methods, functions and buffers while a seam is attached."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor


class Unfilled:
    """A buffer of a runner that the launch pads. What the engine fills it with waits, and is dropped after a launch."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._value: Any = None

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor[index]

    def fill_(self, value: Any) -> None:
        """Tensor.fill_, later or never."""
        self._value = value

    def zero_(self) -> None:
        """Tensor.zero_, later or never."""
        self._value = 0

    def fill(self) -> None:
        """Fills it, if it was to be."""
        if self._value is not None:
            self.tensor.fill_(self._value)


class Bound(functools.partial[Any]):
    """A method of mine in place of an original one, which it gets first."""


class Replaced:
    """Attributes of an engine's objects that something of mine stands in the place of."""

    def __init__(self) -> None:
        # The object, the name, what the object had of its own, and what it has now.
        self._all: list[tuple[Any, str, Any, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._all)

    def put(self, owner: Any, name: str, mine: Any) -> None:
        """Puts mine in the place of an attribute."""
        self._all.append((owner, name, vars(owner).get(name), mine))
        setattr(owner, name, mine)

    def restore(self) -> None:
        """Puts everything back, unless somebody else has replaced it since."""
        for owner, name, own, mine in self._all:
            if vars(owner).get(name) is not mine:
                continue
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
        self._all = []


class Hook:
    """A function of one of SGLang's modules that asks seams first. It is there while there are any."""

    made: ClassVar[dict[tuple[str, str], Hook]] = {}

    def __init__(self, module: ModuleType, name: str) -> None:
        self.module, self.name, self.original = module, name, getattr(module, name)
        self.seams: list[Any] = []

    @classmethod
    def of(cls, module: ModuleType, name: str) -> Hook:
        """The hook of a function, which is put in its place if it isn't there."""
        key = module.__name__, name
        if key not in cls.made:
            cls.made[key] = cls(module, name)
            setattr(module, name, cls.made[key])
        return cls.made[key]

    @classmethod
    def remove(cls, seam: Any) -> None:
        """A seam leaves all hooks, and hooks without seams go."""
        for key, hook in list(cls.made.items()):
            hook.seams = [other for other in hook.seams if other is not seam]
            if not hook.seams:
                if getattr(hook.module, hook.name) is hook:  # otherwise somebody else put one around it
                    setattr(hook.module, hook.name, hook.original)
                del cls.made[key]

    def __call__(self, destinations: list[Tensor], sources: list[Tensor]) -> None:
        """COPIES."""
        for seam in self.seams:
            if seam.copies(self.original, destinations, sources):
                return
        self.original(destinations, sources)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """A kernel's launcher."""

        def launch(*arguments: Any, **keywords: Any) -> None:
            for seam in self.seams:
                if seam.waits(self.original[grid], arguments, keywords):
                    return
            self.original[grid](*arguments, **keywords)

        return launch
