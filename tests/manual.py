"""REFERENCE.md, made from docstrings, help texts and tables. `python tests/manual.py` writes it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onelaunch
from click.testing import CliRunner
from onelaunch import errors
from onelaunch.cli.faults import EXIT_CODES
from onelaunch.cli.main import app
from onelaunch.cli.verbs import Verb
from onelaunch.integrations import flashinfer, sglang, vllm
from onelaunch.spec.config import KernelConfig
from onelaunch.spec.parts import PARTS
from onelaunch.variables import VARIABLES

PATH = Path(__file__).parent.parent / "REFERENCE.md"
HEAD = """# Reference

Made by `make generate` from docstrings, help texts and tables; a test holds it to them. What the words mean is in
[ARCHITECTURE.md](ARCHITECTURE.md).

[Python](#python) · [Engines](#engines) · [Settings](#settings) · [Commands](#commands) ·
[Environment variables](#environment-variables) · [Exit codes](#exit-codes) · [Errors](#errors)
"""


def page() -> str:
    """The whole text."""
    parts = [HEAD, *python(), *engines(), *settings(), *commands(), *variables(), *exit_codes(), *messages()]
    return "\n".join(parts).rstrip() + "\n"


def python() -> Iterator[str]:
    yield "## Python\n"
    for name in onelaunch.__all__:
        value = getattr(onelaunch, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            continue
        if callable(value):
            yield from described(f"onelaunch.{name}", value)
    yield "`FIELDS` and `PRESETS` are the fields and the configurations that ship, by name (`onelaunch list`,"
    yield "`onelaunch describe`). `reference` is the module of what every field means, in plain PyTorch.\n"


def engines() -> Iterator[str]:
    yield "## Engines\n"
    for module in (sglang, flashinfer, vllm):
        yield f"{paragraphs(module)}\n"
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            if callable(value) and not name.startswith("_"):
                yield from described(f"{module.__name__}.{name}", value)


def described(name: str, value: Any) -> Iterator[str]:
    """A heading, a signature and the docstring; of a class its public methods as well."""
    yield f"### {name}\n"
    yield "```text"
    yield f"{name.rpartition('.')[2]}{signature(value)}\n"
    yield inspect.getdoc(value) or ""
    if inspect.isclass(value) and not issubclass(value, KernelConfig):
        for method, function in vars(value).items():
            target = getattr(function, "__func__", function)
            if not method.startswith("_") and inspect.isfunction(target) and target.__doc__:
                yield f"\n{method}{signature(target)}"
                yield from (f"    {line}".rstrip() for line in inspect.cleandoc(target.__doc__).splitlines())
    yield "```\n"


def signature(value: Any) -> str:
    """Parameters with their defaults; types are in the docstring."""
    found = inspect.signature(value)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values()]
    if inspect.isclass(value) and len(bare) > 8:
        return "(...)"
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def paragraphs(module: Any) -> str:
    return inspect.getdoc(module) or ""


def settings() -> Iterator[str]:
    yield "## Settings\n"
    yield "Of `bind(...)`, `KernelConfig(...)`, `--set KEY=VALUE,...` and `set = { ... }` in a file of `[[build]]`"
    yield "tables. A setting at its default is in neither key nor banner.\n"
    yield "| setting | default | meaning |\n|---|---|---|"
    for name, text in attributes(KernelConfig):
        if name not in PARTS:
            yield row(name, getattr(KernelConfig(), name), text)
    for part in PARTS.values():
        for name, text in attributes(part):
            yield row(name, part.__dataclass_fields__[name].default, text)
    yield ""


def row(name: str, default: object, text: str) -> str:
    shown = "+".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"| `{name}` | {f'`{shown}`' if shown else 'none'} | {text} |"


def attributes(value: Any) -> Iterator[tuple[str, str]]:
    """The names and texts of a docstring's section "Attributes"."""
    section = (inspect.getdoc(value) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n        .*)*)", section, re.M):
        for name in names.split(", "):
            yield name, " ".join(text.split())


def commands() -> Iterator[str]:
    yield "## Commands\n"
    for words in walk(app, ()):
        text = CliRunner().invoke(app, [*words, "--help"], prog_name="onelaunch", env={"COLUMNS": "110"}).stdout
        yield f"### onelaunch {' '.join(words)}\n" if words else ""
        yield f"```text\n{text.partition('Exit codes:')[0].rstrip() if not words else text.rstrip()}\n```\n"


def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield words
    command = command.load() if isinstance(command, Verb) else command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*words, name))


def variables() -> Iterator[str]:
    yield "## Environment variables\n"
    yield "`onelaunch doctor` prints those that are set.\n"
    yield "| variable | values | default | meaning |\n|---|---|---|---|"
    for each in VARIABLES:
        yield f"| `{each}` | {each.values} | {each.default} | {each.meaning} |"
    yield ""


def exit_codes() -> Iterator[str]:
    yield "## Exit codes\n"
    yield "| code | meaning |\n|---|---|"
    for code, meaning in re.findall(r"^  (\d+) +(.*(?:\n {4,}.*)*)$", EXIT_CODES, re.M):
        yield f"| {code} | {' '.join(meaning.split())} |"
    yield ""


def messages() -> Iterator[str]:
    yield "## Errors\n"
    yield "A message names the argument, its value, what is allowed and what to do next; a command prints it as one"
    yield "line on standard error. `OnelaunchError` is the base of all.\n"
    yield "| class | when, and what to do |\n|---|---|"
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, errors.OnelaunchError) and value is not errors.OnelaunchError:
            text = (inspect.getdoc(value) or "").partition("\n\nAttributes:")[0]
            yield f"| `{name}` | {' '.join(text.split())} |"


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
