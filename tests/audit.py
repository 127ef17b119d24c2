"""pip-audit on what onelaunch needs to run, at the versions that are installed. Run by `make check`.

A finding fails. So does an audit that breaks. Where the advisories can't be had (no network, or an index that has
none), one line says so: that is no finding, and no clean bill either.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SECONDS = 60
UNREACHABLE = ("ConnectionError", "ConnectionResetError", "Timeout", "ServiceError", "NameResolutionError")


def closure(name: str) -> dict[str, str]:
    """Name to installed version of everything that a distribution requires, directly or not."""
    found: dict[str, str] = {}
    open_names = [(name, "")]
    seen = set()
    while open_names:
        current, extra = open_names.pop()
        if (current, extra) in seen:
            continue
        seen.add((current, extra))
        try:
            distribution = importlib.metadata.distribution(current)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on other systems, or by an extra that nobody asked for
        if current != name:
            found[current] = distribution.version.partition("+")[0]  # advisories name no local version
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = canonicalize_name(requirement.name)
                open_names += [(needed, ""), *((needed, e) for e in requirement.extras)]
    return found


def audit(versions: dict[str, str]) -> tuple[list[dict[str, Any]], str]:
    """pip-audit's answer for each distribution; or none, and why there is none."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{name}=={version}\n" for name, version in sorted(versions.items()))
        file.flush()
        options = ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pip_audit", "-r", file.name, *options],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [], f"no answer in {SECONDS} seconds"
    if done.stdout.strip():
        answers: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
        return answers, ""
    why = next((name for name in UNREACHABLE if name in done.stderr), None)
    if why is None:
        sys.exit(f"audit: pip-audit failed:\n{done.stderr}")
    return [], why


def main() -> int:
    versions = closure("onelaunch")
    answers, why = audit(versions)
    known = [answer for answer in answers if "skip_reason" not in answer]
    findings = [(answer, vulnerability) for answer in known for vulnerability in answer["vulns"]]
    for answer, vulnerability in findings:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no release"
        print(f"audit: {answer['name']} {answer['version']}: {vulnerability['id']}, mended in {fixed}")
    if not known:
        print(
            f"audit: NOT DONE: no advisories could be had for the {len(versions)} dependencies"
            f" ({why or 'the index knows none of them'})"
        )
    elif not findings:
        print(f"audit: no known vulnerability in {len(known)} of {len(versions)} dependencies; the others are unknown")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
