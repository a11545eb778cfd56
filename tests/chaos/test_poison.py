"""Workers whose broker somebody writes to who means harm: on Redis and on RabbitMQ, from outside."""

import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, cast

import httpx2 as httpx
import pytest
from celery import Celery
from kombu.connection import Connection

from support import malformed_messages
from support.celery_messages import OPTIONS, body, broker_of, intake_recipient, seal
from support.malformed_messages import QUEUES, RawMessage
from support.rabbitmq import OnRabbit
from support.service import Service, b64, core_of
from support.waiting import until

MESSAGES: Final = 1000
SECRET: Final = "Zeisig-0815"  # a word that no log line may hold
JOB: Final = {"kind": "encrypt", "items": [{"plaintext": b64(b"x")}]}
LINES: Final = 200  # of a log: three a minute for each queue and reason
connect: Final[Any] = Connection  # kombu ships no types


@pytest.fixture(params=["redis", "rabbitmq"])
def poisoned(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    """A service with two worker processes that nobody shares, on either broker."""
    settings = "[kms.jobs]\nconcurrency = 2\n"
    if request.param == "redis":
        with Service(tmp_path, settings) as service:
            yield service.start()
    else:
        with OnRabbit(tmp_path, request.getfixturevalue("rabbit"), settings) as service:
            service.start()
            until(lambda: _are_declared(service), "the worker has its queues: what is sent before is lost")
            yield service


def _are_declared(service: Service) -> bool:
    with line(service) as connection:
        try:
            for queue in QUEUES:
                connection.default_channel.queue_declare(queue, passive=True)
        except connection.channel_errors:
            return False
    return True


def line(service: Service) -> Any:  # noqa: ANN401 -- kombu ships no types
    options = {} if isinstance(service, OnRabbit) else OPTIONS
    url = service.broker if isinstance(service, OnRabbit) else broker_of(service)
    return connect(url, transport_options=options)


def publish(service: Service, queue: str, messages: list[RawMessage]) -> None:
    """As any client of the broker can."""
    with line(service) as connection:
        producer = connection.Producer()
        for made in messages:
            kinds = {"content_type": made.content_type, "content_encoding": made.content_encoding}
            producer.publish(made.body, exchange="", routing_key=queue, headers=made.headers, **kinds)


def refused(service: Service, reason: str = "") -> float:
    """Messages that the worker says it refused, for any reason or for this one."""
    text = httpx.get(f"http://127.0.0.1:{service.port + 1}/metrics", trust_env=False).text
    named = f'reason="{reason}"' if reason else ""
    lines = (
        line for line in text.splitlines() if line.startswith("kms_messages_refused_total{") and named in line
    )
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def resident(pid: int) -> int:
    """Bytes of memory that were the most a process had at a time."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(found.split()[1]) * 1024


def work(service: Service) -> float:
    """Have a job done; the seconds that it took."""
    begun = time.monotonic()
    service.wait(service.submit(JOB), "succeeded")
    return time.monotonic() - begun


def waiting(service: Service) -> int:
    with line(service) as connection:
        if isinstance(service, OnRabbit):
            return sum(
                connection.default_channel.queue_declare(q, passive=True).message_count for q in QUEUES
            )
    redis = core_of(service).worker_context.store.redis
    return sum(int(redis.llen(f"kms:{queue}")) for queue in QUEUES) + int(redis.hlen("kms:unacked"))


def test_worker_that_is_poisoned_a_thousand_times_takes_the_next_job(
    poisoned: Service, record_property: Callable[[str, object], None]
) -> None:
    work(poisoned)
    worker, children = poisoned.pid("worker"), poisoned.pool_pids()
    before, sent = resident(worker), 0
    lists = {queue: list(malformed_messages.kinds(queue)) for queue in QUEUES}
    while sent < MESSAGES:
        for queue, messages in lists.items():
            publish(poisoned, queue, messages)
            sent += len(messages)
    took = work(poisoned)
    until(lambda: refused(poisoned) >= sent, "all are refused")
    after = work(poisoned)
    record_property("seconds of the job behind them, and of the next", (took, after))

    assert refused(poisoned) == sent
    assert (poisoned.pid("worker"), poisoned.pool_pids()) == (worker, children)
    assert after < 10
    assert waiting(poisoned) == 0
    assert resident(worker) - before < 64 * 1024 * 1024
    assert poisoned.output("worker").count("message.refused") < LINES
    assert "Traceback" not in poisoned.output("worker")
    assert poisoned.http.get("/readyz").status_code == 200


def test_nothing_is_decompressed(poisoned: Service) -> None:
    worker = poisoned.pid("worker")
    work(poisoned)
    before = resident(worker)
    packed = malformed_messages.bomb()
    assert len(packed) < 500_000
    for queue in ("kms.bulk", "kms.submit"):
        task = "kms.run" if queue == "kms.bulk" else "kms.submit"
        publish(
            poisoned,
            queue,
            [RawMessage(packed, malformed_messages.headers(task, compression="application/x-gzip"))],
        )
    until(lambda: refused(poisoned) == 2, "both are refused")

    assert work(poisoned) < 10
    assert resident(worker) - before < 32 * 1024 * 1024
    assert poisoned.pid("worker") == worker


def test_message_above_its_bound_is_refused_unread(poisoned: Service) -> None:
    huge = b'[["' + b"a" * 40_000_000 + b'"],{},{}]'
    publish(poisoned, "kms.submit", [RawMessage(huge, malformed_messages.headers("kms.submit"))])
    publish(poisoned, "kms.bulk", [RawMessage(huge[:1_000_000], malformed_messages.headers())])
    until(lambda: refused(poisoned) == 2, "both are refused")

    assert poisoned.output("worker").count("too_large") == 2
    assert work(poisoned) < 10


def test_options_of_celery_are_obeyed_by_nobody(poisoned: Service) -> None:
    """A wake-up is a wake-up, whatever options of Celery it has.

    Nothing else runs the job: the reaper, which would send a wake-up, is kept out by its lock.
    """
    poisoned.kill("worker")
    store = core_of(poisoned).worker_context.store
    until(lambda: store.lock("caretaker", "test", 600), "the caretaker is kept out")
    job_id = poisoned.submit(JOB)
    with line(poisoned) as connection:  # the service's own is taken away: what runs the job is the one below
        connection.default_channel.queue_purge("kms.bulk")
    if not isinstance(poisoned, OnRabbit):
        store.redis.delete("kms:kms.bulk")
    app = Celery("bare", broker=line(poisoned).as_uri(include_password=True), set_as_current=False)
    app.conf.broker_transport_options = {} if isinstance(poisoned, OnRabbit) else OPTIONS
    app.conf.task_create_missing_queue_type = "quorum"
    other = app.signature("kms.nothing", queue="kms.files")
    options: dict[str, Any] = {"eta": None, "shadow": SECRET, "chain": [dict(other)], "time_limit": 0.001}
    options |= {"headers": {"eta": "2999-01-01T00:00:00+00:00", "expires": "1999-01-01T00:00:00+00:00"}}
    options |= {"link": [dict(other)], "reply_to": SECRET, "priority": 0, "retries": 7}
    app.send_task("kms.run", (), queue="kms.bulk", argsrepr=SECRET, **options)
    poisoned.start("worker")

    poisoned.wait(job_id, "succeeded")
    time.sleep(1)  # in which what was sent would be refused: no worker has such a task
    # Neither the chain nor the link was sent. The broker may still give out what a killed worker had.
    assert refused(poisoned, "unknown_task") == 0
    assert SECRET not in poisoned.output("worker")


def test_refused_submission_leaves_nothing_but_its_task_id(poisoned: Service) -> None:
    for number, argument in enumerate((SECRET, seal(intake_recipient(poisoned), body(version=2)))):
        text = json.dumps([[argument], {}, None]).encode()
        headers = malformed_messages.headers("kms.submit", id=f"sent-{number}")
        publish(poisoned, "kms.submit", [RawMessage(text, headers)])
    publish(poisoned, "kms.submit", [RawMessage(SECRET.encode(), malformed_messages.headers("kms.submit"))])
    until(lambda: refused(poisoned) == 3, "all are refused")

    assert (refused(poisoned, "invalid_request"), refused(poisoned, "body")) == (2, 1)
    told = poisoned.output("worker")
    assert "sent-0" in told
    assert "sent-1" in told
    assert SECRET not in told


def test_what_cannot_be_sealed_needs_no_pool_process(poisoned: Service) -> None:
    """It is refused while all of them stand still."""
    work(poisoned)
    poisoned.signal_pool(signal.SIGSTOP)
    texts = [json.dumps([[argument], {}, None]).encode() for argument in ("%", b64(b"no age file")) * 50]
    publish(
        poisoned, "kms.submit", [RawMessage(text, malformed_messages.headers("kms.submit")) for text in texts]
    )
    until(lambda: refused(poisoned) == len(texts), "all are refused")
    poisoned.signal_pool(signal.SIGCONT)

    assert refused(poisoned, "invalid_request") == refused(poisoned, "not_a_ciphertext") == 50
    assert work(poisoned) < 10


@contextmanager
def held_message(service: Service) -> Iterator[str]:
    """The task id of a submission that whichever child has it holds: its intake key is a FIFO.

    A program has it open for writing, or reading it would be an error.
    """
    recipient, path = intake_recipient(service), service.settings.kms.jobs.intake_identity_path
    kept = path.rename(path.with_suffix(".kept"))
    os.mkfifo(path, 0o600)
    writer = os.open(path, os.O_RDWR)
    task_id = str(uuid.uuid4())
    text = json.dumps([[seal(recipient, body())], {}, None]).encode()
    publish(service, "kms.submit", [RawMessage(text, malformed_messages.headers("kms.submit", id=task_id))])
    try:
        yield task_id
    finally:
        os.close(writer)
        path.unlink()
        kept.rename(path)


def test_message_in_hand_when_its_worker_died_twice_is_dropped(poisoned: Service) -> None:
    """Children that are killed while they open it."""
    killed = 0
    deadline = time.monotonic() + 60
    with held_message(poisoned) as task_id:
        while not refused(poisoned, "worker_died"):
            assert time.monotonic() < deadline, poisoned.output("worker")
            if stuck := stuck_children(poisoned):
                os.kill(stuck[0], signal.SIGKILL)
                killed += 1
            time.sleep(0.1)

    assert killed == 2
    assert task_id in poisoned.output("worker")
    assert waiting(poisoned) == 0
    assert work(poisoned) < 10


def test_message_in_hand_when_all_of_a_worker_was_killed_twice_is_dropped(poisoned: Service) -> None:
    redis = core_of(poisoned).worker_context.store.redis
    with held_message(poisoned) as task_id:
        for _ in range(2):
            until(lambda: stuck_children(poisoned), "a child has the message")
            poisoned.kill("worker")
            for tag in cast("list[bytes]", redis.zrange("kms:unacked_index", 0, -1)):
                redis.zadd("kms:unacked_index", {tag: 1})  # as if ten minutes had gone by
            start_beside_fifo(poisoned)
        until(lambda: refused(poisoned, "worker_died"), "it is dropped")
    time.sleep(1)  # a second copy would be refused, too, or taken

    assert refused(poisoned) == 1
    assert task_id in poisoned.output("worker")
    assert waiting(poisoned) == 0
    assert "submit.accepted" not in poisoned.output("worker")
    assert poisoned.output("worker").count("message.came_back") == 1
    assert work(poisoned) < 10


def stuck_children(service: Service) -> list[int]:
    """Pool processes that read the FIFO."""
    return [pid for pid in service.pool_pids() if is_stuck(service, pid)]


def is_stuck(service: Service, pid: int) -> bool:
    pipe = str(service.settings.kms.jobs.intake_identity_path)
    with suppress(OSError):  # of a descriptor that was closed meanwhile, or a process that ended
        return any(str(each.readlink()) == pipe for each in Path(f"/proc/{pid}/fd").iterdir())
    return False


def start_beside_fifo(service: Service) -> None:
    """Start the worker, whose parent reads the intake key before it forks: the FIFO comes back then."""
    path, before = service.settings.kms.jobs.intake_identity_path, service.output("worker").count(" ready.")
    fifo = path.rename(path.with_suffix(".fifo"))
    shutil.copy2(path.with_suffix(".kept"), path)
    service.spawn("worker")
    pid = service.pid("worker")
    until(Path(f"/proc/{pid}/task/{pid}/children").read_text, "the worker forks", poll_s=0.002)
    fifo.rename(path)
    until(lambda: service.output("worker").count(" ready.") > before, "the worker is ready")


# -- many messages on Redis -----------------------------------------------------------


def element(queue: str, task: str, **info: object) -> bytes:
    """A message as kombu puts it into a list of Redis."""
    envelope = {
        "body": json.dumps([[b64(b"age-encryption.org/v1\n")], {}, None]),
        "headers": malformed_messages.headers(task),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue, **info},
        },
    }
    return json.dumps(envelope).encode()


def test_flood_of_refused_messages_is_work_for_the_watchdog(tmp_path: Path) -> None:
    with Service(tmp_path, "[kms.jobs]\nconcurrency = 1\n") as service:
        service.constants = {"kms_core.jobs.execution.attendance.PATIENCE_S": 5}
        service.start()
        worker, redis = service.pid("worker"), core_of(service).worker_context.store.redis
        end = time.monotonic() + 15
        while time.monotonic() < end:
            if redis.llen("kms:kms.bulk") < 5_000:
                redis.lpush("kms:kms.bulk", *[element("kms.bulk", "kms.nothing")] * 5_000)
            assert service.output("worker").count("worker.takes_nothing") == 0
            time.sleep(0.01)
        redis.delete("kms:kms.bulk")

        work(service)
        assert service.pid("worker") == worker
        assert refused(service) > 500


def test_messages_that_come_back_are_logged_within_a_bound(tmp_path: Path) -> None:
    with Service(tmp_path, "[kms.jobs]\nconcurrency = 1\n") as service:
        redis = core_of(service.start()).worker_context.store.redis
        for _ in range(20):
            redis.lpush("kms:kms.submit", element("kms.submit", "kms.submit", redelivered=True))
        until(lambda: refused(service) == 20, "all are refused by the pool")

        assert service.output("worker").count("message.came_back") == 3
