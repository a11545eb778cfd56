"""Sessions of the pages for people: sealed records in Redis, found by a random cookie.

A session holds a principal, never a token. The cookie is valid for the pages only, not for the API. The
policy is checked with every request, so a revoked token ends its sessions. All API processes that share
Redis and the spool key share the sessions. A record is named by the SHA-256 of its cookie and sealed for
that name; keyed digests name the tenant and the credential. Redis holds neither cookies nor principals in
clear.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, cast

import msgspec
import redis

from kms_core.auth.policy import Principal
from kms_core.jobs.model import RecordKey
from kms_core.jobs.store.keys import PREFIX
from kms_core.jobs.store.scripts import SCRIPTS
from kms_protocol.errors import Unavailable

COOKIE: Final = "kms_session"
VISITOR: Final = "kms_login"  # the cookie that tells our login form from a forged one
LASTS_S: Final = 8 * 3600
SESSION: Final = "kms.session"  # the key of a session's id in the ASGI scope of its requests
MOST_OF_TENANT: Final = 1000
MOST_OF_CREDENTIAL: Final = 50
_LABEL_CHARS: Final = 16  # of a tenant or a credential: two with equal labels would only share a bound
_ID: Final = re.compile(r"[\w-]{43}", re.ASCII)
_ID_BYTES: Final = 32
_INFO: Final = b"kms-service/session/1"
_AWAY: Final = "The pages need Redis, which holds their sessions, and it does not answer or takes no writes"


class _HeldSession(msgspec.Struct, frozen=True):
    who: Principal
    until: float


class Sessions:
    """At most 50 sessions per credential and 1,000 per tenant, of eight hours each.

    One more ends the oldest of the same credential, or else of the same tenant, never another tenant's.
    """

    def __init__(
        self, client: redis.Redis, record_key: RecordKey, clock: Callable[[], float] = time.time
    ) -> None:
        """``clock`` returns seconds since the epoch. Connects to Redis with the first session."""
        self._client = client
        self._key = record_key
        self._clock = clock
        self._begin = client.register_script(SCRIPTS["begin_session"])

    def begin(self, who: Principal) -> str:
        """Begin a session and return its id, the value of the cookie. Raises Unavailable."""
        session = new_id()
        name, (tenant, credential) = _name(session), self._labels(who)
        held = msgspec.msgpack.encode(_HeldSession(who, self._clock() + LASTS_S))
        sealed = self._key.seal_as(_INFO, name.encode(), held)
        with _redis_errors():
            self._begin(
                [f"{PREFIX}sessions:{tenant}"],
                [name, sealed, credential, LASTS_S, MOST_OF_CREDENTIAL, MOST_OF_TENANT],
            )
        return session

    def find(self, session: str) -> Principal | None:
        """The principal of a session; None for an unknown or expired one. Raises Unavailable."""
        if not is_id(session):
            return None
        name = _name(session)
        with _redis_errors():
            sealed = cast("bytes | None", self._client.get(f"{PREFIX}session:{name}"))
        plain = self._key.open_as(_INFO, name.encode(), sealed) if sealed else None
        with suppress(msgspec.ValidationError):  # of a later version
            held = msgspec.msgpack.decode(plain, type=_HeldSession) if plain else None
            return held.who if held and self._clock() < held.until else None
        return None

    def end(self, session: str, who: Principal) -> None:
        """End a session of this principal. Raises Unavailable."""
        name, (tenant, credential) = _name(session), self._labels(who)
        with _redis_errors():
            self._client.delete(f"{PREFIX}session:{name}")
            self._client.zrem(f"{PREFIX}sessions:{tenant}", credential + name)

    def stamp(self, holder: str) -> str:
        """The CSRF token for the forms of a holder, which is a session or else a credential."""
        return self._key.digest(b"form", holder.encode()).hex()

    def is_stamp(self, holder: str, given: str) -> bool:
        return hmac.compare_digest(self.stamp(holder).encode(), given.encode())

    def _labels(self, who: Principal) -> tuple[str, str]:
        """Names of the tenant and of the credential that reveal neither without the key of this install.

        A credential counts by its holder, since each JWT has another id.
        """
        kind = who.credential.partition(":")[0]
        parts = ((b"tenant",), (b"credential", kind.encode(), who.name.encode()))
        digests = [self._key.digest(b"session", who.tenant.encode(), *part) for part in parts]
        return digests[0].hex()[:_LABEL_CHARS], digests[1].hex()[:_LABEL_CHARS]


def _name(session: str) -> str:
    return hashlib.sha256(session.encode()).hexdigest()


@contextmanager
def _redis_errors() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as exc:
        raise Unavailable(_AWAY) from exc


def is_id(text: str) -> bool:
    """Tell a session's id by its form: a request may have thousands of other cookies."""
    return _ID.fullmatch(text) is not None


def cookies(headers: Iterable[tuple[bytes, bytes]], name: str) -> Iterator[str]:
    """All values of a cookie: another port or subdomain may have set one too, which may come first.

    Values are not unquoted. ``http.cookies``, which Starlette uses, does so in quadratic time before Python
    3.11.10 (CVE-2024-7592): seconds for 16 KiB.
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
