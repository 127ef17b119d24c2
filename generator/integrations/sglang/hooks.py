"""What stands in the place of an engine's methods, functions and buffers while a seam is attached."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor
from torch.overrides import TorchFunctionMode


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
    """A function or Triton kernel of one of SGLang's modules that asks seams first. It is there while there are any."""

    made: ClassVar[dict[tuple[str, str], Hook]] = {}

    def __init__(self, module: ModuleType, name: str) -> None:
        self.module, self.name, self.original = module, name, getattr(module, name)
        # Each seam, and what it does: mine(original, arguments...), of which NotImplemented is no result.
        self.seams: list[tuple[Any, Callable[..., Any]]] = []

    @classmethod
    def put(cls, seam: Any, module: ModuleType, name: str, mine: Callable[..., Any]) -> None:
        """Has a function ask a seam, with a hook in its place if there is none."""
        key = module.__name__, name
        if key not in cls.made:
            cls.made[key] = cls(module, name)
            setattr(module, name, cls.made[key])
        cls.made[key].seams.append((seam, mine))

    @classmethod
    def remove(cls, seam: Any) -> None:
        """A seam leaves all hooks, and hooks without seams go."""
        for key, hook in list(cls.made.items()):
            hook.seams = [(other, mine) for other, mine in hook.seams if other is not seam]
            if not hook.seams:
                if getattr(hook.module, hook.name) is hook:  # otherwise somebody else put one around it
                    setattr(hook.module, hook.name, hook.original)
                del cls.made[key]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The function."""
        return self._ask(self.original, arguments, keywords)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        """The kernel's launcher."""
        return lambda *arguments, **keywords: self._ask(self.original[grid], arguments, keywords)

    def _ask(self, original: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        for _, mine in self.seams:
            result = mine(original, *arguments, **keywords)
            if result is not NotImplemented:
                return result
        return original(*arguments, **keywords)


class Answers(TorchFunctionMode):
    """While it is on, PyTorch's operations with known results aren't run: a launch has written what they yield.

    Args:
        known: the results by what asked() makes of an operation.
    """

    def __init__(self, known: dict[tuple[Any, ...], Tensor]) -> None:
        super().__init__()
        self._known, self._names = known, {key[0] for key in known}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation's result."""
        keywords = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self._names:
            try:
                result = self._known.get(asked(name, *args, **keywords))
            except TypeError:  # an argument that isn't hashable
                result = None
            if result is not None:
                return result
        return func(*args, **keywords)


def asked(name: str, *arguments: Any, **keywords: Any) -> tuple[Any, ...]:
    """An operation with its arguments, by which its result is known. Tensors are the same if they are one object."""
    # 1.0 == 1, but yields another dtype. The engine names one device.
    exact = [repr(a) if isinstance(a, float) else id(a) if isinstance(a, Tensor) else a for a in arguments]
    return (name, *exact, *[item for item in keywords.items() if item[0] != "device"])
