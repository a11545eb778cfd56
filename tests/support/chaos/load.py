"""The people in a storm: careful clients that ask until they hear, and readers that look while work goes on.

All of it runs in threads of its own, while the main thread lets processes die.
"""

import hashlib
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import httpx2 as httpx
from kombu.exceptions import OperationalError

from support.celery_messages import body as message_body
from support.celery_messages import intake_recipient, seal, send
from support.chaos.job_mix import JobMix, JobRequest
from support.service import Service
from support.waiting import until

PATIENCE_S: Final = 240.0  # how long a careful client asks; far above every outage
_PAUSE_S: Final = 0.1
_RESEND_S: Final = 3.0
_AGAIN: Final = frozenset({429, 503, 507})
_CANCELLED: Final = frozenset({200, 409})
_NOT_YET: Final = frozenset({409, 410})


@dataclass(frozen=True, slots=True)
class AcceptedJob:
    """A request that was accepted; ``ids`` are all that were told for it."""

    request: JobRequest
    ids: frozenset[str]

    @property
    def job_id(self) -> str:
        return next(iter(self.ids))


@dataclass(frozen=True, slots=True)
class PartialRead:
    """Bytes of a result, read while the storm went on."""

    job_id: str
    start: int
    size: int
    digest: bytes


@dataclass
class Load:
    """``senders`` threads work through ``count`` requests; one more reads results at random.

    They stop after ``request_limit`` requests until that grows. ``token`` is what messages carry.
    """

    service: Service
    mix: JobMix
    count: int
    senders: int
    seed: int
    request_limit: int = sys.maxsize
    token: str | None = None
    accepted_jobs: list[AcceptedJob] = field(default_factory=list)
    glimpses: list[PartialRead] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = 0
        self._done = threading.Event()
        self._reader = threading.Thread(target=self._read, name="reader", daemon=True)
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"sender {number}", daemon=True)
            for number in range(self.senders)
        ]

    def start(self) -> None:
        for thread in (*self._threads, self._reader):
            thread.start()

    @property
    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Wait for the last sender and the reader."""
        for thread in self._threads:
            thread.join()
        self._done.set()
        self._reader.join()

    def some_job(self, rng: random.Random) -> str | None:
        with self._lock:
            return rng.choice(self.accepted_jobs).job_id if self.accepted_jobs else None

    def submit_one_more(self, make: Callable[[], JobRequest]) -> str:
        """Ask for one more job from this thread; its id once it is accepted."""
        with self._lock:
            request = make()
        job_id = self._accepted(request, str(uuid.uuid4()))
        with self._lock:
            self.accepted_jobs.append(AcceptedJob(request, frozenset({job_id})))
        return job_id

    # -- senders -------------------------------------------------------------------------------------

    def _work(self, number: int) -> None:
        rng = random.Random(self.seed * 1000 + number)  # noqa: S311 -- repeatable, no secret
        with ThreadPoolExecutor(2) as pair:
            while request := self._next():
                try:
                    ids = self._place(request, rng, pair)
                except AssertionError as exc:
                    self.troubles.append(f"{request.name}: {exc}")
                    continue
                with self._lock:
                    self.accepted_jobs.append(AcceptedJob(request, frozenset(ids)))

    def _next(self) -> JobRequest | None:
        while self._taken >= self.request_limit and self._taken < self.count:
            time.sleep(_PAUSE_S)
        with self._lock:
            if self._taken == self.count:
                return None
            self._taken += 1
            return self.mix.next()

    def _place(self, request: JobRequest, rng: random.Random, pair: ThreadPoolExecutor) -> set[str]:
        if request.manner == "message":
            return {self._by_message(request)}
        key = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        times = 2 if request.manner == "twice" else 1
        asked: list[Future[str]] = [pair.submit(self._accepted, request, key) for _ in range(times)]
        ids = {future.result() for future in asked}
        if request.manner == "cancel":
            time.sleep(rng.uniform(0, 0.5))
            self._cancel(next(iter(ids)))
        return ids

    def _accepted(self, request: JobRequest, key: str) -> str:
        answer = self._insist(lambda: request.send(key), frozenset({202}))
        return str(answer.json()["job_id"])

    def _cancel(self, job_id: str) -> None:
        self._insist(lambda: self.service.post(f"/jobs/{job_id}/cancel"), _CANCELLED)

    def _by_message(self, request: JobRequest) -> str:
        """As docs/celery.md advises: the same message, again and again, until the job is seen."""
        job_id = str(uuid.uuid4())
        message = seal(self._recipient(), message_body(request.body, job_id=job_id, token=self.token))
        deadline, again_at = time.monotonic() + PATIENCE_S, 0.0
        while True:
            if time.monotonic() >= again_at:
                self._send(message)
                again_at = time.monotonic() + _RESEND_S
            found = self._insist(lambda: self.service.get(f"/jobs/{job_id}"), frozenset({200, 404}))
            if found.status_code == httpx.codes.OK:
                self._send(message)  # once more than needed: a replay changes nothing
                return job_id
            assert time.monotonic() < deadline, "the message was never taken"
            time.sleep(_PAUSE_S)

    def _recipient(self) -> str:
        answers: list[str] = []

        def known() -> bool:
            try:
                answers.append(intake_recipient(self.service))
            except httpx.TransportError:
                return False
            return True

        until(known, "the intake's recipient")
        return answers[0]

    def _send(self, message: str) -> None:
        try:
            send(self.service, message, argsrepr="-", kwargsrepr="-")
        except (OperationalError, OSError, AttributeError):
            # The broker is away: said again soon. kombu 5.7 may meet its own closed connection as None.
            time.sleep(_PAUSE_S)

    def _insist(self, ask: Callable[[], httpx.Response], wanted: frozenset[int]) -> httpx.Response:
        """Ask until there is an answer that is one. Any that says "again later", or none, is no answer."""
        answers: list[httpx.Response] = []

        def answered() -> bool:
            try:
                answer = ask()
            except httpx.TransportError:
                return False
            if answer.status_code in _AGAIN:
                return False
            assert answer.status_code in wanted, f"{answer.status_code} {answer.text}"
            answers.append(answer)
            return True

        until(answered, "an answer")
        return answers[0]

    # -- readers -------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Ranges of results, whether the job has ended or not: what is given must be true for good."""
        rng = random.Random(self.seed)  # noqa: S311 -- repeatable, no secret
        while not self._done.wait(_PAUSE_S / 2):
            job_id = self.some_job(rng)
            if job_id is None:
                continue
            start = rng.choice((0, 0, 17, 65_536))
            headers = {"Range": f"bytes={start}-{start + 99_999}"}
            try:
                answer = self.service.get(f"/jobs/{job_id}/result", headers=headers)
            except httpx.TransportError:
                continue
            self._note(job_id, start, answer)

    def _note(self, job_id: str, start: int, answer: httpx.Response) -> None:
        if answer.status_code == httpx.codes.PARTIAL_CONTENT:
            digest = hashlib.sha256(answer.content).digest()
            self.glimpses.append(PartialRead(job_id, start, len(answer.content), digest))
        elif answer.status_code not in {*_NOT_YET, *_AGAIN, 416}:  # 416: it begins behind the end
            self.troubles.append(f"a reader was answered {answer.status_code} {answer.text}")
