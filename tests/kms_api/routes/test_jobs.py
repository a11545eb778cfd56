"""Waits, reads of many records and results: how often the store is read, and in which threads."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias, cast

import pytest
import redis

from kms_core.auth.policy import Principal
from kms_protocol import wire
from kms_protocol.wire import PREFIX
from support.authorization.application import Application
from support.core_jobs import run_job
from support.job_options import job_options
from support.waiting import WAIT_S, until

JOBS: Final = 50
WAITS: Final = 8
Send: TypeAlias = Callable[[redis.UnixDomainSocketConnection, Sequence[bytes], bool], None]


def submitted(application: Application, group: wire.GroupIn | None = None) -> str:
    """The id of a new job of one item, which waits."""
    who = Principal(application.master.name, "default", application.master.credential)
    options = job_options(who, "encrypt", "env=prod", group=group)
    return application.core.submitter.items(options, [wire.JobItem(plaintext=b"salary")]).job_id


def reads(application: Application, command: str) -> int:
    """The calls of a command that Redis had."""
    stats: Any = application.core.worker_context.store.redis.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])


def test_waits_for_a_group_read_its_jobs_once_when_none_is_open(application: Application) -> None:
    group, store = wire.GroupIn(name="payroll", jobs=JOBS), application.core.worker_context.store
    jobs = [submitted(application, group) for _ in range(JOBS)]
    with ThreadPoolExecutor(WAITS) as pool:
        path = f"{PREFIX}/job-groups/payroll?wait=60"
        before, counts = reads(application, "hgetall"), reads(application, "scard")
        waits = [pool.submit(application.ask, application.master, "GET", path) for _ in range(WAITS)]
        until(lambda: application.streams() == WAITS, "all wait")
        until(lambda: reads(application, "scard") > counts + 2 * WAITS, "they have looked several times")
        assert reads(application, "hgetall") < before + JOBS, "the jobs are not read while one is open"

        for job_id in jobs[1:]:
            store.cancel(job_id, "default")
        of_one = (reads(application, "hgetall") - before) // (JOBS - 1)
        store.cancel(jobs[0], "default")
        answers = [each.result().json() for each in waits]

    assert reads(application, "hgetall") < before + JOBS * (of_one + 2), "once for all waits"
    assert answers == [answers[0]] * WAITS
    assert (answers[0]["ended"], answers[0]["states"]) == (True, {"cancelled": JOBS})


def test_a_wait_for_a_group_ends_with_a_job_that_comes_late(application: Application) -> None:
    """The group has no open job before, and has not ended."""
    group, store = wire.GroupIn(name="late", jobs=2), application.core.worker_context.store
    store.cancel(submitted(application, group), "default")
    with ThreadPoolExecutor() as pool:
        wait = pool.submit(application.ask, application.master, "GET", f"{PREFIX}/job-groups/late?wait=60")
        until(lambda: application.streams() == 1, "it waits")
        store.cancel(submitted(application, group), "default")

        assert wait.result(WAIT_S / 2).json()["states"] == {"cancelled": 2}, "before its time is over"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/jobs", None),
        ("GET", "/jobs/dead", None),
        ("POST", "/jobs/status", {"job_ids": [str(number) for number in range(31)]}),
        ("GET", "/job-groups/none", None),
        ("GET", "/webhooks/dead", None),
        ("GET", "/audit", None),
        ("POST", "/batch", {"operation": "encrypt", "items": [{"plaintext": ""}]}),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("/") else "",
)
def test_reads_of_many_records_leave_threads_to_other_tenants(
    application: Application, method: str, path: str, body: object
) -> None:
    """How many: tests/kms_api/test_deps.py."""
    limiters = application.service.limiters
    limiters.clear()

    application.ask(application.master, method, PREFIX + path, json=body)

    assert [name for name in limiters if name.endswith(" of default")]


def test_a_small_result_takes_one_read_of_its_record_and_one_of_its_content(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other threads of the service read does not count."""
    sent, send = bytearray(), cast("Send", redis.UnixDomainSocketConnection.send_packed_command)

    def record(
        connection: redis.UnixDomainSocketConnection, command: Sequence[bytes], check_health: bool = True
    ) -> None:
        sent.extend(b"".join(command))
        send(connection, command, check_health)

    job_id = submitted(application)
    run_job(job_id, application.core.worker_context, "w/1")
    monkeypatch.setattr(redis.UnixDomainSocketConnection, "send_packed_command", record)

    answer = application.ask(application.master, "GET", f"{PREFIX}/jobs/{job_id}/result")

    assert answer.json()["index"] == 0
    reading = re.findall(rb"\n(H\w*GET\w*)\r\n\$\d+\r\nkms:(\w+):" + job_id.encode(), bytes(sent))
    assert reading == [(b"HGETALL", b"job"), (b"HGET", b"blobs")]
