"""A signed document: its format, its verification, and changes of it by compare-and-set.

Two lines: a JSON object with the name, generation, write id and body of the document, and the HMAC-SHA-256
of that line in hexadecimal digits, under a key of the document's own.
"""

import hmac
import random
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import msgspec

from kms_core.documents.anchors import Anchor, Anchors
from kms_core.documents.storage import MOST_BYTES, Storage
from kms_protocol.errors import ConfigurationError, DocumentOutdated, InvalidRequest, Unavailable
from kms_protocol.wire import NOT_JSON

_VERSION: Final = 1
_EARLIER: Final = 16
_TRIES: Final = 30
_PAUSE_S: Final = 0.05
_AGAIN_S: Final = (0.1, 0.2, 0.4)
Edit = Callable[[bytes], bytes]
"""Makes the next body of a document, empty before the first; called again if others changed it."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A version of a document; generation 0 is one that does not exist. ``tag`` is that of its storage.

    ``earlier`` are the write ids of the versions before it, newest first.
    """

    generation: int = 0
    write_id: str = ""
    earlier: tuple[str, ...] = ()
    written_at: datetime | None = None
    body: bytes = b""
    tag: str = ""

    @property
    def anchor(self) -> Anchor:
        return Anchor(self.generation, self.write_id)


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    version: int = _VERSION
    name: str
    generation: int
    write_id: str
    earlier: tuple[str, ...]
    written_at: datetime | None
    body: msgspec.Raw


class SignedDocument:
    """One document. Raises as its storage, and ConfigurationError for one that is not signed here."""

    def __init__(self, name: str, storage: Storage, key: bytes, anchors: Anchors) -> None:
        self.name = name
        self.storage = storage
        self._key = key
        self._anchors = anchors

    def read(self, known: Version | None = None, *, follows: bool = False) -> Version:
        """Read the current version and compare it with the anchors. Returns ``known`` if it has not changed.

        ``follows``: the caller has read or written the document before, so no anchor is needed. A version
        that is older than an anchor may just have been replaced: it is read again for 0.7 s. Raises
        DocumentOutdated, as ``Anchors.accept``.
        """
        waits = iter(_AGAIN_S)
        while True:
            found = self.verified(known)
            try:
                self._anchors.accept(found.anchor, follows=follows)
            except DocumentOutdated:
                if (wait_s := next(waits, None)) is None:
                    raise
                time.sleep(wait_s)
            else:
                return found

    def write(self, before: Version, edit: Edit) -> Version:
        """Replace a version, or what others have written since, by an edited one.

        A lost answer is settled by the write ids that a later version names. Raises what ``edit`` raises;
        Unavailable if the outcome is unknown or others keep changing the document; InvalidRequest above
        4 MiB.
        """
        self.storage.check()
        mine: set[str] = set()
        for number in range(_TRIES):
            made = self._next(before, before.generation, edit(before.body))
            mine.add(made.write_id)
            try:
                is_written = self.storage.write(self.encode(made), before.tag)
            except Unavailable:
                is_written = False
            before = self.read(follows=True)
            if mine.intersection((before.write_id, *before.earlier)):
                return before
            if is_written:
                raise Unavailable(f"{self.storage} does not have what was written to it")
            time.sleep(random.uniform(0, _PAUSE_S * (number + 1)))  # noqa: S311 -- jitter, no secret
        raise Unavailable(f"{self.storage} is changed by others all the time, or takes no writes")

    def adopt(self, edit: Edit) -> Version:
        """Make what is in the storage the newest version, also if it is older than an anchor.

        Its generation becomes higher than each that this host or Redis has seen. Raises Unavailable if others
        change the document at the same time.
        """
        self.storage.check()
        before = self.verified()
        made = self._next(before, max(before.generation, self._anchors.highest()), edit(before.body))
        if not self.storage.write(self.encode(made), before.tag):
            raise Unavailable(f"{self.storage} was changed at the same time: try again")
        self._anchors.note(made.anchor)
        return made

    def encode(self, version: Version) -> bytes:
        """The bytes of a version in its storage."""
        line = msgspec.json.encode(
            _Line(
                name=self.name,
                generation=version.generation,
                write_id=version.write_id,
                earlier=version.earlier,
                written_at=version.written_at,
                body=msgspec.Raw(version.body),
            )
        )
        if len(line) > MOST_BYTES - 100:
            raise InvalidRequest(f"{self.storage} would have more than 4 MiB: remove what is not needed")
        return line + b"\n" + self._tag(line) + b"\n"

    def open(self, data: bytes, tag: str) -> Version:
        """The version in these bytes. Raises ConfigurationError if they are not signed for this document."""
        if not data:
            return Version()
        line, _, mac = data.partition(b"\n")
        if not hmac.compare_digest(mac.strip(), self._tag(line)):
            raise ConfigurationError(
                f"{self.storage} was changed by others, or written with another spool key than this host's"
            )
        try:
            found = msgspec.json.decode(line, type=_Line)
        except NOT_JSON as exc:
            raise ConfigurationError(f"{self.storage} was written by a later version") from exc
        if found.name != self.name or found.version != _VERSION:
            raise ConfigurationError(
                f"{self.storage} is another document, {found.name} and not {self.name}, or was written by a "
                "later version"
            )
        return Version(
            generation=found.generation,
            write_id=found.write_id,
            earlier=found.earlier,
            written_at=found.written_at,
            body=bytes(found.body),
            tag=tag,
        )

    def verified(self, known: Version | None = None) -> Version:
        """Read what is in the storage, which may be old: anchors are neither compared nor changed."""
        data, tag = self.storage.read(known.tag if known else "")
        if data is None and known:
            return known
        return self.open(data or b"", tag)

    def _next(self, before: Version, above: int, body: bytes) -> Version:
        earlier = (before.write_id, *before.earlier)[:_EARLIER] if before.write_id else ()
        return Version(
            generation=above + 1,
            write_id=secrets.token_hex(16),
            earlier=earlier,
            written_at=datetime.now(UTC).replace(microsecond=0),
            body=body,
        )

    def _tag(self, line: bytes) -> bytes:
        return hmac.digest(self._key, line, "sha256").hex().encode()
