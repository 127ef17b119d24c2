"""One rank builds for all ranks: packed kernels are sent through torch.distributed, without a shared file system."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .. import errors
from ..build import toolchain
from ..cache.store import Store
from ..errors import ArgumentError, CompileError, OnelaunchError, StoreError, ToolchainError
from ..spec.config import KernelConfig
from . import loader, pack

# While a rank builds, all ranks call a collective this often, so that none waits in one until the group's time-out.
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.02, 1.0
# A rank that comes this much later than the others to such a collective counts as gone.
_PATIENCE_SECONDS = 60.0


def distribute(
    configs: Sequence[KernelConfig],
    group: Any = None,
    *,
    archs: Sequence[str] | None = None,
    store: Store | None = None,
) -> list[loader.Kernel]:
    """Builds configurations once for a whole job: the first rank of each architecture builds and sends to the others.

    Every rank of the group calls this with equal ``configs``; the first one waits for the last one in a collective of
    the group, with the group's own time-out. (NCCL's ends the process; and like all collectives of objects, with NCCL
    it needs the rank's device to be the current one.) From then on they talk through gloo, on their CPUs. If one rank
    fails, all raise the same error, at once. A rank that is interrupted raises its interrupt, and the others an error
    that names it. If one is killed, or doesn't answer for a minute, all others raise an error that says so.

    Args:
        configs: the configurations to build or load.
        group: a torch.distributed process group; None is the default one.
        archs: this rank's GPU architectures; None is that of its current CUDA device.
        store: this rank's cache; None is the user's.

    Returns:
        This rank's kernels, in the order of ``configs``.

    Raises:
        ArgumentError: torch.distributed isn't initialized, or this process isn't in the group.
        ToolchainError: numpy isn't installed, without which torch.distributed passes on no objects.
        ToolchainError, CompileError, JitPolicyError, StoreError: see loader.load; the message names the rank.
    """
    import torch.distributed as dist  # not at the top: it imports torch, which takes a second

    if not dist.is_available() or not dist.is_initialized():
        raise ArgumentError("torch.distributed isn't initialized: call init_process_group before distribute().")
    if importlib.util.find_spec("numpy") is None:
        raise ToolchainError(
            "onelaunch.distribute needs numpy, without which torch.distributed passes on no objects, and it isn't "
            "installed. Install it with: pip install numpy."
        )
    if dist.get_rank(group) < 0:
        raise ArgumentError(
            f"Rank {dist.get_rank()} isn't in the group given to distribute(): call it on the group's ranks only."
        )
    ranks = _Ranks(dist, group)
    try:
        return _distribute(ranks, configs, archs, store or loader.default_store())
    finally:
        ranks.close()


def _distribute(
    ranks: _Ranks, configs: Sequence[KernelConfig], archs: Sequence[str] | None, store: Store
) -> list[loader.Kernel]:
    rank, wanted = ranks.rank, list[KernelConfig]()

    def request() -> tuple[list[str], list[str]]:
        wanted.extend(configs)
        targets = tuple(archs or toolchain.current_architectures())
        return [config.key for config in wanted], [toolchain.gencode_flags((arch,))[0] for arch in targets]

    requests = ranks.gather(_Work(request))
    for other, (keys, _) in enumerate(requests):
        if keys != requests[0][0]:
            raise StoreError(
                f"Rank {other} calls distribute() with other configurations than rank 0; give all ranks the same list."
            )
    targets = tuple(flag.rpartition("sm_")[2] for flag in requests[rank][1])
    # CPU kernels are the same for all ranks; GPU kernels for all ranks with the same architectures.
    leaders = list(dict.fromkeys(_leader(requests, other) for other in range(ranks.size)))

    def build() -> bytes:
        if rank not in leaders:
            return b""
        kernels = [loader.load(config, targets, store) for config in wanted]
        entries = {kernel.key: loader.entry_of(kernel) for kernel in kernels}
        return pack.to_bytes(entries.values()) if entries else b""

    building = _Work(build, in_thread=True)
    ranks.gather(building, results=False)
    sent = [ranks.broadcast(building.result, leader) for leader in leaders]

    def take() -> list[loader.Kernel]:
        own = _leader(requests, rank)
        if rank != own and wanted:
            done = pack.from_bytes(sent[leaders.index(own)], store)
            if done.refused:
                raise StoreError(f"{done.refused[0][0]} can't run here: {done.refused[0][1]}.")
        return [loader.load(config, targets, store) for config in wanted]

    taking = _Work(take)
    ranks.gather(taking, results=False)
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


class _Ranks:
    """The ranks of a group, with connections of their own, which end on every rank as soon as one of them is gone.

    Args:
        dist: torch.distributed.
        group: the caller's group.

    Raises:
        StoreError: a rank is gone. So does each method.
    """

    def __init__(self, dist: Any, group: Any) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._gloo: Any = None
        self._agreed = False
        names = [None] * self.size
        with self._talking():
            # The caller's group knows how long to wait for the last one.
            dist.all_gather_object(names, uuid.uuid4().hex, group=group)
            # Not by new_group: all ranks of the job would have to call it, or it names groups alike.
            store = dist.PrefixStore(f"onelaunch/{names[0]}", dist.distributed_c10d._get_default_store())
            patience = datetime.timedelta(seconds=_PATIENCE_SECONDS)
            self._gloo = dist.ProcessGroupGloo(store, self.rank, self.size, patience)

    def gather(self, work: _Work, results: bool = True) -> list[Any]:
        """Every rank's result (or None), on every rank, when all ended; the first error as soon as one has failed."""
        pause, self._agreed = _FIRST_PAUSE_SECONDS, False
        while True:
            ended = work.ended(pause)
            failed = _facts(work.error) if work.error is not None else None
            gathered = self._all((ended, failed, work.result if results else None))
            self._agreed = True  # if this is the end, all know it
            if work.error is not None and not isinstance(work.error, Exception):
                raise work.error
            for other, (_, facts, _) in enumerate(gathered):
                if facts is not None:
                    raise _error(facts, other)
            if all(other_ended for other_ended, _, _ in gathered):
                return [result for _, _, result in gathered]
            pause, self._agreed = min(2 * pause, _MAX_PAUSE_SECONDS), False

    def broadcast(self, data: bytes, rank: int) -> bytes:
        """A rank's bytes; of the others only the type counts."""
        import torch

        with self._talking():
            size = torch.tensor([len(data)])
            self._gloo.broadcast(size, rank).wait()
            content = torch.empty(int(size), dtype=torch.uint8)
            if self.rank == rank and data:
                content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            self._gloo.broadcast(content, rank).wait()
        return content.numpy().tobytes()

    def close(self) -> None:
        """Leaves. Where all know that this is the end, none leaves before the others have heard what ended it."""
        if self._gloo is not None and self._agreed:
            with contextlib.suppress(RuntimeError):
                self._gloo.barrier().wait()
        self._gloo = None

    def _all(self, value: Any) -> list[Any]:
        """The value of every rank."""
        import torch

        with self._talking():
            data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            self._gloo.allgather([sizes], [torch.tensor([len(data)])]).wait()
            room = max(int(size) for size in sizes)
            boxes = [torch.empty(room, dtype=torch.uint8) for _ in range(self.size)]
            self._gloo.allgather([boxes], [torch.nn.functional.pad(data, (0, room - len(data)))]).wait()
        return [pickle.loads(box[: int(size)].numpy().tobytes()) for box, size in zip(boxes, sizes, strict=True)]

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            # The last reference: connections are closed, and the ranks that wait for this one notice at once.
            self._gloo = None
            if not isinstance(error, RuntimeError):
                raise
            raise StoreError(
                "A rank ended, or didn't answer in time, while all were in onelaunch.distribute(). Look at what the "
                "rank that ended first said, and start the job again."
            ) from error


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
