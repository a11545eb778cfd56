"""The checks of ``kms doctor``, and the shape of what they find. Checks read and change nothing."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kms_protocol.errors import EXIT_CONFIGURATION, EXIT_UNAVAILABLE

Level = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``next`` is what to do about it.

    ``away``: a failure of a peer that does not answer, rather than of settings or files of this machine.
    """

    level: Level
    subject: str
    text: str
    next: str = ""
    away: bool = False


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 without failures, 78 if settings or files of this machine fail, 69 if only peers fail."""
    failed = [finding for finding in findings if finding.level == "FAIL"]
    if any(not finding.away for finding in failed):
        return EXIT_CONFIGURATION
    return EXIT_UNAVAILABLE if failed else 0
