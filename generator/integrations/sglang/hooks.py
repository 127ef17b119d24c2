"""What stands in the place of an engine's methods, functions and buffers while a seam is attached."""

from __future__ import annotations

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


class Bound:
    """A method of mine in place of an original one, which it gets first."""

    def __init__(self, mine: Callable[..., Any], original: Any) -> None:
        self.mine, self.original = mine, original

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.mine(self.original, *arguments, **keywords)


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
