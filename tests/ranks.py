"""The ranks of test_distribute.py: `python ranks.py FOLDER BACKEND SIZE CASES` forks a job of new ranks for each case.

In a case something happens to one rank at one stage. Prints, by case and rank: its message, the signal that ended it
(0 if none), and its seconds.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import onelaunch
import torch
import torch.distributed as dist
from onelaunch import KernelConfig
from onelaunch.build import compile as compiler
from onelaunch.cache.store import Store
from onelaunch.load import pack, ranks

# (stage, which rank, what happens to it), by case. "Last" is the rank that neither builds nor holds the store.
EVENTS = {
    "killed before it": ("before it", "last", "killed"),
    "killed as they meet": ("meeting", "last", "killed"),
    "killed as it asks": ("asking", "last", "killed"),
    "killed as another builds": ("waiting", "last", "killed"),
    "killed as it takes": ("taking", "last", "killed"),
    "leader killed as it builds": ("building", "first", "killed"),
    "leader killed as it sends": ("sending", "first", "killed"),
    "the store's process killed": ("building", "first", "killed"),
    "the store's process stopped": ("building", "first", "stopped"),
    "stopped": ("waiting", "last", "stopped"),
    "interrupted before the others came": ("meeting alone", "first", "interrupted"),
    "interrupted as another builds": ("waiting", "last", "interrupted"),
    "leader interrupted as it builds": ("building", "first", "interrupted"),
    "interrupted as it takes": ("taking", "last", "interrupted"),
    "fails as it takes": ("taking", "last", "fails"),
    "late": ("before it", "last", "late"),
}
# The cases in BUILT find this case's build in the leader's cache, so that only the tested step takes time.
BUILDER = "slower than the time-out"
BUILT = {"leader killed as it sends", "killed as it takes", "interrupted as it takes", "fails as it takes"}
LATE_SECONDS, PATIENCE_SECONDS = 10, 5


class Rank:
    """One rank of one case."""

    def __init__(self, folder: Path, backend: str, size: int, how: str, rank: int, port: int) -> None:
        self.backend, self.size, self.how, self.rank = backend, size, how, rank
        self.folder = folder / how.replace(" ", "-")
        self.builds = self.sent = 0
        if backend == "nccl":
            torch.cuda.set_device(rank)
        timeout = datetime.timedelta(seconds=LATE_SECONDS) if how in ("killed before it", "late", BUILDER) else None
        place = f"tcp://127.0.0.1:{port}" if how.startswith("the store's") else f"file://{self.folder}/meet"
        dist.init_process_group(backend, init_method=place, rank=rank, world_size=size, timeout=timeout)
        # A rank that ends while others still connect would make their init_process_group() fail.
        (self.folder / f"connected-{rank}").touch()
        while not all((self.folder / f"connected-{other}").exists() for other in range(size)):
            time.sleep(0.01)
        if how in ("killed as they meet", "stopped", "the store's process stopped"):
            ranks._PATIENCE_SECONDS = PATIENCE_SECONDS

    def at(self, stage: str) -> None:
        """Makes happen what the case says for this rank at this stage."""
        when, which, event = EVENTS.get(self.how, ("", "", ""))
        if when != stage or self.rank != (0 if which == "first" else self.size - 1):
            return
        if event == "late":
            time.sleep(LATE_SECONDS + 3)
        elif event == "fails":
            raise ValueError("no room for it")
        else:
            number = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "interrupted": signal.SIGINT}[event]
            os.kill(os.getpid(), number)

    def run(self) -> dict[str, Any]:
        self._patch()
        store = Store(self.folder / f"cache-{self.rank}")
        if self.how in BUILT and self.rank == 0:
            shutil.copytree(self.folder.parent / BUILDER.replace(" ", "-") / "cache-0", store.root)
        group = dist.new_group(list(range(1, self.size))) if self.how == "a group without the first" else None
        archs = ("100a",) if self.how == "two architectures" and self.rank == self.size // 2 else ("90a",)
        if self.how == "all well" and self.backend == "nccl":
            archs = None
        if self.how == "interrupted before the others came":
            if self.rank == 0:
                threading.Timer(1, self.at, ["meeting alone"]).start()
            else:
                time.sleep(2)
        if self.how in ("killed as another builds", "interrupted as another builds", "stopped"):
            threading.Thread(target=self._wait_for_builder, daemon=True).start()
        self.at("before it")
        try:
            kernels = onelaunch.distribute(self._configs(), group, archs=archs, store=store)
        except (onelaunch.OnelaunchError, KeyboardInterrupt) as error:
            return {"error": [type(error).__name__, str(error)]}
        return {
            "keys": [kernel.key for kernel in kernels],
            "paths": [str(kernel.path) for kernel in kernels],
            "works": all(hasattr(kernel.module, "bind") for kernel in kernels),
            "builds": self.builds,
        }

    def _configs(self) -> Iterator[KernelConfig]:
        self.at("asking")
        if self.how == "no list" and self.rank == 1:
            raise TypeError("no list")
        target = "cuda" if self.backend == "nccl" and self.how == "all well" else "cpu"
        yield KernelConfig(fields=("cache_seqlens",), target=target)
        if self.how == "all well" or (self.how == "they differ" and self.rank != self.size // 2):
            yield KernelConfig(fields=("cache_seqlens",), target=target, num_backends=2)

    def _patch(self) -> None:
        """Reports the stage that it is in, from inside it."""
        this, build, unpack, gloo = self, compiler.build, pack.from_bytes, dist.ProcessGroupGloo

        def building(recipe: Any, *args: Any, **kwargs: Any) -> Any:
            this.builds += 1
            (this.folder / "building").touch()
            this.at("building")
            if this.how in EVENTS:
                time.sleep(600)
            if this.how == BUILDER:
                time.sleep(LATE_SECONDS + 1)
            return build(recipe, *args, **kwargs)

        def taking(*args: Any) -> Any:
            this.at("taking")
            return unpack(*args)

        def connecting(*args: Any) -> Any:
            this.at("meeting")
            return Gloo(*args)

        class Gloo(gloo):  # type: ignore[misc, valid-type]
            def broadcast(self, *args: Any) -> Any:
                this.sent += 1
                if this.sent == 2:  # after the size
                    this.at("sending")
                return super().broadcast(*args)

        compiler.build, pack.from_bytes, dist.ProcessGroupGloo = building, taking, connecting
        if self.how == "leader fails" and self.rank == 0:
            rendering: Any = sys.modules["onelaunch.emit.render"]
            render = rendering.render
            rendering.render = lambda config: render(config) + "#error not today\n"

    def _wait_for_builder(self) -> None:
        while not (self.folder / "building").exists():
            time.sleep(0.01)
        self.at("waiting")


def main(folder: Path, backend: str, size: int, hows: Sequence[str]) -> None:
    started: dict[int, tuple[str, int, float]] = {}
    for how in hows:
        (folder / how.replace(" ", "-")).mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(size):
            child = os.fork()
            if not child:
                be(folder, backend, size, how, rank, port)
            started[child] = how, rank, time.monotonic()
    results: dict[str, list[Any]] = {how: [None] * size for how in hows}
    stopped = {how for how in hows if EVENTS.get(how, ("", "", ""))[2] == "stopped"}
    while started:
        child, status = os.wait()
        how, rank, began = started.pop(child)
        said = folder / how.replace(" ", "-") / f"said-{rank}"
        results[how][rank] = {
            "said": json.loads(said.read_text(encoding="utf-8")) if said.exists() else None,
            "signal": os.WTERMSIG(status),
            "seconds": time.monotonic() - began,
        }
        if how in stopped and sum(result is not None for result in results[how]) == size - 1:
            (last,) = (child for child, (other, _, _) in started.items() if other == how)
            os.kill(last, signal.SIGKILL)
    print(json.dumps(results))


def be(folder: Path, backend: str, size: int, how: str, rank: int, port: int) -> NoReturn:
    with contextlib.suppress(BaseException):
        try:
            result = Rank(folder, backend, size, how, rank, port).run()
            said = folder / how.replace(" ", "-") / f"said-{rank}"
            said.with_suffix(".new").write_text(json.dumps(result), encoding="utf-8")
            said.with_suffix(".new").rename(said)
        except BaseException:
            traceback.print_exc()
    os._exit(0)  # a group with a dead rank can't be destroyed in order


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
