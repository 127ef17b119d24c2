"""How the verbs print, and how they write files."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from onelaunch.cache import files


def size(count: float) -> str:
    """A number of bytes for people: 2400000 is 2 MB."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def print_text(text: str, lexer: str) -> None:
    """Prints text: highlighted on a terminal (unless $NO_COLOR is set), plain elsewhere."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        sys.stdout.write(text)
        return
    # Imported here for start-up time: most output goes to pipes, which need no highlighting.
    from rich.console import Console
    from rich.syntax import Syntax

    # The default background keeps the terminal's own, dark or light. Soft wrapping keeps lines whole for copying.
    highlighted = Syntax(text, lexer, theme="ansi_dark", background_color="default").highlight(text)
    Console().print(highlighted, soft_wrap=True, end="")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file in one step: if it is interrupted, the file keeps its old content.

    Raises:
        OSError: it can't be written; the error names ``path``.
    """
    data = content.encode() if isinstance(content, str) else content
    target = path.resolve()
    if target.exists() and not target.is_file():  # a device or a pipe, such as /dev/stdout
        target.write_bytes(data)
        return
    try:
        files.replace(target, data, 0o644)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(path: Path) -> None:
    """Raises OSError where write_whole would fail, as far as that is known in advance."""
    target = path.resolve()
    place = target if target.exists() and not target.is_file() else target.parent
    place.stat()  # raises if the folder is missing
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
