"""Age keys in signed documents that hosts share: the sealed identities, and the recipient in use.

The body is a JSON object with the content of the two files of a key: ``sealed`` (base64) and ``recipient``.
Hosts read it from their copies. A rotation adds an identity by compare-and-set, and has it used once all
hosts read it.
"""

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from kms_core.age.header import is_age_file
from kms_core.age.recipients import identities_of, parse_identity
from kms_core.backends.key_files import appended
from kms_core.documents.document import Edit, SignedDocument, Version
from kms_core.documents.local_copy import LocalCopy
from kms_core.documents.storage import FileStorage
from kms_core.envelope.sealed_files import FileSealer, SealedFiles, root_of
from kms_core.key_source import StoredKeys
from kms_core.secure_files import in_shell
from kms_protocol.errors import (
    BackendUnavailable,
    ConfigurationError,
    KmsError,
    TooManyVersions,
    Unavailable,
)

INFO: Final = b"kms-service/document/1/keys"
PUBLISH_S: Final = 5.0
"""Twice the time in which all hosts read a change (s): a poll, and two looks of half a second."""
_AGAIN_S: Final = 1.0


class KeyBody(msgspec.Struct, frozen=True):
    """The body of a document: the sealed identities, and the recipient in use."""

    sealed: bytes
    recipient: str


class KeyDocument:
    """The identities of one Age key, as ``KeySource``.

    The service reads this host's copy, which its processes poll. Another program reads the document itself,
    without its anchors, if no service polls.
    """

    publish_s = PUBLISH_S

    def __init__(
        self,
        name: str,
        document: SignedDocument,
        copy: LocalCopy,
        sealer: FileSealer,
        opened: SealedFiles | None = None,
    ) -> None:
        """``opened``: what a parent process has opened; None if this process asks the root itself."""
        self.name, self.document, self.copy = name, document, copy
        storage = str(document.storage)
        self.private: Path | str = Path(storage) if isinstance(document.storage, FileStorage) else storage
        """The path of a file, which is of one host, or the URL of an object."""
        self.public = self.private
        self._sealer, self._opened = sealer, opened
        self._held, self._read_at = Version(), float("-inf")

    @property
    def is_late(self) -> bool:
        return self.copy.is_late

    def stamp(self) -> object:
        return self._version().anchor

    def read(self) -> StoredKeys:
        version = self._version()
        body = self.body_of(version.body)
        try:
            content = (self._opened or self._sealer).open(self.name, body.sealed)
        except ConfigurationError as exc:
            raise ConfigurationError(f"The key in {self.private} cannot be opened: {exc.detail}") from exc
        return StoredKeys(version.anchor, content, body.recipient.encode())

    def sealed(self) -> bytes:
        """The sealed identities in the copy of this host. Raises Unavailable, ConfigurationError."""
        return self.body_of(self.copy.current().body).sealed

    def add(self, block: bytes) -> bool:
        """Seal the identities of the newest version again with ``block``, and again if others add some."""

        def edit(body: bytes) -> bytes:
            before = self.body_of(body)
            content = appended(self._sealer.open(self.name, before.sealed), block)
            sealed = self._sealer.seal_again(self.name, content, before.sealed)
            return msgspec.json.encode(KeyBody(sealed, before.recipient))

        self._write(edit)
        return True

    def use(self, recipient: str) -> None:
        def edit(body: bytes) -> bytes:
            before = self.body_of(body)
            if f"# public key: {recipient}\n".encode() not in self._sealer.open(self.name, before.sealed):
                raise BackendUnavailable("the new identity was removed by others at the same time")
            return msgspec.json.encode(KeyBody(before.sealed, recipient))

        self._write(edit)

    def behind(self, stamp: object) -> str:
        """A version is used ``publish_s`` after it was added, so a document read since then has it."""
        if self._opened is not None and self.copy.age_s >= PUBLISH_S:
            return f"{self.private} was not read for {PUBLISH_S:.0f} s, and may have this version of the key"
        if self._version().anchor != stamp:
            return f"{self.private} has a new version, which is not open on this host yet"
        return ""

    def body_of(self, body: bytes) -> KeyBody:
        """Raises ConfigurationError for one that is missing, not sealed, or of a later version."""
        if not body:
            raise ConfigurationError(
                f"{self.private} does not exist: make it with `kms keygen --sealed-by KEY --for {self.name} "
                f"-o {in_shell(self.private)}`, or from key files: `kms keys adopt {self.name} --from FILE`"
            )
        try:
            found = msgspec.json.decode(body, type=KeyBody)
        except msgspec.MsgspecError as exc:
            raise ConfigurationError(f"{self.private} has no key, or was written by a later version") from exc
        if not is_age_file(found.sealed):
            raise ConfigurationError(f"{self.private} has a plain key, which no document may hold")
        return found

    # -- for commands -------------------------------------------------------------------------------------

    def make(self, content: bytes, root_id: str | None) -> bool:
        """Write the first version: the identities in ``content``, sealed, with the last one in use.

        ``root_id`` is that of ``FileSealer.seal``. Returns False if the document exists or another process
        writes it first. Raises as ``FileSealer.seal`` and ``SignedDocument.write``.
        """
        made = msgspec.json.encode(
            KeyBody(self._sealer.seal(self.name, content, root_id), self._recipients(content)[-1])
        )
        before = self.document.read()
        if before.generation:
            return False
        return self.document.write(before, lambda body: body or made).body == made

    def adopt(self, files: Iterable[bytes]) -> int:
        """Make what is in the storage the newest version, with all identities that are known.

        Those are in the document, in this host's copy and in sealed key ``files``. Returns their number.
        Raises as ``SignedDocument.adopt`` and ``FileSealer.seal``.
        """
        newest, taken, number = Version(), list(files), 0
        try:
            newest = self.document.read()
        except Unavailable:
            with suppress(Unavailable):
                newest = self.copy.current()

        def edit(body: bytes) -> bytes:
            nonlocal number
            bodies = [self.body_of(each) for each in (newest.body, body) if each]
            sealed = [*(each.sealed for each in bodies), *taken]
            if not sealed:
                self.body_of(b"")
            content = b""
            for each in sealed:
                if not is_age_file(each):
                    raise ConfigurationError(
                        "A plain key file, which no document may hold: seal it with `kms keygen "
                        f"--sealed-by KEY --for {self.name} --from FILE -o {in_shell(self.private)}`"
                    )
                content = _merged(content, self._sealer.open(self.name, each))
            number = len(self._recipients(content))
            recipient = bodies[0].recipient if bodies else self._recipients(content)[-1]
            again = self._sealer.seal(self.name, content, root_of(sealed[0]))
            return msgspec.json.encode(KeyBody(again, recipient))

        self.document.adopt(edit)
        return number

    def _recipients(self, content: bytes) -> list[str]:
        """The recipients of identities. Raises ConfigurationError if there are none."""
        found = identities_of(content, self.private, parse_identity, remedy="add one")
        return [str(identity.recipient) for identity, _ in found]

    def _version(self) -> Version:
        """Raises BackendUnavailable."""
        try:
            if self._opened is not None or not self.copy.is_late:
                return self.copy.current()
            if time.monotonic() - self._read_at >= _AGAIN_S:
                self._held = self._from_storage()
                self._read_at = time.monotonic()
        except (Unavailable, OSError) as exc:
            raise BackendUnavailable(f"The key {self.name} is in {self.private}: {exc}") from exc
        return self._held

    def _from_storage(self) -> Version:
        try:
            return self.document.verified(self._held if self._held.generation else None)
        except (Unavailable, OSError):
            with suppress(Unavailable):
                return self.copy.current()
            raise

    def _write(self, edit: Edit) -> None:
        try:
            self.document.write(self.document.read(), edit)
        except TooManyVersions:
            raise
        except (KmsError, OSError) as exc:
            raise BackendUnavailable(f"The key in {self.private} was not changed: {exc}") from exc
        with suppress(Unavailable):  # else the next poll reads it
            self.copy.reread()


def _merged(first: bytes, second: bytes) -> bytes:
    """The lines of both, where those of an identity that ``first`` has are left out of ``second``."""
    known, pending, found = set(first.splitlines()), list[bytes](), [first.rstrip(b"\n")] if first else []
    for line in second.splitlines():
        pending.append(line)
        if line.startswith(b"#") or line in known:
            pending = pending if line.startswith(b"#") else []
            continue
        found += pending
        pending = []
    return b"\n".join(found) + b"\n"
