"""How long the head of a request may take: uvicorn waits for ever, and who opens connections holds them.

Knows connections, and nothing of what is asked.
"""

import asyncio
from typing import ClassVar, Protocol


class Cycle(Protocol):
    """A request, as uvicorn has it."""

    response_complete: bool


class Impatient(asyncio.Protocol):
    """Beside one of uvicorn's protocols: ends a connection on which no request is under way.

    It looks twice, ``head_s`` seconds apart, and costs requests nothing. uvicorn's own timer is for a
    connection that is silent after an answer; a byte every few seconds, or none from the start, escapes it.
    """

    head_s: ClassVar[float] = 30.0
    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    _answered: tuple[Cycle | None] | None = None  # the last request, if it was over at the last look
    _next_look: asyncio.TimerHandle | None = None

    def last(self) -> Cycle | None:
        """The last request whose head has come."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._next_look is not None:
            self._next_look.cancel()

    def _arm(self) -> None:
        self._next_look = self.loop.call_later(self.head_s, self._look)

    def _look(self) -> None:
        last = self.last()
        over = (last,) if last is None or last.response_complete else None
        if over and over == self._answered:
            self.transport.close()
            return
        self._answered = over
        self._arm()
