"""One way to do a refresh as the bench describes it, and the check of what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onelaunch.spec.fields import FIELDS

from .cases import Case
from .scene import Call, Scene


class Unsupported(Exception):
    """An implementation can't do a case; the message says why."""


def sentence_of(error: Exception) -> str:
    """What failed, in one line."""
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first}"


@dataclass(frozen=True)
class Implementation:
    """One way to do a refresh.

    Attributes:
        name: its name in options and results.
        title: its name for people.
        what: what it does, in words.
        variants: gives the calls to measure; in each column the fastest counts.
        live: whether it writes the live columns only. Otherwise it writes every column below the longest request's
            length or, with ``whole``, every column of the table.
        whole: see ``live``.
        spares: whether it leaves the columns alone that it needn't write. Otherwise they aren't compared.
        first_sums: whether it writes the first 0 of the running sums; the engines' tensor code expects it to be there.
        checked: whether it does a refresh, which can be checked.
        writes: the fields that it writes; fewer than all if it does only a part of the refresh.
        limit: maximum requests times columns times backends, as more would take too long; None is no limit.
        builds: whether it builds kernels of ours, which can be done for several cases at once.
    """

    name: str
    title: str
    what: str
    variants: Callable[[Scene, Case], list[Call]]
    live: bool = True
    whole: bool = False
    spares: bool = True
    first_sums: bool = True
    checked: bool = True
    writes: tuple[str, ...] = tuple(FIELDS)
    limit: int | None = None
    builds: bool = False

    def check(self, scene: Scene, case: Case, call: Call) -> str:
        """Makes the call on poisoned destinations; returns the first wrong word, or ""."""
        self.poison(scene)
        call()
        return self.fault(scene, case)

    def poison(self, scene: Scene) -> None:
        """Fills the destinations with what no refresh writes."""
        if self.checked:
            scene.poison(**({} if self.first_sums else {"first_sums": 0}))

    def fault(self, scene: Scene, case: Case) -> str:
        """The first wrong word after a call on poisoned destinations; "" if there is none."""
        if not self.checked:
            return ""
        whole = case.extent == "full" or self.whole
        extent = "live" if self.live and not whole else "full"
        longest = None if whole or self.live else scene.longest
        return scene.fault(extent, longest, self.writes, dead=self.spares)
