"""A workspace for tests of ``kms migrate``: a folder, a running service, and the command as a process."""

import base64
import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kms_client import Client
from support.cli import fixtures
from support.cli.fixtures import RunningService

Json = dict[str, Any]
Ran = subprocess.CompletedProcess[bytes]


@dataclass(frozen=True)
class Workspace:
    """Where a test works."""

    folder: Path
    place: RunningService

    def kms(self, *words: str, given: bytes = b"", env: Mapping[str, str] | None = None) -> Ran:
        variables = {"KMS_SERVICE_URL": self.place.url, **(env or {})}
        return fixtures.kms(self.folder, *words, given=given, **variables)

    def write(self, name: str, lines: Iterable[object]) -> str:
        """A file of lines, each bytes, text or JSON."""
        texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
        data = [text if isinstance(text, bytes) else str(text).encode() for text in texts]
        (self.folder / name).write_bytes(b"".join(line + b"\n" for line in data))
        return name

    def records(self, name: str) -> list[Json]:
        return [json.loads(line) for line in (self.folder / name).read_bytes().splitlines()]

    def opened(self, record: Json, context: str | dict[str, str] | None = None) -> bytes:
        """What the service makes of a record."""
        with Client(self.place.url) as client:
            return client.decrypt(base64.b64decode(record["ciphertext"]), context=context).plaintext


def report(done: Ran) -> dict[str, int]:
    """The counts on stdout."""
    counts: dict[str, int] = json.loads(done.stdout)
    return counts
