"""Second places: where checkpoints are anchored and copies of lines go. None of them holds up a record."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol, cast

import redis

from kms_core.audit import chain
from kms_core.errors import AuditUnavailable

COPIES: Final = "kms:audit:lines"
ANCHORS: Final = "kms:audit:anchors"
_MOST_LINES: Final = 1_000_000
_MOST_ANCHORS: Final = 100_000
_FIELD: Final = "line"
_SUFFIX: Final = ".anchors.jsonl"


class Place(Protocol):
    """Takes lines (each with its newline), in order. ``name`` is a label of metrics."""

    name: str

    def put(self, lines: Sequence[bytes]) -> None:
        """Raises OSError or AuditUnavailable if they may not be there; they are then put again."""


class RedisStream:
    """A stream of bounded length: the oldest entries go."""

    name = "redis"

    def __init__(self, client: redis.Redis, key: str) -> None:
        self._client = client
        self._key = key
        self._most = _MOST_ANCHORS if key == ANCHORS else _MOST_LINES

    def put(self, lines: Sequence[bytes]) -> None:
        try:
            with self._client.pipeline(transaction=False) as pipe:
                for line in lines:
                    pipe.xadd(self._key, {_FIELD: line.rstrip(b"\n")}, maxlen=self._most, approximate=True)
                pipe.execute()
        except redis.RedisError as exc:
            raise AuditUnavailable from exc

    def lines(self) -> list[bytes]:
        """All that is there. Raises AuditUnavailable."""
        try:
            entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", self._client.xrange(self._key))
        except redis.RedisError as exc:
            raise AuditUnavailable("Redis does not answer, so its anchors cannot be compared") from exc
        return [fields.get(_FIELD.encode(), b"") for _, fields in entries]


class Folder:
    """A second directory, best on another disk or host: a file for each chain, synced."""

    name = "directory"

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, lines: Sequence[bytes]) -> None:
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for line in lines:
            found = chain.read(line.rstrip(b"\n"))
            if found is None:
                continue
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self._path / f"{found.chain}{_SUFFIX}", flags, 0o600)
            try:
                os.write(fd, line)
                os.fdatasync(fd)
            finally:
                os.close(fd)


class Stdout:
    """The standard output of this process, for collectors that read it."""

    name = "stdout"

    def put(self, lines: Sequence[bytes]) -> None:
        rest = memoryview(b"".join(lines))
        while rest:
            rest = rest[os.write(1, rest) :]


def read_lines(path: Path) -> list[bytes]:
    """The lines of a file, or of all files of a directory. Raises OSError."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [line for file in files for line in file.read_bytes().split(b"\n") if line]
