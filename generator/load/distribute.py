"""One rank builds for all ranks: packed kernels are sent through torch.distributed, without a shared file system."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from .. import errors
from ..build import toolchain
from ..cache.store import Store
from ..errors import ArgumentError, CompileError, OnelaunchError, StoreError
from ..spec.config import KernelConfig
from . import loader, pack

# While a rank builds, all ranks call a collective this often, so that none waits in one until the group's time-out.
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.02, 1.0


def distribute(
    configs: Sequence[KernelConfig],
    group: Any = None,
    *,
    archs: Sequence[str] | None = None,
    store: Store | None = None,
) -> list[loader.Kernel]:
    """Builds configurations once for a whole job: the first rank of each architecture builds and sends to the others.

    Every rank of the group calls this with equal ``configs``. If one rank fails, all raise the same error, at once. A
    rank that is interrupted raises its interrupt, and the others an error that names it.

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
    """
    import torch.distributed as dist  # not at the top: it imports torch, which takes a second

    if not dist.is_available() or not dist.is_initialized():
        raise ArgumentError("torch.distributed isn't initialized: call init_process_group before distribute().")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ArgumentError(
            f"Rank {dist.get_rank()} isn't in the group given to distribute(): call it on the group's ranks only."
        )
    store = store or loader.default_store()
    wanted = list(configs)

    def request() -> tuple[list[str], list[str]]:
        targets = tuple(archs or toolchain.current_architectures())
        return [config.key for config in wanted], [toolchain.gencode_flags((arch,))[0] for arch in targets]

    requests = _gather(dist, group, _Work(request))
    for other, (keys, _) in enumerate(requests):
        if keys != requests[0][0]:
            raise StoreError(
                f"Rank {other} calls distribute() with other configurations than rank 0; give all ranks the same list."
            )
    targets = tuple(flag.rpartition("sm_")[2] for flag in requests[rank][1])
    # CPU kernels are the same for all ranks; GPU kernels for all ranks with the same architectures.
    leaders = list(dict.fromkeys(_leader(requests, other) for other in range(size)))

    def build() -> bytes:
        if rank not in leaders:
            return b""
        kernels = [loader.load(config, targets, store) for config in wanted]
        entries = {kernel.key: loader.entry_of(kernel) for kernel in kernels}
        return pack.to_bytes(entries.values()) if entries else b""

    building = _Work(build, in_thread=True)
    _gather(dist, group, building, results=False)
    sent: list[list[Any]] = []
    for leader in leaders:
        box = [building.result if rank == leader else None]
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, leader) if group else leader, group=group)
        sent.append(box)

    def take() -> list[loader.Kernel]:
        own = _leader(requests, rank)
        if rank != own and wanted:
            done = pack.from_bytes(sent[leaders.index(own)][0], store)
            if done.refused:
                raise StoreError(f"{done.refused[0][0]} can't run here: {done.refused[0][1]}.")
        return [loader.load(config, targets, store) for config in wanted]

    taking = _Work(take)
    _gather(dist, group, taking, results=False)
    return list(taking.result)


class _Work:
    """A call and its outcome.

    Args:
        call: the function.
        in_thread: whether to run it in another thread. (Each thread has its own current CUDA device.)
    """

    def __init__(self, call: Callable[[], Any], in_thread: bool = False) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._call = call
        # A daemon, so that an interrupted process doesn't wait for its build.
        self._thread = threading.Thread(target=self._run, daemon=True) if in_thread else None
        if self._thread is None:
            self._run()
        else:
            self._thread.start()

    def ended(self, seconds: float) -> bool:
        """Waits up to that time; returns whether it ended. An interrupted wait counts as its end."""
        try:
            if self._thread is not None and self.error is None:
                self._thread.join(seconds)
                return not self._thread.is_alive()
        except BaseException as error:
            self.error = error
        return True

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:  # of any kind: the other ranks must not wait for this one
            self.error = error


def _gather(dist: Any, group: Any, work: _Work, results: bool = True) -> list[Any]:
    """Every rank's result (or None), when all have ended; raises the first error as soon as a rank has failed."""
    pause = _FIRST_PAUSE_SECONDS
    while True:
        ended = work.ended(pause)
        failed = _facts(work.error) if work.error is not None else None
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (ended, failed, work.result if results else None), group=group)
        if work.error is not None and not isinstance(work.error, Exception):
            raise work.error
        for other, (_, facts, _) in enumerate(gathered):
            if facts is not None:
                raise _error(facts, other)
        if all(other_ended for other_ended, _, _ in gathered):
            return [result for _, _, result in gathered]
        pause = min(2 * pause, _MAX_PAUSE_SECONDS)


def _leader(requests: Sequence[tuple[list[str], list[str]]], rank: int) -> int:
    """The first rank that has this rank's architectures."""
    return next(other for other, (_, flags) in enumerate(requests) if flags == requests[rank][1])


def _facts(error: BaseException) -> dict[str, Any]:
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
    what = f"{facts['type']}: {facts['message']}".removesuffix(": ")  # an interrupt has no text
    return StoreError(f"Rank {rank} failed in onelaunch.distribute(): {what}")
