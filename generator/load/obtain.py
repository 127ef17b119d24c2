"""One build: look it up again under the lock, else compile, publish and remember the outcome."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .. import log
from ..build import compile as compiler
from ..build import diagnosis
from ..build.key import Recipe
from ..build.toolchain import Tools
from ..cache import collect, failures
from ..cache.lock import Lock
from ..cache.manifest import MANIFEST, Entry
from ..cache.store import Store
from ..cache.tiers import fallback, writable
from ..errors import CompileError

EDITED_FILE = "edited.cu"
"""The file in an entry that was compiled in place of the emitted source."""

# If a store fails with one of these, it is still read, and the build goes to the fallback store.
_CANT_BE_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Bounds:
    """Limits and options of a build.

    Attributes:
        retry: whether to try a failed build again; None reads $ONELAUNCH_RETRY.
        timeout: seconds that the compilers may take; None is no limit.
        jobs: compilers that run at the same time, see compile.build.
    """

    retry: bool | None = None
    timeout: float | None = None
    jobs: int | None = None


def obtain(recipe: Recipe, tools: Tools, store: Store, bounds: Bounds | None = None) -> tuple[Entry, Store, bool]:
    """Builds; or, if another process is building the same, waits for its entry and takes that.

    Returns:
        The entry, its store (the fallback store if the given one can't be written), and whether it was built here.

    Raises:
        CompileError: the build failed, now or before.
        ToolchainError: the compilers don't fit each other, a tool is missing, or no process can be started.
        StoreError: the store can't be trusted, or neither it nor a temporary folder can be written.
    """
    bounds = bounds or Bounds()
    limit = collect.limit()  # reports an unreadable limit before the work
    home = store
    with as_store_error(lambda: home):
        home = writable(store, recipe.key)
        try:
            found = _obtain(recipe, tools, home, bounds)
        except OSError as trouble:
            if trouble.errno not in _CANT_BE_WRITTEN:
                raise
            home = fallback(f"The cache folder {home.root} can't take a build ({trouble.strerror})")
            found = _obtain(recipe, tools, home, bounds)
        except CompileError as error:
            if error.lasting or not diagnosis.NO_SPACE.search(error.log.read_text(encoding="utf-8", errors="replace")):
                raise
            home = fallback(f"The cache folder {home.root} can't take a build (its disk is full)")
            found = _obtain(recipe, tools, home, bounds)
        collect.bound(home, recipe.key, limit)
        return found[0], home, found[1]


@contextlib.contextmanager
def as_store_error(store: Callable[[], Store]) -> Iterator[None]:
    """Turns an OSError of a store's operation into a StoreError about that store."""
    try:
        yield
    except OSError as error:
        raise store().unusable(error) from error


def _obtain(recipe: Recipe, tools: Tools, home: Store, bounds: Bounds) -> tuple[Entry, bool]:
    key = recipe.key
    before = failures.mark(home, key)
    retry = failures.retry_wanted() if bounds.retry is None else bounds.retry
    if not retry and (error := failures.recall(home, key)) is not None:
        raise error

    def failed_meanwhile() -> CompileError | None:
        return failures.recall(home, key) if failures.mark(home, key) != before else None

    def done() -> bool:
        return (home.root / "entries" / key / MANIFEST).exists() or failed_meanwhile() is not None

    with home.lock(key, f"{recipe.symbol}, which another process builds", done) as held:
        if (entry := home.find(key)) is not None:
            return entry, False
        if (failed := failed_meanwhile()) is not None:
            raise failed
        try:
            entry = _build(recipe, tools, home, held, bounds)
        except CompileError as error:
            failures.remember(home, error)
            raise
        failures.forget(home, key)
    return entry, True


def _build(recipe: Recipe, tools: Tools, home: Store, held: Lock, bounds: Bounds) -> Entry:
    """Compiles in a new staging folder and publishes, whether or not the lock is held."""
    where = f" for {', '.join(f'sm_{arch}' for arch in recipe.archs)}" if recipe.archs else " for the CPU"
    edited = f" (edited by hand: {recipe.edited})" if recipe.edited else ""
    log.notice(f"building {recipe.symbol}{where}, because {home.root} has no build of it yet{edited}")
    with home.staging() as stage:
        held.phase("compiling")
        done = compiler.build(recipe, tools, stage=stage, timeout=bounds.timeout, jobs=bounds.jobs)
        held.phase("publishing")
        if recipe.edited:
            (stage / EDITED_FILE).write_text(recipe.source, encoding="utf-8")
        facts = {
            "schema": recipe.ingredients["schema"],
            **({"config": dict(recipe.config)} if recipe.config is not None else {}),
            "ingredients": recipe.ingredients,
            "edited": recipe.ingredients["source"] if recipe.edited else "",
            "symbol": recipe.symbol,
            "archs": list(recipe.archs),
            "module": recipe.module,
            "module_file": done.module_file,
            "source_file": EDITED_FILE if recipe.edited else done.source_file,
            "compilers": dict(recipe.compilers),
            "command": done.command,
            "seconds": round(done.seconds, 3),
            "resources": done.resources,
            "requires": done.requires,
        }
        mark = "edited by hand" if recipe.edited else ""
        log.event("build", recipe.symbol, recipe.key, "miss", done.seconds, *recipe.archs, mark)
        return home.publish(stage, recipe.key, facts)
