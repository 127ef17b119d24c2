"""Stand-ins for missing modules: importing one succeeds, and each of its attributes is an inert class."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import types
from collections.abc import Sequence
from typing import Any

VERSION = "99.0"

_BINARY_OPERATORS = ("or", "ror", "and", "rand", "add", "radd", "sub", "rsub", "mul", "rmul", "lshift", "rshift")


class _Empty(type):
    """The metaclass of an empty module's attributes: classes that one can call, subscript, enter and subclass."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _empty(f"{cls.__name__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not cls.__dict__.get("_is_empty"):  # one of SGLang's classes, derived from an empty one
            return super().__call__(*args, **kwargs)
        if len(args) == 1 and not kwargs and isinstance(args[0], (types.FunctionType, type)):
            return args[0]  # used as a decorator: returns what it decorates
        return cls

    def __iter__(cls) -> Any:
        return iter(())

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __enter__(cls) -> Any:
        return cls

    def __exit__(cls, *error: Any) -> bool:
        return False

    def __int__(cls) -> int:
        return 0

    def __index__(cls) -> int:
        return 0


def _same(cls: Any, other: Any) -> Any:
    return cls


for _operator in _BINARY_OPERATORS:
    setattr(_Empty, f"__{_operator}__", _same)


def _schema(cls: Any, *args: Any) -> Any:
    from pydantic_core import core_schema

    return core_schema.any_schema()


def _empty(name: str) -> Any:
    members = {
        "_is_empty": True,
        "__module__": "empty",
        "__get_pydantic_core_schema__": classmethod(_schema),
        "__init_subclass__": classmethod(lambda cls, **kwargs: None),
    }
    return _Empty(name, (), members)


class _EmptyModule(types.ModuleType):
    __version__ = VERSION

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _empty(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A finder of empty modules and their submodules. Placed last in sys.meta_path, it lets real modules come first.

    Args:
        names: the packages to replace.
        absent: submodules of them whose import must fail.
    """

    def __init__(self, names: Sequence[str], absent: Sequence[str] = ()) -> None:
        self._names, self._absent = frozenset(names), frozenset(absent)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] in self._names and fullname not in self._absent:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = _EmptyModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None:
        """There is nothing to execute."""
