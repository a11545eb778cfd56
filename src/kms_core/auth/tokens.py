"""API tokens: authentication by their digests, the file that has these, and changes that commands make.

A token is ``kms_<id>_<secret>``: an id of 10 characters, which names it in the audit log, and 256 random
bits. The file has the SHA-256 of the whole text: random secrets of this size need no slow hash.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
from base64 import b32encode
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal, Self, TypeAlias

import msgspec
import structlog

from kms_core import secure_files
from kms_core.documents.document import SignedDocument, Version
from kms_core.documents.local_copy import LocalCopy
from kms_core.reload import SMALL_BYTES, reason_of, stamp_of_stat
from kms_core.secure_files import OTHERS, is_open
from kms_core.settings.model import Settings
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
_UNKNOWN: Final = "unknown"
_MOST_BYTES: Final = 64 * 1024 * 1024
_WRITABLE: Final = 0o022
NONE: Final = b"{}"
"""The body of a signed document before its first version."""
Where: TypeAlias = Path | SignedDocument
"""The token file, or the signed document that has the tokens."""
DOCUMENT_NAME: Final = "tokens"
DOCUMENT_INFO: Final = b"kms-service/document/1/tokens"
_log = structlog.get_logger(__name__)


class Digest(msgspec.Struct, frozen=True, kw_only=True):
    """SHA-256 (32 bytes) of a token's text; the old text of a rotated token is valid ``until`` a time."""

    sha256: bytes
    until: datetime | None = None


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A token without its text."""

    id: str
    name: str
    tenant: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None = None
    digests: tuple[Digest, ...]

    def has_expired(self, now: datetime) -> bool:
        return self.expires_at is not None and now >= self.expires_at

    def is_named(self, which: str) -> bool:
        """Return whether ``which`` is the id, the name or tenant/name of this token."""
        return which in {self.id, self.name, f"{self.tenant}/{self.name}"}


@dataclass(frozen=True, slots=True)
class KnownTokens:
    """The tokens as read last; ``stamp`` is None if their file does not exist.

    ``revoked`` are ids of tokens that a signed document had.
    """

    stamp: tuple[int, ...] | None
    tokens: Mapping[str, Token] = field(default_factory=dict, repr=False)
    tenants: frozenset[str] = frozenset()
    revoked: frozenset[str] = frozenset()

    @classmethod
    def of(cls, stamp: tuple[int, ...], body: "TokensBody") -> Self:
        revoked = frozenset(one.id for one in body.revoked)
        tokens = {token.id: token for token in body.tokens if token.id not in revoked}
        return cls(stamp, tokens, frozenset(token.tenant for token in tokens.values()), revoked)


class UnknownToken(Unauthenticated):
    """A token that is not known here. ``look_up`` looks for it where it may be known.

    ``look_up`` blocks for seconds, and raises Unavailable or Unauthenticated. Look-ups at one ``source`` may
    wait for each other.
    """

    def __init__(self, look_up: Callable[[], None], source: object) -> None:
        super().__init__(REFUSED, reason=_UNKNOWN)
        self.look_up, self.source = look_up, source


class Tokens:
    """Authenticates by tokens, wherever they are held."""

    def _fresh(self) -> KnownTokens:
        """The current tokens. Raises Unavailable."""
        raise NotImplementedError

    def is_current(self) -> bool:
        """True if changes by other processes are seen."""
        return True

    def authenticate(self, text: str) -> Token:
        """The token with this text. Raises Unauthenticated; Unavailable if the tokens cannot be read."""
        match = TEXT.fullmatch(text)
        if match is None:
            raise Unauthenticated(REFUSED, reason="malformed")
        return self.of_digest(match[1], hashlib.sha256(text.encode("ascii")).digest())

    def of_digest(self, token_id: str, digest: bytes) -> Token:
        """The token of this id whose text has this SHA-256. Raises as ``authenticate``."""
        token, now = self._fresh().tokens.get(token_id), datetime.now(UTC)
        known = token.digests if token else (Digest(sha256=_NOBODY),)
        fits = [hmac.compare_digest(digest, one.sha256) and _is_current(one, now) for one in known]
        if token is None or not any(fits):
            raise Unauthenticated(REFUSED, reason=_UNKNOWN)
        if token.has_expired(now):  # only its holder may know
            raise Unauthenticated("This token has expired: ask for a new one", reason="expired")
        return token

    def by_id(self, token_id: str) -> Token | None:
        """The token of this id, if it is valid now. Raises Unavailable, also without a file."""
        found = self._fresh()
        if found.stamp is None:  # which must not end the jobs of existing tokens
            raise Unavailable("The token file does not exist")
        token = found.tokens.get(token_id)
        return None if token is None or token.has_expired(datetime.now(UTC)) else token

    def tenants(self) -> frozenset[str]:
        """The tenants with a token, valid or not. Raises Unavailable if the tokens cannot be read."""
        return self._fresh().tenants


class TokenFile(Tokens):
    """Reads the token file, again when it changes. A missing file has no tokens; an unreadable one fails.

    While a thread reads a file above 256 KiB again, callers get the tokens of before.
    """

    def __init__(self, path: Path, *, strict: bool = False) -> None:
        """``strict``: a file that every user may read is an error, not only a warning."""
        self._path = path
        self._name = str(path)
        self._strict = strict
        self._read = KnownTokens(())
        self._reader = ThreadPoolExecutor(1, "tokens")
        self._reading: Future[KnownTokens] | None = None

    def _fresh(self) -> KnownTokens:
        """The current tokens; a stat of the file for each call costs a microsecond."""
        known = self._read
        try:
            found = os.stat(self._name)  # noqa: PTH116 -- for each call: a Path takes half as long again
            stamp = stamp_of_stat(found)
            if stamp != known.stamp:
                self._check(found)
                reading = self._reading = self._reading or self._reader.submit(
                    lambda: KnownTokens.of(stamp, read(self._path))
                )
                if found.st_size <= SMALL_BYTES or not known.stamp or reading.done():
                    self._reading = None
                    log_change(known, reading.result())
                    known = self._read = reading.result()
        except FileNotFoundError:
            self._reading, known = None, KnownTokens(None)
            self._read = known
        except (OSError, ConfigurationError) as exc:
            self._reading, self._read = None, KnownTokens(())
            _log.error("tokens.unreadable", path=str(self._path), reason=reason_of(exc))
            raise Unavailable("The token file cannot be read; the service's log says why") from exc
        return known

    def _check(self, found: os.stat_result) -> None:
        """Check owner and mode: a program that can write the file can create tokens."""
        mode = stat.S_IMODE(found.st_mode)
        if found.st_uid not in {os.geteuid(), 0} or mode & _WRITABLE:
            raise ConfigurationError("others may write it: the service must own it, with mode 0600")
        if self._strict and mode & OTHERS:
            raise ConfigurationError("every user may read it: run chmod 600 on it")
        if is_open(found, os.geteuid()):
            _log.warning("tokens.open_to_others", path=str(self._path), mode=f"{mode:04o}")


def log_change(before: KnownTokens, after: KnownTokens) -> None:
    """Log the ids of new and removed tokens, which are not secret."""
    old, new = before.tokens.keys(), after.tokens.keys()
    _log.info("tokens.read", tokens=len(new), new=sorted(new - old), gone=sorted(old - new))


def read(path: Path) -> "TokensBody":
    """The content of the file. Raises OSError; ConfigurationError for another kind of file."""
    try:
        return TokensBody.of(small_files.read(path, _MOST_BYTES))
    except ConfigurationError as exc:
        raise ConfigurationError(
            f"{path} is not a file that kms token wrote, or a later version did"
        ) from exc


# -- changes, by the command ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """The properties of a new token. ``ttl`` None: it does not expire."""

    name: str
    tenant: str
    scopes: Sequence[str]
    ttl: timedelta | None


class Revoked(msgspec.Struct, frozen=True, kw_only=True):
    """A revoked token of a signed document, kept ``until`` the token would have expired; None: always."""

    id: str
    until: datetime | None = None


class _Unread(msgspec.Struct):
    """The tokens of a body as JSON."""

    version: Literal[1] = 1
    tokens: list[msgspec.Raw] = []
    revoked: list[Revoked] = []


_TOKEN: Final = msgspec.json.Decoder(Token)


class TokensBody(msgspec.Struct, kw_only=True):
    """The tokens of a file or of a signed document, which are changed in place. No file has ``revoked``."""

    version: Literal[1] = 1
    tokens: list[Token] = []
    revoked: list[Revoked] = []

    @classmethod
    def of(cls, body: bytes) -> Self:
        """The tokens in these bytes. Raises ConfigurationError.

        One by one: to decode a whole file at once holds all threads of the process for a second.
        """
        try:
            unread = msgspec.json.decode(body, type=_Unread)
            return cls(tokens=[_TOKEN.decode(each) for each in unread.tokens], revoked=unread.revoked)
        except NOT_JSON as exc:
            raise ConfigurationError("The tokens are damaged, or were written by a later version") from exc


Recorder = Callable[[Token], AbstractContextManager[object]]
"""Makes a context that is entered while the tokens change, which records the change in the audit log."""


def listed(where: Where) -> list[Token]:
    """All tokens, valid or not. Raises as ``read`` and ``SignedDocument.read``."""
    if isinstance(where, SignedDocument):
        return TokensBody.of(where.read().body or NONE).tokens
    return read(where).tokens if where.exists() else []


def create(where: Where, wish: TokenRequest, record: Recorder = nullcontext) -> tuple[Token, str]:
    """Create a token; returns it with its text, which is not stored. Raises Conflict for a name in use."""
    now, secret = _now(), secrets.token_urlsafe(_SECRET_BYTES)
    token_id = b32encode(os.urandom(_ID_BYTES)).decode("ascii").lower().rstrip("=")

    def edit(draft: TokensBody) -> tuple[Token, str]:
        if any((token.name, token.tenant) == (wish.name, wish.tenant) for token in draft.tokens):
            raise Conflict(
                f"Tenant {wish.tenant} has a token {wish.name}: rotate or revoke it, or name another"
            )
        text, digest = _new_text(token_id, secret)
        token = Token(
            id=token_id,
            name=wish.name,
            tenant=wish.tenant,
            scopes=tuple(wish.scopes),
            created_at=now,
            expires_at=None if wish.ttl is None else now + wish.ttl,
            digests=(digest,),
        )
        draft.tokens.append(token)
        return token, text

    return _change(where, edit, record)


def rotate(
    where: Where, which: str, overlap: timedelta, ttl: timedelta | None, record: Recorder = nullcontext
) -> tuple[Token, str]:
    """Give a token a new text; the old one stays valid for ``overlap``. ``ttl`` None keeps the expiry."""
    now, secret = _now(), secrets.token_urlsafe(_SECRET_BYTES)

    def edit(draft: TokensBody) -> tuple[Token, str]:
        at = _index(draft.tokens, which)
        old = draft.tokens[at]
        text, digest = _new_text(old.id, secret)
        kept = tuple(
            Digest(sha256=one.sha256, until=min(one.until or now + overlap, now + overlap))
            for one in old.digests
            if overlap and _is_current(one, now)
        )
        expires_at = old.expires_at if ttl is None else now + ttl
        draft.tokens[at] = msgspec.structs.replace(old, digests=(digest, *kept), expires_at=expires_at)
        return draft.tokens[at], text

    return _change(where, edit, record)


def revoke(where: Where, which: str, record: Recorder = nullcontext) -> Token:
    """Remove a token: its calls and jobs are refused from then on. Raises Missing."""

    def edit(draft: TokensBody) -> tuple[Token, str]:
        token = draft.tokens.pop(_index(draft.tokens, which))
        draft.revoked.append(Revoked(id=token.id, until=token.expires_at))
        return token, ""

    return _change(where, edit, record)[0]


def adopt(document: SignedDocument, taken: Sequence[Token] = ()) -> int:
    """Accept the stored document and add these tokens; returns the number of all tokens.

    Tokens that it has, or that were revoked, are not taken again. Raises as ``SignedDocument.adopt``.
    """

    def edit(body: bytes) -> bytes:
        draft = TokensBody.of(body or NONE)
        known = {token.id for token in draft.tokens} | {revoked.id for revoked in draft.revoked}
        draft.tokens += [token for token in taken if token.id not in known]
        return msgspec.json.encode(draft)

    return len(TokensBody.of(document.adopt(edit).body).tokens)


def _change(
    where: Where, edit: Callable[[TokensBody], tuple[Token, str]], record: Recorder
) -> tuple[Token, str]:
    """Change the tokens. ``edit`` is called again if others changed a document, with the same secrets."""
    if isinstance(where, Path):
        secure_files.make_folders(where.parent)
        with secure_files.lock(where.with_name(f"{where.name}.lock")):  # against other commands
            draft = TokensBody(tokens=listed(where))
            token, text = edit(draft)
            data = msgspec.json.format(msgspec.json.encode({"version": 1, "tokens": draft.tokens})) + b"\n"
            with record(token):
                secure_files.write(where, data, locked=True)
            return token, text
    made: list[tuple[Token, str]] = []

    def edited(body: bytes) -> bytes:
        draft, now = TokensBody.of(body or NONE), _now()
        made.append(edit(draft))
        draft.revoked = [one for one in draft.revoked if one.until is None or now < one.until]
        return msgspec.json.encode(draft)

    before = where.read()
    edited(before.body)  # which may raise, before anything is recorded
    with record(made[-1][0]):
        where.write(before, edited)
    return made[-1]


def _index(tokens: Sequence[Token], which: str) -> int:
    """The index of a token by id, name or tenant/name. Raises Conflict for several, Missing for none."""
    found = [at for at, token in enumerate(tokens) if token.is_named(which)]
    if len(found) > 1:
        raise Conflict(f"Several tenants have a token {which}: use its id, or tenant/name")
    if not found:
        raise Missing(f"There is no token {which}: `kms token list` shows all")
    return found[0]


def _new_text(token_id: str, secret: str) -> tuple[str, Digest]:
    text = f"{PREFIX}{token_id}_{secret}"
    return text, Digest(sha256=hashlib.sha256(text.encode("ascii")).digest())


def _is_current(digest: Digest, now: datetime) -> bool:
    return digest.until is None or now < digest.until


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def several_tenants(settings: Settings, known: Tokens) -> Callable[[], bool]:
    """A function that says whether jobs can come from more than one tenant, by settings and tokens.

    Without authentication all callers are of one tenant. Unreadable tokens count as several tenants.
    """
    kms = settings.kms
    if kms.auth.mode != "required":
        return lambda: False
    named = {
        *kms.tenants,
        *(section.tenant for section in kms.auth.certificates.values()),
        *(name for section in kms.auth.issuers.values() for name in section.tenants or (section.tenant,)),
    }

    def answer() -> bool:
        if len(named) > 1:
            return True
        try:
            return len(named | known.tenants()) > 1
        except Unavailable:
            return True

    return answer


class DocumentTokens(Tokens):
    """Raises Unavailable, and refuses no token, while the copy is missing or too old.

    A token that the copy does not have may have just been made: the document is read again before it is
    refused, unless it was revoked.
    """

    def __init__(self, copy: LocalCopy) -> None:
        self._copy = copy
        self._held = Version(), KnownTokens((0,))

    def of_digest(self, token_id: str, digest: bytes) -> Token:
        """As for a file; one that was not revoked and is unknown so far raises UnknownToken to look up."""
        try:
            return super().of_digest(token_id, digest)
        except Unauthenticated as exc:
            if exc.reason != _UNKNOWN or token_id in self._fresh().revoked:
                raise
        raise UnknownToken(self._copy.reread, self)

    def by_id(self, token_id: str) -> Token | None:
        """As for a file. Blocks for a token that is unknown and was not revoked: it may be new."""
        known = self._fresh()
        if token_id not in known.tokens and token_id not in known.revoked:
            self._copy.reread()
        return super().by_id(token_id)

    def is_current(self) -> bool:
        """True if the document was read in the last ten seconds, or ``max_stale_s`` if that is less."""
        return not self._copy.is_late

    def _fresh(self) -> KnownTokens:
        version = self._copy.current()
        held, known = self._held
        if version is held:
            return known
        try:
            now = KnownTokens.of((version.generation,), TokensBody.of(version.body or NONE))
        except ConfigurationError as exc:
            raise Unavailable("The tokens were written by a later version of the service") from exc
        log_change(known, now)
        self._held = version, now
        return now
