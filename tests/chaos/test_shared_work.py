"""Sharing of work by running workers: between tenants, between hosts, and its cost while there is none.

Counts only; ``scripts/bench sharing`` and ``waiting`` measure the same with many jobs.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import redis

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.container import build as build_core
from kms_core.programs import tether
from kms_protocol.wire import JobItem
from support.job_options import job_options
from support.job_stores import connect
from support.network_hosts import Host, hosts_or_local
from support.ports import free_port
from support.service import CONTEXT, Service
from support.waiting import until

BIG: Final = job_options(Principal("big", "big"), "encrypt", CONTEXT)
SMALL: Final = replace(BIG, who=Principal("small", "small"))
QUEUED: Final = 400
SMALL_JOBS: Final = 3
WAITING: Final = 1000
ITEMS: Final = 40  # of a job that takes long enough for another host to come
SHARED_OUT: Final = 400  # long enough that a pause of one process, as for upkeep, does not count
IDLE_JOBS: Final = 600
IDLE_S: Final = 10.0
MOST_COMMANDS_PER_S: Final = 36  # those that scripts call included


class Stream:
    """The transitions of jobs from now on."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client
        newest = cast("list[tuple[bytes, object]]", client.xrevrange("kms:events", count=1))
        self._at: bytes | str = newest[0][0] if newest else "0-0"

    def later(self) -> Iterator[tuple[str, str, str]]:
        """Job, tenant and state, as they come; ends after a second without any."""
        while answer := cast("Any", self._redis.xread({"kms:events": self._at}, block=1000)):
            found = [
                row for _, rows in (answer.items() if isinstance(answer, dict) else answer) for row in rows
            ]
            for self._at, fields in found[0] if found and isinstance(found[0], list) else found:
                names = [fields[name].decode() for name in (b"subject", b"tenant", b"type")]
                yield names[0], names[1], names[2].rpartition(".")[2]


class Hosts(Service):
    """A worker on each of some hosts, with one process each."""

    def __init__(self, folder: Path, both: Mapping[str, Host]) -> None:
        super().__init__(folder, "[kms.jobs]\nconcurrency = 1\n")
        self._both = both

    def spawn(self, name: str) -> None:
        argv = [*self._both[name].enter, sys.executable, "-P", "-m", "kms_worker.main"]
        environ = self.environ | {"KMS_PORT": str(free_port()), "PATH": os.environ["PATH"]}
        with (self.logs / f"{name}.log").open("ab") as output:
            self._processes[name] = tether.spawn(argv, env=environ, output=output)


@contextmanager
def core_in(service: Service) -> Iterator[tuple[Core, redis.Redis]]:
    """A core that wakes workers as the API does, and a client of its Redis."""
    core = build_core(service.settings, "test", None)
    with connect(service.settings.kms.redis.url) as client:
        yield core, client


def test_small_tenant_waits_for_no_queue_of_another(tmp_path: Path) -> None:
    with Service(tmp_path) as service, core_in(service) as (core, client):
        for _ in range(QUEUED):
            core.submitter.items(BIG, [JobItem(plaintext=b"x")])
        service.start("worker")
        until(lambda: client.zcard("kms:state:big:succeeded"), "a job of the big tenant ends")

        before = [_started_before(core, client) for _ in range(SMALL_JOBS)]

        assert client.zcard("kms:state:big:queued"), "all jobs of the big tenant have run"
    assert max(before) <= 2, before  # one for each process


def _started_before(core: Core, client: redis.Redis) -> int:
    """Jobs of the big tenant that start after one of the small tenant is queued and before it starts."""
    stream, started, is_queued = Stream(client), 0, False
    ours = core.submitter.items(SMALL, [JobItem(plaintext=b"x")]).job_id
    count = -1
    for job_id, _, state in stream.later():
        if job_id == ours:
            is_queued = True
            count = started if state == "running" else count
            if state == "succeeded":
                return count
        started += is_queued and state == "running"
    raise AssertionError("the job of the small tenant did not end")


def test_each_of_two_hosts_works_while_jobs_wait(tmp_path: Path) -> None:
    with hosts_or_local(2) as both:
        named = dict(zip(("host1", "host2"), both, strict=True))
        with Hosts(tmp_path, named) as service, core_in(service) as (core, client):
            for _ in range(WAITING):
                core.submitter.items(BIG, [JobItem(plaintext=b"x")] * ITEMS)
            for name in named:
                service.spawn(name)

            until(lambda: len(_workers(client)) == len(named), "both hosts run a job")
            assert client.zcard("kms:state:big:queued") > SHARED_OUT, "one host has done all of it"

            runs = [job_id for job_id, _, state in _next_runs(client)]
            by = Counter(_worker(client, job_id) for job_id in runs)
    assert len(by) == len(named), by
    assert min(by.values()) >= SHARED_OUT // 20, by  # how they share depends on what else runs here


def _next_runs(client: redis.Redis) -> Iterator[tuple[str, str, str]]:
    count = 0
    for found in Stream(client).later():
        if found[2] == "running":
            count += 1
            yield found
        if count == SHARED_OUT:
            return


def _workers(client: redis.Redis) -> set[bytes]:
    """The workers that have had a job."""
    found = [client.zrange(f"kms:state:big:{state}", 0, -1) for state in ("running", "succeeded")]
    return {_worker(client, raw.decode()) for ids in found for raw in cast("list[bytes]", ids)} - {b""}


def _worker(client: redis.Redis, job_id: str) -> bytes:
    return (cast("bytes | None", client.hget(f"kms:job:{job_id}", "worker")) or b"").partition(b"/")[0]


def test_an_idle_service_leaves_redis_alone(tmp_path: Path) -> None:
    """Jobs wait behind the cap of a tenant, and in a queue that no worker serves."""
    settings = '[kms.jobs]\nlease_s = 600\ntenant_leases = 1\nqueues = ["kms.bulk", "kms.maintenance"]\n'
    with Service(tmp_path, settings) as service, core_in(service) as (core, client):
        for _ in range(IDLE_JOBS):
            core.submitter.items(BIG, [JobItem(plaintext=b"x")])
        first = core.worker_context.store.next("elsewhere/1", ("kms.bulk",), woken=False)
        assert first is not None  # it holds the only lease that its tenant may have
        (source := service.files / "source").write_bytes(b"x")
        for number in range(IDLE_JOBS // 2):
            target = f"file://{service.files}/{number}"
            core.submitter.files(
                job_options(SMALL.who, "encrypt", CONTEXT, source=f"file://{source}", target=target)
            )
        service.start()
        _pass(client, IDLE_S)  # what a start asks for

        begun, before = _seconds(client), _commands(client)
        _pass(client, IDLE_S)
        took, after = _seconds(client) - begun, _commands(client)

        spent = {name: (count - before[name]) / took for name, count in after.items() if count > before[name]}
        assert client.zcard("kms:state:small:queued") == IDLE_JOBS // 2
    text = ", ".join(f"{name} {rate:.1f}" for name, rate in spent.items())
    assert sum(spent.values()) < MOST_COMMANDS_PER_S, text


def _pass(client: redis.Redis, seconds: float) -> None:
    begun = _seconds(client)
    until(lambda: _seconds(client) - begun > seconds, "some seconds pass", poll_s=1.0)


def _seconds(client: redis.Redis) -> float:
    seconds, micro = client.time()
    return seconds + micro / 1e6


def _commands(client: redis.Redis) -> Counter[str]:
    """Calls of each command since the start, but for those that ask for this."""
    found = cast("dict[str, dict[str, int]]", client.info("commandstats"))
    names = {name: name.removeprefix("cmdstat_") for name in found}
    return Counter({names[name]: each["calls"] for name, each in found.items() if names[name] != "info"})
