"""Where moved ciphertexts go: lines of JSON, or a file each; and which of them are there already."""

import fcntl
import os
import re
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import msgspec

from kms_cli.atomic_file import placed
from kms_protocol.errors import Conflict, InvalidRequest

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
SUFFIX: Final = ".age"


class MovedRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One ciphertext that was moved. ``source`` is the SHA-256 of the line that it was."""

    line: int
    reference: str | None = None
    source: str
    ciphertext: bytes  # msgspec writes and reads bytes as base64
    key_id: str
    key_version: str


class _Done(msgspec.Struct):
    source: str


class Output(Protocol):
    """Where records go."""

    def has(self, name: str, source: str) -> bool:
        """Whether this one is there from an earlier run. Raises InvalidRequest for a name that cannot be."""

    def put(self, name: str, record: MovedRecord) -> None:
        """Keep one."""

    def flush(self) -> None:
        """Make sure that what was put stays."""


class Lines:
    """One line of JSON for each record."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._done: set[str] = set()

    @classmethod
    def continued(cls, path: Path) -> "Lines":
        """A file that may hold the beginning. Raises Conflict while another run writes it, InvalidRequest."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        file = os.fdopen(handle, "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            file.close()
            raise Conflict(f"Another run writes {path}") from exc
        lines = cls(file)
        lines._take_up(path)
        return lines

    def has(self, name: str, source: str) -> bool:
        del name
        return source in self._done

    def put(self, name: str, record: MovedRecord) -> None:
        del name
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._done.add(record.source)

    def flush(self) -> None:
        self._file.flush()
        if self._file.seekable():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _take_up(self, path: Path) -> None:
        """Remember what is there; a line that was cut when the last run ended is taken away."""
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                self._done.add(msgspec.json.decode(line, type=_Done).source)
            except msgspec.DecodeError as exc:
                raise InvalidRequest(
                    f"Line {number} of {path} is not one of this command: name another"
                ) from exc
            whole += len(line)
        self._file.seek(whole)
        self._file.truncate()


class OutputFolder:
    """A file for each record, named by its reference, else by the number of its line."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, name: str, source: str) -> bool:
        del source
        return self._path(name).exists()

    def put(self, name: str, record: MovedRecord) -> None:
        with placed(self._path(name), overwrite=False) as file:
            file.write(record.ciphertext)

    def flush(self) -> None:
        """Each file is complete and on disk when it appears."""

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InvalidRequest("A reference that is to name a file has letters, digits and _ . - alone")
        return self._folder / f"{name}{SUFFIX}"
