"""Ranks of torch.distributed that work together, and fail together: all raise the same error, soon."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import CompileError, OnelaunchError, StoreError

# A rank that waits for others, or for its build, looks this often: none waits in one call until a time-out.
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.02, 1.0
# A rank that comes this much later than the others to a collective counts as gone.
_PATIENCE_SECONDS = 60.0
# When it has failed, all ranks that live say so well within this time.
_FAREWELL_SECONDS = 10.0


class Work:
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


class _LostError(Exception):
    """Another rank has failed or is gone, or the store of torch.distributed is."""


class Ranks:
    """The ranks of a group, with connections of their own, which end on every rank as soon as one of them is gone.

    A rank's state is in torch.distributed's store: the keys "here/RANK", "left/RANK" and "heard/RANK", with counters of
    them under "here", "left" and "heard". "reason" is the error that all raise, set by the first rank that knows one.

    Args:
        dist: torch.distributed.
        group: the caller's group.
    """

    def __init__(self, dist: Any, group: Any) -> None:
        self.rank, self.numbers = dist.get_rank(group), dist.get_process_group_ranks(group)
        self._dist = dist
        self._whole = dist.distributed_c10d._get_default_store()
        self._store: Any = None
        self._gloo: Any = None

    def named(self, ranks: Sequence[int]) -> str:
        """These ranks, as the beginning of a sentence."""
        numbers = ", ".join(str(self.numbers[rank]) for rank in ranks)
        return f"Rank{'s' * (len(ranks) > 1)} {numbers}"

    def meet(self) -> None:
        """Waits for all ranks, and connects them.

        Raises:
            StoreError: a rank didn't come within the job's time-out.
            _LostError: a rank is gone, or has failed.
        """
        seconds = self._whole.timeout.total_seconds()

        def arrive() -> Any:
            # A name of our own: new_group would want all ranks of the job, or names some groups alike.
            place = f"onelaunch/{hashlib.sha256(repr(self.numbers).encode()).hexdigest()}"
            calls = self._whole.add(f"{place}/calls/{self.rank}", 1)
            self._store = self._dist.PrefixStore(f"{place}/{calls}", self._whole)
            missing = self._say_and_wait("here", len(self.numbers), seconds)
            if self._store.check(["reason"]):
                raise _LostError
            if missing:
                raise StoreError(
                    f"{self.named(missing)} didn't call onelaunch.distribute() within {seconds:.0f} s of the others, "
                    "the time-out given to init_process_group. Look at the last output there."
                )
            patience = datetime.timedelta(seconds=_PATIENCE_SECONDS)
            return self._dist.ProcessGroupGloo(self._store, self.rank, len(self.numbers), patience)

        self._gloo = self._ask(arrive, seconds + _PATIENCE_SECONDS + _FAREWELL_SECONDS)

    def gather(self, work: Work, results: bool = True) -> list[Any]:
        """Every rank's result (or None), on every rank, when all ended.

        Raises:
            OnelaunchError: this rank's work failed; the message names the rank.
            _LostError: another rank has failed or is gone.
        """
        for pause in _pauses():
            ended = work.ended(pause)
            if isinstance(work.error, Exception):
                raise _named(work.error, self.named([self.rank])) from work.error
            if work.error is not None:
                raise work.error
            gathered = self._all([ended, work.result if results else None])
            if all(other_ended for other_ended, _ in gathered):
                break
        return [result for _, result in gathered]

    def broadcast(self, data: bytes, rank: int) -> bytes:
        """A rank's bytes; of the others only the type counts."""
        import torch

        with self._talking():
            size = torch.tensor([len(data)])
            self._gloo.broadcast(size, rank).wait()
            content = bytearray(data if self.rank == rank else int(size))
            if content:
                self._gloo.broadcast(torch.frombuffer(content, dtype=torch.uint8), rank).wait()
        return bytes(content)

    def close(self) -> None:
        """Leaves when all is done, but not before the others know that it is."""
        with contextlib.suppress(RuntimeError):
            self._gloo.barrier().wait()
        self._gloo = None

    def leave(self, error: BaseException) -> OnelaunchError:
        """Leaves because of an error, and returns the one that all ranks raise.

        It is the error of the first rank that failed. If none has set a reason, it names the ranks that didn't leave.
        """

        def agree() -> OnelaunchError:
            if self._store is None:
                raise _LostError
            if isinstance(error, OnelaunchError):
                self._say_why(error)
            elif not isinstance(error, _LostError):
                self._say_why(_named(error, self.named([self.rank])))
            # The last reference: connections are closed, and the ranks that wait for this one notice at once.
            self._gloo = None
            gone = self._say_and_wait("left", len(self.numbers), _FAREWELL_SECONDS)
            what = (
                f"{self.named(gone)} ended, or didn't answer in time, while all were in onelaunch.distribute(). "
                "Look at the last output there, and start the job again."
                if gone
                else "A connection between ranks broke in onelaunch.distribute(). Start the job again."
            )
            self._say_why(StoreError(what), gone)
            reason: OnelaunchError
            reason, gone = pickle.loads(self._store.get("reason"))
            # The store may live in this process, which must not end before the others have read it.
            absent = {*self._silent("here"), *gone}
            self._say_and_wait("heard", len(self.numbers) - len(absent), _FAREWELL_SECONDS)
            return reason

        try:
            agreed: OnelaunchError = self._ask(agree, 3 * _FAREWELL_SECONDS)
        except _LostError:
            agreed = StoreError(
                "The store of torch.distributed doesn't answer: what holds it, rank 0 or torchrun, ended or stopped "
                "during onelaunch.distribute(). Look at the last output there, and start the job again."
            )
        self._gloo = None
        return agreed

    def _ask(self, call: Callable[[], Any], seconds: float) -> Any:
        """Runs a call that talks to the store, in a thread: if the store's process has stopped, the call never ends."""
        work = Work(call, in_thread=True)
        if not work.ended(seconds) or (
            isinstance(work.error, RuntimeError) and not isinstance(work.error, OnelaunchError)
        ):
            raise _LostError from work.error
        if work.error is not None:
            raise work.error
        return work.result

    def _say_why(self, error: OnelaunchError, gone: Sequence[int] = ()) -> None:
        self._store.compare_set("reason", "", pickle.dumps((error, gone)))  # the first one counts

    def _say_and_wait(self, what: str, number: int, seconds: float) -> list[int]:
        """Sets this rank's key; waits for this many ranks, or for a reason. Returns the ranks that haven't set it."""
        self._store.set(f"{what}/{self.rank}", "")
        said, until = self._store.add(what, 1), time.monotonic() + seconds
        for pause in _pauses():
            if said >= number:
                return []
            if time.monotonic() > until or (what != "heard" and self._store.check(["reason"])):
                break
            time.sleep(pause)
            said = self._store.add(what, 0)
        return self._silent(what)

    def _silent(self, what: str) -> list[int]:
        return [rank for rank in range(len(self.numbers)) if not self._store.check([f"{what}/{rank}"])]

    def _all(self, value: Any) -> list[Any]:
        """The value of every rank."""
        import torch

        with self._talking():
            data = json.dumps(value).encode()
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in self.numbers]
            self._gloo.allgather([sizes], [torch.tensor([len(data)])]).wait()
            room = max(int(size) for size in sizes)
            boxes = [bytearray(room) for _ in self.numbers]
            own, *others = (torch.frombuffer(box, dtype=torch.uint8) for box in (bytearray(data.ljust(room)), *boxes))
            self._gloo.allgather([others], [own]).wait()
        return [json.loads(box) for box in boxes]

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise _LostError from error


def _pauses() -> Iterator[float]:
    pause = _FIRST_PAUSE_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, _MAX_PAUSE_SECONDS)


def _named(error: BaseException, rank: str) -> OnelaunchError:
    """An error as all ranks raise it: with the name of the rank."""
    message = f"{rank}: {error}"
    if isinstance(error, CompileError):
        return CompileError(
            message,
            key=error.key,
            command=error.command,
            log=error.log,
            source=error.source,
            lasting=error.lasting,
        )
    if isinstance(error, OnelaunchError):
        return type(error)(message)
    what = f"{type(error).__name__}: {error}".removesuffix(": ")  # an interrupt has no text
    return StoreError(f"{rank} failed in onelaunch.distribute(): {what}")
