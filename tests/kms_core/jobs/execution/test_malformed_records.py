"""Workers and callers of the job store get an answer whatever a plain field of a record holds."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Final

import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.ends import spec_digest
from kms_core.jobs.execution.runner import _defer, run_job
from kms_core.jobs.execution.tree import PART_FILES
from kms_core.jobs.model import EXHAUSTED, part_id
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import Reference, SubmissionOptions
from kms_protocol.context import Context
from kms_protocol.errors import JobsUnavailable, KmsError, Unavailable
from kms_protocol.wire import JobIn, JobItem
from support.embedded_valkey import EmbeddedValkey
from support.failing_store import stumbling
from support.job_stores import COMMIT, LONG, TENANT, accepted, forge, record, spool_folder, store_of
from support.record_fields import FIELDS, MISSING, put
from support.service import Service, core_of

HOSTILE: Final = (
    *(b"-1", b"-5.5", b"2.5", b"nan", b"1e308", b"5000", b"4503599627370496", b"9007199254740992"),
    *(b"9223372036854775808", b"", b"\xff\xfe", b"9" * 1_000_000, MISSING),
)
LIVES: Final[Mapping[str, Mapping[str, str]]] = {
    "queued": {"fence": "2", "attempt": "2"},
    "running": {"state": "running", "fence": "1", "attempt": "1", "lease_until": "0"},
    "committing": {"state": "committing", "fence": "1", "attempt": "1", "lease_until": "0"},
    "dead": {"state": "failed", "error": EXHAUSTED, "fence": "3"},
    "ended": {"state": "failed", "error": "decrypt_failed", "fence": "3"},
}
WORST_OF_ALL: Final = (b"nan", b"-5.5", b"9007199254740992", b"\xff\xfe", MISSING)
ANSWER_S: Final = 30.0  # what counts up to a number of others takes hours


@pytest.fixture(scope="module")
def busy(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Core:
    """A core of a worker, for all tests of this module."""
    redis_url = valkey.files.url_of(next(database_numbers))
    return core_of(Service(tmp_path_factory.mktemp("busy"), redis=redis_url))


def answer(what: Callable[[], object]) -> None:
    """It answers, within ``ANSWER_S`` seconds, or says that the record is at fault, never that Redis is."""
    begin = time.monotonic()
    try:
        what()
    except KmsError as exc:
        assert not isinstance(exc, JobsUnavailable)  # noqa: PT017 -- which of our errors it is
    assert time.monotonic() - begin < ANSWER_S


@pytest.mark.parametrize("field", FIELDS)
def test_every_call_answers_whatever_a_field_holds(busy: Core, field: str) -> None:
    root = spool_folder(busy).parent / "files"
    root.mkdir(exist_ok=True)
    (root / "in").write_bytes(b"salary")
    store = store_of(busy, LONG, [])
    worker_context = replace(busy.worker_context, store=store)
    away = stumbling(busy, "committing", after=False, error=Unavailable())
    terms = SubmissionOptions(Principal("local"), "encrypt", Context.parse("env=test"))
    lives = itertools.islice(itertools.cycle(LIVES), FIELDS.index(field) % len(LIVES), None)
    for number, (value, life) in enumerate(zip(HOSTILE, lives, strict=False)):
        target = (root / f"{field.replace(':', '.').replace('/', '.')}.{number}").as_uri()
        job_id = busy.submitter.files(terms, Reference((root / "in").as_uri(), target, overwrite=True)).job_id
        forge(store, job_id, **LIVES[life])
        forge(store, job_id, commit=store.record_key.sign_commit(job_id, COMMIT, spec_of(store, job_id)))
        for call in (
            lambda job_id=job_id: store.get(job_id, TENANT),
            lambda job_id=job_id: run_job(job_id, away, "w/1"),
            lambda job_id=job_id: store.reap(job_id),
            lambda job_id=job_id: run_job(job_id, worker_context, "w/2"),
            lambda job_id=job_id: store.retry(job_id, TENANT, 60),
            lambda job_id=job_id: store.claim(job_id, "w/3"),
            lambda job_id=job_id: store.cancel(job_id, TENANT),
            lambda job_id=job_id: store.purged(job_id),
            lambda job_id=job_id: run_job(job_id, worker_context, "w/4"),  # which tidies
        ):
            put(store, job_id, field, value)
            answer(call)


def spec_of(store: JobStore, job_id: str) -> bytes:
    return spec_digest(record(store, job_id)[b"sealed"])


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("whose", ["the whole's", "the part's"])
def test_jobs_in_parts_answer_whatever_a_field_holds(busy: Core, whose: str, field: str) -> None:
    root = spool_folder(busy).parent / "files" / "many"
    root.mkdir(exist_ok=True, parents=True)
    (root / "in").write_bytes(b"salary")
    store = store_of(busy, LONG, [])
    worker_context = replace(busy.worker_context, store=store)
    terms = SubmissionOptions(Principal("local"), "reseal", Context.parse("env=test"))
    body = JobIn(kind="reseal", source=f"{root.as_uri()}/*", target=f"{root.as_uri()}/*", overwrite=True)
    for value in WORST_OF_ALL:
        whole = busy.submitter.submit(terms, body, 10).job_id
        forged = whole if whose == "the whole's" else part_id(whole, 0)
        for call in (
            lambda job_id=whole: run_job(job_id, worker_context, "w/1"),
            lambda job_id=whole: run_job(part_id(job_id, 0), worker_context, "w/2"),
            lambda job_id=whole: run_job(job_id, worker_context, "w/3"),
            lambda job_id=whole: store.cancel(job_id, TENANT),
            lambda job_id=whole: store.retry(job_id, TENANT, 60),
        ):
            if store.exists(forged):
                put(store, forged, field, value)
            answer(call)


def test_fence_that_no_attempt_had_costs_a_part_no_search_for_its_leftovers(busy: Core) -> None:
    """Each message about a part that has ended has its files looked at, 500 at most."""
    root = spool_folder(busy).parent / "files" / "swept"
    root.mkdir(parents=True)
    for number in range(PART_FILES):
        (root / str(number)).write_bytes(b"x")
    terms = SubmissionOptions(Principal("local"), "reseal", Context.parse("env=test"))
    body = JobIn(kind="reseal", source=f"{root.as_uri()}/*", target=f"{root.as_uri()}/*", overwrite=True)
    whole = busy.submitter.submit(terms, body, PART_FILES).job_id
    run_job(whole, busy.worker_context, "w/1")
    part = part_id(whole, 0)
    forge(busy.worker_context.store, part, state="failed", error="expired", fence="2147483648")

    answer(lambda: run_job(part, busy.worker_context, "w/2"))


@pytest.mark.parametrize("value", [b"-1", b"2.5", b"4503599627370496"])
@pytest.mark.parametrize("field", ["fence", "attempt"])
def test_count_that_no_worker_came_to_ends_its_job_as_refused(core: Core, field: str, value: bytes) -> None:
    """It stays a dead letter, which may be retried."""
    store = store_of(core, LONG, [])
    job_id = core.submitter.items(
        SubmissionOptions(Principal("local"), "encrypt", Context.parse("env=test")), [JobItem(plaintext=b"x")]
    ).job_id
    forge(store, job_id, **{field: value})

    run_job(job_id, core.worker_context, "w/1")
    assert (store.get(job_id, TENANT).state, store.get(job_id, TENANT).error) == ("failed", "record_refused")

    store.retry(job_id, TENANT, 60)
    run_job(job_id, core.worker_context, "w/1")
    assert store.get(job_id, TENANT).state == "succeeded"


def test_deferrals_that_nobody_counted_delay_a_job_by_a_minute_at_most(core: Core) -> None:
    store = store_of(core, LONG, [])
    job_id = store.submit(accepted()).job_id
    forge(store, job_id, deferrals="5000")
    claim = store.claim(job_id, "w/1")
    assert claim

    _defer(claim, store, Unavailable())

    assert 0 < float(record(store, job_id)[b"not_before"]) - time.time() <= 60
