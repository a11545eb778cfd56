"""Follow a job until it ends: by its events while the service offers them, else by polling."""

import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import msgspec

from kms_client import requests
from kms_client.engine import Engine
from kms_client.events import EventParser, ServerSentEvent
from kms_client.http_client import AnswerHead
from kms_client.problems import RETRYABLE
from kms_protocol import wire
from kms_protocol.errors import Unavailable

FIRST_POLL_S: Final = 0.1
SLOWEST_POLL_S: Final = 2.0
OUTAGE_S: Final = 60.0  # a job outlives its service; whoever waits for it bears a restart
SILENCE_S: Final = 45.0  # three keep-alives of the event stream


@dataclass(slots=True)
class JobWait:
    """One wait. ``deadline`` is a time.monotonic value; without one it lasts as long as the job."""

    engine: Engine
    job_id: str
    deadline: float | None = None
    _events_offered: bool = True
    _pause_s: float = FIRST_POLL_S
    _away_since: float | None = None

    async def states(self) -> AsyncGenerator[wire.JobOut]:
        """Every state seen, ending at the deadline; the caller stops at an ended one.

        Raises UnknownJob and the like at once, Unavailable after a minute without the service.
        """
        while self._left_s() > 0:
            try:
                async with contextlib.aclosing(self._round()) as states:
                    async for job in states:
                        self._away_since = None
                        yield job
            except Unavailable as exc:
                self._bear(exc)
            await self.engine.transport.sleep(max(0.0, min(self._pause_s, self._left_s())))

    async def _round(self) -> AsyncGenerator[wire.JobOut]:
        if not self._events_offered:
            yield await self._poll()
            return
        silence_s = min(SILENCE_S, self._left_s())
        async with self.engine.responding(requests.events(self.job_id), silence_s=silence_s) as answer:
            self._events_offered = _is_event_stream(answer) or answer.status in RETRYABLE
            yield await self._poll()  # after subscribing, so that no change falls between the two
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

    def _bear(self, error: Unavailable) -> None:
        now = time.monotonic()
        self._away_since = self._away_since or now
        if now - self._away_since > OUTAGE_S:
            raise error
        self._pause_s = min(error.retry_after_s, SLOWEST_POLL_S)

    def _left_s(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()


def _is_event_stream(answer: AnswerHead) -> bool:
    kind = answer.headers.get("content-type", "")
    return answer.status == HTTPStatus.OK and kind.startswith("text/event-stream")


def _state_in(event: ServerSentEvent) -> wire.JobOut | None:
    """The job that an event carries, or None for one that only says that something moved."""
    try:
        return msgspec.json.decode(event.data, type=wire.JobOut)
    except wire.NOT_JSON:
        return None
