"""API tokens: a file of their digests, read again when it changes, and the changes that commands make to it.

A token is ``kms_<id>_<secret>``: an id of 10 characters, which names it in the audit trail, and 256 random
bits. The file holds SHA-256 of the whole text: of so much randomness nothing slower is needed.
"""

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
from base64 import b32encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec
import structlog

from kms_core.durable import sync_folder
from kms_core.secure_files import is_open
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError, Conflict, Missing, Unauthenticated, Unavailable
from kms_protocol.wire import NOT_JSON

PREFIX: Final = "kms_"
REFUSED: Final = "The credential is unknown, was revoked, or is not for this service"
TEXT: Final = re.compile(r"kms_([a-z2-7]{10})_[A-Za-z0-9_-]{43}")
NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,80}")
_ID_BYTES: Final = 6
_SECRET_BYTES: Final = 32
_NOBODY: Final = bytes(32)
_MOST_BYTES: Final = 64 * 1024 * 1024
_WRITABLE: Final = 0o022
_OPEN_TO_ALL: Final = 0o007
_log = structlog.get_logger(__name__)


class Digest(msgspec.Struct, frozen=True, kw_only=True):
    """SHA-256 (32 bytes) of a token's text; an old one of a rotated token is valid ``until``."""

    sha256: bytes
    until: datetime | None = None


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """One token as it rests: everything but its text."""

    id: str
    name: str
    tenant: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None = None
    digests: tuple[Digest, ...]

    def has_expired(self, now: datetime) -> bool:
        return self.expires_at is not None and now >= self.expires_at


class _File(msgspec.Struct, frozen=True, kw_only=True):
    version: int = 1
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class _Read:
    """The content of the file at one moment; ``stamp`` None means that there is no file."""

    stamp: tuple[int, ...] | None
    tokens: Mapping[str, Token] = field(default_factory=dict, repr=False)
    tenants: frozenset[str] = frozenset()


class TokenFile:
    """The reading side. A file that is not there holds no tokens; one that cannot be read lets nobody in."""

    def __init__(self, path: Path, *, strict: bool = False) -> None:
        """``strict``: a file that every user may read is refused, not only told of."""
        self._path = path
        self._name = str(path)
        self._strict = strict
        self._read = _Read(())

    def holder(self, text: str) -> Token:
        """Whose token this is. Raises Unauthenticated, and Unavailable if the file cannot be read."""
        match = TEXT.fullmatch(text)
        if match is None:
            raise Unauthenticated(REFUSED, reason="malformed")
        token, now = self._fresh().tokens.get(match[1]), datetime.now(UTC)
        digest = hashlib.sha256(text.encode("ascii")).digest()
        known = token.digests if token else (Digest(sha256=_NOBODY),)
        fits = [hmac.compare_digest(digest, one.sha256) and _is_current(one, now) for one in known]
        if token is None or not any(fits):
            raise Unauthenticated(REFUSED, reason="unknown")
        if token.has_expired(now):  # told to nobody but its holder
            raise Unauthenticated("This token has expired: ask for a new one", reason="expired")
        return token

    def by_id(self, token_id: str) -> Token | None:
        """The token of this id, if it is valid now. Raises Unavailable, also where there is no file."""
        found = self._fresh()
        if found.stamp is None:  # of whoever had a token, this must not be taken as a refusal
            raise Unavailable(f"There is no token file {self._path}")
        token = found.tokens.get(token_id)
        return None if token is None or token.has_expired(datetime.now(UTC)) else token

    def tenants(self) -> frozenset[str]:
        """Those that have a token, valid or not. Raises Unavailable if the file cannot be read."""
        return self._fresh().tenants

    def _fresh(self) -> _Read:
        """The tokens now: looking at the file costs a microsecond."""
        try:
            found = os.stat(self._name)  # noqa: PTH116 -- with each call, and a Path takes half as long again
            stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if stamp != self._read.stamp:
                self._check(found)
                all_tokens = read(self._path)
                tenants = frozenset(token.tenant for token in all_tokens)
                self._read = self._changed(_Read(stamp, {token.id: token for token in all_tokens}, tenants))
        except FileNotFoundError:
            self._read = _Read(None)
        except (OSError, ConfigurationError) as exc:
            _log.error("tokens.unreadable", path=str(self._path), reason=_reason(exc))
            raise Unavailable("The token file cannot be read; the service's log says why") from exc
        return self._read

    def _changed(self, now: _Read) -> _Read:
        """Tell the log who came and who went: ids are no secrets."""
        before, after = self._read.tokens.keys(), now.tokens.keys()
        _log.info("tokens.read", tokens=len(after), new=sorted(after - before), gone=sorted(before - after))
        return now

    def _check(self, found: os.stat_result) -> None:
        """Whoever can write the file can let himself in."""
        mode = stat.S_IMODE(found.st_mode)
        if found.st_uid not in {os.geteuid(), 0} or mode & _WRITABLE:
            raise ConfigurationError("others may write it: it must be the service's own, with mode 0600")
        if self._strict and mode & _OPEN_TO_ALL:
            raise ConfigurationError("every user may read it: run chmod 600 on it")
        if is_open(found, os.geteuid()):
            _log.warning("tokens.open_to_others", path=str(self._path), mode=f"{mode:04o}")


def read(path: Path) -> tuple[Token, ...]:
    """Every token of the file, valid or not. Raises OSError; ConfigurationError if it is none of ours."""
    try:
        file = msgspec.json.decode(small_files.read(path, _MOST_BYTES), type=_File)
    except NOT_JSON as exc:
        raise ConfigurationError(f"{path} is not a file that kms token wrote") from exc
    if file.version != 1:
        raise ConfigurationError(f"{path} is of a later version")
    return file.tokens


# -- changes, by the command ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What a new token shall be. ``ttl`` None means that it does not expire."""

    name: str
    tenant: str
    scopes: Sequence[str]
    ttl: timedelta | None


Witness = Callable[
    [Token], AbstractContextManager[object]
]  # entered around the moment at which a file changes


def _unseen(token: Token) -> AbstractContextManager[object]:
    del token
    return nullcontext()


def create(path: Path, wish: TokenRequest, witness: Witness = _unseen) -> tuple[Token, str]:
    """A new token and its text, which is nowhere afterwards. Raises Conflict if the tenant has the name."""
    with _changing(path) as draft:
        tokens, now = draft.tokens, _now()
        if any((token.name, token.tenant) == (wish.name, wish.tenant) for token in tokens):
            raise Conflict(
                f"Tenant {wish.tenant} has a token {wish.name}: rotate or revoke it, or name another"
            )
        token_id = b32encode(os.urandom(_ID_BYTES)).decode("ascii").lower().rstrip("=")
        text, digest = _new_text(token_id)
        token = Token(
            id=token_id,
            name=wish.name,
            tenant=wish.tenant,
            scopes=tuple(wish.scopes),
            created_at=now,
            expires_at=None if wish.ttl is None else now + wish.ttl,
            digests=(digest,),
        )
        tokens.append(token)
        draft.save(token, witness)
        return token, text


def rotate(
    path: Path, which: str, overlap: timedelta, ttl: timedelta | None, witness: Witness = _unseen
) -> tuple[Token, str]:
    """A new text for the same token; the old one is valid for ``overlap``. ``ttl`` None keeps the term."""
    with _changing(path) as draft:
        tokens, now = draft.tokens, _now()
        at = _index(tokens, which)
        old = tokens[at]
        text, digest = _new_text(old.id)
        kept = tuple(
            Digest(sha256=one.sha256, until=min(one.until or now + overlap, now + overlap))
            for one in old.digests
            if overlap and _is_current(one, now)
        )
        expires_at = old.expires_at if ttl is None else now + ttl
        tokens[at] = msgspec.structs.replace(old, digests=(digest, *kept), expires_at=expires_at)
        draft.save(tokens[at], witness)
        return tokens[at], text


def revoke(path: Path, which: str, witness: Witness = _unseen) -> Token:
    """Take a token out: no call and no job of its begins afterwards. Raises Missing."""
    with _changing(path) as draft:
        token = draft.tokens.pop(_index(draft.tokens, which))
        draft.save(token, witness)
        return token


def _index(tokens: Sequence[Token], which: str) -> int:
    """By id, or by a name that one tenant has."""
    found = [
        at
        for at, token in enumerate(tokens)
        if which in {token.id, token.name, f"{token.tenant}/{token.name}"}
    ]
    if len(found) > 1:
        raise Conflict(f"Several tenants have a token {which}: name it by its id, or as tenant/name")
    if not found:
        raise Missing(f"No token is called {which}; kms token list shows them")
    return found[0]


def _new_text(token_id: str) -> tuple[str, Digest]:
    text = f"{PREFIX}{token_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    return text, Digest(sha256=hashlib.sha256(text.encode("ascii")).digest())


def _is_current(digest: Digest, now: datetime) -> bool:
    return digest.until is None or now < digest.until


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _reason(exc: Exception) -> str:
    return str(exc.strerror if isinstance(exc, OSError) else exc)


@dataclass(frozen=True, slots=True)
class _Draft:
    """The tokens of a file, to be changed in place, and then saved: whole or not at all."""

    path: Path
    tokens: list[Token]

    def save(self, token: Token, witness: Witness) -> None:
        """``token`` is the one that has changed."""
        data = msgspec.json.format(msgspec.json.encode(_File(tokens=tuple(self.tokens)))) + b"\n"
        with witness(token):
            _write(self.path, data)


@contextmanager
def _changing(path: Path) -> Iterator[_Draft]:
    """One command at a time."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield _Draft(path, list(read(path)) if path.exists() else [])
    finally:
        os.close(lock)


def _write(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` (0600) durably. The lock is held, so the temporary name is ours alone."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a command that was killed
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(handle, "wb") as file:  # noqa: PTH123 -- a handle, not a path
        file.write(data)
        file.flush()
        os.fsync(handle)
    temporary.replace(path)
    sync_folder(path.parent)
