"""Sealed Celery messages against the real thing: a bare Celery client, pyrage or age, a broker, a worker."""

import base64
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import pytest
import redis
from celery import Celery
from kombu.connection import Connection

from kms_core.jobs.store.heartbeats import live_workers
from kms_core.jobs.submission import celery_intake
from kms_core.settings.redis_urls import for_celery
from support.celery_messages import (
    JOB,
    OPTIONS,
    PLAIN,
    body,
    broker_of,
    decrypted,
    intake_recipient,
    seal,
    send,
)
from support.programs import program
from support.service import B64_CANARY, CANARY, Service, b64, core_of
from support.waiting import until

connect: Final[Any] = Connection  # kombu ships no types


def received(service: Service, queue: str) -> list[Any]:
    """The arguments of the one message that arrives in a queue of the workflow's own."""
    connection = connect(broker_of(service), transport_options=OPTIONS)
    with connection, connection.SimpleQueue(queue) as simple:
        message = simple.get(timeout=60)
        message.ack()
        args: list[Any] = message.payload[0]
        return args


def ended(service: Service, asked: Mapping[str, object]) -> str:
    """The id of the job of a message, once a worker has taken it and it has succeeded."""
    job_id = str(asked["job_id"])
    until(lambda: service.get(f"/jobs/{job_id}").status_code == 200, "a worker has taken the message")
    service.wait(job_id, "succeeded")
    return job_id


def test_bulk_items_make_the_round_trip(service: Service) -> None:
    asked = body(JOB | {"items": [{"plaintext": b64(text.encode())} for text in PLAIN]})
    message = seal(intake_recipient(service), asked)
    for _ in range(3):
        send(service, message)

    ciphertexts = [line["ciphertext"] for line in service.lines(ended(service, asked))]
    assert decrypted(service, ciphertexts, "env=prod") == PLAIN


def test_stock_age_makes_a_message(service: Service) -> None:
    asked = body()
    command = [program("age"), "-r", intake_recipient(service)]
    sealed = subprocess.run(command, input=json.dumps(asked).encode(), capture_output=True, check=True)
    send(service, base64.b64encode(sealed.stdout).decode())

    assert ended(service, asked)


def test_link_fires_with_the_job_id_when_the_message_is_taken(service: Service) -> None:
    asked, queue = body(), f"workflow-{uuid.uuid4()}"
    app = Celery(set_as_current=False)
    link = app.signature("workflow.taken", queue=queue)
    send(
        service,
        seal(intake_recipient(service), asked),
        link=link,
        link_error=app.signature("workflow.not", queue=queue),
    )

    assert received(service, queue) == [asked["job_id"]]


@pytest.mark.parametrize(
    ("sealed", "options"),
    [(True, {}), (False, {}), (True, {"chain": [Celery(set_as_current=False).signature("workflow.after")]})],
)
def test_link_error_fires_with_the_task_id_when_it_is_refused(
    service: Service, options: dict[str, object], *, sealed: bool
) -> None:
    queue = f"workflow-{uuid.uuid4()}"
    app = Celery(set_as_current=False)
    link = app.signature("workflow.taken", queue=queue)
    error = app.signature("workflow.not", queue=queue)
    asked = body() if options else body(version=2)
    message = seal(intake_recipient(service), asked) if sealed else "%"
    task_id = send(service, message, link=link, link_error=error, **options)

    assert received(service, queue) == [task_id]
    assert service.get(f"/jobs/{asked['job_id']}").status_code == 404


def test_intake_serves_the_recipient_and_nothing_else(service: Service) -> None:
    path = service.settings.kms.jobs.intake_identity_path
    answer = service.get("/intake")

    assert answer.json().keys() == {"recipient", "key_version", "version"}
    assert answer.json()["recipient"] == str(celery_intake.recipient(path))
    assert answer.json()["version"] == 1
    assert oct(path.stat().st_mode & 0o777) == "0o600"


def test_intake_without_a_key_is_404_and_with_one_again_it_answers(no_redis: Service, tmp_path: Path) -> None:
    path = no_redis.settings.kms.jobs.intake_identity_path
    path.rename(tmp_path / "intake.key")
    without = no_redis.get("/intake")
    (tmp_path / "intake.key").rename(path)

    assert (without.status_code, without.json()["code"]) == (404, "unknown_key")
    assert no_redis.get("/intake").status_code == 200


# -- what nobody may see -----------------------------------------------------------------------------------


def test_redis_and_logs_see_no_plaintext(tmp_path: Path) -> None:
    """All that the server was ever told is in its log on disk. Of refusals: tests/chaos/test_poison.py."""
    with Service(tmp_path, '[kms.log]\nlevel = "debug"\n') as own:
        asked = body()
        send(own.start(), seal(intake_recipient(own), asked))
        ended(own, asked)

        told = b"".join(path.read_bytes() for path in own.valkey.files.data_dir.rglob("*aof*"))
        assert b"kms.submit" in told
        assert "submit.accepted" in own.output()
        for secret in (CANARY, B64_CANARY, "env=prod"):
            assert secret.encode() not in told
            assert secret not in own.output()


# -- when something is away --------------------------------------------------------------------------------


def test_a_message_waits_for_the_store_and_is_taken_once(tmp_path: Path, redis_url: str) -> None:
    broker = for_celery(redis_url)
    with Service(tmp_path, f'[kms.redis]\nbroker_url = "{broker}"\n') as service:
        service.start()
        asked = body()
        message = seal(intake_recipient(service), asked)
        os.kill(service.valkey.pid, signal.SIGKILL)
        send(service, message)
        until(lambda: service.output("worker").count("submit.postponed") >= 2, "the message has come back")
        service.valkey.start()
        ended(service, asked)

        assert service.output("worker").count("submit.accepted") == 1
        assert "Traceback" not in service.output("worker")


def test_a_worker_without_a_key_leaves_the_messages_and_says_so_once(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, "", redis_url) as service:
        recipient = str(celery_intake.recipient(service.settings.kms.jobs.intake_identity_path))
        service.settings.kms.jobs.intake_identity_path.unlink()
        service.start("worker")
        send(service, seal(recipient, body()))
        store = core_of(service).submitter.store
        until(lambda: len(live_workers(store)) == 1, "the worker is at work")
        time.sleep(1.0)  # in which it would take the message

        assert redis.Redis.from_url(redis_url).llen("kms:kms.submit") == 1
        assert service.output("worker").count("submit.off") == 1


def test_message_that_a_killed_worker_had_in_hand_is_taken_within_the_hour(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        service.start("api")
        asked = body()
        send(service, seal(intake_recipient(service), asked))
        store = core_of(service).worker_context.store
        message = json.loads(cast("bytes", store.redis.rpop("kms:kms.submit")))
        properties = message["properties"]
        where = properties["delivery_info"]
        held = [message, where["exchange"], where["routing_key"]]  # as kombu notes what a worker has taken
        store.redis.hset("kms:unacked", properties["delivery_tag"], json.dumps(held))
        store.redis.zadd("kms:unacked_index", {properties["delivery_tag"]: time.time() - 3600})
        service.start("worker")

        ended(service, asked)
