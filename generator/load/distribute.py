"""One rank builds for all ranks: packed kernels are sent through torch.distributed, without a shared file system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..build import toolchain
from ..cache.store import Store
from ..errors import ArgumentError, StoreError
from ..spec.config import KernelConfig
from . import loader, pack
from .ranks import Ranks, Work


def distribute(
    configs: Sequence[KernelConfig],
    group: Any = None,
    *,
    archs: Sequence[str] | None = None,
    store: Store | None = None,
) -> list[loader.Kernel]:
    """Builds configurations once for a whole job: the first rank of each architecture builds and sends to the others.

    Every rank of the group calls this with equal ``configs``. Whatever the group's backend, the ranks meet at the store
    of torch.distributed, and then talk through gloo, on their CPUs. If one rank fails, all raise the same error, at
    once. A rank that is interrupted raises its interrupt, and the others an error that names it. If one is killed, all
    others raise an error that names it, after ten seconds; after a minute if it stopped, or its host; and after the
    time-out given to init_process_group if it never calls this. Ranks are named by their numbers in the whole job.

    Args:
        configs: the configurations to build or load.
        group: a torch.distributed process group; None is the default one.
        archs: this rank's GPU architectures; None is that of its current CUDA device.
        store: this rank's cache; None is the user's.

    Returns:
        This rank's kernels, in the order of ``configs``.

    Raises:
        ArgumentError: torch.distributed isn't initialized, or this process isn't in the group.
        ToolchainError, CompileError, JitPolicyError, StoreError: see loader.load; the message names the rank.
        StoreError: the ranks' configurations differ, a rank is gone, or the store of torch.distributed is.
    """
    import torch.distributed as dist  # not at the top: it imports torch, which takes a second

    if not dist.is_available() or not dist.is_initialized():
        raise ArgumentError("torch.distributed isn't initialized: call init_process_group before distribute().")
    if dist.get_rank(group) < 0:
        raise ArgumentError(
            f"Rank {dist.get_rank()} isn't in the group given to distribute(): call it on the group's ranks only."
        )
    ranks = Ranks(dist, group or dist.group.WORLD)
    try:
        ranks.meet()
        kernels = _distribute(ranks, configs, archs, store or loader.default_store())
    except BaseException as error:
        reason = ranks.leave(error)
        if not isinstance(error, Exception):
            raise
        raise reason from error
    ranks.close()
    return kernels


def _distribute(
    ranks: Ranks, configs: Sequence[KernelConfig], archs: Sequence[str] | None, store: Store
) -> list[loader.Kernel]:
    rank, wanted = ranks.rank, list[KernelConfig]()

    def request() -> tuple[list[str], list[str]]:
        wanted.extend(configs)
        targets = tuple(archs or toolchain.current_architectures())
        return [config.key for config in wanted], [toolchain.gencode_flags((arch,))[0] for arch in targets]

    requests = ranks.gather(Work(request))
    for other, (keys, _) in enumerate(requests):
        if keys != requests[0][0]:
            raise StoreError(
                f"{ranks.named([other])} calls distribute() with other configurations than rank {ranks.numbers[0]}; "
                "give all ranks the same list."
            )
    targets = tuple(flag.rpartition("sm_")[2] for flag in requests[rank][1])
    # CPU kernels are the same for all ranks; GPU kernels for all ranks with the same architectures.
    leaders = list(dict.fromkeys(_leader(requests, other) for other in range(len(requests))))

    def build() -> bytes:
        if rank not in leaders:
            return b""
        kernels = [loader.load(config, targets, store) for config in wanted]
        entries = {kernel.key: loader.entry_of(kernel) for kernel in kernels}
        return pack.to_bytes(entries.values()) if entries else b""

    building = Work(build, in_thread=True)
    ranks.gather(building, results=False)
    sent = [ranks.broadcast(building.result, leader) for leader in leaders]

    def take() -> list[loader.Kernel]:
        own = _leader(requests, rank)
        if rank != own and wanted:
            done = pack.from_bytes(sent[leaders.index(own)], store)
            if done.refused:
                raise StoreError(f"{done.refused[0][0]} can't run here: {done.refused[0][1]}.")
        return [loader.load(config, targets, store) for config in wanted]

    taking = Work(take, in_thread=True)
    ranks.gather(taking, results=False)
    return list(taking.result)


def _leader(requests: Sequence[tuple[list[str], list[str]]], rank: int) -> int:
    """The first rank that has this rank's architectures."""
    return next(other for other, (_, flags) in enumerate(requests) if flags == requests[rank][1])
