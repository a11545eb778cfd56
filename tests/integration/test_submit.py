"""Sealed Celery messages against the real thing: a bare Celery client, pyrage or age, a broker, a worker."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import redis
from celery import Celery
from kombu.connection import Connection

from kms_cli.valkey import EmbeddedValkey
from kms_core.errors import (
    ConfigurationError,
    IdempotencyConflict,
    InvalidRequest,
    JobsUnavailable,
    PathRefused,
    TooLarge,
    UnknownKey,
)
from kms_core.jobs import intake
from kms_core.jobs.build import Core, build_intake
from kms_core.jobs.intake import Intake
from kms_core.wire import PREFIX
from kms_worker import kombu_ack
from peers import program
from service import B64_CANARY, CANARY, Service, b64, core_of, unb64, until
from submissions import JOB, body, in_s, seal

ROOT: Final = Path(__file__).parents[2]
EXAMPLE: Final = ROOT / "examples/workflow/submit.py"
OPTIONS: Final = {"global_keyprefix": "kms:"}
connect: Final[Any] = Connection  # kombu ships no types
PLAIN: Final = [f"{CANARY} {number}" for number in range(1200)]


# -- accepting, in this process --------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path: Path, redis_url: str) -> Service:
    return Service(tmp_path, "", redis_url)


@pytest.fixture
def core(install: Service) -> Core:
    return core_of(install)


@pytest.fixture
def recipient(install: Service) -> str:
    return str(intake.recipient(install.settings.kms.jobs.intake_identity_path))


def opened(install: Service, core: Core) -> Intake:
    made = build_intake(install.settings, core.desk)
    assert made is not None
    return made


@pytest.fixture
def desk(install: Service, core: Core) -> Intake:
    return opened(install, core)


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file: its inode and what is in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_ino, path.read_bytes()) for path in files}


def test_a_message_becomes_a_job_of_the_submitters_name(desk: Intake, core: Core, recipient: str) -> None:
    asked = body()
    job_id = desk.accept(seal(recipient, asked), "worker/1")
    accepted = core.desk.store.accepted(job_id)

    assert job_id == asked["job_id"]
    assert (accepted.principal, accepted.tenant, accepted.credential) == ("celery", "default", "none")
    assert (accepted.kind, accepted.items, accepted.context) == ("encrypt", 1, (("env", "prod"),))
    assert accepted.request_id == job_id
    assert core.desk.store.get(job_id, "default").state == "queued"


def test_a_replay_changes_nothing(desk: Intake, core: Core, install: Service, recipient: str) -> None:
    message = seal(recipient, body())
    job_id = desk.accept(message, "worker/1")
    before, job = content(install.spool), core.desk.store.get(job_id, "default")

    for worker in ("worker/1", "worker/2"):
        assert desk.accept(message, worker) == job_id
    assert content(install.spool) == before
    assert core.desk.store.get(job_id, "default") == job
    assert core.desk.store.open_counts()["queued"] == 1


def test_a_message_sealed_anew_is_a_replay_too(desk: Intake, core: Core, recipient: str) -> None:
    asked = body(JOB | {"context": {"b": "2", "a": "1"}})
    again = asked | {"expires_at": in_s(900), "job": JOB | {"context": {"a": "1", "b": "2"}}}

    assert desk.accept(seal(recipient, asked), "worker/1") == desk.accept(seal(recipient, again), "worker/2")
    assert core.desk.store.open_counts()["queued"] == 1


OTHERS: Final = {
    "item": JOB | {"items": [{"plaintext": b64(b"other")}]},
    "context": JOB | {"context": "env=dev"},
    "new context": JOB | {"new_context": "env=dev"},
    "kind": {"kind": "decrypt", "items": [{"ciphertext": b64(b"x")}]},
    "term of the result": JOB | {"ttl_s": 60},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_job_under_a_used_id_is_refused(
    desk: Intake, core: Core, install: Service, recipient: str, other: dict[str, object]
) -> None:
    asked = body()
    job_id = desk.accept(seal(recipient, asked), "worker/1")
    before, accepted = content(install.spool), core.desk.store.accepted(job_id)

    with pytest.raises(IdempotencyConflict):
        desk.accept(seal(recipient, asked | {"job": other}), "worker/1")
    assert content(install.spool) == before
    assert core.desk.store.accepted(job_id) == accepted


def test_a_replay_does_not_revive_what_has_ended(desk: Intake, core: Core, recipient: str) -> None:
    message = seal(recipient, body())
    job_id = desk.accept(message, "worker/1")
    core.desk.store.cancel(job_id, "default")

    assert desk.accept(message, "worker/1") == job_id
    assert core.desk.store.get(job_id, "default").state == "cancelled"


def test_the_record_outlives_the_message(tmp_path: Path, redis_url: str) -> None:
    install = Service(tmp_path, "[kms.jobs]\nresult_ttl_s = 60\n", redis_url)
    core = core_of(install)
    recipient = str(intake.recipient(install.settings.kms.jobs.intake_identity_path))
    asked = body(JOB | {"ttl_s": 60}, expires_at=in_s(3600))
    job_id = opened(install, core).accept(seal(recipient, asked), "worker/1")
    core.desk.store.cancel(job_id, "default")
    client = redis.Redis.from_url(redis_url)

    assert int(str(client.ttl(f"kms:job:{job_id}"))) > 3600


def test_a_message_in_other_hands_is_left_to_them(desk: Intake, core: Core, recipient: str) -> None:
    asked = body()
    core.desk.store.lock(f"submit:{asked['job_id']}", "worker/2", 60)

    with pytest.raises(JobsUnavailable):
        desk.accept(seal(recipient, asked), "worker/1")
    assert not core.desk.store.exists(str(asked["job_id"]))


def test_many_workers_at_once_make_one_whole_job(install: Service, recipient: str) -> None:
    items = [{"plaintext": b64(text.encode())} for text in PLAIN]
    asked = body(JOB | {"items": items})
    message = seal(recipient, asked)
    outcomes: list[str] = []

    def take(number: int) -> None:
        try:
            outcomes.append(opened(install, core_of(install)).accept(message, f"worker/{number}"))
        except JobsUnavailable:
            outcomes.append("again")

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    job_id = str(asked["job_id"])

    assert job_id in outcomes
    assert set(outcomes) <= {job_id, "again"}
    assert core_of(install).desk.store.open_counts()["queued"] == 1
    assert core_of(install).desk.store.accepted(job_id).items == len(PLAIN)


REFUSED: Final = {
    "unknown key": (JOB | {"key_id": "payroll"}, UnknownKey),
    "upload": ({"kind": "encrypt"}, InvalidRequest),
    "items and source": (JOB | {"source": "file:///x", "target": "file:///y"}, InvalidRequest),
    "no item": (JOB | {"items": []}, InvalidRequest),
    "item of another kind": (JOB | {"kind": "decrypt"}, InvalidRequest),
    "too many items": (JOB | {"items": [{"plaintext": ""}] * 10_001}, TooLarge),
    "outside": ({"kind": "encrypt", "source": "file:///etc/passwd", "target": "file:///tmp/x"}, PathRefused),
}


@pytest.mark.parametrize(("job", "error"), REFUSED.values(), ids=REFUSED)
def test_what_the_service_would_refuse_over_http_is_refused(
    desk: Intake, install: Service, recipient: str, job: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        desk.accept(seal(recipient, body(job)), "worker/1")
    assert content(install.spool) == {}


def test_no_job_may_reach_the_key(install: Service, tmp_path: Path) -> None:
    root = tmp_path / "root"
    install.config.write_text(
        f'[kms]\n[kms.jobs]\nroots = ["{root}"]\nintake_identity_path = "{root}/intake.key"\n'
    )

    with pytest.raises(ConfigurationError, match="overlaps kms.jobs.intake_identity_path"):
        _ = install.settings


def test_a_replay_needs_no_source_any_more(desk: Intake, install: Service, recipient: str) -> None:
    source = install.files / "a.txt"
    source.write_text(CANARY)
    job = {"kind": "encrypt", "source": f"file://{source}", "target": f"file://{source}.age"}
    message = seal(recipient, body(job))
    job_id = desk.accept(message, "worker/1")
    source.unlink()

    assert desk.accept(message, "worker/1") == job_id


# -- through the broker ----------------------------------------------------------------------------------


def broker_of(service: Service) -> str:
    return service.settings.kms.redis.broker_url


def whom(service: Service) -> str:
    return str(service.get("/intake").json()["recipient"])


def send(service: Service, message: object, **options: Any) -> str:  # noqa: ANN401 -- Celery's own keywords
    """A bare Celery client, which hides nothing by itself."""
    app = Celery("workflow", broker=broker_of(service), set_as_current=False)
    app.conf.broker_transport_options = OPTIONS
    with app.connection_for_write() as connection:
        return str(
            app.send_task("kms.submit", (message,), queue="kms.submit", connection=connection, **options).id
        )


def received(service: Service, queue: str) -> list[Any]:
    """The arguments of the one message that arrives in a queue of the workflow's own."""
    connection = connect(broker_of(service), transport_options=OPTIONS)
    with connection, connection.SimpleQueue(queue) as simple:
        message = simple.get(timeout=60)
        message.ack()
        args: list[Any] = message.payload[0]
        return args


def results(service: Service, job_id: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in service.result(job_id).splitlines()]


def decrypted(service: Service, ciphertexts: list[str], context: str) -> list[str]:
    items = [{"ciphertext": ciphertext} for ciphertext in ciphertexts]
    job_id = service.submit({"kind": "decrypt", "context": context, "items": items})
    service.wait(job_id, "succeeded")
    return [unb64(line["plaintext"]).decode() for line in results(service, job_id)]


def test_bulk_items_make_the_round_trip(service: Service) -> None:
    asked = body(JOB | {"items": [{"plaintext": b64(text.encode())} for text in PLAIN]})
    message = seal(whom(service), asked)
    for _ in range(3):
        send(service, message)
    job_id = str(asked["job_id"])
    until(lambda: service.get(f"/jobs/{job_id}").status_code == 200, "a worker has taken the message")
    service.wait(job_id, "succeeded")

    ciphertexts = [line["ciphertext"] for line in results(service, job_id)]
    assert decrypted(service, ciphertexts, "env=prod") == PLAIN


def test_stock_age_makes_a_message(service: Service) -> None:
    asked = body()
    command = [program("age"), "-r", whom(service)]
    sealed = subprocess.run(command, input=json.dumps(asked).encode(), capture_output=True, check=True)
    send(service, base64.b64encode(sealed.stdout).decode())

    until(
        lambda: service.get(f"/jobs/{asked['job_id']}").status_code == 200, "a worker has taken the message"
    )
    service.wait(str(asked["job_id"]), "succeeded")


def test_link_fires_with_the_job_id_when_the_message_is_taken(service: Service) -> None:
    asked, queue = body(), f"workflow-{uuid.uuid4()}"
    app = Celery(set_as_current=False)
    link = app.signature("workflow.taken", queue=queue)
    send(
        service, seal(whom(service), asked), link=link, link_error=app.signature("workflow.not", queue=queue)
    )

    assert received(service, queue) == [asked["job_id"]]


def test_link_error_fires_with_the_task_id_when_it_is_refused(service: Service) -> None:
    queue = f"workflow-{uuid.uuid4()}"
    app = Celery(set_as_current=False)
    link = app.signature("workflow.taken", queue=queue)
    error = app.signature("workflow.not", queue=queue)
    message = seal(whom(service), body(token="stolen"))
    task_id = send(service, message, link=link, link_error=error)

    assert received(service, queue) == [task_id]


def test_intake_serves_the_recipient_and_nothing_else(service: Service) -> None:
    path = service.settings.kms.jobs.intake_identity_path
    answer = service.get("/intake")

    assert answer.json().keys() == {"recipient", "key_version", "version"}
    assert answer.json()["recipient"] == str(intake.recipient(path))
    assert answer.json()["version"] == 1
    assert oct(path.stat().st_mode & 0o777) == "0o600"


def test_intake_without_a_key_is_404_and_with_one_again_it_answers(strict: Service, tmp_path: Path) -> None:
    path = strict.settings.kms.jobs.intake_identity_path
    path.rename(tmp_path / "intake.key")
    without = strict.get("/intake")
    (tmp_path / "intake.key").rename(path)

    assert (without.status_code, without.json()["code"]) == (404, "unknown_key")
    assert strict.get("/intake").status_code == 200


# -- what nobody may see -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose Redis nobody else writes to: all that it was ever told is in its log on disk."""
    with Service(tmp_path_factory.mktemp("own"), '[kms.log]\nlevel = "debug"\n') as running:
        yield running.start()


def told_to_redis(service: Service) -> bytes:
    return b"".join(
        path.read_bytes() for path in service.valkey.place.data_dir.rglob("*aof*") if path.is_file()
    )


def test_redis_and_logs_see_no_plaintext(own: Service) -> None:
    asked = body()
    send(own, seal(whom(own), asked))
    until(lambda: own.get(f"/jobs/{asked['job_id']}").status_code == 200, "a worker has taken the message")
    own.wait(str(asked["job_id"]), "succeeded")

    told, logged = told_to_redis(own), own.output()
    assert b"kms.submit" in told
    assert "submit.accepted" in logged
    for secret in (CANARY, B64_CANARY, "env=prod"):
        assert secret.encode() not in told
        assert secret not in logged


def test_the_argument_is_not_logged_whatever_it_is(own: Service) -> None:
    word = "Zeisig-0815"  # sent in the open: it is in Redis, which the other canary never is
    sealed = seal(whom(own), body(token=word))
    for message in (word, {word: 1}, sealed):
        send(own, message)
    until(lambda: own.output("worker").count("submit.refused") >= 3, "all are refused")

    logged = own.output()
    assert word not in logged
    assert sealed[:40] not in logged
    assert "unauthenticated" in logged


# -- when something is away --------------------------------------------------------------------------------


def test_a_message_waits_for_the_store_and_is_taken_once(
    tmp_path: Path, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> None:
    broker = valkey.place.broker_url_of(next(database_numbers))
    with Service(tmp_path, f'[kms.redis]\nbroker_url = "{broker}"\n') as service:
        service.start()
        asked = body()
        message = seal(whom(service), asked)
        os.kill(service.valkey.pid, signal.SIGKILL)
        send(service, message)
        until(lambda: service.output("worker").count("submit.postponed") >= 2, "the message has come back")
        service.valkey.start()
        job_id = str(asked["job_id"])
        until(lambda: service.get(f"/jobs/{job_id}").status_code == 200, "a worker has taken the message")
        service.wait(job_id, "succeeded")

        assert service.output("worker").count("submit.accepted") == 1
        assert "Traceback" not in service.output("worker")


def test_a_worker_without_a_key_leaves_the_messages_and_says_so_once(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, "", redis_url) as service:
        recipient = str(intake.recipient(service.settings.kms.jobs.intake_identity_path))
        service.settings.kms.jobs.intake_identity_path.unlink()
        service.start("worker")
        send(service, seal(recipient, body()))
        store = core_of(service).desk.store
        until(lambda: store.workers() == 1, "the worker is at work")
        time.sleep(1.0)  # in which it would take the message

        assert redis.Redis.from_url(redis_url).llen("kms:kms.submit") == 1
        assert service.output("worker").count("submit.off") == 1


def test_a_rejection_that_fails_gives_its_credit_back(tmp_path: Path) -> None:
    kombu_ack.install()
    with EmbeddedValkey(tmp_path) as server:
        connection = connect(server.broker_url, transport_options=OPTIONS)
        with connection.SimpleQueue("kms.test") as simple:
            simple.put("x")
            message = simple.get(timeout=10)
            qos = message.channel.qos
            qos.prefetch_count = 1
            assert not qos.can_consume()
            os.kill(server.pid, signal.SIGKILL)

            with pytest.raises(connection.connection_errors):
                message.requeue()
            assert qos.can_consume()


# -- the example --------------------------------------------------------------------------------------------


def run_example(service: Service, job: object, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", str(EXAMPLE), "-", "--broker", broker_of(service), *options],
        input=json.dumps(job),
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_example_stands_alone() -> None:
    assert "import kms" not in EXAMPLE.read_text()
    assert "from kms" not in EXAMPLE.read_text()


@pytest.mark.parametrize("by_events", [False, True], ids=["by HTTP", "by events"])
def test_the_example_brings_items_home(service: Service, *, by_events: bool) -> None:
    events = ("--events", service.settings.kms.redis.url) if by_events else ()
    ran = run_example(service, JOB, "--service", service.url, *events)

    assert ran.returncode == 0, ran.stderr
    ciphertext = json.loads(ran.stdout)["ciphertext"]
    assert decrypted(service, [ciphertext], "env=prod") == [CANARY]


def test_the_example_needs_no_http(service: Service) -> None:
    (service.files / "report.txt").write_text(CANARY)
    job = {
        "kind": "encrypt",
        "source": f"file://{service.files}/report.txt",
        "target": f"file://{service.files}/report.age",
        "context": "env=prod",
    }
    recipient = str(intake.recipient(service.settings.kms.jobs.intake_identity_path))
    ran = run_example(service, job, "--recipient", recipient, "--events", service.settings.kms.redis.url)

    assert ran.returncode == 0, ran.stderr
    sealed = (service.files / "report.age").read_bytes()
    assert decrypted(service, [b64(sealed)], "env=prod") == [CANARY]


def test_the_example_tells_a_failure(service: Service) -> None:
    job = {"kind": "decrypt", "items": [{"ciphertext": b64(b"no ciphertext")}]}
    ran = run_example(service, job, "--service", service.url)

    assert ran.returncode == 1
    assert "failed items_failed" in ran.stderr
    assert json.loads(ran.stdout)["error"]["code"] == "not_a_ciphertext"


def test_the_documents_say_what_there_is(service: Service) -> None:
    text = (ROOT / "docs/celery.md").read_text()

    assert f"GET {PREFIX}/intake" in text
    assert httpx.get(f"{service.url}{PREFIX}/intake").status_code == 200
