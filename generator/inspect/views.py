"""The views of a kernel that `onelaunch show` prints: source, machine code, binding, commands, key."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ..build import compile as compiler
from ..build import toolchain
from ..emit.binding import module_name, render_binding
from ..errors import ArgumentError, ToolchainError
from ..load import loader
from ..spec.config import KernelConfig
from . import machine_code
from .kernels import Subject

VIEWS = ("cuda", "ptx", "sass", "resources", "binding", "command", "key")


def view(kernel: Subject, what: str, annotate: bool = False) -> str:
    """A view, as `onelaunch show` prints it.

    Args:
        what: one of VIEWS.
        annotate: whether to add the source line of each instruction of PTX or SASS.

    Raises:
        ArgumentError: the kernel has no such view.
        ToolchainError: a program that it needs is missing.
    """
    if annotate and what not in ("ptx", "sass"):
        raise ArgumentError(f"--annotate is for ptx and sass; {what} has no instructions.")
    if what == "cuda":
        return kernel.source
    if what == "binding":
        config = _known(kernel)
        return render_binding(config, module_name(config.symbol))
    if what == "ptx":
        return machine_code.ptx(kernel, annotate)
    if what == "sass":
        return machine_code.sass(kernel, annotate)
    return table(facts(kernel, what))


def facts(kernel: Subject, what: str) -> dict[str, Any]:
    """The views "resources", "command" and "key", as JSON values."""
    if what == "resources":
        return _marked(kernel, dict(machine_code.resources(kernel)))
    if what == "command":
        return _marked(kernel, _commands(kernel))
    return _marked(kernel, _key(kernel))


def table(values: Mapping[str, Any], indent: str = "") -> str:
    """Values as lines ``name  value``; nested ones are indented."""
    width = max((len(name) for name, value in values.items() if not isinstance(value, dict)), default=0)
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{name}\n{table(value, indent + '  ')}")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"{indent}{name:{width}}  {text}\n")
    return "".join(lines)


def _key(kernel: Subject) -> dict[str, Any]:
    config = _known(kernel)
    values: dict[str, Any] = {"symbol": kernel.symbol, "configuration": config.key}
    if kernel.entry is not None:
        made_of = dict(kernel.entry.manifest.get("ingredients", {}))
        values |= {"build": kernel.entry.key, "built": str(kernel.entry.path)}
    else:
        try:
            versions = toolchain.find_tools(config.target).versions()
        except ToolchainError as error:
            return {**values, "build": f"unknown, as it can't be built here: {str(error).splitlines()[0]}"}
        made_of = loader.ingredients(config, kernel.archs, versions)
        values |= {"build": loader.content_key(config, kernel.archs, versions), "built": "no"}
    return {**values, "made of": {name: value for name, value in made_of.items() if name != "config"}}


def _commands(kernel: Subject) -> dict[str, Any]:
    """The commands that build it: onelaunch's, and the compiler's as it was recorded or as it would be."""
    values = {}
    if kernel.config is not None:
        values["onelaunch"] = loader.build_command(kernel.config, kernel.archs)
    if kernel.entry is not None and kernel.entry.manifest.get("command"):
        values["recorded"] = str(kernel.entry.manifest["command"])
    elif kernel.on_gpu:
        values["compiler"] = shlex.join(
            map(str, machine_code.nvcc(kernel.archs, f"{kernel.symbol}.cu", f"{kernel.symbol}.o", "-c"))
        )
    else:
        host = toolchain.find_host_compiler()
        flags = [*host.flags, *compiler.HOST_FLAGS, "-fPIC", "-xc++"]
        values["compiler"] = shlex.join(
            [str(host.path), *flags, "-c", f"{kernel.symbol}.cu", "-o", f"{kernel.symbol}.o"]
        )
    return values


def _known(kernel: Subject) -> KernelConfig:
    if kernel.config is None:
        raise ArgumentError(f"{kernel.name} doesn't say which configuration it is for; name a preset, or use --set.")
    return kernel.config


def _marked(kernel: Subject, values: dict[str, Any]) -> dict[str, Any]:
    return {"edited by hand": str(kernel.edited), **values} if kernel.edited else values
