"""One rank builds, all ranks have it: packed kernels travel through torch.distributed, with no shared file system."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import errors
from ..build import toolchain
from ..cache.store import Store
from ..errors import CompileError, OnelaunchError, StoreError
from ..spec.config import KernelConfig
from . import loader


def distribute(
    configs: Sequence[KernelConfig],
    group: Any = None,
    *,
    archs: Sequence[str] | None = None,
    store: Store | None = None,
) -> list[loader.Kernel]:
    """Builds configurations once for a whole job: each architecture's first rank builds, and sends to the others.

    Every rank of the group calls this with equal ``configs``. If one rank fails, all raise the same error.

    Args:
        configs: what to build or load.
        group: a torch.distributed process group; None is the default one.
        archs: this rank's GPU architectures; None is that of its current CUDA device.
        store: this rank's cache; None is the user's.

    Returns:
        This rank's kernels, in the order of ``configs``.

    Raises:
        ToolchainError, CompileError, JitPolicyError, StoreError: see loader.load; the message names the rank.
    """
    import torch.distributed as dist

    from . import pack

    store = store or loader.default_store()
    wanted = list(configs)
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def mine() -> tuple[list[str], list[str]]:
        targets = tuple(archs or toolchain.current_architectures())
        return [config.key for config in wanted], [toolchain.gencode_flags((arch,))[0] for arch in targets]

    requests = _together(dist, group, mine)
    for other, (keys, _) in enumerate(requests):
        if keys != requests[0][0]:
            raise StoreError(
                f"Rank {other} asks distribute() for other configurations than rank 0; give all ranks the same list."
            )
    targets = tuple(flag.rpartition("sm_")[2] for flag in requests[rank][1])
    # The CPU's kernels are the same for all; those of a GPU for all ranks of one architecture.
    leaders = list(dict.fromkeys(_leader(requests, other) for other in range(size)))

    def lead() -> bytes:
        if rank not in leaders:
            return b""
        kernels = [loader.load(config, targets, store) for config in wanted]
        entries = {kernel.key: loader.entry_of(kernel) for kernel in kernels}
        return pack.to_bytes(entries.values()) if entries else b""

    sent: list[list[Any]] = []
    data = _checked(dist, group, lead)
    for leader in leaders:
        box = [data if rank == leader else None]
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, leader) if group else leader, group=group)
        sent.append(box)

    def take() -> list[loader.Kernel]:
        own = _leader(requests, rank)
        if rank != own and wanted:
            done = pack.from_bytes(sent[leaders.index(own)][0], store)
            if done.refused:
                raise StoreError(f"{done.refused[0][0]} can't run here: {done.refused[0][1]}.")
        return [loader.load(config, targets, store) for config in wanted]

    kernels: list[loader.Kernel] = _checked(dist, group, take)
    return kernels


def _leader(requests: Sequence[tuple[list[str], list[str]]], rank: int) -> int:
    """The first rank that has this rank's architectures."""
    return next(other for other, (_, flags) in enumerate(requests) if flags == requests[rank][1])


def _together(dist: Any, group: Any, work: Callable[[], Any]) -> list[Any]:
    """Every rank's result, on every rank; if one failed, the first such error, on every rank."""
    result: Any = None
    failed: dict[str, Any] | None = None
    try:
        result = work()
    except Exception as error:  # whatever it is, the others must hear of it instead of waiting
        failed = _facts(error)
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (failed, result), group=group)
    for other, (facts, _) in enumerate(gathered):
        if facts is not None:
            raise _error(facts, other)
    return [value for _, value in gathered]


def _checked(dist: Any, group: Any, work: Callable[[], Any]) -> Any:
    """This rank's result, once it is known that no rank failed."""
    kept: list[Any] = []
    _together(dist, group, lambda: kept.append(work()))
    return kept[0]


def _facts(error: Exception) -> dict[str, Any]:
    facts: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, CompileError):
        facts["compile"] = {
            "key": error.key,
            "command": error.command,
            "log": error.log,
            "source": error.source,
            "lasting": error.lasting,
        }
    return facts


def _error(facts: dict[str, Any], rank: int) -> Exception:
    message = f"Rank {rank}: {facts['message']}"
    if "compile" in facts:
        return CompileError(message, **facts["compile"])
    known = getattr(errors, facts["type"], None)
    if isinstance(known, type) and issubclass(known, OnelaunchError):
        return known(message)
    return StoreError(f"Rank {rank} failed in onelaunch.distribute(): {facts['type']}: {facts['message']}")
