"""The builder: a separate Python process that compiles kernels, each in a fork of its own.

It is started by path (see process.py), so it imports nothing of onelaunch. It reads jobs from stdin, one line of JSON
each. To each it answers {"pid"}, the leader of the build's session, then {"status", "answer", "errors"}. It imports
torch once, because that takes as long as a build. Each fork has its own folder, environment and session, so it can set
all process state that load_inline reads. The builder ends when its parent does, or after IDLE_SECONDS without a job.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

IDLE_SECONDS = 30.0
_POLL_SECONDS = 0.02
# All paths that ninja and the compilers see begin with it. They run in the staging folder, so no character of the
# cache's path can confuse them, and the object doesn't depend on that path.
HERE = "/proc/self/cwd"

# load_inline names these libraries on every link line, but the object uses none of them. Each is replaced by an empty
# linker script, so that a link can't fail because pip's toolkit has no libcudart.so, or torch has no CUDA.
_UNUSED_LIBRARIES = ("c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python", "cudart")


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles, links and loads, in the working folder and with this process's environment.

    Args:
        job: "arguments" of load_inline; "ninja", its path; "toolkit", the CUDA toolkit's folder or None.

    Returns:
        {"commands": every command of the build}, or {"step": "compile" or "load", "output": text, "status": of ninja}.
    """
    extension = _cpp_extension()
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
    """Ends every process of a session, its leader last; session 0 is none.

    ninja starts each command in its own process group, so a build's processes have only the session in common.
    """
    while session and (members := _members(session)):
        for pid in [pid for pid in members if pid != session] or members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _members(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name in parentheses may contain anything, so fields are counted from its end.
            state, _, _, its_session = path.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def _cpp_extension() -> Any:
    # It warns on import if there is no GPU, which a build doesn't need.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension  # not at the top: onelaunch imports this module, too

    extension: Any = cpp_extension
    # torch doesn't quote this path, and the path of a virtual environment may have a space.
    extension.TORCH_LIB_PATH = "stubs"
    extension.CUDNN_HOME = None
    extension.SUBPROCESS_DECODE_ARGS = ("utf-8", "replace")
    # It locks the folder, which is private and whose file system may lack locks; and it deletes precompiled headers in
    # site-packages, which belong to the user.
    extension.FileLock = lambda path: contextlib.nullcontext()
    extension.remove_extension_h_precompiler_headers = lambda: None
    return extension


def _here(text: str) -> str:
    return text.replace(HERE, ".")


def _in_fork(job: dict[str, Any], answer: int, errors: int) -> None:
    """One build, in its own session, folder and environment. Doesn't return."""
    os.setsid()
    # The output of compilers and libraries must not go to the parent.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    try:
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        result = build(job)
    except BaseException:
        result = {"step": "python", "output": traceback.format_exc(), "status": 0}
    with os.fdopen(answer, "wb") as file:
        file.write(json.dumps(result).encode())
    os._exit(0)


def _run(job: dict[str, Any]) -> None:
    """Builds in a fork, and replies with its outcome."""
    try:
        _cpp_extension()
    except Exception:
        _reply({"pid": 0})
        _reply({"status": 0, "answer": {"step": "python", "output": traceback.format_exc(), "status": 0}, "errors": ""})
        return
    # Files in memory: neither a pipe nor a disk can fill up.
    answer, errors = os.memfd_create("answer"), os.memfd_create("errors")
    pid = os.fork()
    if pid == 0:
        _in_fork(job, answer, errors)
    _reply({"pid": pid})
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if select.select([0], [], [], _POLL_SECONDS)[0]:  # the end of file: the parent is gone
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            kill_session(pid)
            os._exit(0)
    status = os.waitstatus_to_exitcode(ended[1])
    if status != 0:
        kill_session(pid)  # its compilers may still run
    _reply({"status": status, "answer": _parsed(_text(answer)), "errors": _text(errors)})


def _reply(message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def _text(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(descriptor, "rb") as file:
        return file.read().decode("utf-8", "replace")


def _parsed(text: str) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError:  # it died before it could answer
        return {}
    return answer if isinstance(answer, dict) else {}


def main() -> None:
    """Runs jobs until none comes for IDLE_SECONDS, or stdin is closed."""
    line = b""
    while select.select([0], [], [], IDLE_SECONDS)[0]:
        part = os.read(0, 1 << 20)
        if not part:
            return
        line += part
        if line.endswith(b"\n"):
            job = json.loads(line)
            line = b""
            # The folder of the parent's torch, if this interpreter doesn't find torch by itself.
            sys.path += [folder for folder in job["path"] if folder not in sys.path]
            _run(job)


if __name__ == "__main__":
    main()
