"""Reading an engine's objects by attribute names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ArgumentError

REQUIRED: Any = object()
_MAX_LISTED = 16


def has(owner: Any, names: Sequence[str]) -> bool:
    """Whether the object has one of the attributes, None or not."""
    return any(hasattr(owner, name) for name in names)


def read(label: str, owner: Any, names: Sequence[str], advice: str, default: Any = REQUIRED) -> Any:
    """The value of the first attribute that isn't None; None if all that exist are None.

    Args:
        label: the object's name in messages.
        owner: the object.
        names: names of the attribute in different versions of the engine.
        advice: the end of the message: what to do.
        default: the value if the object has none of the attributes; without a default that is an error.

    Raises:
        ArgumentError: the object has none of the attributes, and there is no default.
    """
    present = [name for name in names if hasattr(owner, name)]
    if present:
        return next((value for name in present if (value := getattr(owner, name)) is not None), None)
    if default is not REQUIRED:
        return default
    raise ArgumentError(f"{label} has no attribute {' or '.join(names)}; it is {described(owner)}. {advice}")


def described(owner: Any) -> str:
    """An object's type and attribute names, for messages."""
    names = [name for name in getattr(owner, "__dict__", dir(owner)) if not name.startswith("_")]
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    kind = type(owner).__name__
    return f"a {kind} with {', '.join(names[:_MAX_LISTED])}{more}" if names else f"a {kind} without attributes"


def merged(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """An integration's own arguments of bind() and a caller's, which override them. Mappings are merged by key."""
    both = {**own, **given}
    for name in own.keys() & given.keys():
        if isinstance(own[name], Mapping) and isinstance(given[name], Mapping):
            both[name] = {**own[name], **given[name]}
    return both
