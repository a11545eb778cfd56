"""A job id belongs to the tenant that used it first; its job stays as it was submitted."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from kms_core.container import Core, build_intake
from kms_core.jobs.submission import celery_intake
from kms_core.jobs.submission.celery_intake import Intake
from kms_protocol.errors import IdempotencyConflict, UnknownJob
from support.celery_messages import body, seal
from support.credentials import Guarded
from support.service import core_of

SCOPES = ("jobs:write", "encrypt")


@pytest.fixture
def install(tmp_path: Path, redis_url: str) -> Guarded:
    return Guarded(tmp_path, redis=redis_url)


@pytest.fixture
def core(install: Guarded) -> Core:
    return core_of(install)


@pytest.fixture
def takes(install: Guarded, core: Core) -> Intake:
    made = build_intake(install.settings, core.submitter)
    assert made
    return made


def message(install: Guarded, asked: Mapping[str, object], tenant: str) -> str:
    """The same job, submitted by a caller of this tenant whom nobody had seen before."""
    recipient = celery_intake.recipient(install.settings.kms.jobs.intake_identity_path)
    return seal(str(recipient), {**asked, "token": install.make(*SCOPES, tenant=tenant)[1]})


def spooled(install: Guarded) -> dict[Path, bytes]:
    files = [path for path in install.spool.rglob("*") if path.is_file() and path.parent.name != "hosts"]
    return {path: path.read_bytes() for path in files}


def test_a_message_with_another_tenants_job_id_is_refused(
    install: Guarded, core: Core, takes: Intake
) -> None:
    """It is no replay, even of the same job: its sender would wait for a job of others."""
    asked = body()
    job_id = takes.accept(message(install, asked, "acme"), "worker/1")
    accepted, spool = core.submitter.store.accepted(job_id), spooled(install)

    with pytest.raises(IdempotencyConflict):
        takes.accept(message(install, asked, "web"), "worker/1")
    assert (core.submitter.store.accepted(job_id), spooled(install)) == (accepted, spool)
    with pytest.raises(UnknownJob):
        core.submitter.store.get(job_id, "web")


def test_a_colleagues_replay_leaves_the_job_to_its_submitter(
    install: Guarded, core: Core, takes: Intake
) -> None:
    asked = body()
    job_id = takes.accept(message(install, asked, "acme"), "worker/1")
    accepted, spool = core.submitter.store.accepted(job_id), spooled(install)

    assert takes.accept(message(install, asked, "acme"), "worker/1") == job_id
    assert (core.submitter.store.accepted(job_id), spooled(install)) == (accepted, spool)


@pytest.mark.parametrize("tenant", ["acme", "web"])
def test_a_record_is_not_written_over(install: Guarded, core: Core, takes: Intake, tenant: str) -> None:
    """Redis is asked in the same step in which it would write."""
    store = core.submitter.store
    job_id = takes.accept(message(install, body(), "acme"), "worker/1")
    before = store.accepted(job_id)
    other = msgspec.structs.replace(before, tenant=tenant, principal="eve", kind="decrypt")
    open_jobs = store.redis.zcard("kms:open")

    if tenant == "acme":
        assert store.submit(other).kind == "encrypt"
    else:
        with pytest.raises(UnknownJob):
            store.submit(other)
    assert store.accepted(job_id) == before
    assert store.redis.zcard("kms:open") == open_jobs
