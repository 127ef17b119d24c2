"""Request traces: when requests arrived, and how many tokens they had."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onelaunch.errors import ArgumentError

COLUMNS = ("arrival_ms", "input_tokens", "output_tokens")
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        arrival_ms: float64 [requests], milliseconds, never decreasing.
        input_tokens: int64 [requests], at least 1.
        output_tokens: int64 [requests], at least 1.
    """

    arrival_ms: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.arrival_ms)

    def head(self, requests: int) -> Trace:
        """The first ``requests`` requests, or all of them if there are fewer."""
        return Trace(self.arrival_ms[:requests], self.input_tokens[:requests], self.output_tokens[:requests])

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read a CSV file whose header names arrival_ms, input_tokens and output_tokens (others are ignored).

        Raises:
            ArgumentError: the file can't be read, or a line isn't a request; the message names line and
                column.
        """
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                return cls._parse(path, csv.reader(file))
        except OSError as error:
            reason = error.strerror or error
            raise ArgumentError(f"The trace {path} can't be opened: {reason}. Name a CSV file.") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise ArgumentError(f"The trace {path} isn't a CSV text in UTF-8: {error}.") from error

    @classmethod
    def _parse(cls, path: Path, lines: Iterator[list[str]]) -> Trace:
        header = [name.strip() for name in next(lines, [])]
        for name in COLUMNS:
            if header.count(name) != 1:
                raise ArgumentError(
                    f"{path}, line 1: the header has {header.count(name)} columns {name} where one is "
                    f"needed; it must name {', '.join(COLUMNS)}."
                )
        places = [header.index(name) for name in COLUMNS]
        rows: list[tuple[float, int, int]] = []
        for cells in lines:
            if not cells:
                continue
            line: int = lines.line_num  # type: ignore[attr-defined]  # a csv reader, which has no public type
            values = []
            for name, place in zip(COLUMNS, places, strict=True):
                where = f"{path}, line {line}, column {name}"
                if place >= len(cells):
                    raise ArgumentError(
                        f"{where}: the line has {len(cells)} cells, the header {len(header)}; fill in the value."
                    )
                values.append(_number(cells[place].strip(), where, whole=name != "arrival_ms"))
            arrival, prompt, output = values
            if rows and arrival < rows[-1][0]:
                raise ArgumentError(
                    f"{path}, line {line}, column arrival_ms: {arrival:g} is before the arrival of the "
                    f"request above ({rows[-1][0]:g}); sort the trace by arrival_ms."
                )
            rows.append((arrival, int(prompt), int(output)))
        if not rows:
            raise ArgumentError(f"The trace {path} holds no request; a header and one line are the least it needs.")
        arrivals, prompts, outputs = zip(*rows, strict=True)
        return cls(np.array(arrivals, np.float64), np.array(prompts, np.int64), np.array(outputs, np.int64))


def _number(text: str, where: str, *, whole: bool) -> float:
    """``text`` as a number: a count of tokens from 1 to 2^31 - 1 if ``whole``, else milliseconds from 0."""
    # A pattern, since int() and float() also take "1_000", "nan" and digits of other scripts.
    if re.fullmatch(r"[0-9]+" if whole else r"[0-9]+(\.[0-9]*)?", text):
        value = float(text)
        if (1 if whole else 0) <= value <= (INT32_MAX if whole else 2**53):
            return value
    allowed = f"a whole number from 1 to {INT32_MAX}" if whole else "a number of milliseconds, 0 or more"
    raise ArgumentError(f"{where}: {text!r} isn't {allowed}.")
