"""Runs code as another user, in a forked child that gives up root. For tests of permissions."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# User ids that no account has.
ALICE, MALLORY = 54_321, 54_322


def as_user(user: int, work: Callable[[], Any], **environment: str | None) -> tuple[Any, list[str]]:
    """Runs work as that user in a forked child. Returns its result, which must fit JSON, and its warnings' messages.

    Args:
        environment: variables of the child; None removes one.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            tempfile.tempdir = None  # so that TMPDIR is read again
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = [work(), [str(warning.message) for warning in caught]]
            os.write(writer, json.dumps(result).encode())
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    assert os.waitpid(child, 0)[1] == 0, said.decode()
    result, warned = json.loads(said)
    return result, warned


@contextmanager
def public_folder() -> Iterator[Path]:
    """A folder that every user can read; pytest's own folders are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
