"""Sessions of the page: who has logged in with a browser, known by a random cookie. In one process's memory.

A session keeps a principal, never a token: the cookie opens the page alone, and is worth nothing at the API.
What the principal may do is asked of the policy with every request, so a revoked token ends its sessions.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from typing import Final

from kms_core.policy import Principal

COOKIE: Final = "kms_session"
VISITOR: Final = "kms_login"  # the cookie that tells our login form from a forged one
LASTS_S: Final = 8 * 3600
SESSION: Final = "kms.session"  # where the gate leaves the id of a session in a request's scope
_MOST: Final = 1000
_ID_BYTES: Final = 32


class Sessions:
    """At most 1,000, of eight hours each; above that the oldest ends. Used by one event loop."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """``clock`` gives seconds since the epoch."""
        self._clock = clock
        self._stamping = secrets.token_bytes(32)
        self._found: dict[bytes, tuple[Principal, float]] = {}  # in the order in which they end

    def begin(self, who: Principal) -> str:
        """A new session; its id, which is nowhere afterwards but in the browser."""
        now = self._clock()
        self._found = {name: held for name, held in self._found.items() if held[1] > now}
        while len(self._found) >= _MOST:
            del self._found[next(iter(self._found))]
        session = new_id()
        self._found[_digest(session)] = who, now + LASTS_S
        return session

    def find(self, session: str) -> Principal | None:
        """Whose session that is; None for one that nobody began, or that has ended."""
        held = self._found.get(_digest(session))
        return held[0] if held and self._clock() < held[1] else None

    def end(self, session: str) -> None:
        self._found.pop(_digest(session), None)

    def stamp(self, holder: str) -> str:
        """What a form of this holder (a session, or else a credential) carries against forged ones (CSRF)."""
        return hmac.digest(self._stamping, holder.encode(), "sha256").hex()

    def is_stamp(self, holder: str, given: str) -> bool:
        return hmac.compare_digest(self.stamp(holder).encode(), given.encode())


def new_id() -> str:
    """256 random bits, as a cookie can hold them."""
    return secrets.token_urlsafe(_ID_BYTES)


def _digest(session: str) -> bytes:
    return hashlib.sha256(session.encode()).digest()
