"""Declarations of engines' metadata beside the standard fields, which presets and integrations share."""

from __future__ import annotations

from .fields import Vector, vector


def vllm_slot_mapping(group: int, *, enabled: bool = True) -> dict[str, Vector]:
    """The slot mapping of a KV-cache group, slots_0 of group 0, with the terms that it names.

    They name the inputs ``idx`` and ``position``, the source table_0 and the constant size_0, of its blocks. -1 takes
    the place of what is outside of the block table, also where idx is -1; behind the requests it is padding.

    Args:
        enabled: whether the group has slots; all of them are -1 otherwise.
    """
    g = group
    declared = {
        f"entry_{g}": vector(f"position // size_{g}", "request", dtype="int64"),
        f"offset_{g}": vector(f"position % size_{g}", "request", dtype="int64"),
        f"block_{g}": vector(f"table_{g}(idx, entry_{g})", "request", dtype="int64", missing=-1),
    }
    slot = f"max(block_{g} * size_{g} + offset_{g}, -1)" if enabled else "-1"
    return {**declared, f"slots_{g}": vector(slot, "request", dtype="int64", pad=-1)}


def vllm_request_of_token(index: int) -> Vector:
    """The request of a token in a step with a token for each request, and of padding the last request, ``last``.

    Args:
        index: query_end_0 is the map of where requests end, for index 0.
    """
    return vector(f"where(query_end_{index}(request) > request, request, last)", "request")
