"""Small inputs and results in Redis: no file of the spool, the same bindings, gone with their job."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import pytest

from kms_core.container import Core
from kms_core.jobs.execution import results
from kms_core.jobs.execution.runner import run_claimed
from kms_core.jobs.recovery.spool_cleanup import SpoolCleanup, expired
from kms_core.jobs.submission import submitter
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import RecordRefused, ResultExpired, ResultReleased
from support.core_jobs import WHO, end_of, lines, result, run, run_job
from support.job_options import job_options
from support.job_stores import TENANT, reap, remove_inputs, spool_folder, take, uploaded
from support.service import CANARY, Service, core_of, unb64

OPTIONS: Final = job_options(WHO, "encrypt", Context())
LIMIT: Final = 16 * 1024
NONE: Final = "[kms.jobs]\ninline_bytes = 0\n"


def bulk(core: Core, *texts: bytes, options: SubmissionOptions = OPTIONS) -> str:
    return core.submitter.items(options, [wire.JobItem(plaintext=text) for text in texts]).job_id


def upload(core: Core, data: bytes) -> str:
    return uploaded(core, OPTIONS, data)


def small(core: Core, job_id: str) -> dict[str, bytes]:
    """The blobs of a job in Redis, by role."""
    found = cast("dict[bytes, bytes]", core.worker_context.store.redis.hgetall(f"kms:blobs:{job_id}"))
    return {name.decode().partition(".")[0]: data for name, data in found.items()}


def on_disk(core: Core, job_id: str) -> set[str]:
    folder = spool_folder(core) / job_id
    return {path.name.partition(".")[0] for path in folder.iterdir()} if folder.exists() else set()


def roles(core: Core, job_id: str) -> set[str]:
    """What rests of a job, in Redis or on the disk."""
    return {*small(core, job_id), *on_disk(core, job_id)}


@pytest.mark.parametrize("submit", [bulk, upload], ids=["items", "upload"])
def test_small_input_comes_with_the_claim(core: Core, submit: Callable[[Core, bytes], str]) -> None:
    context = core.worker_context
    job_id = submit(core, CANARY.encode())
    claim = take(context.store, job_id)
    context.store.redis.delete(f"kms:blobs:{job_id}")
    run_claimed(claim, context)

    assert context.store.get(job_id, TENANT).state == "succeeded"


# -- where blobs rest -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "settings", "in_redis", "files"),
    [
        ([b"one", b"two"], "", {"items", "result0"}, set()),
        ([bytes(LIMIT)], "", set(), {"items", "result0"}),
        ([b"x"] * 60, "", {"items"}, {"result0"}),  # an age file of a few bytes has some hundred
        ([b"x"], NONE, set(), {"items", "result0"}),
    ],
    ids=["small", "large", "small with a large result", "none may be in Redis"],
)
def test_small_blobs_need_no_file(  # noqa: PLR0913 -- two fixtures more
    tmp_path: Path, redis_url: str, *, texts: list[bytes], settings: str, in_redis: set[str], files: set[str]
) -> None:
    core = core_of(Service(tmp_path, settings, redis_url))
    job_id = bulk(core, *texts)

    assert run(core, job_id).state == "succeeded"
    assert (set(small(core, job_id)), on_disk(core, job_id)) == (in_redis, files)
    sealed = [unb64(line["ciphertext"]) for line in lines(core, job_id)]
    assert [core.kms.decrypt(WHO, each, Context()).plaintext for each in sealed] == texts


@pytest.mark.parametrize("size", [1_000, 15_000, 15_900, 16_400, 100_000])
def test_both_parts_of_a_result_rest_together(core: Core, size: int) -> None:
    job_id = upload(core, bytes(size))

    assert run(core, job_id).state == "succeeded"
    places = [set(small(core, job_id)), on_disk(core, job_id)]
    assert sorted(places, key=len) == [set(), {"upload", "head"}]
    assert size > 1_000 or not on_disk(core, job_id)
    assert core.kms.decrypt(WHO, result(core, job_id), Context()).plaintext == bytes(size)


def test_blobs_go_to_the_disk_while_redis_has_little_room(core: Core) -> None:
    """Which a submission finds out when it is checked, and a worker by its claim."""
    before = bulk(core, b"x")
    core.worker_context.store.redis.set("kms:half", "1", ex=60)
    core.submitter.check(OPTIONS)
    later = bulk(core, b"x")

    assert on_disk(core, later) == {"items"}
    for job_id in (before, later):
        assert run(core, job_id).state == "succeeded"
        assert "result0" in on_disk(core, job_id)
        assert result(core, job_id)
    assert not small(core, later)


def test_a_process_that_keeps_none_there_reads_those_of_others(
    core: Core, tmp_path: Path, redis_url: str
) -> None:
    """Hosts may differ in ``inline_bytes``, and it may be set back to 0 while jobs wait."""
    other = core_of(Service(tmp_path, NONE, redis_url))
    waiting, ended = bulk(core, b"one"), bulk(core, b"two")
    run(core, ended)

    assert run(other, waiting).state == "succeeded"
    assert on_disk(other, waiting) == {"result0"}
    assert small(other, waiting).keys() == {"items"}
    assert result(core, waiting)
    assert result(other, ended)
    other.worker_context.spool.delete(ended)
    assert small(core, ended) == {}


def test_nothing_of_the_plaintext_rests_in_redis(core: Core) -> None:
    job_id = bulk(core, CANARY.encode())
    run(core, job_id)

    assert not any(CANARY.encode() in data for data in small(core, job_id).values())


# -- what others may do to them -------------------------------------------------------------------------


def test_input_of_another_job_is_refused(core: Core) -> None:
    mine, other = bulk(core, b"mine"), bulk(core, b"other")
    core.worker_context.store.redis.hset(f"kms:blobs:{mine}", "items", small(core, other)["items"])

    run(core, mine)

    assert end_of(core, mine) == ("failed", "record_refused")


@pytest.mark.parametrize("damage", ["changed", "shorter", "longer", "another job's", "gone"])
def test_damaged_result_is_refused(core: Core, damage: str) -> None:
    job_id, other = bulk(core, b"x"), bulk(core, b"y")
    run(core, job_id)
    run(core, other)
    redis = core.worker_context.store.redis
    (name,) = [raw for raw in cast("list[bytes]", redis.hkeys(f"kms:blobs:{job_id}")) if b"result" in raw]
    data = small(core, job_id)["result0"]
    changed = {
        "changed": data[:-1] + bytes([data[-1] ^ 1]),
        "shorter": data[:-1],
        "longer": data + b"\0",
        "another job's": small(core, other)["result0"],
    }
    if damage == "gone":
        redis.hdel(f"kms:blobs:{job_id}", name)
    else:
        redis.hset(f"kms:blobs:{job_id}", name, changed[damage])

    with pytest.raises(ResultExpired if damage == "gone" else RecordRefused):
        result(core, job_id)


# -- when they go ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data", "kept"),
    [
        ("items", b"x", {"result0"}),
        ("encrypt", bytes(300_000), {"upload", "head"}),
        ("decrypt", b"age-encryption.org/v1\nno file of age", set()),
    ],
    ids=["items", "upload", "failed upload"],
)
def test_inputs_outlive_the_end_by_the_grace(core: Core, kind: str, data: bytes, kept: set[str]) -> None:
    options = job_options(WHO, cast("wire.JobKind", kind), Context())  # or none
    job_id = bulk(core, data) if kind == "items" else uploaded(core, options, data)
    (given,) = roles(core, job_id)
    assert run(core, job_id).ended

    remove_inputs(core, 60)
    assert given in roles(core, job_id)
    assert core.worker_context.store.redis.zscore("kms:inputs", job_id)

    remove_inputs(core)
    assert roles(core, job_id) == kept
    assert not core.worker_context.store.redis.exists("kms:inputs")


class UnaskedStore:
    """A store of the spool that fails the test if anything but its size is asked."""

    usage_cache_s, is_remote, is_away, is_refused = 3600.0, True, False, False

    def used_bytes(self) -> int:
        return 0

    def free_bytes(self) -> int:
        return 1 << 40


@pytest.mark.parametrize("submit", [bulk, upload], ids=["items", "upload"])
@pytest.mark.parametrize("end", ["expired", "released", "cancelled"])
def test_a_job_whose_blobs_are_in_redis_asks_the_store_nothing(
    core: Core, submit: Callable[[Core, bytes], str], end: str
) -> None:
    """In all its life: 5,000 such jobs would have their cleanup wait for as many answers of a bucket."""
    context = core.worker_context
    context.spool.store = cast("Any", UnaskedStore())
    job_id = submit(core, b"x")
    if end == "cancelled":
        context.store.cancel(job_id, TENANT)
        context.spool.delete(job_id)  # as the API does
    else:
        assert run(core, job_id).state == "succeeded"
        assert result(core, job_id)
        remove_inputs(core)
    if end == "released":
        results.delete(context.store.get(job_id, TENANT), context.store, context.spool)
    context.store.redis.zadd("kms:ended", {job_id: 1})
    SpoolCleanup(context.store, context.spool, "r", may_sweep=lambda: False)._delete_expired()  # noqa: SLF001 -- the sweep asks, once in ten minutes

    assert not small(core, job_id)
    assert expired(context.store) == []


@pytest.mark.parametrize("texts", [[b"x"] * 60, [bytes(LIMIT)]], ids=["large result", "all is large"])
def test_what_rests_on_the_disk_leaves_with_the_result(core: Core, texts: list[bytes]) -> None:
    context, job_id = core.worker_context, bulk(core, *texts)
    run(core, job_id)
    assert on_disk(core, job_id)

    context.store.redis.zadd("kms:ended", {job_id: 1})
    reap(context.store, context.spool)

    assert not roles(core, job_id)


def test_released_result_is_gone(core: Core) -> None:
    job_id = bulk(core, b"x")
    context = core.worker_context
    results.delete(run(core, job_id), context.store, context.spool)

    assert not small(core, job_id)
    with pytest.raises(ResultReleased):
        result(core, job_id)


def test_cancelled_job_leaves_nothing(core: Core) -> None:
    job_id = bulk(core, b"x")
    core.worker_context.store.cancel(job_id, TENANT)
    run_job(job_id, core.worker_context, "w/1")

    assert not roles(core, job_id)


def test_blobs_leave_with_the_record(core: Core) -> None:
    job_id, redis = bulk(core, b"x"), core.worker_context.store.redis
    assert redis.ttl(f"kms:blobs:{job_id}") == -1
    run(core, job_id)

    left = [redis.pttl(f"kms:{what}:{job_id}") for what in ("job", "blobs")]
    assert left[0] > 0
    assert abs(left[1] - left[0]) < 1000


def test_nothing_rests_of_a_job_that_was_not_accepted(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    named, second = replace(OPTIONS, idempotency="a key"), submitter.new_id()
    first = bulk(core, b"x", options=named)
    monkeypatch.setattr(submitter, "new_id", lambda: second)

    assert bulk(core, b"x", options=named) == first
    assert not small(core, second)
    assert small(core, first)


@pytest.mark.parametrize("code", ["attempts_exhausted", "record_refused"])
def test_dead_job_is_retried_with_its_input(core: Core, code: str) -> None:
    job_id, store = bulk(core, b"x"), core.worker_context.store
    store.finish(take(store, job_id), "failed", code)
    remove_inputs(core)
    assert roles(core, job_id) == {"items"}
    assert [job.job_id for job in store.dead(TENANT, 10)] == [job_id]

    store.retry(job_id, TENANT)

    assert store.redis.ttl(f"kms:blobs:{job_id}") == -1
    assert run(core, job_id).state == "succeeded"
    assert store.dead(TENANT, 10) == []
