"""From a configuration to a loaded kernel: memory, then the store, then the policy, then a build."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.resources
import importlib.util
import json
import os
import platform
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from . import compile as compiler
from . import toolchain
from .config import SCHEMA_VERSION, KernelConfig
from .errors import JitPolicyError, ToolchainError
from .store import Entry, Store

Policy = Literal["allow", "warn", "error"]
POLICY_VARIABLE = "ONELAUNCH_JIT"

# Variables that decide which compilers are found.
_ENVIRONMENT = ("PATH", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "CXX")

_lock = threading.RLock()
_loaded: dict[tuple[str, tuple[str, ...], str], Kernel] = {}
_frozen: Policy | None = None


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
    """

    config: KernelConfig
    key: str
    path: Path
    archs: tuple[str, ...]
    manifest: Mapping[str, Any]
    module: ModuleType

    @property
    def source(self) -> str:
        """The emitted source."""
        from .render import render

        return render(self.config)

    @property
    def resources(self) -> dict[str, dict[str, int]]:
        """Registers a thread, and bytes of stack, shared and local memory, by architecture."""
        return dict(self.manifest["resources"])

    def __repr__(self) -> str:
        return f"Kernel({self.config.symbol}, key={self.key[:16]}, archs={'+'.join(self.archs) or 'host'})"


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
    """The kernel of a configuration: from this process, else the store, else built now.

    Args:
        config: the configuration.
        archs: GPU architectures, such as ("90a",); None is that of the current device, see toolchain.architectures.
            Ignored on the CPU target.
        store: where builds are kept; None is the user's.

    Raises:
        ToolchainError: a build is needed and a tool is missing.
        CompileError: the build failed.
        JitPolicyError: a build is needed and the policy forbids it.
        StoreError: the store can't be trusted, or can't be written.
    """
    store = store or default_store()
    targets = () if config.target == "cpu" else tuple(archs or toolchain.architectures())
    try:
        memory = (config.key, targets, str(store.root))
        kernel = _loaded.get(memory)
        if kernel is None:
            with _lock:
                kernel = _loaded.get(memory) or _load(config, targets, store)
                _loaded[memory] = kernel
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
    from .render import render, render_binding

    material = {
        "schema": SCHEMA_VERSION,
        "config": config.to_dict(),
        "source": _sha256(render(config)),
        "binding": _sha256(render_binding(config, module_name(config))),
        "flags": compiler.flags(config.target, archs),
        "archs": list(archs),
        "machine": platform.machine(),
        "compilers": dict(versions),
    }
    return _sha256(json.dumps(material, sort_keys=True))


def module_name(config: KernelConfig) -> str:
    """The import name that is baked into a configuration's binding."""
    return f"{config.symbol}_binding"


def _load(config: KernelConfig, archs: tuple[str, ...], store: Store) -> Kernel:
    request = _request(config, archs)
    noted = store.read_index(request)
    if noted is not None and _unchanged(noted):
        entry = store.find(str(noted["key"]))
        if entry is not None:
            return _kernel(config, archs, entry)
    try:
        tools = compiler.find_tools(config.target)
    except ToolchainError:
        # A host without a compiler takes what was built from the same source, whoever compiled it.
        entry = store.find(str(noted["key"])) if noted is not None else None
        if entry is None:
            raise
        return _kernel(config, archs, entry)
    key = content_key(config, archs, tools.versions())
    entry = store.find(key)
    module = None
    if entry is None:
        _obey_policy(config, archs)
        with store.lock(key):
            entry = store.find(key)
            if entry is None:
                entry, module = _build(config, archs, key, tools, store)
    store.write_index(request, {"key": key, **_surroundings(tools)})
    return _kernel(config, archs, entry, module)


def _build(
    config: KernelConfig, archs: tuple[str, ...], key: str, tools: compiler.Tools, store: Store
) -> tuple[Entry, ModuleType]:
    from .render import render, render_binding

    where = f" for {', '.join(f'sm_{arch}' for arch in archs)}" if archs else " for the CPU"
    print(
        f"onelaunch: building {config.symbol}{where}, because {store.root} has no build of it yet",
        file=sys.stderr,
        flush=True,
    )
    name = module_name(config)
    with store.staging() as stage:
        done = compiler.build(
            name,
            render(config),
            render_binding(config, name),
            archs=archs,
            tools=tools,
            stage=stage,
            key=key,
        )
        facts = {
            "schema": SCHEMA_VERSION,
            "config": config.to_dict(),
            "symbol": config.symbol,
            "archs": list(archs),
            "module": name,
            "module_file": done.module_file,
            "source_file": done.source_file,
            "compilers": tools.versions(),
            "command": done.command,
            "seconds": round(done.seconds, 3),
            "resources": done.resources,
        }
        return store.publish(stage, key, facts), done.module


def _kernel(config: KernelConfig, archs: tuple[str, ...], entry: Entry, module: ModuleType | None = None) -> Kernel:
    return Kernel(config, entry.key, entry.module_path, archs, entry.manifest, module or import_module(entry))


def import_module(entry: Entry) -> ModuleType:
    """Loads an entry's binding, without ninja and without torch.utils.cpp_extension."""
    name = str(entry.manifest["module"])
    loader = importlib.machinery.ExtensionFileLoader(name, str(entry.module_path))
    spec = importlib.util.spec_from_file_location(name, entry.module_path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _obey_policy(config: KernelConfig, archs: tuple[str, ...]) -> None:
    policy = _frozen or os.environ.get(POLICY_VARIABLE, "allow")
    if policy == "allow":
        return
    settings = config.settings()
    command = "onelaunch build" + (f" --set {settings}" if settings else "")
    command += f" --arch {','.join(archs)}" if archs else ""
    message = f"{config.symbol} has to be built now, which can stall serving. Build it ahead of time with: {command}"
    if policy == "warn":
        print(f"onelaunch: warning: {message}", file=sys.stderr, flush=True)
    elif policy == "error":
        raise JitPolicyError(f"{message} (builds are refused by onelaunch.freeze() or {POLICY_VARIABLE}=error)")
    else:
        raise JitPolicyError(f"{POLICY_VARIABLE} is {policy!r}; allowed: allow, warn, error.")


def _request(config: KernelConfig, archs: tuple[str, ...]) -> str:
    """What a process wants, computed without rendering: the generator's own files stand for the source they emit."""
    material = [config.key, _generator_digest(), *compiler.flags(config.target, archs), platform.machine()]
    return _sha256("\n".join(material))


@functools.cache
def _generator_digest() -> str:
    digest = hashlib.sha256()
    package = importlib.resources.files("onelaunch")
    templates = importlib.resources.files("onelaunch.templates")
    files = [package / name for name in ("config.py", "fields.py", "layout.py", "render.py", "compile.py")]
    for folder in (templates, templates / "parts"):
        files += sorted((f for f in folder.iterdir() if f.name.endswith(".j2")), key=lambda f: f.name)
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


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
