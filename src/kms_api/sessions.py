"""Sessions of the page: who has logged in with a browser, known by a random cookie. A small file for each.

A session keeps a principal, never a token: the cookie opens the page alone, and is worth nothing at the API.
What the principal may do is asked of the policy with every request, so a revoked token ends its sessions.
Files, since several processes may answer at one port.
"""

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from kms_core.policy import Principal

COOKIE: Final = "kms_session"
VISITOR: Final = "kms_login"  # the cookie that tells our login form from a forged one
LASTS_S: Final = 8 * 3600
SESSION: Final = "kms.session"  # where the gate leaves the id of a session in a request's scope
_MOST: Final = 1000
_ID_BYTES: Final = 32
_KEY_BYTES: Final = 32
_STAMPING: Final = "stamping"


class _Held(msgspec.Struct, frozen=True):
    who: Principal
    until: float


class Sessions:
    """At most 1,000, of eight hours each; above that the oldest ends."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """``folder`` is made; ``clock`` gives seconds since the epoch. Raises OSError."""
        self._folder = folder
        self._clock = clock
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._stamping = _key(folder / _STAMPING)

    def begin(self, who: Principal) -> str:
        """A new session; its id, which is nowhere afterwards but in the browser."""
        self._make_room()
        session, now = new_id(), self._clock()
        path = self._path(session)
        _write(path, msgspec.json.encode(_Held(who, now + LASTS_S)))
        os.utime(path, (now, now))
        return session

    def find(self, session: str) -> Principal | None:
        """Whose session that is; None for one that nobody began, or that has ended."""
        try:
            held = msgspec.json.decode(self._path(session).read_bytes(), type=_Held)
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
        return self._folder / hashlib.sha256(session.encode()).hexdigest()

    def _make_room(self) -> None:
        """End what has run out, and the oldest of too many."""
        begun = sorted((_begun(path), path) for path in self._folder.iterdir() if path.name != _STAMPING)
        over = len(begun) - _MOST + 1
        for number, (at, path) in enumerate(begun):
            if number < over or at + LASTS_S <= self._clock():
                path.unlink(missing_ok=True)


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
