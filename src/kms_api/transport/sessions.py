"""Sessions of the page: who has logged in with a browser, known by a random cookie. A small file for each.

A session keeps a principal, never a token: the cookie opens the page alone, and is worth nothing at the API.
What the principal may do is asked of the policy with every request, so a revoked token ends its sessions.
Files, since several processes may answer at one port. A tenant has a folder, named by a hash under a key of
this install, and a file in it is named by such a hash of the credential and a hash of the cookie. Sessions of
earlier versions, whose files lie beside the folders, last until they expire.
"""

import hashlib
import hmac
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from kms_core.auth.policy import Principal

COOKIE: Final = "kms_session"
VISITOR: Final = "kms_login"  # the cookie that tells our login form from a forged one
LASTS_S: Final = 8 * 3600
SESSION: Final = "kms.session"  # where the gate leaves the id of a session in a request's scope
_SWEEP_S: Final = 3600
MOST_OF_TENANT: Final = 1000
MOST_OF_CREDENTIAL: Final = 50
_LABEL_CHARS: Final = 16  # of a tenant or a credential: a clash of two would only let them share a bound
_GROUP: Final = re.compile(rf"[0-9a-f]{{{2 * _LABEL_CHARS}}}")
_LABEL: Final = re.compile(rf"[0-9a-f]{{{_LABEL_CHARS}}}")
_FILE: Final = re.compile(r"[0-9a-f]{64,96}")  # a digest, and before it what tells whose
_ID: Final = re.compile(rf"(?:[0-9a-f]{{{2 * _LABEL_CHARS}}})?[\w-]{{43}}", re.ASCII)  # group, 32 bytes
_ID_BYTES: Final = 32
_KEY_BYTES: Final = 32
_STAMPING: Final = "stamping"


class _HeldSession(msgspec.Struct, frozen=True):
    who: Principal
    until: float


class Sessions:
    """At most 50 of a credential and 1,000 of a tenant, of eight hours each.

    Above that the oldest of the same credential ends, or else of the same tenant, and never another tenant's.
    A login looks at the sessions of its tenant only. Once an hour one removes what has expired of others.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """``folder`` is made; ``clock`` gives seconds since the epoch. Raises OSError."""
        self._folder = folder
        self._clock = clock
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._stamping = _key(folder / _STAMPING)
        self._swept_at = -math.inf

    def begin(self, who: Principal) -> str:
        """Begin a session and return its id, which only the browser keeps. Raises OSError."""
        group = self._label(f"tenant {who.tenant}") + self._label(_credential(who))
        self._make_room(group)
        session, now = f"{group}{new_id()}", self._clock()
        path = self._path(session)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _write(path, msgspec.json.encode(_HeldSession(who, now + LASTS_S)))
        os.utime(path, (now, now))
        return session

    def find(self, session: str) -> Principal | None:
        """Whose session that is; None for one that nobody began, or that has ended."""
        if not _ID.fullmatch(session):  # a request may bring some thousand
            return None
        try:
            held = msgspec.json.decode(self._path(session).read_bytes(), type=_HeldSession)
        except (OSError, msgspec.MsgspecError):
            return None
        return held.who if self._clock() < held.until else None

    def end(self, session: str) -> None:
        self._path(session).unlink(missing_ok=True)

    def stamp(self, holder: str) -> str:
        """What a form of this holder (a session, or else a credential) carries against forged ones (CSRF)."""
        return hmac.digest(self._stamping, holder.encode(), "sha256").hex()

    def is_stamp(self, holder: str, given: str) -> bool:
        return hmac.compare_digest(self.stamp(holder).encode(), given.encode())

    def _path(self, session: str) -> Path:
        """The file of a session. What is no id of ours has none that could exist."""
        digest = hashlib.sha256(session.encode()).hexdigest()
        group = session[: 2 * _LABEL_CHARS]
        if not _GROUP.fullmatch(group):
            return self._folder / digest
        return self._folder / group[:_LABEL_CHARS] / f"{group[_LABEL_CHARS:]}{digest}"

    def _label(self, text: str) -> str:
        """A name that tells nothing without the key of this install."""
        return self.stamp(f"label {text}")[:_LABEL_CHARS]

    def _make_room(self, group: str) -> None:
        """Remove what has expired, and the oldest session of the tenant where one more would be too many."""
        if self._clock() - self._swept_at >= _SWEEP_S:
            self._sweep()
        tenant, credential = group[:_LABEL_CHARS], group[_LABEL_CHARS:]
        mine: list[Path] = []
        others: list[Path] = []
        for path in self._unexpired(self._folder / tenant):
            (mine if path.name.startswith(credential) else others).append(path)
        over = len(mine) - MOST_OF_CREDENTIAL + 1
        crowded = len(mine) + len(others) - MOST_OF_TENANT + 1
        for path in (mine + others)[: max(0, over, crowded)]:
            path.unlink(missing_ok=True)

    def _unexpired(self, folder: Path) -> list[Path]:
        """The sessions of a folder, oldest first; those that have expired are removed."""
        now, found = self._clock(), []
        for at, path in sorted((_begun(path), path) for path in _sessions(folder)):
            if at + LASTS_S <= now:
                path.unlink(missing_ok=True)
            else:
                found.append(path)
        return found

    def _sweep(self) -> None:
        """Remove what has expired of all tenants, and of sessions of earlier versions."""
        self._swept_at = self._clock()
        tenants = [path for path in self._folder.iterdir() if _LABEL.fullmatch(path.name)]
        for folder in (self._folder, *tenants):
            self._unexpired(folder)


def _sessions(folder: Path) -> list[Path]:
    """The files of sessions directly in a folder, which need not exist."""
    try:
        return [path for path in folder.iterdir() if _FILE.fullmatch(path.name)]
    except FileNotFoundError:
        return []


def _credential(who: Principal) -> str:
    """The key of sessions of one credential: its holder, since each JWT has an id of its own."""
    return f"{who.credential.partition(':')[0]} {who.tenant} {who.name}"


def cookie(headers: Iterable[tuple[bytes, bytes]], name: str) -> str:
    """The first value of a cookie of ours in the headers of a request; empty without one."""
    return next(cookies(headers, name), "")


def cookies(headers: Iterable[tuple[bytes, bytes]], name: str) -> Iterator[str]:
    """All values of a cookie of ours: another port or subdomain may have set one beside it, and come first.

    They are taken as they stand. ``http.cookies``, which Starlette asks, unquotes values in quadratic time
    before Python 3.11.10 (CVE-2024-7592): seconds for the 16 KiB that anybody may send.
    """
    wanted = name.encode("ascii")
    for header, text in headers:
        for pair in text.split(b";") if header == b"cookie" else ():
            given, _, value = pair.partition(b"=")
            if given.strip() == wanted:
                yield value.strip().decode("latin-1")


def new_id() -> str:
    """256 random bits, as a cookie can hold them."""
    return secrets.token_urlsafe(_ID_BYTES)


def _key(path: Path) -> bytes:
    """32 random bytes, made by whoever comes first; what is cut short would be known to everybody."""
    made = path.with_name(f".{_STAMPING}.{new_id()}")
    _write(made, secrets.token_bytes(_KEY_BYTES), durable=True)
    try:
        while True:
            with suppress(FileExistsError):
                path.hardlink_to(made)
            with suppress(FileNotFoundError):  # somebody else takes away what was cut
                found = path.read_bytes()
                if len(found) == _KEY_BYTES:
                    return found
                path.unlink()
    finally:
        made.unlink()


def _write(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Make a file that nobody else has made."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(handle, "wb") as file:  # noqa: PTH123 -- a handle, not a path
        file.write(content)
        file.flush()
        if durable:
            os.fsync(handle)


def _begun(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
