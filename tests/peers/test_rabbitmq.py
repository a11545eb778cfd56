"""RabbitMQ as the broker; state stays in Valkey."""

import json
import uuid
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import cast

import pytest
from celery import Celery
from kombu.connection import Connection

from kms_core.jobs.spec import QUEUES
from support.celery_messages import JOB, body, intake_recipient, run_example, seal
from support.rabbitmq import OnRabbit
from support.service import Json, Service, b64, core_of
from support.waiting import until

JOBS = 200


def ended(service: Service) -> Counter[str]:
    stream = cast(
        "list[tuple[bytes, dict[bytes, bytes]]]",
        core_of(service).worker_context.store.redis.xrange("kms:events"),
    )
    kinds = (fields[b"type"].decode().removeprefix("kms.job.") for _, fields in stream)
    return Counter(kind for kind in kinds if kind in {"succeeded", "failed"})


def submit_by_message(service: OnRabbit, queue_type: str) -> str:
    """As docs/celery.md says."""
    app = Celery("workflow", broker=service.broker, set_as_current=False)
    app.conf.task_create_missing_queue_type = queue_type
    job_id = str(uuid.uuid4())
    message = seal(intake_recipient(service), body(job_id=job_id))
    app.send_task("kms.submit", (message,), queue="kms.submit", argsrepr="-", ignore_result=True)
    app.close()
    return job_id


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
def test_jobs_outlive_a_killed_worker(tmp_path: Path, rabbit: str, queue_type: str) -> None:
    settings = f'[kms.redis]\nbroker_queue_type = "{queue_type}"\n[kms.jobs]\nlease_s = 2\n'
    with OnRabbit(tmp_path, rabbit, settings) as service:
        service.start()
        for number in range(JOBS):
            service.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"%d" % number)}] * 20})
            if number == JOBS // 2:
                service.kill("worker")
                service.spawn("worker")
        by_message = submit_by_message(service, queue_type)
        until(lambda: ended(service)["succeeded"] == JOBS + 1, "all jobs have ended")

        assert ended(service) == {"succeeded": JOBS + 1}
        assert "ciphertext" in service.lines(by_message)[0]
        until(lambda: service.get("/status").json()["queue_depth"] == 0, "no message is left")
        assert "exception" not in service.output("worker").lower()
    other = None if queue_type == "quorum" else {"x-queue-type": "quorum"}
    with (
        Connection(rabbit) as connection,  # type: ignore[no-untyped-call]  # as above
        pytest.raises(connection.channel_errors, match="x-queue-type"),
    ):
        connection.default_channel.queue_declare(QUEUES[0], durable=True, auto_delete=False, arguments=other)


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
def test_the_example_hands_a_job_to_rabbitmq(tmp_path: Path, rabbit: str, queue_type: str) -> None:
    options = [] if queue_type == "quorum" else ["--queue-type", queue_type]
    with OnRabbit(tmp_path, rabbit, f'[kms.redis]\nbroker_queue_type = "{queue_type}"\n') as service:
        service.start()
        ran = run_example(service, JOB, "--service", service.url, *options)

    assert ran.returncode == 0, ran.stderr
    assert "ciphertext" in json.loads(ran.stdout)


@pytest.mark.parametrize("how", ["queue", "exclusive", "exchange", "consumer"])
def test_what_is_not_as_it_should_be_is_told_and_waited_for(tmp_path: Path, rabbit: str, how: str) -> None:
    """Celery alone asks some fifty times a second, and writes as many lines."""
    settings = '[kms.redis]\nbroker_queue_type = "classic"\n' if how == "consumer" else ""
    with Connection(rabbit) as connection:  # type: ignore[no-untyped-call]  # as above
        channel, name = connection.default_channel, QUEUES[0]
        if how == "exchange":
            channel.exchange_delete(name)
            channel.exchange_declare(name, "fanout", durable=True, auto_delete=False)
        else:
            channel.queue_declare(name, durable=True, auto_delete=False, exclusive=how == "exclusive")
        if how == "consumer":
            channel.basic_consume(name, consumer_tag="others", callback=lambda _: None, exclusive=True)
        with OnRabbit(tmp_path, rabbit, settings) as service:
            service.start("api")
            job = service.submit({"kind": "encrypt", "items": [{"plaintext": b64(b"x")}]})
            service.spawn("worker")
            until(lambda: len(differing(service)) >= 3, "it is told")
            told = differing(service)
            channel.basic_cancel("others")
            channel.queue_delete(name)
            channel.exchange_delete(name)

            service.wait(job, "succeeded")
    assert all("kms.bulk" in event["error"] and "broker_queue_type" in event["hint"] for event in told)
    first, third = (datetime.fromisoformat(told[number]["time"]) for number in (0, 2))
    assert third - first > timedelta(seconds=5)


def differing(service: Service) -> list[Json]:
    lines = service.output("worker").splitlines()
    return [json.loads(line) for line in lines if '"broker.queue_differs"' in line]
