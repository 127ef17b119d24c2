"""An audit of what onelaunch needs to run, at the versions that are installed. Run by `make check`.

pip-audit asks first: it knows every release. What it has no answer for is looked up in the package index that pip is
set to use: a project's page there has the advisories of its newest release and the releases that were withdrawn
("yanked"), and nothing on older ones, which are named as unknown. Both are asked about one release with known,
unmended vulnerabilities too, and a source that doesn't report it isn't believed.

A finding fails. So does an audit that breaks. Where the advisories can't be had (no network, or an index that has
none), one line says so: that is no finding, and no clean bill either.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

import requests
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SECONDS = 60
UNREACHABLE = ("ConnectionError", "ConnectionResetError", "Timeout", "ServiceError", "NameResolutionError")
# Given up by its authors with vulnerabilities that no release mends, so it stays both newest and vulnerable.
VULNERABLE = {"pycrypto": "2.6.1"}
PAGES = "the package index's pages on newest releases"


@dataclass
class Answers:
    """What a source said: findings (each a line) by distribution, empty where it knows of none; and, if it is no
    source at all, why."""

    source: str
    findings: dict[str, list[str]] = field(default_factory=dict)
    why: str = ""

    def believed(self) -> Answers:
        """This, without the answer on the vulnerable release; or no answers, where that answer was wrong."""
        proven = [self.findings.pop(name, None) for name in VULNERABLE]
        if all(proven):
            return self
        why = self.why or "it has no advisories: it reports no vulnerability where there are known ones"
        return Answers(self.source, why=why)


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


def line(name: str, version: str, vulnerability: dict[str, Any], fixed: list[str]) -> str:
    return f"{name} {version}: {vulnerability['id']}, mended in {', '.join(fixed) or 'no release'}"


def from_pip_audit(versions: dict[str, str]) -> Answers:
    """pip-audit's answers, from the advisories of exactly these releases."""
    source = "pip-audit"
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
            return Answers(source, why=f"no answer in {SECONDS} seconds")
    if not done.stdout.strip():
        why = next((name for name in UNREACHABLE if name in done.stderr), None)
        if why is None:
            sys.exit(f"audit: pip-audit failed:\n{done.stderr}")
        return Answers(source, why=why)
    known = [answer for answer in json.loads(done.stdout)["dependencies"] if "skip_reason" not in answer]
    if not known:
        return Answers(source, why="its service knows none of the releases")
    return Answers(
        source,
        {
            answer["name"]: [line(answer["name"], answer["version"], v, v["fix_versions"]) for v in answer["vulns"]]
            for answer in known
        },
    )


def pip_setting(name: str) -> str:
    """A global setting of pip's, from the environment or its files; empty if there is none."""
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    from_environment = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    return from_environment or subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def index_root() -> str:
    """The address of the package index that pip uses, without its /simple."""
    index = pip_setting("index-url")
    if not index:
        from pip._internal.models.index import PyPI  # pip's own default has no public name

        index = PyPI.simple_url
    return index.rstrip("/").removesuffix("/simple")


def from_index(versions: dict[str, str]) -> Answers:
    """The package index's answers, for those releases that are their project's newest or were withdrawn."""
    answers = Answers(PAGES)
    root = index_root()
    with requests.Session() as session:
        session.verify = pip_setting("cert") or True
        for name, version in sorted(versions.items()):
            try:
                response = session.get(f"{root}/pypi/{name}/json", timeout=SECONDS)
            except requests.RequestException as error:
                return Answers(answers.source, why=type(error).__name__)
            if response.status_code == 404:
                continue
            if not response.ok:
                return Answers(answers.source, why=f"it answers {response.status_code}")
            page = response.json()
            answers.source = (
                f"the package index's pages on newest releases, of {response.headers.get('Date', 'no date')}"
            )
            files = page["releases"].get(version, [])
            withdrawn = [f"{name} {version}: withdrawn: {f['yanked_reason']}" for f in files if f["yanked"]][:1]
            if page["info"]["version"] == version:
                valid = [v for v in page["vulnerabilities"] if not v["withdrawn"]]
                answers.findings[name] = withdrawn + [line(name, version, v, v["fixed_in"]) for v in valid]
            elif withdrawn:
                answers.findings[name] = withdrawn
    return answers


def main() -> int:
    versions = closure("onelaunch")
    findings: dict[str, list[str]] = {}
    for ask in (from_pip_audit, from_index):
        unknown = {name: version for name, version in versions.items() if name not in findings}
        if not unknown:
            break
        answers = ask(unknown | VULNERABLE).believed()
        findings |= answers.findings
        if answers.why:
            print(f"audit: nothing from {answers.source}: {answers.why}")
        else:
            print(f"audit: {len(answers.findings)} of {len(unknown)} dependencies are known to {answers.source}")
    found = [text for texts in findings.values() for text in texts]
    for text in found:
        print(f"audit: {text}")
    unknown_names = [f"{name} {version}" for name, version in sorted(versions.items()) if name not in findings]
    if not findings:
        print(f"audit: NOT DONE: no advisories could be had for the {len(versions)} dependencies")
    else:
        print(f"audit: {len(found)} known vulnerabilities; unknown: {', '.join(unknown_names) or 'none'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
