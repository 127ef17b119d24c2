"""Arguments and options that several verbs share, and the configurations that they name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from onelaunch.errors import ArgumentError
from onelaunch.spec.config import KernelConfig
from onelaunch.spec.presets import PRESETS, preset
from onelaunch.spec.settings import parse_settings


def preset_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str | CompletionItem]:
    """The presets that a shell offers as completions of a configuration's name."""
    return [name for name in PRESETS if name.startswith(incomplete)]


def config_argument(function: Any) -> Any:
    """CONFIG, which names a kernel."""
    return click.argument("config", required=False, shell_complete=preset_names)(function)


def settings_option(function: Any) -> Any:
    """--set, the settings of a configuration."""
    return click.option(
        "--set",
        "settings",
        metavar="KEY=VALUE,…",
        help="Settings over the preset, or over the defaults if none is named. Fields are joined by +.",
    )(function)


def target_option(function: Any) -> Any:
    """--target, what the kernel is built for."""
    return click.option("--target", metavar="TARGET", help="cuda or cpu; default cuda.")(function)


def arch_option(function: Any) -> Any:
    """--arch, the GPU architectures."""
    return click.option("--arch", metavar="ARCHS", help="GPU architectures, such as 90a,100a.")(function)


def json_option(function: Any) -> Any:
    """--json, for output that a script reads."""
    return click.option("--json", "as_json", is_flag=True, help="As JSON.")(function)


def html_option(function: Any) -> Any:
    """--html, a page for a browser."""
    return click.option(
        "--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page for a browser to this file."
    )(function)


def dry_run_option(function: Any) -> Any:
    """--dry-run, for verbs that remove something."""
    return click.option("--dry-run", is_flag=True, help="Remove nothing; print what would be removed.")(function)


def gone_option(name: str, instead: str) -> Callable[[Any], Any]:
    """A removed option. For one release its error message names the replacement."""

    def refuse(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise ArgumentError(f"{name} is gone since 0.2; {instead}.")

    return click.option(name, "gone_" + name.strip("-"), hidden=True, expose_value=False, callback=refuse)


def chosen(name: str | None, settings: str | None, target: str | None = None) -> KernelConfig:
    """The configuration that a preset's name, --set and --target give."""
    config = parse_settings(settings or "", preset(name) if name else None)
    return config.replace(target=target) if target else config


def architectures(text: str | None) -> tuple[str, ...] | None:
    """The architectures of --arch; None if it wasn't given."""
    return tuple(part.strip() for part in text.split(",")) if text else None
