"""Replacements for an engine's methods, functions and buffers while a seam is attached."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Unfilled:
    """A runner's buffer that the launch pads. The engine's fill is deferred, and dropped if the launch is made."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._value: Any = None

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor[index]

    def fill_(self, value: Any) -> None:
        """Tensor.fill_, deferred."""
        self._value = value

    def zero_(self) -> None:
        """Tensor.zero_, deferred."""
        self._value = 0

    def fill(self) -> None:
        """Runs the deferred fill, if there is one."""
        if self._value is not None:
            self.tensor.fill_(self._value)


class Bound(functools.partial[Any]):
    """A replacement method. Its first argument is the original method."""


class Replaced:
    """The replaced attributes of an engine's objects."""

    def __init__(self) -> None:
        # (object, name, the value in the object's own __dict__ or None, the replacement)
        self._all: list[tuple[Any, str, Any, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._all)

    def put(self, owner: Any, name: str, mine: Any) -> None:
        """Replaces an attribute of an object by mine."""
        self._all.append((owner, name, vars(owner).get(name), mine))
        setattr(owner, name, mine)

    def restore(self) -> None:
        """Restores every attribute that other code hasn't replaced since."""
        for owner, name, own, mine in self._all:
            if vars(owner).get(name) is not mine:
                continue
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
        self._all = []


class Hook:
    """Replaces a function or Triton kernel in one of SGLang's modules: each seam may handle a call before the original.

    It stays in place as long as a seam uses it.
    """

    made: ClassVar[dict[tuple[str, str], Hook]] = {}

    def __init__(self, module: ModuleType, name: str) -> None:
        self.module, self.name, self.original = module, name, getattr(module, name)
        # (seam, handler). handler(original, *arguments) returns NotImplemented if it doesn't handle the call.
        self.seams: list[tuple[Any, Callable[..., Any]]] = []

    @classmethod
    def put(cls, seam: Any, module: ModuleType, name: str, mine: Callable[..., Any]) -> None:
        """Adds a seam's handler to a function's hook, and makes the hook if there is none."""
        key = module.__name__, name
        if key not in cls.made:
            cls.made[key] = cls(module, name)
            setattr(module, name, cls.made[key])
        cls.made[key].seams.append((seam, mine))

    @classmethod
    def remove(cls, seam: Any) -> None:
        """Removes a seam from all hooks, and hooks that have no seam left."""
        for key, hook in list(cls.made.items()):
            hook.seams = [(other, mine) for other, mine in hook.seams if other is not seam]
            if not hook.seams:
                if getattr(hook.module, hook.name) is hook:  # else other code wrapped it
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
    """While it is active, operations whose results a launch has already written return these and don't run.

    Args:
        known: the results by asked() of the operation.
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
    """The key of an operation with its arguments. Tensors are equal only if they are the same object."""
    # 1.0 == 1, but gives another dtype. The device is left out, because the engine uses one.
    exact = [repr(a) if isinstance(a, float) else id(a) if isinstance(a, Tensor) else a for a in arguments]
    return (name, *exact, *[item for item in keywords.items() if item[0] != "device"])
