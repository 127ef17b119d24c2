"""From a configuration to a loaded kernel: memory, then the store, then the policy, then a build."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from .. import log
from ..build import key as keys
from ..build import toolchain
from ..build.programs import save_answers
from ..cache.manifest import Entry
from ..cache.module import EntryChanged, import_entry
from ..cache.store import Store
from ..emit import override
from ..emit import render as emission
from ..errors import JitPolicyError, ToolchainError
from ..spec.config import KernelConfig
from ..spec.presets import PRESETS
from ..variables import POLICY_VARIABLE
from . import find
from .obtain import Bounds, as_store_error, obtain

Policy = Literal["allow", "warn", "error"]

_lock = threading.RLock()
_loaded: dict[tuple[str, tuple[str, ...], str, str], Kernel] = {}
_frozen: Policy | None = None


def _forked() -> None:
    """In a forked child: replaces the lock, which another thread of the parent may have held."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_forked)


@dataclass(frozen=True, eq=False)
class Kernel:
    """A specialized kernel, loaded.

    Attributes:
        config: its configuration.
        key: content key of the build, 64 hex digits.
        path: the shared object.
        archs: GPU architectures that it was built for; () on the CPU target.
        manifest: the manifest of its entry.
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
        return entry_of(self).source if self.edited else emission.render(self.config)

    @property
    def resources(self) -> dict[str, dict[str, int]]:
        """Registers per thread, and bytes of stack, shared and local memory, by architecture."""
        return dict(self.manifest["resources"])

    def __repr__(self) -> str:
        mark = ", edited by hand" if self.edited else ""
        return f"Kernel({self.config.symbol}, key={self.key[:16]}, archs={'+'.join(self.archs) or 'host'}{mark})"


def freeze(policy: Policy = "error") -> None:
    """From now on a build raises an error ("error") or prints a warning ("warn"); "allow" permits builds again.

    Call it after warm-up: a build while serving would stall requests.

    Raises:
        JitPolicyError: the policy is none of these.
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
        store: the cache; None is the user's. The folders of $ONELAUNCH_PREBUILT are searched before it.

    Raises:
        ToolchainError: a build is needed and a tool is missing or doesn't fit the others.
        CompileError: the build failed, now or before (see failures.py).
        JitPolicyError: a build is needed and the policy forbids it, or a CUDA graph is being captured.
        StoreError: the store can't be trusted or written, or its entry can't run here.
    """
    store = store or default_store()
    start = time.perf_counter()
    request = find.Request.of(config, _targets(config, archs))
    memory = (config.key, request.archs, store.place, request.edit.digest if request.edit else "")
    kernel = _loaded.get(memory)
    if kernel is None:
        with _lock:
            kernel = _loaded.get(memory) or _load(request, store)
            _loaded[memory] = kernel
    _report(kernel, start, request.edit)
    return kernel


def ensure(
    config: KernelConfig, archs: Sequence[str] | None = None, store: Store | None = None, bounds: Bounds | None = None
) -> tuple[Entry, bool]:
    """Makes sure that the entry is in the store, building it if needed under any policy; loads nothing.

    Returns:
        The entry, and whether it was built now.

    Raises:
        ToolchainError, CompileError, StoreError: see load.
    """
    request = find.Request.of(config, _targets(config, archs))
    entry, _, built = _entry(request, store or default_store(), bounds or Bounds())
    return entry, built


@functools.cache
def default_store() -> Store:
    """The user's store."""
    return Store()


def recipe(config: KernelConfig, archs: Sequence[str], versions: Mapping[str, str]) -> keys.Recipe:
    """The recipe that would be compiled for a configuration, with its key.

    Args:
        versions: Tools.versions().
    """
    return find.Request.of(config, tuple(archs)).recipe(versions)


def content_key(config: KernelConfig, archs: Sequence[str], versions: Mapping[str, str]) -> str:
    """The key of recipe()."""
    return recipe(config, archs, versions).key


def ingredients(config: KernelConfig, archs: Sequence[str], versions: Mapping[str, str]) -> dict[str, Any]:
    """The ingredients of the key of recipe()."""
    return recipe(config, archs, versions).ingredients


def lookup(
    config: KernelConfig, archs: tuple[str, ...], store: Store, key: str = "", any_compiler: bool = False
) -> tuple[Entry, Store] | None:
    """The entry that a load would find, and its store.

    Args:
        key: content key; "" searches only the notes of earlier processes.
        any_compiler: whether to accept notes for other compiler versions.
    """
    with as_store_error(lambda: store):
        found = find.by_note(find.Request.of(config, archs), store, any_compiler)
        return found or (find.by_key(key, store) if key else None)


def note(store: Store, config: KernelConfig, archs: tuple[str, ...], noted: Mapping[str, Any]) -> None:
    """find.note for the emitted source of a configuration."""
    find.note(find.Request.of(config, archs), store, noted)


def _targets(config: KernelConfig, archs: Sequence[str] | None) -> tuple[str, ...]:
    return () if config.target == "cpu" else tuple(archs or toolchain.current_architectures())


def _load(request: find.Request, store: Store) -> Kernel:
    _refuse_during_capture(request.config, request.archs)
    entry, home, built = _entry(request, store, Bounds(), obey_policy=True)
    try:
        module = import_entry(entry, request.expect)
    except EntryChanged:  # `cache clear` in another process, for example
        entry, home, built = _entry(request, store, Bounds(), obey_policy=True)
        module = import_entry(entry, request.expect)
    home.stamp(entry.key)
    archs = tuple(str(arch) for arch in entry.manifest["archs"])
    return Kernel(request.config, entry.key, entry.module_path, archs, entry.manifest, module, built)


def _entry(request: find.Request, store: Store, bounds: Bounds, obey_policy: bool = False) -> tuple[Entry, Store, bool]:
    """The entry of a request: by a note, by key, or built. Renders once, and only without a note."""
    with as_store_error(lambda: store):
        if (noted := find.by_note(request, store)) is not None:
            return *noted, False
    try:
        tools = toolchain.find_tools(request.config.target)
        recipe = request.recipe(tools.versions())
        with as_store_error(lambda: store):
            found = find.by_key(recipe.key, store)
        built = False
        if found is None:
            if obey_policy:
                _obey_policy(request.config, request.archs)
            entry, home, built = obtain(recipe, tools, store, bounds)
            found = entry, home
    except ToolchainError:
        # A host without a compiler accepts a build of the same source by any compiler.
        with as_store_error(lambda: store):
            found = find.by_note(request, store, any_compiler=True)
        if found is None:
            raise
        return *found, False
    find.note(request, found[1], {"key": recipe.key, "compilers": dict(recipe.compilers)})
    save_answers()
    return *found, built


def _report(kernel: Kernel, start: float, edit: override.Edited | None) -> None:
    """Logs one line; warns, once per process, if the kernel is edited by hand."""
    seconds, new = time.perf_counter() - start, kernel.since >= start
    outcome, origin = ("miss", "built now") if kernel.built and new else ("hit", str(kernel.path) if new else "memory")
    level = logging.INFO if new else logging.DEBUG
    mark = "edited by hand" if edit else ""
    log.event("load", kernel.config.symbol, kernel.key, outcome, seconds, *kernel.archs, origin, mark, level=level)
    if edit:
        log.warn_once(f"{kernel.config.symbol} is edited by hand: {edit.path} runs in place of what onelaunch emits.")


def is_edited(manifest: Mapping[str, Any]) -> bool:
    """Whether a build's source was edited by hand."""
    return bool(manifest.get("ingredients", {}).get("edited"))


def entry_of(kernel: Kernel) -> Entry:
    """The entry that a kernel was loaded from."""
    return Entry(kernel.key, kernel.path.parent, kernel.manifest)


def build_command(config: KernelConfig, archs: Sequence[str]) -> str:
    """The command that builds a configuration ahead of time."""
    preset = next((name for name, shipped in PRESETS.items() if shipped == config), None)
    settings = config.settings() or f"target={config.target}"  # the defaults have no settings, and something is named
    command = "onelaunch build " + (preset or f"--set {shlex.quote(settings)}")
    return command + (f" --arch {','.join(archs)}" if archs else "")


def _refuse_during_capture(config: KernelConfig, archs: tuple[str, ...]) -> None:
    """Raises an error while a stream is captured: loading a module would end the capture with a worse one."""
    torch = sys.modules.get("torch")
    if config.target != "cuda" or torch is None or not torch.cuda.is_initialized():
        return
    if torch.cuda.is_current_stream_capturing():
        raise JitPolicyError(
            f"{config.symbol} isn't loaded yet and a CUDA graph is being captured. Bind the plan, or call once, before "
            f"the capture; to have it built by then: {build_command(config, archs)}"
        )


def _obey_policy(config: KernelConfig, archs: tuple[str, ...]) -> None:
    policy = _frozen or POLICY_VARIABLE.read() or POLICY_VARIABLE.default
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
