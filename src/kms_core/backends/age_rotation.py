"""Rotation of an age key: an identity is appended to the private file, then the recipient is replaced.

In this order, each by a rename and on the disk before the next step: a reader at any moment, or after a
crash or power cut in between, finds a recipient whose identity is there. Owner and mode of the files stay.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from kms_core.age import mlkem768x25519, x25519
from kms_core.payload.disk import sync_folder
from kms_protocol import small_files
from kms_protocol.errors import BackendUnavailable


def append_identity(private: Path, public: Path | None, *, post_quantum: bool) -> datetime:
    """Make an identity and use it from now on; the time is what its ``# created:`` line says.

    Raises BackendUnavailable if the files cannot be written: a read-only mount, a missing permission.
    """
    identity = mlkem768x25519.HybridIdentity.generate() if post_quantum else x25519.X25519Identity.generate()
    created = datetime.now(UTC).replace(microsecond=0)
    stamp = created.isoformat().replace("+00:00", "Z")
    try:
        with _alone(private.parent):
            before = small_files.text(private)
            gap = "" if before.endswith("\n") else "\n"
            block = f"# created: {stamp}\n# public key: {identity.recipient}\n{identity.export()}\n"
            _replace(private, before + gap + block)
            if public:
                _replace(public, f"{identity.recipient}\n")
    except OSError as exc:
        raise BackendUnavailable(
            f"Cannot rotate the age key: {exc.filename or private}: {exc.strerror}. "
            "Let the service write the key's directory, or add an identity by hand with `kms keygen`"
        ) from exc
    return created


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Of two processes that rotate at once, the second appends to what the first has written."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(path: Path, text: str) -> None:
    path = path.resolve(strict=True)
    old = path.stat()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with open(handle, "w", encoding="utf-8") as file:  # noqa: PTH123  # a handle, not a path
            if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(handle, old.st_uid, old.st_gid)
            os.fchmod(handle, old.st_mode & 0o777)
            file.write(text)
            file.flush()
            os.fsync(handle)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
