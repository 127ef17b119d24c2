"""What people read while it runs: notices, warnings, and the logger "onelaunch" with a line per build, load and bind.

$ONELAUNCH_LOG shows the logger's lines on standard error.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings

from .variables import LOG_VARIABLE

_LEVELS = {"info": logging.INFO, "debug": logging.DEBUG}

logger = logging.getLogger("onelaunch")
logger.addHandler(logging.NullHandler())

_warned: set[str] = set()


def event(
    what: str, symbol: str, key: str, outcome: str, seconds: float, *details: str, level: int = logging.INFO
) -> None:
    """Logs one line.

    Args:
        what: "build", "load" or "bind".
        symbol: the kernel.
        key: content key of its build.
        outcome: "hit" or "miss".
        seconds: how long it took.
        details: further parts of the line; "" is omitted.
    """
    if logger.isEnabledFor(level):
        text = ", ".join((f"{seconds * 1000:.1f} ms", *filter(None, details)))
        logger.log(level, "%s %s key=%s %s %s", what, symbol, short_key(key), outcome, text)


def short_key(key: str) -> str:
    """The digits of a key that messages show; commands accept 4 or more."""
    return key[:12]


def notice(text: str) -> None:
    """One line on standard error. A stream that is closed, full or broken never fails the caller."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(f"onelaunch: {text}", file=sys.stderr, flush=True)


def warn_once(text: str) -> None:
    """Gives a warning once per process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=3)


def _show(name: str) -> None:
    """Sends the lines to standard error. An application that configures logging itself leaves the variable unset."""
    if name not in _LEVELS:
        warnings.warn(f"{LOG_VARIABLE} is {name!r}; allowed: info, debug. Nothing is logged.", stacklevel=2)
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(_LEVELS[name])
    logger.propagate = False


if LOG_VARIABLE.read():
    _show(LOG_VARIABLE.read())
