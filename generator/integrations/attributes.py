"""Reading objects of which only the attribute names are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ArgumentError

REQUIRED: Any = object()
_TOLD = 16


def has(owner: Any, names: Sequence[str]) -> bool:
    """Whether the object has one of the attributes, None or not."""
    return any(hasattr(owner, name) for name in names)


def read(label: str, owner: Any, names: Sequence[str], advice: str, default: Any = REQUIRED) -> Any:
    """The first of the attributes that isn't None; None if those that are there all are.

    Args:
        label: what the object is, for messages.
        owner: the object.
        names: an attribute's names in the engine's versions.
        advice: what to do about it, a sentence.
        default: what an object without any of them gives, if that is allowed.

    Raises:
        ArgumentError: there is none of them, and no default.
    """
    present = [name for name in names if hasattr(owner, name)]
    if present:
        return next((value for name in present if (value := getattr(owner, name)) is not None), None)
    if default is not REQUIRED:
        return default
    raise ArgumentError(f"{label} has no attribute {' or '.join(names)}; it is {described(owner)}. {advice}")


def described(owner: Any) -> str:
    """The type of an object and the attributes that it has."""
    names = [name for name in getattr(owner, "__dict__", dir(owner)) if not name.startswith("_")]
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    kind = type(owner).__name__
    return f"a {kind} with {', '.join(names[:_TOLD])}{more}" if names else f"a {kind} without attributes"
