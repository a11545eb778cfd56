"""Anchors of a document: the highest generation that was seen, by a host and by all.

An older document that is put back, in a bucket or from a backup, would revive what was revoked. So the
highest generation that was seen is kept: by each host in its state directory, and by all in Redis.
"""

import hmac
from pathlib import Path
from typing import Any, Final

import msgspec
import redis
import structlog

from kms_core import secure_files
from kms_protocol import small_files
from kms_protocol.errors import DocumentOutdated, Unavailable

_PREFIX: Final = "kms:document:"
_ANCHOR_BYTES: Final = 4096
_log = structlog.get_logger(__name__)


class Anchor(msgspec.Struct, frozen=True, order=True):
    """A version of a document: generations count from 1, and each has one write id."""

    generation: int = 0
    write_id: str = ""


class Anchors:
    """The two anchors of one document. An entry in Redis without a valid MAC counts as none."""

    def __init__(
        self,
        name: str,
        folder: Path,
        client: redis.Redis | None,
        key: bytes,
        adopt: str = "kms token adopt",
    ) -> None:
        """``client`` None: Redis cannot be asked, which is so for some commands.

        ``adopt`` is the command that makes what is in the storage the newest version.
        """
        self._name, self._key, self._adopt = name, key, adopt
        self._path = folder / f"{name}.anchor"
        self._client = client

    def accept(self, found: Anchor, *, follows: bool = False) -> None:
        """Note a version that was read or written. ``follows``: it came after one that was accepted.

        Raises DocumentOutdated for one that is older than an anchor, another one of the same generation, or,
        without any anchor, one that may be an old one unless it ``follows``; Unavailable if this host has no
        anchor and Redis does not answer; OSError.
        """
        local, shared, is_away = self._local(), None, False
        try:
            shared = self._shared()
        except redis.RedisError as exc:
            is_away = True
            if local is None:
                raise Unavailable(
                    f"Redis does not answer, and this host has not seen the document {self._name} before"
                ) from exc
        known = [anchor for anchor in (local, shared) if anchor]
        if found.generation and not known and not follows:
            raise DocumentOutdated(
                f"Neither this host nor Redis has seen the document {self._name} before, so an old one "
                f"cannot be told from the newest: run `{self._adopt}` once if it is the right one"
            )
        newer = [one for one in known if found < one or (found > one and found.generation == one.generation)]
        if newer:
            raise DocumentOutdated(
                f"The document {self._name} has generation {found.generation}, and another one, of "
                f"generation {max(newer).generation}, was seen before: put that back, or run `{self._adopt}` "
                "to go on with this one (docs/hosts.md says what is lost)"
            )
        if (local or Anchor()) < found:
            self._note_here(found)
        if not is_away and (shared or Anchor()) < found:
            self._note_for_all(found)

    def highest(self) -> int:
        """The highest generation of both anchors, as far as they can be read. Raises OSError."""
        try:
            shared = self._shared()
        except redis.RedisError:
            shared = None
        return max(self._local() or Anchor(), shared or Anchor()).generation

    def note(self, found: Anchor) -> None:
        """Raise both anchors to a version. Raises OSError; an error of Redis is logged."""
        self._note_here(found)
        self._note_for_all(found)

    def _note_here(self, found: Anchor) -> None:
        secure_files.make_folders(self._path.parent)
        secure_files.write(self._path, msgspec.json.encode(found))

    def _note_for_all(self, found: Anchor) -> None:
        if self._client:
            try:
                self._client.transaction(lambda pipe: self._raise_shared(pipe, found), self._redis_key)
            except redis.RedisError as exc:
                _log.warning("document.not_anchored", document=self._name, error=type(exc).__name__)

    @property
    def _redis_key(self) -> str:
        return f"{_PREFIX}{self._name}"

    def _local(self) -> Anchor | None:
        try:
            return msgspec.json.decode(small_files.read(self._path, _ANCHOR_BYTES), type=Anchor)
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, ValueError) as exc:
            raise OSError(f"{self._path} is no anchor of a document: put it back from a backup") from exc

    def _shared(self) -> Anchor | None:
        """Raises redis.RedisError, also without a client."""
        if self._client is None:
            raise redis.ConnectionError("no client")
        return self._opened(self._client.get(self._redis_key))

    def _opened(self, raw: Any) -> Anchor | None:  # noqa: ANN401 -- redis-py has one type for async clients too
        tag, _, body = (raw or b"").partition(b" ")
        if not hmac.compare_digest(tag, self._tag(body)):
            return None
        return msgspec.json.decode(body, type=Anchor)

    def _raise_shared(self, pipe: Any, found: Anchor) -> None:  # noqa: ANN401 -- as above
        """In a transaction: no other host has written in between."""
        before = self._opened(pipe.get(self._redis_key))
        pipe.multi()
        if before is None or before < found:
            body = msgspec.json.encode(found)
            pipe.set(self._redis_key, self._tag(body) + b" " + body)

    def _tag(self, body: bytes) -> bytes:
        return hmac.digest(self._key, b"anchor " + body, "sha256").hex().encode()
