"""A client that calls and submits all the time: the load of an update, of the version whose Python runs it.

Run by its path: ``load_program.py URL FOLDER``, with a folder below the roots of the service. It prints a
line for each job that it has seen to its end, and after SIGTERM and its last job a JSON object: ``Report``.
"""

import io
import json
import signal
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from kms_client import Client
from kms_client.http_client import HttpAnswer, HttpRequest
from kms_client.settings import ClientSettings
from kms_client.sync import SyncTransport
from kms_protocol import wire

CONTEXT: Final = {"load": "update"}
THREADS: Final = 2
OPEN_JOBS: Final = 4
"""Jobs of a thread that it does not wait for."""
LONGEST_S: Final = 120.0
PAUSE_S: Final = 0.05
_FAILED: Final = 500


@dataclass
class Report:
    """What was asked for and what came: ``ids`` are those of jobs by their Idempotency-Keys.

    ``targets`` are the files that jobs make, by id; ``unexplained`` are the answers of 500 and above without
    ``Retry-After``, ``errors`` what the client raised in spite of its retries, and what was wrong.
    """

    ids: dict[str, str] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    calls: int = 0
    refused: int = 0
    unexplained: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class NotingTransport(SyncTransport):
    """Counts the answers that ask to try again, and notes those of 500 and above that do not say when."""

    def __init__(self, settings: ClientSettings, report: Report) -> None:
        super().__init__(settings)
        self._report = report

    async def open(self, request: HttpRequest) -> HttpAnswer:
        answer = await super().open(request)
        self._report.calls += 1
        if answer.status >= _FAILED:
            self._report.refused += 1
            if "retry-after" not in answer.headers:
                self._report.unexplained.append(f"{request.method} {request.url}: {answer.status}")
        return answer


@dataclass(frozen=True)
class Asked:
    """A job that was accepted. ``again`` submits it once more; ``judge`` looks at what came of it."""

    job_id: str
    key: str
    again: Callable[[], str]
    judge: Callable[[str], None]


class Load:
    """One thread's calls. Each has bytes of its own, so that nothing can be taken for another's."""

    def __init__(self, client: Client, report: Report, folder: Path) -> None:
        self._kms, self._report, self._folder = client, report, folder
        self._open: deque[Asked] = deque()
        self._all: list[Asked] = []

    def run(self, stop: threading.Event) -> None:
        """Work until ``stop``, then see every job to its end and submit each once more."""
        turn = 0
        while not stop.wait(PAUSE_S):
            self._noting(self._call)
            self._noting(lambda: self._submit(turn))  # noqa: B023 -- called at once
            turn += 1
            while len(self._open) > OPEN_JOBS:
                self._noting(self._settle)
        while self._open:
            self._noting(self._settle)
        for asked in self._all:
            self._noting(lambda: self._once_more(asked))  # noqa: B023 -- as above

    def _noting(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as exc:  # noqa: BLE001 -- a thread that ended would report nothing
            self._report.errors.append(f"{type(exc).__name__}: {exc}")

    def _call(self) -> None:
        plain = uuid.uuid4().bytes
        sealed = self._kms.encrypt(plain, context=CONTEXT)
        opened = self._kms.decrypt(sealed.ciphertext, context=CONTEXT)
        assert opened.plaintext == plain, "a call opened something else"

    def _submit(self, turn: int) -> None:
        kinds = (self._items, self._file, self._upload, self._items, self._file, self._upload, self._parts)
        asked = kinds[turn % len(kinds)](str(uuid.uuid4()))
        self._report.ids[asked.key] = asked.job_id
        self._open.append(asked)
        self._all.append(asked)
        if turn % 3 == 0:
            self._once_more(asked)

    def _once_more(self, asked: Asked) -> None:
        assert asked.again() == asked.job_id, f"one Idempotency-Key has two jobs: {asked.job_id}"

    def _settle(self) -> None:
        asked = self._open.popleft()
        found = self._kms.wait(asked.job_id, timeout_s=LONGEST_S)
        assert found.state == "succeeded", f"{found.job_id} is {found.state}: {found.error}"
        asked.judge(asked.job_id)
        print(asked.job_id, flush=True)  # noqa: T201 -- what it is for

    # -- kinds ---------------------------------------------------------------------------------------

    def _items(self, key: str, count: int = 3) -> Asked:
        plains = [uuid.uuid4().bytes for _ in range(count)]
        items = [wire.JobItem(plaintext=plain) for plain in plains]
        job = wire.JobIn(kind="encrypt", items=items, context=CONTEXT)

        def judge(job_id: str) -> None:
            lines = list(self._kms.items(job_id))
            assert [line.index for line in lines] == list(range(count)), f"{job_id} lacks lines"
            for line, plain in ((lines[0], plains[0]), (lines[-1], plains[-1])):
                assert isinstance(line.ciphertext, bytes), f"{job_id} lacks a result"
                self._opens(line.ciphertext, plain)

        return self._asked(key, lambda: self._kms.submit(job, idempotency_key=key), judge)

    def _parts(self, key: str) -> Asked:
        return self._items(key, 600)

    def _file(self, key: str) -> Asked:
        source, plain = self._folder / key, uuid.uuid4().bytes
        target = source.with_name(f"{key}.age")
        source.write_bytes(plain)
        job = wire.JobIn(kind="encrypt", source=source.as_uri(), target=target.as_uri(), context=CONTEXT)

        def judge(_: str) -> None:
            self._opens(target.read_bytes(), plain)

        asked = self._asked(key, lambda: self._kms.submit(job, idempotency_key=key), judge)
        self._report.targets[asked.job_id] = str(target)
        return asked

    def _upload(self, key: str) -> Asked:
        plain = key.encode() * 2_000

        def send() -> wire.JobAccepted:
            return self._kms.upload_encrypt(io.BytesIO(plain), context=CONTEXT, idempotency_key=key)

        return self._asked(key, send, lambda job_id: self._opens(b"".join(self._kms.result(job_id)), plain))

    @staticmethod
    def _asked(key: str, send: Callable[[], wire.JobAccepted], judge: Callable[[str], None]) -> Asked:
        return Asked(send().job_id, key, lambda: send().job_id, judge)

    def _opens(self, ciphertext: bytes, plain: bytes) -> None:
        opened = self._kms.decrypt(ciphertext, context=CONTEXT)
        assert opened.plaintext == plain, "a result is of something else"


def main(url: str, folder: Path) -> None:
    """Run the threads until SIGTERM, and print the report."""
    stop, report = threading.Event(), Report()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    settings = ClientSettings.of(url, {})
    threads = []
    for _ in range(THREADS):
        load = Load(Client.over(settings, NotingTransport(settings, report)), report, folder)
        threads.append(threading.Thread(target=load.run, args=(stop,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(asdict(report)), flush=True)  # noqa: T201 -- as above


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
