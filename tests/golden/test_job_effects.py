"""What an earlier version's jobs still cause: replays that are known again, webhooks, and messages that wait.

The worker's test lets processes of the tree run the golden jobs from the golden messages.
"""

import base64
import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core, build_intake
from kms_core.jobs.events.webhook import WebhookRequest, sign
from kms_core.jobs.submission.deadlines import Deadlines
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol.context import Context
from kms_protocol.errors import IdempotencyConflict, JobExpired
from kms_protocol.wire import JobItem
from support.celery_messages import body, in_s, seal
from support.golden import expected_jobs as expected
from support.golden import manifest, reference
from support.golden.jobs import DUMP, HOOK_SECRET, IDS, SECRET, record
from support.golden.manifest import SMALL, unb64
from support.service import Service
from support.waiting import until

WHO: Final = Principal("local", "default", "none")


# -- submitted again ---------------------------------------------------------------------------------


def test_idempotency_key_finds_the_job(core: Core) -> None:
    ttl = next(ttl for ttl in _terms_of_life() if _digest(ttl) == record(IDS["items-encrypt"])["digest"])
    items = [JobItem(plaintext=SMALL), JobItem(plaintext=b"own", context={"env": "archive"})]
    terms = SubmissionOptions(
        WHO,
        "encrypt",
        Context.parse("env=prod,service=api"),
        deadlines=Deadlines(ttl_s=ttl),
        idempotency="golden-1",
        callback="ci",
        priority="high",
    )

    assert core.submitter.items(terms, items).job_id == IDS["items-encrypt"]
    with pytest.raises(IdempotencyConflict):
        core.submitter.items(terms, items[:1])


def _terms_of_life() -> Iterator[int]:
    """The ``ttl_s`` that the maker may have given, to the second."""
    about = round(expected.FAR - record(IDS["items-encrypt"])["created_at"])
    yield from range(about - 30, about + 30)


def _digest(ttl: int) -> bytes:
    """Version 1's, of kind, context, key, new context, term, callback, priority and the items."""
    pairs = reference.canonical({"env": "prod", "service": "api"})
    parts = [b"encrypt", pairs, b"", b"-", str(ttl).encode(), b"ci", b"high"]
    lines = [
        {"plaintext": manifest.b64(SMALL), "ciphertext": None, "context": None},
        {"plaintext": "b3du", "ciphertext": None, "context": {"env": "archive"}},
    ]
    texts = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
    return reference.digest(SECRET, *parts, rest=texts)


def test_idempotency_key_rests_as_a_keyed_digest() -> None:
    digest = reference.digest(SECRET, b"default local jobs golden-1").hex()

    assert unb64(DUMP[f"kms:idem:{digest}"]["value"]).decode().startswith(IDS["items-encrypt"])


def _intake_recipient() -> str:
    lines = (manifest.V1 / "keys/intake.txt").read_text().splitlines()
    prefix = "# public key: "
    return next(line.removeprefix(prefix) for line in lines if line.startswith(prefix))


def test_message_of_a_workflow_is_known_again(core: Core, held: Service) -> None:
    """By the digest of its job in canonical form, under the label of version 1."""
    intake = build_intake(held.settings, core.submitter)
    assert intake is not None
    again = body(expected.INTAKE_JOB, job_id=expected.INTAKE_ID, expires_at=in_s(600))

    digest = reference.digest(SECRET, b"kms.submit", expected.INTAKE_CANONICAL)
    assert record(IDS["intake"])["digest"] == digest
    assert intake.accept(seal(_intake_recipient(), again), "golden") == expected.INTAKE_ID


def _submitted() -> dict[str, Any]:
    (text,) = DUMP["kms:kms.submit"]["value"]
    found: dict[str, Any] = json.loads(unb64(text))
    return found


def test_message_of_a_workflow_opens(core: Core, held: Service) -> None:
    """It opened where it is found to have expired: no golden message can be of today."""
    message = _submitted()
    (argument,), _, _ = json.loads(base64.b64decode(message["body"]))
    intake = build_intake(held.settings, core.submitter)
    assert intake is not None

    assert message["headers"]["task"] == "kms.submit"
    with pytest.raises(JobExpired):
        intake.accept(argument, "golden")


# -- webhooks ----------------------------------------------------------------------------------------


def test_signature_of_a_delivery_is_that_of_version_1() -> None:
    message = WebhookRequest("d-1", "j-1", b'{"a":1}')
    expected_mac = reference.hmac_sha256(HOOK_SECRET, b'1700000000.d-1.j-1.{"a":1}').hex()

    assert sign(HOOK_SECRET, 1_700_000_000, message) == f"v1={expected_mac}"


# -- messages, and a worker that takes them ----------------------------------------------------------


@pytest.mark.parametrize("key", expected.QUEUES)
def test_message_is_of_version_1(key: str) -> None:
    priority, names = expected.QUEUES[key]
    queue = key.removeprefix("kms:").partition("\x06")[0]
    messages = [json.loads(unb64(text)) for text in DUMP[key]["value"]]
    found = {json.loads(message["body"])[0][0]: message for message in messages}

    for name in names:
        message = found[IDS[name]]
        assert message["body"] == f'[["{IDS[name]}"],{{}},null]'
        assert (message["content-type"], message["content-encoding"]) == ("application/json", "utf-8")
        assert message["headers"].keys() == {"task", "id", "at"}
        assert message["headers"]["task"] == "kms.run"
        properties = message["properties"]
        assert properties["delivery_info"] == {"exchange": "", "routing_key": queue}
        assert properties["priority"] == priority


def test_worker_takes_the_messages_and_runs_the_jobs(held: Service, core: Core) -> None:
    """Nothing but the messages tells it of them: the list that the reaper looks at is taken away."""
    core.worker_context.store.redis.delete("kms:open")
    with held:
        held.start()
        for name in ("upload-encrypt", "upload-decrypt", "upload-rewrap", "split", "intake"):
            held.wait(IDS[name], "succeeded")
        for kind in ("encrypt", "decrypt", "rewrap", "reseal"):
            held.wait(IDS[f"items-{kind}"], "succeeded")
        until(lambda: "submit.refused" in held.output("worker"), "the message of a workflow is taken")

        assert held.result(IDS["upload-decrypt"]) == SMALL
        assert held.decrypt(held.result(IDS["upload-encrypt"])) == expected.UPLOADED
        assert held.decrypt(held.result(IDS["upload-rewrap"]), "env=archive") == SMALL
        lines = [json.loads(held.result(IDS[f"items-{kind}"])) for kind in ("decrypt", "rewrap", "reseal")]
        assert unb64(lines[0]["plaintext"]) == SMALL
        assert [held.decrypt(unb64(line["ciphertext"]), "env=archive") for line in lines[1:]] == [SMALL] * 2
        assert len(held.result(IDS["split"]).splitlines()) == 501
