"""The environment variables of onelaunch, each declared once. All of them are read here."""

from __future__ import annotations

import os


class Variable(str):
    """The name of a variable, with its meaning.

    Attributes:
        values: the allowed values.
        default: the value if it is unset or empty.
        meaning: its meaning, in one sentence.
    """

    values: str
    default: str
    meaning: str

    def __new__(cls, name: str, values: str, default: str, meaning: str) -> Variable:
        self = super().__new__(cls, name)
        self.values, self.default, self.meaning = values, default, meaning
        return self

    def read(self) -> str:
        """Its value without white space around it; "" where it is unset."""
        return os.environ.get(self, "").strip()

    def is_on(self) -> bool:
        """Whether it is set, and not to 0."""
        return self.read() not in ("", "0")


CACHE_VARIABLE = Variable(
    "ONELAUNCH_CACHE_DIR",
    "a folder",
    "$XDG_CACHE_HOME/onelaunch, else ~/.cache/onelaunch",
    "The folder of the kernel cache.",
)
MAX_SIZE_VARIABLE = Variable(
    "ONELAUNCH_CACHE_MAX_SIZE",
    "a size such as 500M or 2G",
    "2G",
    "The limit of all entries together; above it the least recently used ones are removed.",
)
SHARED_VARIABLE = Variable(
    "ONELAUNCH_SHARED_CACHE", "1", "off", "Trusts every user who can write to the cache: code from it runs as you."
)
PREBUILT_VARIABLE = Variable(
    "ONELAUNCH_PREBUILT", "folders, joined by :", "none", "Read-only caches that are searched for a kernel first."
)
TIMEOUT_VARIABLE = Variable(
    "ONELAUNCH_LOCK_TIMEOUT", "seconds", "600", "How long a process waits for another's build before it builds itself."
)
POLICY_VARIABLE = Variable(
    "ONELAUNCH_JIT",
    "allow, warn or error",
    "allow",
    "Whether a call may start a build: yes, yes with a warning, or no.",
)
RETRY_VARIABLE = Variable("ONELAUNCH_RETRY", "1", "off", "Kernels that failed to compile before are compiled again.")
ARCHITECTURE_VARIABLE = Variable(
    "ONELAUNCH_CUDA_ARCH",
    "architectures such as 90a,100a",
    "the current GPU's",
    "The GPU architectures that kernels are built for.",
)
OVERRIDE_VARIABLE = Variable(
    "ONELAUNCH_OVERRIDE_DIR", "a folder", "none", "Kernels edited by hand, which run in place of the emitted ones."
)
LOG_VARIABLE = Variable("ONELAUNCH_LOG", "info or debug", "off", "A line on stderr for each build, load and bind.")
AUDIT_VARIABLE = Variable(
    "ONELAUNCH_AUDIT_EVERY",
    "a whole number",
    "off",
    "A plan that is bound without audit_every audits after every so many runs, and raises what it finds.",
)
NVTX_VARIABLE = Variable("ONELAUNCH_NVTX", "1", "off", "An NVTX range around each launch.")
DISABLE_VARIABLE = Variable("ONELAUNCH_DISABLE", "1", "off", "attach() attaches nothing; the engine's own path runs.")
SGLANG_VARIABLE = Variable(
    "ONELAUNCH_SGLANG",
    "1, backends or 0",
    "off",
    "Attaches in an unmodified SGLang to all that is served, with backends to attention backends alone; 0 overrides "
    "SGLANG_PLUGINS.",
)

VARIABLES = tuple(value for value in list(globals().values()) if isinstance(value, Variable))
"""All of them."""
