"""Judges what ``pip-audit --format json`` says, on stdin: what was looked up, and what is known of it.

pip-audit passes over packages that its service does not know and still ends well, as it does behind a
registry that has packages and no advisories. Here nothing passes for checked that was not.
"""

import sys
from typing import Final

import msgspec

OK: Final = 0
VULNERABLE: Final = 1
UNCHECKED: Final = 75
"""Not one package was looked up: the service is out of reach (EX_TEMPFAIL of sysexits.h)."""


class Vulnerability(msgspec.Struct):
    """An advisory, and the versions that are without it."""

    id: str
    fix_versions: list[str] = []


class Dependency(msgspec.Struct):
    """A locked package; ``skip_reason`` if it was not looked up."""

    name: str
    version: str = ""
    vulns: list[Vulnerability] = []
    skip_reason: str = ""


class Audit(msgspec.Struct):
    """The report."""

    dependencies: list[Dependency]


def judge(report: bytes) -> tuple[int, list[str]]:
    """An exit code, and lines for people. Anything that is no report counts as unchecked."""
    try:
        found = msgspec.json.decode(report, type=Audit).dependencies
    except msgspec.DecodeError:
        found = []
    skipped = [each.name for each in found if each.skip_reason]
    if len(skipped) == len(found):
        return UNCHECKED, [
            "NOTHING WAS CHECKED for known vulnerabilities: the service does not answer from here"
        ]
    lines = [
        f"{each.name} {each.version}: {known.id}, mended in {_or_none(known.fix_versions)}"
        for each in found
        for known in each.vulns
    ]
    if skipped:
        lines.append(f"not checked, since the service does not know them: {', '.join(skipped)}")
    code = VULNERABLE if lines else OK
    return code, lines or [f"{len(found)} packages, no known vulnerability"]


def _or_none(versions: list[str]) -> str:
    return ", ".join(versions) or "no version yet"


def main() -> int:
    code, lines = judge(sys.stdin.buffer.read())
    sys.stderr.writelines(f"kms: supply chain: {line}\n" for line in lines)
    return code


if __name__ == "__main__":
    sys.exit(main())
