"""Budgets of concurrent requests: bytes of JSON bodies, uploads, downloads, event streams, open logins.

Each budget is of this process, with a bound per credential, per tenant and in total. A tenant may hold at
most as much as is still free, so a tenant that holds nothing always finds room. A request beyond a bound is
refused at once (ADR 45). A request gives back its amounts when it ends, also by an error.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal, Self

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from kms_api.deps import LOCAL_CALLER, PRINCIPAL
from kms_api.transport.connection import ReaderWatch, TransferLimits, UnreadBody, cycle_of
from kms_core.auth.policy import Principal
from kms_core.auth.rate_limit import source_of
from kms_core.settings.model import ServerSection
from kms_protocol.errors import KmsError, RateLimited, Unavailable
from kms_protocol.units import KiB, MiB

RESERVATION: Final = "kms.reservation"  # the key of a request's reservation in its ASGI scope
BODY_S: Final = 60.0
"""Seconds for a whole JSON body or form, which holds its bytes in memory until then."""
GRACE_S: Final = 30.0
STALL_S: Final = 60.0
_BYTES_PER_S: Final = 4 * KiB
"""The pace of uploads and downloads, which slow links keep: a slower peer would hold its slot for long."""
_JSON_BYTES: Final = 192 * MiB
"""Of JSON bodies in memory, where a decoded one takes up to three times its size: half of it for a tenant, a
third for a credential, and so at least one body of the largest size."""
_STREAMS: Final = 256
"""Event streams and waits: each asks Redis up to four times a second."""
_LOGINS: Final = 64
_LOGINS_PER_ADDRESS: Final = 8
"""Unfinished logins: they hold no credential to count by."""
_RETRY_S: Final = 5.0
Kind = Literal["json", "upload", "download", "stream", "login"]
Reason = Literal["credential", "tenant", "total"]
Holder = tuple[str, str]
"""The tenant and the credential of a request; the source address twice, if it has no credential."""
_NOUNS: Final[dict[Kind, str]] = {
    "json": "bytes of request bodies",
    "upload": "uploads",
    "download": "downloads",
    "stream": "open event streams",
    "login": "unfinished logins",
}


class Budget:
    """The amounts that requests of one kind hold. Used only on the event loop.

    A holder of None is every caller of a service without authentication: only the total bounds it.
    """

    def __init__(self, kind: Kind, total: int, per_tenant: int, per_credential: int) -> None:
        """The bounds are in bytes for JSON bodies, else in requests."""
        self.kind: Final = kind
        self.held = 0
        self._total, self._per_tenant, self._per_credential = total, per_tenant, per_credential
        self._amounts = Counter[str | Holder]()  # by tenant, and by tenant and credential

    def take(self, holder: Holder | None, amount: int = 1) -> None:
        """Take an amount now. Raises RateLimited or Unavailable, and then takes nothing."""
        reason = self._reason(holder, amount)
        if reason is not None:
            raise self._refused_error(reason)
        self._add(holder, amount)

    def give_back(self, holder: Holder | None, amount: int = 1) -> None:
        """Give back an amount."""
        self._add(holder, -amount)

    def _reason(self, holder: Holder | None, amount: int) -> Reason | None:
        """The bound that the amount would exceed, if any."""
        free = self._total - self.held
        if holder is not None:
            if self._amounts[holder] + amount > self._per_credential:
                return "credential"
            tenant = self._amounts[holder[0]] + amount
            if tenant > self._per_tenant or (free >= amount and tenant > free):
                return "tenant"
        return None if amount <= free else "total"

    def _add(self, holder: Holder | None, amount: int) -> None:
        self.held += amount
        for key in (holder, holder[0]) if holder is not None else ():
            self._amounts[key] += amount
            if not self._amounts[key]:
                del self._amounts[key]

    def _refused_error(self, reason: Reason) -> KmsError:
        noun = _NOUNS[self.kind]
        if reason == "total":
            return Unavailable(f"The service has its maximum of {noun}", retry_after_s=_RETRY_S)
        return RateLimited(f"This {reason} has its maximum of {noun}", retry_after_s=_RETRY_S)


@dataclass(frozen=True, slots=True)
class Admission:
    """The budgets of a process, and the time limits of bodies."""

    json: Budget
    uploads: Budget
    downloads: Budget
    streams: Budget
    logins: Budget
    body_s: float
    transfer: TransferLimits

    @classmethod
    def of(cls, server: ServerSection) -> Self:
        """The budgets and limits: a tenant has half of the slots, and a credential a quarter."""
        half, quarter = (server.uploads + 1) // 2, (server.uploads + 3) // 4
        return cls(
            Budget("json", _JSON_BYTES, _JSON_BYTES // 2, _JSON_BYTES // 3),
            Budget("upload", server.uploads, half, quarter),
            Budget("download", server.uploads, half, quarter),
            Budget("stream", _STREAMS, _STREAMS // 2, _STREAMS // 4),
            Budget("login", _LOGINS, _LOGINS_PER_ADDRESS, _LOGINS_PER_ADDRESS),
            BODY_S,
            TransferLimits(GRACE_S, _BYTES_PER_S, STALL_S),
        )


class Reservation:
    """The amounts that one request holds of the budgets of ``admission``."""

    __slots__ = ("_amounts", "_scope", "admission")

    def __init__(self, admission: Admission, scope: Scope) -> None:
        self.admission = admission
        self._scope = scope
        self._amounts: dict[Budget, int] = {}

    def take(self, budget: Budget, amount: int = 1) -> None:
        """Take an amount until the request ends. Raises RateLimited, Unavailable."""
        budget.take(holder_of(self._scope), amount)
        self._amounts[budget] = self._amounts.get(budget, 0) + amount

    def release(self) -> None:
        """Give back all amounts."""
        if self._amounts:
            holder = holder_of(self._scope)
            for budget, amount in self._amounts.items():
                budget.give_back(holder, amount)
            self._amounts.clear()


class Admitted:
    """ASGI middleware that gives each request a reservation, and releases it afterwards.

    An answer that leaves part of the body unread ends the connection.
    """

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = scope[RESERVATION] = Reservation(self._admission, scope)
        cycle = cycle_of(scope)
        if cycle is not None and cycle.more_body:
            send = UnreadBody(scope, receive, send, held.release).send
        try:
            await self._app(scope, receive, send)
            if cycle is not None and cycle.flow.write_paused:
                await self._read_by_peer(cycle)
        finally:
            held.release()

    async def _read_by_peer(self, cycle: RequestResponseCycle) -> None:
        """Wait until the reader has taken most of the answer, or was too slow and is cut off."""
        with ReaderWatch(cycle, self._admission.transfer):
            await cycle.flow.drain()


def reservation_of(scope: Scope) -> Reservation:
    """The reservation of the request of this scope."""
    found: Reservation = scope[RESERVATION]
    return found


def holder_of(scope: Scope) -> Holder | None:
    """The holder of a request. JWTs of one subject count together, anonymous callers by address."""
    who: Principal = scope[PRINCIPAL]
    if who is LOCAL_CALLER:
        return None
    if who.name:
        return who.tenant, who.credential if who.grant is None else who.name
    address = source_of(scope["client"][0]) if scope.get("client") else "local"
    source = f"address {address}"  # no tenant's name has a space
    return source, source
