"""The child process of a build: a Python in the staging folder that compiles one kernel and answers how that ended.

It is started by path (see process.py), so it imports nothing of onelaunch. The job comes as JSON on stdin, the answer
goes as JSON to stdout. Everything that load_inline reads from its process is set here, where nobody else is disturbed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

# Every path that ninja and the compilers see begins with it, so no character of the cache's path can confuse them, and
# the object doesn't depend on the folder it was built in. All of them run in the staging folder.
HERE = "/proc/self/cwd"

# load_inline names these libraries on every link line. The object uses none of them, so an empty linker script stands
# for each: a link can't fail because pip's toolkit has no libcudart.so, or torch no CUDA.
_UNUSED_LIBRARIES = ("c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python", "cudart")


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles, links and loads.

    Args:
        job: "arguments" of load_inline; "ninja", its path; "toolkit", the CUDA toolkit's folder or None.

    Returns:
        {"commands": every command of the build}, or {"step": "compile" or "load", "output": text, "status": of ninja}.
    """
    # On import it warns that there is no GPU, which an ahead-of-time build doesn't need.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension

    extension: Any = cpp_extension
    # torch doesn't quote this folder, which is inside a virtual environment: one with a space in its path.
    extension.TORCH_LIB_PATH = "stubs"
    extension.CUDNN_HOME = None
    extension.SUBPROCESS_DECODE_ARGS = ("utf-8", "replace")
    # It locks the folder, which is nobody else's and whose file system may have no locks; and it deletes precompiled
    # headers below site-packages, which are the user's.
    extension.FileLock = lambda path: contextlib.nullcontext()
    extension.remove_extension_h_precompiler_headers = lambda: None
    os.mkdir("stubs")
    for library in _UNUSED_LIBRARIES:
        Path("stubs", f"lib{library}.so").write_text("/* unused */\n", encoding="utf-8")
    if job["toolkit"] is not None:
        os.symlink(job["toolkit"], "cuda")  # the toolkit by a path without a space
        extension.CUDA_HOME = "cuda"
    try:
        extension.load_inline(build_directory=HERE, **job["arguments"])
    except RuntimeError as error:
        cause = error.__cause__
        if not isinstance(cause, subprocess.CalledProcessError):
            raise
        return {"step": "compile", "output": _here(str(error)), "status": cause.returncode}
    except ImportError as error:
        return {"step": "load", "output": _here(str(error)), "status": 0}
    done = subprocess.run([job["ninja"], "-t", "commands"], capture_output=True, check=False)
    return {"commands": _here(done.stdout.decode("utf-8", "replace"))}


def kill_session(session: int) -> None:
    """Ends every process of a session, its leader last. ninja gives each command a process group of its own, so what
    a build's processes share is the session."""
    while members := _members(session):
        for pid in [pid for pid in members if pid != session] or members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _members(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name in parentheses may hold anything, so the fields are counted from its end.
            state, _, _, its_session = path.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def _here(text: str) -> str:
    return text.replace(HERE, ".")


def _end_with(lifeline: int) -> None:
    """The parent holds the other end of a pipe; when that closes, the parent is dead and nobody wants the result."""
    os.read(lifeline, 1)
    kill_session(os.getpid())


def main() -> None:
    """Reads the job, and writes the answer where neither a compiler nor a library writes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    job = json.load(sys.stdin)
    # Where the parent's torch is, in case this interpreter finds none by itself.
    sys.path += job["path"]
    try:
        answer = build(job)
    except Exception:
        answer = {"step": "python", "output": traceback.format_exc(), "status": 0}
    json.dump(answer, answers)
    answers.flush()
    # torch starts threads, and nothing that is left to do at exit is worth the wait.
    os._exit(0)


if __name__ == "__main__":
    main()
