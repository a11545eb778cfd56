"""Messages become jobs: once, under their submitter's name, and as the API would accept them over HTTP."""

import contextlib
import contextvars
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
import redis

from kms_core import audit
from kms_core.container import Core, build_intake
from kms_core.jobs.spec import QUEUES, ItemsJob
from kms_core.jobs.store.gauges import survey_queues
from kms_core.jobs.store.heartbeats import worker_seen
from kms_core.jobs.submission import celery_intake
from kms_core.jobs.submission.celery_intake import Intake
from kms_protocol.errors import (
    IdempotencyConflict,
    InvalidRequest,
    JobsUnavailable,
    PathRefused,
    RateLimited,
    TooLarge,
    UnknownJob,
    UnknownKey,
)
from support.celery_messages import JOB, PLAIN, body, in_s, seal
from support.credentials import SecuredService
from support.service import CANARY, Service, b64, core_of


@pytest.fixture
def install(tmp_path: Path, redis_url: str) -> Service:
    return Service(tmp_path, "", redis_url)


@pytest.fixture
def core(install: Service) -> Core:
    return core_of(install)


@pytest.fixture
def recipient(install: Service) -> str:
    return str(celery_intake.recipient(install.settings.kms.jobs.intake_identity_path))


def opened(install: Service, core: Core) -> Intake:
    made = build_intake(install.settings, core.submitter)
    assert made is not None
    return made


@pytest.fixture
def intake(install: Service, core: Core) -> Intake:
    return opened(install, core)


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a job: its inode and what is in it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "hosts"]
    return {str(path): (path.stat().st_ino, path.read_bytes()) for path in files}


def queued(core: Core) -> int:
    return survey_queues(core.submitter.store).jobs["queued"]


def test_a_message_becomes_a_job_of_the_submitters_name(intake: Intake, core: Core, recipient: str) -> None:
    asked = body()
    job_id = intake.accept(seal(recipient, asked), "worker/1")
    accepted = core.submitter.store.accepted(job_id)

    assert job_id == asked["job_id"]
    assert (accepted.principal, accepted.tenant, accepted.credential) == ("celery", "default", "none")
    assert (accepted.kind, accepted.items, accepted.context) == ("encrypt", 1, (("env", "prod"),))
    assert accepted.request_id == job_id
    assert core.submitter.store.get(job_id, "default").state == "queued"


def test_lines_after_a_message_do_not_carry_its_id(intake: Intake, recipient: str) -> None:
    """Nor after one that is refused."""

    def run(asked: dict[str, object]) -> str:
        with contextlib.suppress(PathRefused):
            intake.accept(seal(recipient, asked), "worker/1")
        return audit.request_id.get()

    refused = body({"kind": "encrypt", "source": "file:///etc/passwd", "target": "file:///etc/x"})
    for asked in (body(), refused):
        assert contextvars.Context().run(run, asked) == ""


def test_a_replay_changes_nothing(intake: Intake, core: Core, install: Service, recipient: str) -> None:
    """Also one that was sealed anew."""
    asked = body(JOB | {"context": {"b": "2", "a": "1"}})
    same = asked | {"expires_at": in_s(900), "job": JOB | {"context": {"a": "1", "b": "2"}}}
    message = seal(recipient, asked)
    job_id = intake.accept(message, "worker/1")
    before, job = content(install.spool), core.submitter.store.get(job_id, "default")

    for replay in (message, message, seal(recipient, same)):
        assert intake.accept(replay, "worker/2") == job_id
    assert content(install.spool) == before
    assert core.submitter.store.get(job_id, "default") == job
    assert queued(core) == 1


OTHERS: Final = {
    "item": JOB | {"items": [{"plaintext": b64(b"other")}]},
    "context": JOB | {"context": "env=dev"},
    "new context": JOB | {"new_context": "env=dev"},
    "kind": {"kind": "decrypt", "items": [{"ciphertext": b64(b"x")}]},
    "term of the result": JOB | {"ttl_s": 60},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_job_under_a_used_id_is_refused(
    intake: Intake, core: Core, install: Service, recipient: str, other: dict[str, object]
) -> None:
    asked = body()
    job_id = intake.accept(seal(recipient, asked), "worker/1")
    before, accepted = content(install.spool), core.submitter.store.accepted(job_id)

    with pytest.raises(IdempotencyConflict):
        intake.accept(seal(recipient, asked | {"job": other}), "worker/1")
    assert content(install.spool) == before
    assert core.submitter.store.accepted(job_id) == accepted


def test_a_replay_does_not_revive_what_has_ended(intake: Intake, core: Core, recipient: str) -> None:
    message = seal(recipient, body())
    job_id = intake.accept(message, "worker/1")
    core.submitter.store.cancel(job_id, "default")

    assert intake.accept(message, "worker/1") == job_id
    assert core.submitter.store.get(job_id, "default").state == "cancelled"


def test_the_record_outlives_the_message(tmp_path: Path, redis_url: str) -> None:
    install = Service(tmp_path, "[kms.jobs]\nresult_ttl_s = 60\n", redis_url)
    core = core_of(install)
    recipient = str(celery_intake.recipient(install.settings.kms.jobs.intake_identity_path))
    asked = body(JOB | {"ttl_s": 60}, expires_at=in_s(3600))
    job_id = opened(install, core).accept(seal(recipient, asked), "worker/1")
    core.submitter.store.cancel(job_id, "default")
    client = redis.Redis.from_url(redis_url)

    assert int(str(client.ttl(f"kms:job:{job_id}"))) > 3600


def test_a_message_in_other_hands_is_left_to_them(intake: Intake, core: Core, recipient: str) -> None:
    asked = body()
    core.submitter.store.lock(f"submit:{asked['job_id']}", "worker/2", 60)

    with pytest.raises(JobsUnavailable):
        intake.accept(seal(recipient, asked), "worker/1")
    assert not core.submitter.store.exists(str(asked["job_id"]))


def test_many_workers_at_once_make_one_whole_job(install: Service, core: Core, recipient: str) -> None:
    asked = body(JOB | {"items": [{"plaintext": b64(text.encode())} for text in PLAIN]})
    message, job_id = seal(recipient, asked), str(asked["job_id"])

    def take(number: int) -> str:
        try:
            return opened(install, core_of(install)).accept(message, f"worker/{number}")
        except JobsUnavailable:
            return "again"

    with ThreadPoolExecutor(6) as pool:
        outcomes = set(pool.map(take, range(6)))

    assert {job_id} <= outcomes <= {job_id, "again"}
    assert queued(core) == 1
    assert core.submitter.store.accepted(job_id).items == len(PLAIN)


IN_FILES: Final = "[kms.jobs]\ninline_bytes = 0\nopen_jobs = 1\n"


@pytest.mark.parametrize("is_understood", [True, False])
def test_items_have_the_name_that_every_live_worker_knows(
    tmp_path: Path, redis_url: str, *, is_understood: bool
) -> None:
    """A worker of 0.2 is not listed."""
    install = Service(tmp_path, IN_FILES, redis_url)
    core = core_of(install)
    store = core.submitter.store
    if not is_understood:
        worker_seen(store, "old", 1, QUEUES)
    recipient = str(celery_intake.recipient(install.settings.kms.jobs.intake_identity_path))
    job_id = opened(install, core).accept(seal(recipient, body()), "worker/1")
    accepted = store.accepted(job_id)
    assert isinstance(accepted, ItemsJob)

    name = f"items.{accepted.input_ref.hex()}" if is_understood else "items"
    assert [path.name for path in (install.spool / job_id).iterdir()] == [name]
    needs = store.redis.hget(f"kms:job:{job_id}", "needs")
    assert needs == (b"input-by-ref" if is_understood else None)


def test_a_postponed_message_leaves_what_another_process_wrote(tmp_path: Path, redis_url: str) -> None:
    install = Service(tmp_path, IN_FILES, redis_url)
    core = core_of(install)
    recipient = str(celery_intake.recipient(install.settings.kms.jobs.intake_identity_path))
    intake, asked = opened(install, core), body()
    intake.accept(seal(recipient, body()), "worker/1")
    folder = install.spool / str(asked["job_id"])
    folder.mkdir(mode=0o700)
    (folder / "items.other").write_bytes(b"")

    with pytest.raises(RateLimited):
        intake.accept(seal(recipient, asked), "worker/1")
    assert [path.name for path in folder.iterdir()] == ["items.other"]


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
    intake: Intake, install: Service, recipient: str, job: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        intake.accept(seal(recipient, body(job)), "worker/1")
    assert content(install.spool) == {}


def test_a_replay_needs_no_source_any_more(intake: Intake, install: Service, recipient: str) -> None:
    source = install.files / "a.txt"
    source.write_text(CANARY)
    job = {"kind": "encrypt", "source": f"file://{source}", "target": f"file://{source}.age"}
    message = seal(recipient, body(job))
    job_id = intake.accept(message, "worker/1")
    source.unlink()

    assert intake.accept(message, "worker/1") == job_id


# -- an id belongs to the tenant that used it first ------------------------------------------------------


@pytest.mark.parametrize("tenant", ["acme", "web"])
def test_a_message_with_the_id_of_a_job_leaves_it_to_its_submitter(
    tmp_path: Path, redis_url: str, tenant: str
) -> None:
    """Of a colleague it is a replay; of another tenant it is none, or its sender would wait for others."""
    install = SecuredService(tmp_path, redis=redis_url)
    core, asked = core_of(install), body()
    intake, store = opened(install, core), core.submitter.store
    recipient = str(celery_intake.recipient(install.settings.kms.jobs.intake_identity_path))

    def message(tenant: str) -> str:
        return seal(
            recipient, asked | {"token": install.new_token("jobs:write", "encrypt", tenant=tenant)[1]}
        )

    job_id = intake.accept(message("acme"), "worker/1")
    accepted, spool = store.accepted(job_id), content(install.spool)

    if tenant == "acme":
        assert intake.accept(message(tenant), "worker/1") == job_id
    else:
        with pytest.raises(IdempotencyConflict):
            intake.accept(message(tenant), "worker/1")
        with pytest.raises(UnknownJob):
            store.get(job_id, tenant)
    assert (store.accepted(job_id), content(install.spool)) == (accepted, spool)
