"""From a configuration to a loaded kernel: memory, then the store, then the policy, then a build."""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.resources
import logging
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from .. import log
from ..build import compile as compiler
from ..build import toolchain
from ..cache import collect, failures
from ..cache.lock import Lock
from ..cache.manifest import key_of
from ..cache.module import import_entry as import_module
from ..cache.store import MANIFEST, Entry, Store, warn_once
from ..cache.tiers import fallback, tiers, writable
from ..cache.trust import CACHE_VARIABLE
from ..emit import override
from ..errors import CompileError, JitPolicyError, StoreError, ToolchainError
from ..spec.config import SCHEMA_VERSION, KernelConfig

Policy = Literal["allow", "warn", "error"]
POLICY_VARIABLE = "ONELAUNCH_JIT"

# Variables that decide which compilers are found.
_ENVIRONMENT = ("PATH", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "CXX")

_lock = threading.RLock()
_loaded: dict[tuple[str, tuple[str, ...], str, str], Kernel] = {}
_frozen: Policy | None = None
# What was compiled in place of the emitted source, in an entry.
EDITED_FILE = "edited.cu"
# A build that fails for these is made in a temporary folder instead.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# torch writes paths into ninja's file and escapes spaces alone.
_BUILDABLE = re.compile(r"[^$:|\n\r]+")


def _forked() -> None:
    """A child's other threads are gone, and what they held would stay held."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_forked)


@dataclass(frozen=True, eq=False)
class Kernel:
    """A specialized kernel, loaded.

    Attributes:
        config: what it is specialized to.
        key: content key of the build, 64 hex digits.
        path: the shared object.
        archs: GPU architectures it was built for; () on the CPU target.
        manifest: what the store keeps about the build.
        module: the binding.
        built: whether this process built it.
        since: time.perf_counter() when this process got it.
    """

    config: KernelConfig
    key: str
    path: Path
    archs: tuple[str, ...]
    manifest: Mapping[str, Any]
    module: ModuleType
    built: bool = False
    since: float = field(default_factory=time.perf_counter)

    @property
    def edited(self) -> bool:
        """Whether its source was edited by hand (see override.py)."""
        return is_edited(self.manifest)

    @property
    def source(self) -> str:
        """The emitted source, or what was edited by hand in its place."""
        from ..emit.render import render

        return entry_of(self).source if self.edited else render(self.config)

    @property
    def resources(self) -> dict[str, dict[str, int]]:
        """Registers a thread, and bytes of stack, shared and local memory, by architecture."""
        return dict(self.manifest["resources"])

    def __repr__(self) -> str:
        mark = ", edited by hand" if self.edited else ""
        return f"Kernel({self.config.symbol}, key={self.key[:16]}, archs={'+'.join(self.archs) or 'host'}{mark})"


def freeze(policy: Policy = "error") -> None:
    """From here on a build is an error ("error") or a warning ("warn"); "allow" lifts it.

    Call it when warm-up is done: a kernel that would be built later would stall requests.

    Raises:
        JitPolicyError: another policy was named.
    """
    global _frozen
    if policy not in ("allow", "warn", "error"):
        raise JitPolicyError(f"policy is {policy!r}; allowed: 'allow', 'warn', 'error'.")
    _frozen = policy


def load(config: KernelConfig, archs: Sequence[str] | None = None, store: Store | None = None) -> Kernel:
    """The kernel of a configuration: from this process, else prebuilt, else from the store, else built now.

    Args:
        config: the configuration.
        archs: GPU architectures, such as ("90a",); None is toolchain.current_architectures(). Ignored on the CPU
            target.
        store: where builds are kept; None is the user's. The folders of $ONELAUNCH_PREBUILT come before it.

    Raises:
        ToolchainError: a build is needed and a tool is missing.
        CompileError: the build failed, now or before (see failures.py).
        JitPolicyError: a build is needed and the policy forbids it, or a CUDA graph is being captured.
        StoreError: the store can't be trusted or written, or what it has can't run here.
    """
    store = store or default_store()
    targets = () if config.target == "cpu" else tuple(archs or toolchain.current_architectures())
    try:
        start = time.perf_counter()
        edit = override.edited(config)
        memory = (config.key, targets, store.place, edit.digest if edit else "")
        kernel = _loaded.get(memory)
        if kernel is None:
            with _lock:
                kernel = _loaded.get(memory) or _load(config, targets, store)
                _loaded[memory] = kernel
        _tell(kernel, start, edit)
    except OSError as error:
        raise store.unusable(error) from error
    return kernel


@functools.cache
def default_store() -> Store:
    """The user's store."""
    return Store()


def content_key(config: KernelConfig, archs: Sequence[str], versions: Mapping[str, str]) -> str:
    """The key of a build: schema, configuration, sources, flags, architectures and compilers; no path and no time.

    Args:
        versions: Tools.versions().
    """
    return key_of(ingredients(config, archs, versions))


def ingredients(config: KernelConfig, archs: Sequence[str], versions: Mapping[str, str]) -> dict[str, Any]:
    """What a key is made of; the manifest holds it, so that explain can say what differs."""
    from ..emit.render import render_binding

    edit = override.edited(config)
    return {
        "schema": SCHEMA_VERSION,
        "config": config.to_dict(),
        "source": edit.digest if edit else _sha256(override.source(config)),
        **({"edited": True} if edit else {}),
        "binding": _sha256(render_binding(config, module_name(config))),
        "flags": compiler.flags(config.target, archs),
        "archs": list(archs),
        "machine": platform.machine(),
        "compilers": dict(versions),
    }


def module_name(config: KernelConfig) -> str:
    """The import name that is baked into a configuration's binding."""
    return f"{config.symbol}_binding"


def _load(config: KernelConfig, archs: tuple[str, ...], store: Store) -> Kernel:
    _refuse_during_capture(config, archs)
    found = lookup(config, archs, store)
    if found is not None:
        return _kernel(config, *found)
    try:
        tools = compiler.find_tools(config.target)
    except ToolchainError:
        # A host without a compiler takes what was built from the same source, whoever compiled it.
        found = lookup(config, archs, store, any_compiler=True)
        if found is None:
            raise
        return _kernel(config, *found)
    key = content_key(config, archs, tools.versions())
    found = lookup(config, archs, store, key)
    if found is not None:
        note(found[1], config, archs, {"key": key, **_surroundings(tools)})
        return _kernel(config, *found)
    from ..emit.render import render_binding

    _obey_policy(config, archs)
    edit, source = override.edited(config), override.source(config)
    made_of = ingredients(config, archs, tools.versions())
    if (made_of["source"], key_of(made_of)) != (_sha256(source), key):
        raise StoreError(f"The edited source of {config.symbol} changed while its build began; ask for it again.")
    facts = {"schema": SCHEMA_VERSION, "config": config.to_dict(), "ingredients": made_of}
    binding = render_binding(config, module_name(config))
    recipe = Recipe(key, config.symbol, source, binding, archs, facts, edit.path if edit else None)
    entry, home, module = obtain(recipe, tools, store)
    note(home, config, archs, {"key": key, **_surroundings(tools)})
    return _kernel(config, entry, home, module)


def lookup(
    config: KernelConfig, archs: tuple[str, ...], store: Store, key: str = "", any_compiler: bool = False
) -> tuple[Entry, Store] | None:
    """Where a load would find its entry.

    Args:
        key: content key; "" goes by what earlier processes noted for the request alone.
        any_compiler: take what was noted although the compilers aren't those any more.
    """
    request = request_of(config, archs)
    # A note has no sum, so what it leads to must be what was requested.
    expect = {"config": config.to_dict(), "archs": archs}
    for tier in tiers(store):
        noted = tier.read_note(request)
        # What somebody put there on purpose is taken, whichever compiler made it from this very source.
        if noted is None or not (any_compiler or tier.read_only or noted.get("adopted") or _unchanged(noted)):
            continue
        if (entry := tier.find(str(noted.get("key")), expect)) is not None:
            return entry, tier
    for tier in tiers(store) if key else ():
        if (entry := tier.find(key, expect)) is not None:
            return entry, tier
    return None


def note(store: Store, config: KernelConfig, archs: tuple[str, ...], noted: Mapping[str, Any]) -> None:
    """Notes a key for a request, and for a request of each single architecture that has no build of its own."""
    if store.read_only:
        return
    store.write_note(request_of(config, archs), noted)
    for arch in archs if len(archs) > 1 else ():
        request = request_of(config, (arch,))
        known = store.read_note(request)
        if known is None or known.get("key") not in store.stored_keys():
            store.write_note(request, noted)


@dataclass(frozen=True)
class Recipe:
    """What is compiled, and under which key it is kept.

    Attributes:
        key: content key, 64 hex digits.
        symbol: name of the emitted kernel; its binding's import name is <symbol>_binding.
        source, binding: emitted texts, see compile.build.
        archs: GPU architectures; () on the CPU target.
        facts: what the manifest says beyond what every build says.
        edited: the file that a person edited, None if the source is what the templates emit.
    """

    key: str
    symbol: str
    source: str
    binding: str
    archs: tuple[str, ...]
    facts: Mapping[str, Any]
    edited: Path | None = None


def obtain(recipe: Recipe, tools: compiler.Tools, store: Store) -> tuple[Entry, Store, ModuleType | None]:
    """Builds, unless another process does so at this moment: then what it makes is taken.

    Returns:
        The entry, the store that it is in (a temporary one where the store can't take it), and the module if it was
        built here.

    Raises:
        CompileError, StoreError: see load.
    """
    most = collect.limit()  # a setting that can't be read is told of before the work
    key, began = recipe.key, time.time()
    home = writable(store, key)
    if not failures.retry_wanted() and (error := failures.recall(home, key)) is not None:
        raise error

    def done() -> bool:
        return (home.root / "entries" / key / MANIFEST).exists() or failures.recall(home, key, began) is not None

    with home.lock(key, f"{recipe.symbol}, which another process builds", done) as held:
        entry = home.find(key)
        if entry is not None:
            return entry, home, None
        if (failed := failures.recall(home, key, began)) is not None:
            raise failed
        try:
            entry, module = _build(recipe, tools, home, held)
        except OSError as trouble:
            if trouble.errno not in _NO_ROOM:
                raise
            home = fallback(f"The cache folder {home.root} can't take a build ({trouble.strerror})")
            entry, module = _build(recipe, tools, home, held)
        except CompileError as error:
            failures.remember(home, error)
            if not re.search("No space left|Disk quota exceeded", error.log.read_text(encoding="utf-8")):
                raise
            home = fallback(f"The cache folder {home.root} can't take a build (its disk is full)")
            entry, module = _build(recipe, tools, home, held)
        failures.forget(home, key)
    collect.bound(home, key, most)
    return entry, home, module


def check_buildable(store: Store) -> None:
    """Raises StoreError where a store's path is one that ninja can't be told of; what is there can still be loaded."""
    if not _BUILDABLE.fullmatch(str(store.root)):
        raise StoreError(
            f"Nothing can be built in the kernel cache {str(store.root)!r}: ninja, which runs the compilers, can't be "
            f"told of a path with $, :, | or a line break in it. Set {CACHE_VARIABLE} to a folder without them."
        )


def _build(recipe: Recipe, tools: compiler.Tools, store: Store, held: Lock) -> tuple[Entry, ModuleType]:
    """Compiles in a staging folder of its own and publishes, whether or not the lock is held."""
    check_buildable(store)
    where = f" for {', '.join(f'sm_{arch}' for arch in recipe.archs)}" if recipe.archs else " for the CPU"
    print(
        f"onelaunch: building {recipe.symbol}{where}, because {store.root} has no build of it yet"
        + (f" (edited by hand: {recipe.edited})" if recipe.edited else ""),
        file=sys.stderr,
        flush=True,
    )
    name = f"{recipe.symbol}_binding"
    with store.staging() as stage:
        held.phase("compiling")
        done = compiler.build(
            name, recipe.source, recipe.binding, archs=recipe.archs, tools=tools, stage=stage, key=recipe.key
        )
        held.phase("publishing")
        if recipe.edited:
            (stage / EDITED_FILE).write_text(recipe.source, encoding="utf-8")
        facts = {
            "symbol": recipe.symbol,
            "archs": list(recipe.archs),
            "module": name,
            "module_file": done.module_file,
            "source_file": EDITED_FILE if recipe.edited else done.source_file,
            "compilers": tools.versions(),
            "command": done.command,
            "seconds": round(done.seconds, 3),
            "resources": done.resources,
            "requires": done.requires,
            **recipe.facts,
        }
        mark = "edited by hand" if recipe.edited else ""
        log.event("build", recipe.symbol, recipe.key, "miss", done.seconds, *recipe.archs, mark)
        return store.publish(stage, recipe.key, facts), done.module


def _kernel(config: KernelConfig, entry: Entry, store: Store, module: ModuleType | None = None) -> Kernel:
    archs = tuple(str(arch) for arch in entry.manifest["archs"])
    built = module is not None
    module = module or import_module(entry)
    store.stamp(entry.key)
    return Kernel(config, entry.key, entry.module_path, archs, entry.manifest, module, built)


def _tell(kernel: Kernel, start: float, edit: override.Edited | None) -> None:
    """One line in the log; and a warning, once a process, where a kernel isn't what the templates emit."""
    seconds, new = time.perf_counter() - start, kernel.since >= start
    outcome, origin = ("miss", "built now") if kernel.built and new else ("hit", str(kernel.path) if new else "memory")
    level = logging.INFO if new else logging.DEBUG
    mark = "edited by hand" if edit else ""
    log.event("load", kernel.config.symbol, kernel.key, outcome, seconds, *kernel.archs, origin, mark, level=level)
    if edit:
        warn_once(f"{kernel.config.symbol} is edited by hand: {edit.path} runs in place of what onelaunch emits.")


def is_edited(manifest: Mapping[str, Any]) -> bool:
    """Whether a build's source was edited by hand."""
    return bool(manifest.get("ingredients", {}).get("edited"))


def entry_of(kernel: Kernel) -> Entry:
    """The entry that a kernel was loaded from."""
    return Entry(kernel.key, kernel.path.parent, kernel.manifest)


def build_command(config: KernelConfig, archs: Sequence[str]) -> str:
    """The command that builds a configuration ahead of time."""
    settings = config.settings()
    command = "onelaunch build" + (f" --set {settings}" if settings else "")
    return command + (f" --arch {','.join(archs)}" if archs else "")


def _refuse_during_capture(config: KernelConfig, archs: tuple[str, ...]) -> None:
    """A module that is loaded while a stream is captured would end the capture with an error of its own."""
    torch = sys.modules.get("torch")
    if config.target != "cuda" or torch is None or not torch.cuda.is_initialized():
        return
    if torch.cuda.is_current_stream_capturing():
        raise JitPolicyError(
            f"{config.symbol} isn't loaded yet and a CUDA graph is being captured. Bind the plan, or call once, before "
            f"the capture; to have it built by then: {build_command(config, archs)}"
        )


def _obey_policy(config: KernelConfig, archs: tuple[str, ...]) -> None:
    policy = _frozen or os.environ.get(POLICY_VARIABLE, "allow")
    if policy == "allow":
        return
    command = build_command(config, archs)
    message = f"{config.symbol} has to be built now, which can stall serving. Build it ahead of time with: {command}"
    if policy == "warn":
        print(f"onelaunch: warning: {message}", file=sys.stderr, flush=True)
    elif policy == "error":
        raise JitPolicyError(f"{message} (builds are refused by onelaunch.freeze() or {POLICY_VARIABLE}=error)")
    else:
        raise JitPolicyError(f"{POLICY_VARIABLE} is {policy!r}; allowed: allow, warn, error.")


def request_of(config: KernelConfig, archs: tuple[str, ...]) -> str:
    """What a process wants, computed without rendering: the generator's own files stand for the source they emit."""
    material = [config.key, _generator_digest(), *compiler.flags(config.target, archs), platform.machine()]
    edit = override.edited(config)
    return _sha256("\n".join([*material, edit.digest] if edit else material))


@functools.cache
def _generator_digest() -> str:
    """sha256 (hex) of everything that decides which source a configuration becomes and how it is compiled."""
    digest = hashlib.sha256()
    package = importlib.resources.files("onelaunch")
    rooms = [package / name for name in ("spec", "emit", "build")]
    for file in _files(*rooms, importlib.resources.files("onelaunch.templates")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _files(*folders: Traversable) -> Iterator[Traversable]:
    for folder in folders:
        for item in sorted(folder.iterdir(), key=lambda item: item.name):
            if item.is_dir():
                yield from _files(item)
            elif item.name.endswith((".py", ".j2", ".cuh", ".cpp")):
                yield item


def _surroundings(tools: compiler.Tools) -> dict[str, Any]:
    """What shows a later process that the compilers are still these."""
    return {
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
        "programs": [toolchain.identity(path) for path in tools.programs()],
    }


def _unchanged(noted: Mapping[str, Any]) -> bool:
    try:
        if noted["environment"] != {name: os.environ.get(name) for name in _ENVIRONMENT}:
            return False
        return all(toolchain.identity(Path(known["path"])) == known for known in noted["programs"])
    except (OSError, KeyError, TypeError):
        return False


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
