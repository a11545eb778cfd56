"""The stand-in that the client brings for users' tests: one set of expectations, held to both services."""

import asyncio
import doctest
import io
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec import UNSET

from kms_client import Client, ServiceUnreachable, errors, testing, wire
from kms_client.testing import FakeService
from kms_protocol.units import MiB, time_text
from kms_protocol.wire import Answer
from support.embedded_valkey import EmbeddedValkey
from support.service import Service

CONTEXT = "env=test,app=billing"
SECRET = b"secret-data"
USED = {"key_id": "str", "key_version": "str", "backend": "str", "file_id": "str"}
UNKNOWN = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def real(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Iterator[Service]:
    settings, redis = "[kms.age]\ndata_keys = true\n", valkey.files.url_of(next(database_numbers))
    with Service(tmp_path_factory.mktemp("real"), settings, redis) as running:
        yield running.start()


@pytest.fixture(params=["fake", "real"])
def kms(request: pytest.FixtureRequest) -> Iterator[Client]:
    if request.param == "fake":
        made = FakeService().client()
    else:
        service: Service = request.getfixturevalue("real")
        made = Client(service.url)
    with made:
        yield made


def shape(answer: Answer) -> dict[str, str]:
    """The fields of an answer with the types of their values; absent ones are left out."""
    given = ((name, getattr(answer, name)) for name in answer.__struct_fields__)
    return {name: type(value).__name__ for name, value in given if value is not UNSET}


def test_shapes_of_answers(kms: Client) -> None:
    sealed = kms.encrypt(SECRET, context=CONTEXT)
    opened = kms.decrypt(sealed.ciphertext, context=CONTEXT)

    assert shape(sealed) == USED | {"ciphertext": "bytes"}
    assert shape(opened) == USED | {"plaintext": "bytes", "origin": "str"}
    assert (opened.plaintext, opened.origin) == (SECRET, "service")
    assert (opened.key_id, opened.key_version) == ("default", sealed.key_version)
    assert opened.file_id == sealed.file_id
    assert sealed.ciphertext.startswith(b"age-encryption.org/v1\n")
    assert (len(sealed.key_version), len(sealed.file_id)) == (8, 32)
    assert shape(kms.health()) == {"status": "str", "backend": "str", "checked_at": "str"}


def test_two_ciphertexts_of_one_plaintext_differ(kms: Client) -> None:
    assert kms.encrypt(SECRET).ciphertext != kms.encrypt(SECRET).ciphertext
    assert kms.decrypt(kms.encrypt(b"").ciphertext).plaintext == b""


@pytest.mark.parametrize("context", [None, "env=test", {"env": "test"}, "env=test,app=other"])
def test_another_context_opens_nothing(kms: Client, context: wire.ContextIn) -> None:
    sealed = kms.encrypt(SECRET, context=CONTEXT)

    with pytest.raises(errors.DecryptFailed):
        kms.decrypt(sealed.ciphertext, context=context)
    assert kms.decrypt(sealed.ciphertext, context={"app": "billing", "env": "test"}).plaintext == SECRET


def test_what_is_damaged_of_another_key_or_no_ciphertext_opens_nothing(kms: Client) -> None:
    sealed = kms.encrypt(SECRET, key_id="default").ciphertext

    with pytest.raises(errors.DecryptFailed):
        kms.decrypt(sealed[:-1] + bytes([sealed[-1] ^ 1]))
    with pytest.raises(errors.DecryptFailed):
        kms.decrypt(sealed, key_id="payroll")
    with pytest.raises(errors.NotACiphertext):
        kms.decrypt(b"something else")


def test_a_context_in_the_past_opens_nothing(kms: Client) -> None:
    past = {"not_after": time_text(datetime.now(UTC) - timedelta(hours=1))}
    sealed = kms.encrypt(SECRET, context=past)

    with pytest.raises(errors.DecryptFailed):
        kms.decrypt(sealed.ciphertext, context=past)


def test_one_call_takes_a_mebibyte(kms: Client) -> None:
    assert len(kms.decrypt(kms.encrypt(bytes(MiB)).ciphertext).plaintext) == MiB


@pytest.mark.parametrize(
    ("plaintext", "options", "error"),
    [
        (SECRET, {"context": "env"}, errors.InvalidContext),
        (SECRET, {"context": {"kms:own": "x"}}, errors.InvalidContext),
        (SECRET, {"context": {"": "x"}}, errors.InvalidContext),
        (SECRET, {"context": {"not_after": "tomorrow"}}, errors.InvalidContext),
        (SECRET, {"key_id": "payroll"}, errors.UnknownKey),
        (SECRET, {"key_id": "pay roll"}, errors.InvalidRequest),
        (bytes(MiB + 1), {}, errors.TooLarge),
    ],
    ids=["no pair", "reserved", "no name", "no time", "unknown key", "no key id", "too large"],
)
def test_what_cannot_be_sealed_is_refused(
    kms: Client, plaintext: bytes, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        kms.encrypt(plaintext, **options)


@pytest.mark.parametrize(("spec", "size"), [("AES_128", 16), ("AES_256", 32)])
def test_data_keys(kms: Client, spec: wire.KeySpec, size: int) -> None:
    made = kms.generate_data_key(spec, context=CONTEXT)
    hidden = kms.generate_data_key(spec, context=CONTEXT, without_plaintext=True)

    assert isinstance(made.plaintext, bytes)
    assert (len(made.plaintext), made.key_spec) == (size, spec)
    assert kms.decrypt(made.ciphertext, context=CONTEXT).plaintext == made.plaintext
    assert hidden.plaintext is UNSET
    assert len(kms.decrypt(hidden.ciphertext, context=CONTEXT).plaintext) == size


def test_rewrap_keeps_the_file_and_can_change_its_context(kms: Client) -> None:
    sealed = kms.encrypt(SECRET, context=CONTEXT)

    kept = kms.rewrap(sealed.ciphertext, context=CONTEXT)
    moved = kms.rewrap(kept.ciphertext, context=CONTEXT, new_context="env=prod")

    assert {kept.file_id, moved.file_id} == {sealed.file_id}
    assert kms.decrypt(kept.ciphertext, context=CONTEXT).plaintext == SECRET
    assert kms.decrypt(moved.ciphertext, context="env=prod").plaintext == SECRET
    with pytest.raises(errors.DecryptFailed):
        kms.decrypt(moved.ciphertext, context=CONTEXT)
    with pytest.raises(errors.DecryptFailed):
        kms.rewrap(sealed.ciphertext, context="env=other")


def test_a_batch_answers_each_item(kms: Client) -> None:
    sealed = kms.batch("encrypt", [wire.BatchItem(plaintext=SECRET, context=CONTEXT, reference="pay")])
    (first,) = sealed.results
    assert isinstance(first.ciphertext, bytes)
    opened = kms.batch(
        "decrypt",
        [wire.BatchItem(ciphertext=first.ciphertext, context=CONTEXT), wire.BatchItem(ciphertext=b"else")],
    )

    assert (first.reference, sealed.failed, opened.failed) == ("pay", 0, 1)
    assert [each.index for each in opened.results] == [0, 1]
    assert opened.results[0].plaintext == SECRET
    assert opened.results[1].error == wire.ErrorCode(code="not_a_ciphertext")
    bad = [wire.BatchItem(ciphertext=b""), wire.BatchItem(plaintext=b"", key_id="payroll")]
    wrong = kms.batch("encrypt", bad)
    codes = [wire.ErrorCode(code=code) for code in ("invalid_request", "unknown_key")]
    assert [each.error for each in wrong.results] == codes
    assert shape(first) == USED | {"index": "int", "reference": "str", "ciphertext": "bytes"}
    assert shape(opened.results[0]) == USED | {"index": "int", "plaintext": "bytes", "origin": "str"}
    assert shape(opened.results[1]) == {"index": "int", "error": "ErrorCode"}


# -- jobs -------------------------------------------------------------------------------------------------


def items_of(kms: Client, job: wire.JobIn) -> tuple[wire.JobOut, list[wire.ItemResult]]:
    accepted = kms.submit(job)
    ended = kms.wait(accepted.job_id, timeout_s=60)
    return ended, list(kms.items(accepted.job_id))


def test_a_job_over_items(kms: Client) -> None:
    plain = [wire.JobItem(plaintext=b"one", context="row=1"), wire.JobItem(plaintext=b"two")]
    ended, sealed = items_of(kms, wire.JobIn(kind="encrypt", items=plain, context=CONTEXT))
    assert (ended.state, ended.kind, ended.attempt, ended.error) == ("succeeded", "encrypt", 1, None)
    assert (ended.progress.items, ended.progress.items_done, ended.progress.items_failed) == (2, 2, 0)
    assert [shape(each) for each in sealed] == [{"index": "int", "ciphertext": "bytes", "file_id": "str"}] * 2

    files = [wire.JobItem(ciphertext=bytes(each.ciphertext)) for each in sealed]  # type: ignore[arg-type]  # UNSET
    files[0] = wire.JobItem(ciphertext=files[0].ciphertext, context="row=1")
    _, opened = items_of(kms, wire.JobIn(kind="decrypt", items=files, context=CONTEXT))
    assert [each.plaintext for each in opened] == [b"one", b"two"]

    for kind in ("rewrap", "reseal"):
        job = wire.JobIn(kind=kind, items=files, context=CONTEXT, new_context="env=prod")
        _, moved = items_of(kms, job)
        again = [kms.decrypt(bytes(each.ciphertext), context="env=prod").plaintext for each in moved]  # type: ignore[arg-type]  # UNSET
        assert again == [b"one", b"two"]


def test_a_failed_item_fails_the_job_and_no_other_item(kms: Client) -> None:
    files = [wire.JobItem(ciphertext=kms.encrypt(SECRET).ciphertext), wire.JobItem(ciphertext=b"else")]
    ended, found = items_of(kms, wire.JobIn(kind="decrypt", items=files))

    assert ended.state == "failed"
    assert ended.error is not None
    assert ended.error.code == "items_failed"
    assert ended.error.items == [wire.FailedItem(index=1, code="not_a_ciphertext")]
    assert (ended.progress.items, ended.progress.items_done, ended.progress.items_failed) == (2, 2, 1)
    assert found[0].plaintext == SECRET
    assert found[1].error == wire.ErrorCode(code="not_a_ciphertext")


def test_a_submission_that_is_repeated_makes_one_job(kms: Client) -> None:
    key, item = str(uuid.uuid4()), [wire.JobItem(plaintext=SECRET)]
    first = kms.submit(wire.JobIn(kind="encrypt", items=item), idempotency_key=key)
    again = kms.submit(wire.JobIn(kind="encrypt", items=item), idempotency_key=key)

    assert again.job_id == first.job_id
    assert first.links.self_ == f"{wire.PREFIX}/jobs/{first.job_id}"
    with pytest.raises(errors.IdempotencyConflict):
        kms.submit(wire.JobIn(kind="encrypt", items=item, context=CONTEXT), idempotency_key=key)


def test_a_submission_that_cannot_succeed_is_refused(kms: Client) -> None:
    with pytest.raises(errors.UnknownKey):
        kms.submit(wire.JobIn(kind="encrypt", items=[wire.JobItem(plaintext=b"")], key_id="payroll"))
    for items in (None, [], [wire.JobItem(ciphertext=b"")]):
        with pytest.raises(errors.InvalidRequest):
            kms.submit(wire.JobIn(kind="encrypt", items=items))


def test_shapes_of_jobs(kms: Client) -> None:
    items = [wire.JobItem(plaintext=SECRET)]
    named: dict[str, Any] = {"labels": {"run": "7"}, "metadata": {"by": "Ada, née B"}, "priority": "low"}
    texts = ("job_id", "kind", "state", "priority", "created_at", "started_at", "ended_at", "expires_at")
    whole = dict.fromkeys((*texts, "start_by", "run_by", "submitter"), "str") | {
        "attempt": "int",
        "progress": "JobProgress",
        "links": "JobLinks",
        "error": "NoneType",
        "labels": "dict",
        "metadata": "dict",
    }

    accepted = kms.submit(wire.JobIn(kind="encrypt", items=items, key_id="default", **named))
    bulk = kms.wait(accepted.job_id, timeout_s=60)
    file = kms.wait(kms.upload_encrypt(io.BytesIO(SECRET), **named).job_id, timeout_s=60)

    assert accepted.state == "queued"
    assert shape(accepted) == {"job_id": "str", "state": "str", "links": "JobLinks"}
    assert shape(bulk) == whole | {"key_id": "str"}
    assert shape(file) == whole | {"file_id": "str"}
    for job in (bulk, file):
        assert (job.labels, job.metadata, job.priority) == tuple(named.values())
    assert kms.submit(wire.JobIn(kind="encrypt", items=items), wait_s=30).state == "succeeded"


def test_states_of_many_jobs(kms: Client) -> None:
    ids = [kms.upload_encrypt(io.BytesIO(SECRET)).job_id for _ in range(2)]
    for job_id in ids:
        kms.wait(job_id, timeout_s=60)

    found = kms.many([*ids, UNKNOWN])

    assert {job.job_id: job.state for job in found.jobs} == dict.fromkeys(ids, "succeeded")
    assert found.unknown == [UNKNOWN]


def test_a_file_there_and_back(kms: Client) -> None:
    sealed, opened = io.BytesIO(), io.BytesIO()
    content = bytes(range(256)) * 8192
    job = kms.upload_encrypt(io.BytesIO(content), context=CONTEXT)
    ended = kms.wait(job.job_id, timeout_s=60)
    assert (ended.state, ended.progress.bytes, ended.progress.bytes_done) == ("succeeded", 2 * MiB, 2 * MiB)
    assert isinstance(ended.file_id, str)
    assert kms.download(job.job_id, sealed) == len(sealed.getvalue())
    sealed.seek(0)
    job = kms.upload_decrypt(sealed, context={"env": "test", "app": "billing"})
    kms.wait(job.job_id, timeout_s=60)
    kms.download(job.job_id, opened)

    assert opened.getvalue() == content


def test_a_file_that_does_not_open_fails_its_job(kms: Client) -> None:
    sealed = kms.encrypt(SECRET, context=CONTEXT).ciphertext
    job = kms.upload_decrypt(io.BytesIO(sealed), context="env=other")
    ended = kms.wait(job.job_id, timeout_s=60)

    assert ended.state == "failed"
    assert ended.error
    assert ended.error.code == "decrypt_failed"
    with pytest.raises(errors.ResultExpired):
        kms.download(job.job_id, io.BytesIO())
    with pytest.raises(errors.NotACiphertext):
        kms.upload_decrypt(io.BytesIO(b"something else"))


def test_an_ended_job_is_not_cancelled_and_a_released_result_is_gone(kms: Client) -> None:
    job = kms.upload_encrypt(io.BytesIO(SECRET))
    kms.wait(job.job_id, timeout_s=60)

    assert kms.cancel(job.job_id).state == "succeeded"
    kms.download(job.job_id, io.BytesIO(), release=True)
    with pytest.raises(errors.ResultReleased):
        kms.download(job.job_id, io.BytesIO())


@pytest.mark.parametrize("call", [Client.job, Client.wait, Client.cancel, Client.release])
def test_an_unknown_job_is_named_so(kms: Client, call: Callable[[Client, str], object]) -> None:
    with pytest.raises(errors.UnknownJob):
        call(kms, UNKNOWN)


# -- what only the stand-in has ---------------------------------------------------------------------------


def test_the_example_of_its_documentation_runs() -> None:
    assert doctest.testmod(testing) == (0, 2)


def test_clients_of_one_service_share_it() -> None:
    fake = FakeService(keys=("default", "payroll"))
    with fake.client() as first:
        sealed = first.encrypt(SECRET, key_id="payroll")
        assert sealed.key_id == "payroll"
        assert SECRET not in sealed.ciphertext

    async def opened() -> bytes:
        async with fake.async_client() as second:
            job = await second.upload_encrypt(io.BytesIO(SECRET))
            assert (await second.wait(job.job_id)).state == "succeeded"
            return (await second.decrypt(sealed.ciphertext)).plaintext

    assert asyncio.run(opened()) == SECRET
    with FakeService().client() as another, pytest.raises(errors.DecryptFailed):
        another.decrypt(sealed.ciphertext)


def test_failures_are_raised_once_each() -> None:
    fake = FakeService()
    fake.failures += [errors.BackendUnavailable(), ServiceUnreachable()]
    with fake.client() as kms:
        with pytest.raises(errors.BackendUnavailable):
            kms.encrypt(SECRET)
        with pytest.raises(ServiceUnreachable):
            kms.encrypt(SECRET)
        assert kms.decrypt(kms.encrypt(SECRET).ciphertext).plaintext == SECRET


def test_what_is_not_faked_says_so() -> None:
    job = wire.JobIn(kind="encrypt", source="file:///srv/in", target="file:///srv/out")
    with FakeService().client() as kms:
        with pytest.raises(NotImplementedError, match="does not answer POST /keys/default/rotate"):
            kms.rotate("default")
        with pytest.raises(NotImplementedError, match="FakeService runs no jobs with source"):
            kms.submit(job)
        with pytest.raises(NotImplementedError, match="FakeService runs no jobs with callback"):
            kms.upload_encrypt(io.BytesIO(b""), callback="erp")
