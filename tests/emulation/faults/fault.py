"""A fault to plant in an emitted kernel."""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass

from cases import Shape
from onelaunch import KernelConfig

SANITIZERS = ("thread", "address", "undefined")


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: the change.
        breaks: its effect on a GPU.
        config, shape: the case that shows it.
        pattern, replacement: a regular expression, and its substitute for every match.
        caught_by: the only check that detects it, a value of ``Outcome.caught``.
    """

    name: str
    breaks: str
    config: KernelConfig
    shape: Shape
    pattern: str
    replacement: str
    caught_by: str = "mismatch"

    @property
    def sanitizer(self) -> str:
        """The sanitizer that the faulty kernel is built with."""
        return self.caught_by if self.caught_by in SANITIZERS else "none"

    def apply(self, source: str, template: str) -> str:
        """The faulty source.

        Args:
            source: the emitted kernel.
            template: the file with the fault: a file of templates/device/, or a Jinja template for the whole source.

        Raises:
            LookupError: the pattern matches nothing, so nothing would be tested.
        """
        part = source
        if template.endswith(".cuh"):
            text = importlib.resources.files("onelaunch.templates").joinpath(*template.split("/"))
            part = text.read_text(encoding="utf-8").rstrip("\n")
        faulty, count = re.subn(self.pattern, self.replacement, part, flags=re.DOTALL)
        if count == 0 or faulty == part or part not in source:
            raise LookupError(
                f"fault {self.name!r}: its pattern {self.pattern!r} no longer matches {template} in the "
                "emitted source; the templates changed. Update the fault"
            )
        return source.replace(part, faulty)


def barrier(function: str, which: int) -> str:
    """Matches up to the barrier number ``which`` of a function, from 0."""
    return (
        rf"(\b{function}\([^;{{]*\) \{{(?:(?!\n\}}).)*?"
        + r"__syncthreads\(\);(?:(?!\n\}).)*?" * which
        + (r")__syncthreads\(\);")
    )
