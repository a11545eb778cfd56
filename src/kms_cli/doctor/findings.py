"""One line of ``kms doctor``, and what exit code a failure ends with. Knows nothing of what is checked."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kms_protocol.errors import EXIT_CONFIGURATION, EXIT_UNAVAILABLE

Level = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``next`` says what to do, where something is to be done.

    ``away``: something that should answer does not; else a failure is one of settings or files here.
    """

    level: Level
    subject: str
    text: str
    next: str = ""
    away: bool = False


def exit_code(findings: Iterable[Finding]) -> int:
    """0 if nothing fails, 78 if settings or files here are wrong, 69 if what fails is only away."""
    failed = [finding for finding in findings if finding.level == "FAIL"]
    if any(not finding.away for finding in failed):
        return EXIT_CONFIGURATION
    return EXIT_UNAVAILABLE if failed else 0
