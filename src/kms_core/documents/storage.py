"""Storage of documents: a file that processes of one host share, or an object that hosts share."""

import hashlib
from pathlib import Path
from typing import Final, TypeAlias

from kms_core import secure_files
from kms_core.s3.bucket import Bucket, If
from kms_core.s3.conditions import PROBE, PROBE_MARK, ignored_conditions
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError

MOST_BYTES: Final = 4 * 1024 * 1024


class FileStorage:
    """A file (0600) that processes of one host share, written under a lock.

    A tag names what is stored and changes with each write; it is empty if nothing does.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def read(self, unless: str = "") -> tuple[bytes | None, str]:
        """Read the content and its tag: ``(b"", "")`` if nothing is stored, ``(None, unless)`` for that tag.

        Raises OSError, also above 4 MiB.
        """
        try:
            data = small_files.read(self._path, MOST_BYTES)
        except FileNotFoundError:
            return b"", ""
        tag = hashlib.sha256(data).hexdigest()
        return None if tag == unless else data, tag

    def write(self, data: bytes, tag: str) -> bool:
        """Replace the content of this tag. Returns False, and writes nothing, if there is another.

        Raises as ``read``; the outcome is then unknown.
        """
        secure_files.make_folders(self._path.parent)
        with secure_files.lock(self._path.with_name(f"{self._path.name}.lock")):
            _, found = self.read()
            if found != tag:
                return False
            secure_files.write(self._path, data, locked=True)
            return True

    def check(self) -> None:
        """A file has a lock."""


class ObjectStorage:
    """An object, written with ``If-Match`` by its ETag, the first time with ``If-None-Match``."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.bucket = bucket
        self._key = key
        self._is_checked = False

    def __str__(self) -> str:
        return f"s3://{self.bucket.name}/{self._key}"

    def read(self, unless: str = "") -> tuple[bytes | None, str]:
        """As ``FileStorage.read``, but raises as ``Bucket``: PathRefused, Unavailable."""
        return self.bucket.get(self._key, unless)

    def write(self, data: bytes, tag: str) -> bool:
        """As ``FileStorage.write``."""
        return self.bucket.put(self._key, data, If(etag=tag) if tag else If(absent=True), "document")

    def check(self) -> None:
        """Try conditional writes that must fail, and one that must not, on an object beside the document.

        It stays, so that this needs no right to delete. Once for each process. Raises ConfigurationError if
        the bucket ignores conditions; others as ``write``.
        """
        if self._is_checked:
            return
        probe = f"{self._key}.probe"
        missing = ignored_conditions(self.bucket, probe, uploads=False)
        found = self.bucket.head(probe)  # whatever others put there
        known = If(etag=found.etag if found else "")
        if missing or not self.bucket.put(probe, PROBE, known, PROBE_MARK):
            raise ConfigurationError(
                f"{self}: this bucket ignores {' and '.join(missing) or 'the ETag'} on writes, so two hosts "
                "could overwrite each other's changes: use a store with conditional writes (docs/hosts.md)"
            )
        self._is_checked = True


Storage: TypeAlias = FileStorage | ObjectStorage
