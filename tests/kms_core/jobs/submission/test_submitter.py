"""Uploads and items that are refused: nothing of them is left."""

import pytest

from kms_core.container import Core
from kms_protocol import wire
from kms_protocol.errors import InvalidRequest, JobsUnavailable, NotACiphertext, RedisFull
from kms_protocol.wire import JobKind
from support.core_jobs import CONTEXT, WHO
from support.job_options import job_options
from support.job_stores import TENANT, spool_folder


@pytest.mark.parametrize("size", [5, 500_000], ids=["small", "large"])
@pytest.mark.parametrize(
    ("kind", "missing", "error"), [("encrypt", 1, InvalidRequest), ("decrypt", 0, NotACiphertext)]
)
def test_an_upload_that_is_cut_or_no_ciphertext_leaves_nothing(
    core: Core, kind: JobKind, missing: int, error: type[Exception], size: int
) -> None:
    receiving = core.submitter.receive_upload(job_options(WHO, kind, CONTEXT), size + missing)
    next(receiving)

    with pytest.raises(error):
        receiving.send((memoryview(bytes(size)), False))
    assert core.worker_context.store.redis.zcard(f"kms:tenant:{TENANT}") == 0
    assert {path.name for path in spool_folder(core).iterdir()} <= {"hosts"}


def fill(core: Core) -> None:
    """Have Redis count as full, as a look at its memory says a moment ago."""
    for name in ("probed", "full"):
        core.worker_context.store.redis.set(f"kms:{name}", 1, ex=60)


@pytest.mark.parametrize("size", [5, 50_000], ids=["small", "large"])
def test_items_in_one_body_are_refused_by_a_full_redis_and_nothing_is_left(core: Core, size: int) -> None:
    fill(core)
    items = [wire.JobItem(plaintext=bytes(size))]

    with pytest.raises(RedisFull):
        core.submitter.submit(job_options(WHO, "encrypt", CONTEXT, items=items))
    assert core.worker_context.store.redis.zcard(f"kms:tenant:{TENANT}") == 0
    assert {path.name for path in spool_folder(core).iterdir()} <= {"hosts"}


def test_a_job_that_is_there_is_answered_by_a_full_redis(core: Core) -> None:
    asked = job_options(WHO, "encrypt", CONTEXT, items=[wire.JobItem(plaintext=b"x")], idempotency="once")
    job_id = core.submitter.submit(asked).job_id
    fill(core)

    assert core.submitter.submit(asked).job_id == job_id


def test_items_for_the_disk_leave_no_file_if_redis_has_gone(core: Core) -> None:
    asked = job_options(WHO, "encrypt", CONTEXT, items=[wire.JobItem(plaintext=bytes(50_000))])
    before = core.submitter.submit(asked).job_id
    pool = core.worker_context.store.redis.connection_pool
    pool.reset()
    pool.connection_kwargs |= {"path": str(spool_folder(core) / "none")}

    with pytest.raises(JobsUnavailable):
        core.submitter.submit(asked)
    assert {path.name for path in spool_folder(core).iterdir()} - {"hosts"} == {before}
