"""What ``kms doctor --json`` tells."""

import json
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class DoctorReport:
    """The lines of one run, and its exit code."""

    lines: list[dict[str, str]]
    exit_code: int

    def at(self, subject: str, level: str) -> str:
        """Text and next step of the one line about a subject with this level."""
        (found,) = self.all(subject, level)
        return found

    def all(self, subject: str, level: str) -> list[str]:
        """Texts and next steps of all lines about a subject with this level."""
        found = [line for line in self.lines if (line["subject"], line["level"]) == (subject, level)]
        return [f"{line['text']}: {line['next']}" for line in found]

    @property
    def failed(self) -> set[str]:
        return {line["subject"] for line in self.lines if line["level"] == "FAIL"}


def told_by(ran: subprocess.CompletedProcess[str]) -> DoctorReport:
    assert not ran.stderr
    return DoctorReport([json.loads(line) for line in ran.stdout.splitlines()], ran.returncode)
