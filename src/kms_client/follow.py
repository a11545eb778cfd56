"""Follows a job until it ends: by its events if the service offers them, otherwise by polling.

Events are server-sent events (WHATWG HTML §9.2.6).
"""

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

import msgspec

from kms_client import requests
from kms_client.http_client import AnswerHead, Engine
from kms_client.problems import RETRYABLE, UnexpectedAnswer
from kms_protocol import wire
from kms_protocol.errors import Unavailable

MAX_LINE_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event: its name, and its data lines joined by newlines."""

    name: str
    data: str


@dataclass(slots=True)
class EventParser:
    """An incremental parser: ``feed`` takes bytes and yields the events that they complete.

    Comments (keep-alives) and fields other than event, data and id are ignored. ``last_id`` is the
    Last-Event-ID of the next connection. Raises UnexpectedAnswer for a line above 1 MiB.
    """

    last_id: str = ""
    _rest: bytes = b""
    _name: str = ""
    _data: list[str] = field(default_factory=list)

    def feed(self, data: bytes) -> Iterator[ServerSentEvent]:
        *lines, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise UnexpectedAnswer("A line of the event stream has no end")
        for line in lines:
            if line:
                self._take(line.decode("utf-8", "replace"))
            elif self._data:
                yield ServerSentEvent(self._name or "message", "\n".join(self._data))
                self._name, self._data = "", []
            else:
                self._name = ""

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        elif name == "id" and "\0" not in value:
            self.last_id = value


FIRST_POLL_S: Final = 0.1
SLOWEST_POLL_S: Final = 2.0
OUTAGE_S: Final = 60.0  # a job survives a restart of its service, and so does a wait
SILENCE_S: Final = 45.0  # three keep-alives of the event stream


@dataclass(slots=True)
class JobWait:
    """A wait for one job. ``deadline`` is a time.monotonic value; None waits as long as the job runs."""

    engine: Engine
    job_id: str
    deadline: float | None = None
    _events_offered: bool = True
    _pause_s: float = FIRST_POLL_S
    _unreachable_since: float | None = None

    async def states(self) -> AsyncGenerator[wire.JobOut]:
        """Yield each observed state until the deadline. The caller stops at a final one.

        Raises UnknownJob and the like immediately, Unavailable after a minute without the service.
        """
        while self._left_s() > 0:
            try:
                async with contextlib.aclosing(self._round()) as states:
                    async for job in states:
                        self._unreachable_since = None
                        yield job
            except Unavailable as exc:
                self._tolerate(exc)
            await self.engine.transport.sleep(max(0.0, min(self._pause_s, self._left_s())))

    async def _round(self) -> AsyncGenerator[wire.JobOut]:
        if not self._events_offered:
            yield await self._poll()
            return
        silence_s = min(SILENCE_S, self._left_s())
        async with self.engine.responding(requests.events(self.job_id), silence_s=silence_s) as answer:
            self._events_offered = _is_event_stream(answer) or answer.status in RETRYABLE
            yield await self._poll()  # after subscribing: a change between the two is not missed
            if _is_event_stream(answer):
                async with contextlib.aclosing(self._events(answer)) as states:
                    async for job in states:
                        yield job

    async def _events(self, answer: AnswerHead) -> AsyncGenerator[wire.JobOut]:
        parser = EventParser()
        async with contextlib.aclosing(self.engine.transport.chunks(answer)) as chunks:
            async for chunk in chunks:
                for event in parser.feed(chunk):
                    yield _state_in(event) or await self._poll()
                if self._left_s() <= 0:
                    return

    async def _poll(self) -> wire.JobOut:
        call = requests.job(self.job_id)
        reply = await self.engine.exchange(call)
        job = call.read(reply)
        self._pause_s = reply.retry_after_s() or min(self._pause_s * 1.5, SLOWEST_POLL_S)
        return job

    def _tolerate(self, error: Unavailable) -> None:
        now = time.monotonic()
        self._unreachable_since = self._unreachable_since or now
        if now - self._unreachable_since > OUTAGE_S:
            raise error
        self._pause_s = min(error.retry_after_s, SLOWEST_POLL_S)

    def _left_s(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()


def _is_event_stream(answer: AnswerHead) -> bool:
    kind = answer.headers.get("content-type", "")
    return answer.status == HTTPStatus.OK and kind.startswith("text/event-stream")


def _state_in(event: ServerSentEvent) -> wire.JobOut | None:
    """Return the job that an event contains; None for an event that only signals a change."""
    try:
        return msgspec.json.decode(event.data, type=wire.JobOut)
    except wire.NOT_JSON:
        return None
