"""The intake by itself: what is no message is refused for good, before Redis or the disk are asked."""

import base64
import inspect
import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import pyrage
import pytest
from celery import Celery
from celery.exceptions import Ignore, Reject
from kombu.connection import Connection
from pyrage import x25519

from kms_core.age import header, mlkem768x25519, stream
from kms_core.age.armor import VERSION_LINE
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.container import build_intake
from kms_core.envelope import sealing
from kms_core.envelope.binding import KeyRef
from kms_core.jobs.submission import celery_intake
from kms_core.jobs.submission.celery_intake import Intake, Submission
from kms_core.shared_time import SharedTime
from kms_protocol.context import Context
from kms_protocol.errors import (
    BackendUnavailable,
    ConfigurationError,
    DecryptFailed,
    InvalidRequest,
    JobExpired,
    JobsUnavailable,
    KmsError,
    NotACiphertext,
    TooLarge,
    UnknownKey,
)
from kms_worker import submit as submit_task
from support.celery_messages import JOB, body, in_s, seal
from support.service import B64_CANARY, CANARY, Service, core_of

SCHEMA: Final = Path(__file__).parents[4] / "docs/schemas/kms.submit.v1.json"
LIMIT: Final = 4000
WORKER: Final = "worker/1"
connect: Final[Any] = Connection  # kombu ships no types


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    """An install whose Redis is away: only what asks nobody can be decided."""
    monkeypatch.setattr(celery_intake, "JSON_BYTES", LIMIT)
    return Service(tmp_path, redis="unix:///nonexistent/valkey.sock")


@pytest.fixture
def path(service: Service) -> Path:
    return service.settings.kms.jobs.intake_identity_path


@pytest.fixture
def recipient(path: Path) -> str:
    return str(celery_intake.recipient(path))


def opened(service: Service) -> Intake:
    made = build_intake(service.settings, core_of(service).submitter)
    assert made is not None
    return made


@pytest.fixture
def intake(service: Service) -> Intake:
    return opened(service)


def refusal(intake: Intake, message: object, error: type[KmsError]) -> None:
    with pytest.raises(error) as caught:
        intake.accept(message, WORKER)
    assert type(caught.value) is error
    assert CANARY not in str(caught.value)
    assert B64_CANARY not in str(caught.value)


def taken(intake: Intake, message: str) -> None:
    """Nothing is wrong with the message: next, Redis is asked."""
    refusal(intake, message, JobsUnavailable)


def test_a_message_made_by_pyrage_opens(intake: Intake, recipient: str) -> None:
    """One of several recipients may be the service."""
    other = str(x25519.Identity.generate().to_public())

    taken(intake, seal(recipient, body()))
    taken(intake, seal(other, body(), [recipient]))


NO_FILES: Final[dict[str, tuple[object, type[KmsError]]]] = {
    "null": (None, InvalidRequest),
    "int": (7, InvalidRequest),
    "bytes": (b"x", InvalidRequest),
    "list": (["x"], InvalidRequest),
    "dict": ({"x": "y"}, InvalidRequest),
    "not base64": (CANARY, InvalidRequest),
    "not ascii": ("Kanarienvögel", InvalidRequest),
    "line end": ("YWdl\n", InvalidRequest),
    "empty": ("", NotACiphertext),
    "not age": (B64_CANARY, NotACiphertext),
    "header only": (base64.b64encode(VERSION_LINE).decode(), DecryptFailed),
    "long, and not decoded": ("\N{SNOWMAN}" * 1_000_000, TooLarge),
}


@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_age_file_is_refused(intake: Intake, what: str) -> None:
    refusal(intake, *NO_FILES[what])


def test_a_message_to_somebody_else_is_refused(intake: Intake) -> None:
    refusal(intake, seal(str(x25519.Identity.generate().to_public()), body()), DecryptFailed)


def test_a_message_under_a_passphrase_is_refused(intake: Intake) -> None:
    sealed = pyrage.passphrase.encrypt(json.dumps(body()).encode(), "hunter2")

    refusal(intake, base64.b64encode(sealed).decode(), DecryptFailed)


def test_a_ciphertext_of_the_service_is_no_message(intake: Intake, path: Path) -> None:
    backend = AgeBackend(KeyFiles(path))
    key = KeyRef("default", "intake", backend.versions()[-1].version, backend.name)
    sealed = sealing.seal(json.dumps(body()).encode(), [(backend, key)], Context())

    refusal(intake, base64.b64encode(sealed).decode(), DecryptFailed)


def flipped(sealed: bytes, at: int) -> bytes:
    return sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at:][1:]


CHANGES: Final[dict[str, Callable[[bytes], bytes]]] = {
    "stanza": lambda sealed: flipped(sealed, 30),
    "stanza body": lambda sealed: flipped(sealed, 80),
    "payload": lambda sealed: flipped(sealed, -20),
    "tag": lambda sealed: flipped(sealed, -1),
    "a byte less": lambda sealed: sealed[:-1],
    "less than a tag": lambda sealed: sealed[:-40],
    "nearly nothing": lambda sealed: sealed[:60],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tampered_or_cut_message_is_refused(intake: Intake, recipient: str, change: str) -> None:
    sealed = base64.b64decode(seal(recipient, body()))

    refusal(intake, base64.b64encode(CHANGES[change](sealed)).decode(), DecryptFailed)


# -- size ---------------------------------------------------------------------------------------------


def padded(size: int) -> bytes:
    """A message of so many bytes of JSON."""
    return json.dumps(body()).encode().ljust(size)


@pytest.mark.parametrize(("size", "error"), [(LIMIT, JobsUnavailable), (LIMIT + 1, TooLarge)], ids=str)
def test_json_is_bounded_to_the_byte(
    intake: Intake, recipient: str, size: int, error: type[KmsError]
) -> None:
    refusal(intake, seal(recipient, padded(size)), error)


@pytest.mark.parametrize("size", [65, 500], ids=["stanzas", "bytes"])
def test_headers_are_bounded(intake: Intake, recipient: str, size: int) -> None:
    refusal(intake, seal(recipient, b"", [recipient] * size), TooLarge)


# -- shape --------------------------------------------------------------------------------------------


def changed_item(**fields: object) -> Mapping[str, object]:
    return JOB | {"items": [{"plaintext": B64_CANARY, **fields}]}


NOT_AS_DESCRIBED: Final[dict[str, bytes | dict[str, object]]] = {
    "not JSON": CANARY.encode(),
    "not UTF-8": b'{"version": 1, "token": "\xff"}',
    "empty": b"",
    "array": b"[]",
    "deep": b"[" * 2000,
    "more behind it": json.dumps(body()).encode() + b"{}",
    "unknown field": body(canary=CANARY),
    "unknown field of the job": body(JOB | {CANARY: 1}),
    "unknown field of an item": body(changed_item(canary=CANARY)),
    "no version": {name: value for name, value in body().items() if name != "version"},
    "no term": {name: value for name, value in body().items() if name != "expires_at"},
    "other version": body(version=2),
    "version as text": body(version="1"),
    "null id": body(job_id=None),
    "id in capitals": body(job_id=str(uuid.uuid4()).upper()),
    "id with a line end": body(job_id=f"{uuid.uuid4()}\n"),
    "id of a part": body(job_id=str(uuid.uuid5(uuid.NAMESPACE_URL, "x"))),
    "id as a path": body(job_id="../../../../etc/passwd"),
    "time without zone": body(expires_at="2030-01-01T00:00:00"),
    "time as number": body(expires_at=1_900_000_000),
    "time as words": body(expires_at="tomorrow"),
    "token of another type": body(token=7),
    "unknown kind": body(JOB | {"kind": "sign"}),
    "key id as a path": body(JOB | {"key_id": "../x"}),
    "item that is not base64": body(changed_item(plaintext=CANARY)),
}


@pytest.mark.parametrize("content", NOT_AS_DESCRIBED.values(), ids=NOT_AS_DESCRIBED)
def test_what_the_schema_does_not_describe_is_refused(
    intake: Intake, recipient: str, content: bytes | dict[str, object]
) -> None:
    refusal(intake, seal(recipient, content), InvalidRequest)


@pytest.mark.parametrize(
    ("expires_at", "error"),
    [
        (-1, JobExpired),
        (-1e9, JobExpired),
        ("0001-01-01T00:00:00+23:59", JobExpired),
        ("0001-01-01T00:00:00Z", JobExpired),
        (30, JobsUnavailable),
        (24 * 3600 - 5, JobsUnavailable),
        (24 * 3600 + 5, InvalidRequest),
        (1e10, InvalidRequest),
    ],
)
def test_a_message_has_a_term_of_a_day(
    intake: Intake, recipient: str, expires_at: float | str, error: type[KmsError]
) -> None:
    text = expires_at if isinstance(expires_at, str) else in_s(expires_at)
    refusal(intake, seal(recipient, body(expires_at=text)), error)


@pytest.mark.parametrize("token", ["", "kms_0123456789", None])
def test_without_authentication_a_token_is_not_looked_at(
    intake: Intake, recipient: str, token: str | None
) -> None:
    """And may be absent."""
    content = body(token=token)
    if token is None:
        del content["token"]

    taken(intake, seal(recipient, content))


def schema() -> dict[str, object]:
    """The JSON schema of a message, as published in docs/schemas."""
    found = msgspec.json.schema(Submission)
    for shape in found["$defs"].values():  # docstrings, which Python takes the indentation from since 3.13
        if "description" in shape:
            shape["description"] = inspect.cleandoc(shape["description"])
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:kms-service:kms.submit:v1"}
    return head | found


def test_the_published_schema_is_the_shape() -> None:
    assert json.loads(SCHEMA.read_text()) == schema(), (
        f"write json.dumps(schema(), indent=2) and a line end to {SCHEMA}"
    )


# -- the key ------------------------------------------------------------------------------------------


def test_after_a_rotation_old_and_new_messages_open(service: Service, path: Path, recipient: str) -> None:
    with path.open("a") as file:
        file.write(f"# the new one\n{x25519.Identity.generate()}\n\n")
    rotated = str(celery_intake.recipient(path))
    intake = opened(service)

    assert rotated != recipient
    for one in (recipient, rotated):
        taken(intake, seal(one, body()))


def test_the_key_may_be_a_post_quantum_one(service: Service, path: Path) -> None:
    path.write_text(mlkem768x25519.HybridIdentity.generate().export())
    intake_recipient = celery_intake.recipient(path)
    file_key, nonce = os.urandom(16), os.urandom(16)
    payload = stream.seal(stream.payload_key(file_key, nonce), json.dumps(body()).encode())
    sealed = header.render([intake_recipient.wrap(file_key)], file_key) + nonce + payload

    assert str(intake_recipient).startswith("age1pq1")
    taken(opened(service), base64.b64encode(sealed).decode())


def test_without_a_key_there_is_no_intake(service: Service, path: Path) -> None:
    path.unlink()

    assert build_intake(service.settings, core_of(service).submitter) is None
    with pytest.raises(UnknownKey):
        celery_intake.recipient(path)


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "hunter2\n", "\x00"], ids=["empty", "comment", "word", "zero"]
)
def test_a_broken_key_is_told_and_not_shown(service: Service, path: Path, text: str) -> None:
    path.write_text(text)

    with pytest.raises(BackendUnavailable) as caught:
        celery_intake.recipient(path)
    with pytest.raises(ConfigurationError):
        build_intake(service.settings, core_of(service).submitter)
    assert "hunter2" not in str(caught.value)


def test_a_key_that_others_can_read_is_refused_in_prod(tmp_path: Path) -> None:
    prod = "environment = 'prod'\nprod_backend = 'age'\nallow_age_in_prod = true\nauth.mode = 'none'\n"
    service = Service(tmp_path, "", "unix:///nonexistent/valkey.sock")
    core = core_of(service)
    service.config.write_text(f"[kms]\n{prod}")
    service.settings.kms.jobs.intake_identity_path.chmod(0o644)

    with pytest.raises(ConfigurationError, match="chmod 600"):
        build_intake(service.settings, core.submitter)


# -- the task -----------------------------------------------------------------------------------------


def task(
    build: Callable[[], Intake | None],
    broker: str = "redis+socket:///nonexistent",
    pulse: SharedTime | None = None,
) -> Callable[..., str]:
    app = Celery(set_as_current=False, broker=broker)
    submit_task.register(app, build, "worker", pulse or SharedTime())
    found: Callable[..., str] = app.tasks[submit_task.SUBMIT_TASK]
    return found


@pytest.mark.parametrize("away", ["Redis and broker", "a key"])
def test_a_good_message_goes_back_to_the_queue_while_something_is_away(
    intake: Intake, recipient: str, away: str
) -> None:
    def build() -> Intake:
        if away == "a key":
            raise ConfigurationError
        return intake

    with pytest.raises(Reject) as caught:
        task(build)(seal(recipient, body()))

    assert caught.value.requeue


def test_a_good_message_is_sent_again_while_redis_is_away(intake: Intake, recipient: str) -> None:
    message = seal(recipient, body())
    with pytest.raises(Ignore):
        task(lambda: intake, "memory://again")(message)

    with connect("memory://again") as connection, connection.SimpleQueue("kms.submit") as simple:
        assert simple.get(timeout=10).payload[0] == [message]


@pytest.mark.parametrize(
    ("args", "named"),
    [((), {}), (("a", "b"), {}), (("a",), {"b": 1}), ((), {"message": "a"})],
    ids=["none", "two", "more by name", "by name"],
)
def test_the_task_takes_one_argument(intake: Intake, args: tuple[str, ...], named: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        task(lambda: intake)(*args, **named)


def test_a_refusal_leaves_the_process_without_its_text(intake: Intake) -> None:
    with pytest.raises(NotACiphertext) as caught:
        task(lambda: intake)(B64_CANARY)

    assert caught.value.__suppress_context__
    assert caught.value.detail == NotACiphertext.summary


def test_what_nobody_foresaw_does_not_come_back() -> None:
    def broken() -> Intake:
        raise ZeroDivisionError(CANARY)

    with pytest.raises(KmsError) as caught:
        task(broken)("x")

    assert type(caught.value) is KmsError


def test_a_worker_without_a_key_serves_no_messages(intake: Intake) -> None:
    assert submit_task.queues(None) == ()
    assert submit_task.queues(intake) == ("kms.submit",)
    with pytest.raises(UnknownKey):
        task(lambda: None)("x")


def test_the_pulse_beats_when_a_message_is_taken() -> None:
    pulse = SharedTime()
    assert pulse.at == float("-inf")

    with pytest.raises(UnknownKey):
        task(lambda: None, pulse=pulse)("x")

    assert pulse.at > float("-inf")
