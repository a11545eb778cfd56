"""Budgets of concurrent requests.

Amounts are bytes of JSON bodies, uploads, downloads, event streams and open logins. Each budget is of this
process, with a bound per credential, per tenant and in total. A tenant may hold at most as much as is still
free, so a tenant that holds nothing always finds room. A request beyond a bound is refused at once (ADR 45).
A request gives back its amounts when it ends, also by an error.
"""

from collections.abc import Mapping
from typing import Final, Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from kms_api.deps import LOCAL_CALLER, PRINCIPAL
from kms_api.transport.pace import ReaderWatch, UnreadBody, uvicorn_cycle
from kms_core.auth.policy import Principal
from kms_core.auth.rate_limit import source_of
from kms_core.settings.model import ServerSection
from kms_protocol.errors import RateLimited, Unavailable
from kms_protocol.units import MiB

RESERVATION: Final = "kms.reservation"  # the key of a request's reservation in its ASGI scope
_JSON_BYTES: Final = 192 * MiB
"""Of JSON bodies in memory, where a decoded one takes up to three times its size: half of it for a tenant, a
third for a credential, and so at least one body of the largest size."""
_STREAMS: Final = 256
"""Event streams and waits: each asks Redis up to four times a second."""
_LOGINS: Final = 64
_LOGINS_PER_ADDRESS: Final = 8
"""Unfinished logins: they hold no credential to count by."""
_RETRY_S: Final = 5.0
Kind = Literal["json", "uploads", "downloads", "streams", "logins"]
Holder = tuple[str, str]
"""The tenant and the credential of a request; the source address twice, if it has no credential."""


class Budget:
    """The amounts that requests of one kind hold. Used only on the event loop.

    A holder of None is every caller of a service without authentication: only the total bounds it.
    """

    def __init__(self, noun: str, total: int, per_tenant: int, per_credential: int) -> None:
        """The bounds are in bytes for JSON bodies, else in requests; ``noun`` says of what, in refusals."""
        self.held = 0
        self._noun = noun
        self._total, self._per_tenant, self._per_credential = total, per_tenant, per_credential
        self._amounts: dict[str | Holder, int] = {}  # by tenant, and by tenant and credential

    def take(self, holder: Holder | None, amount: int = 1) -> None:
        """Take an amount now. Raises RateLimited or Unavailable, and then takes nothing."""
        free = self._total - self.held
        if holder is not None:
            credential = self._amounts.get(holder, 0) + amount
            if credential > self._per_credential:
                raise self._bound_error("credential")
            tenant = self._amounts.get(holder[0], 0) + amount
            if tenant > self._per_tenant or (free >= amount and tenant > free):
                raise self._bound_error("tenant")
            if free >= amount:
                self._amounts[holder], self._amounts[holder[0]] = credential, tenant
        if amount > free:
            raise Unavailable(f"The service has its maximum of {self._noun}", retry_after_s=_RETRY_S)
        self.held += amount

    def give_back(self, holder: Holder | None, amount: int = 1) -> None:
        """Give back an amount."""
        self.held -= amount
        for key in (holder, holder[0]) if holder is not None else ():
            self._amounts[key] -= amount
            if not self._amounts[key]:
                del self._amounts[key]

    def _bound_error(self, of: str) -> RateLimited:
        return RateLimited(f"This {of} has its maximum of {self._noun}", retry_after_s=_RETRY_S)


def budgets_of(server: ServerSection) -> dict[Kind, Budget]:
    """The budgets of a process: a tenant has half of the slots, and a credential a quarter."""
    half, quarter = (server.uploads + 1) // 2, (server.uploads + 3) // 4
    return {
        "json": Budget("bytes of request bodies", _JSON_BYTES, _JSON_BYTES // 2, _JSON_BYTES // 3),
        "uploads": Budget("uploads", server.uploads, half, quarter),
        "downloads": Budget("downloads", server.uploads, half, quarter),
        "streams": Budget("open event streams", _STREAMS, _STREAMS // 2, _STREAMS // 4),
        "logins": Budget("unfinished logins", _LOGINS, _LOGINS_PER_ADDRESS, _LOGINS_PER_ADDRESS),
    }


class Reservation:
    """The amounts that one request holds of ``budgets``."""

    __slots__ = ("_amounts", "_holder", "_scope", "budgets", "cycle")

    def __init__(self, budgets: Mapping[Kind, Budget], scope: Scope) -> None:
        self.budgets, self.cycle = budgets, uvicorn_cycle(scope)
        self._scope = scope
        self._amounts: dict[Kind, int] = {}
        self._holder: Holder | None = None

    def take(self, kind: Kind, amount: int = 1) -> None:
        """Take an amount until the request ends. Raises RateLimited, Unavailable."""
        self._holder = holder_of(self._scope)
        self.budgets[kind].take(self._holder, amount)
        self._amounts[kind] = self._amounts.get(kind, 0) + amount

    def release(self) -> None:
        """Give back all amounts."""
        if self._amounts:
            for kind, amount in self._amounts.items():
                self.budgets[kind].give_back(self._holder, amount)
            self._amounts.clear()


class Admitted:
    """ASGI middleware that gives each request a reservation, and releases it afterwards.

    An answer that leaves part of the body unread ends the connection.
    """

    def __init__(self, app: ASGIApp, budgets: Mapping[Kind, Budget]) -> None:
        self._app = app
        self._budgets = budgets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held = scope[RESERVATION] = Reservation(self._budgets, scope)
        cycle = held.cycle
        if cycle is not None and cycle.more_body:
            send = UnreadBody(scope, receive, send, held.release).send
        try:
            await self._app(scope, receive, send)
            if cycle is not None and cycle.flow.write_paused:
                with ReaderWatch(cycle):  # until it has taken most of the answer, or is cut off
                    await cycle.flow.drain()
        finally:
            held.release()


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
