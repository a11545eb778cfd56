"""What a fail-over costs: Redis with Sentinel, a replica 1.5 s behind, and a master that dies under load.

Clients submit over HTTP until so many jobs are acknowledged; the master is killed after a half of them. Half
of the jobs have their input in the spool. Then the replica becomes master, another one follows it, and all
jobs end. A job is lost if it was acknowledged and is unknown; it has turned if it had succeeded by the stream
of transitions and is not so any more, or has no result.
"""

import functools
import http.client
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import redis
from benchmarks import report
from benchmarks.bench_jobs import CONTEXT
from benchmarks.jobs_install import Ends, wait
from benchmarks.measure import Contender, Reading, in_turn, say
from benchmarks.report import Cell, Scale

from kms_core.jobs.storage.spool import ITEMS
from kms_core.settings.model import JobsSection, RedisSection
from kms_protocol.wire import ENDED, PREFIX
from support.redis_servers import Server, sentinel, server
from support.service import Service, b64
from support.tcp_proxy import LaggingProxy
from support.waiting import until
from support.webhooks import make_localhost_tls

JOBS: Final = 4_000
LAG_S: Final = 1.5
SENDERS: Final = 32
PROCESSES: Final = 4
_GRACE_S: Final = 5
_PATIENCE_S: Final = 600.0
_PAUSE_S: Final = 0.2
_SPOOLED: Final = b64(bytes(80 * 1024))
_LOGIN: Final = "master=mymaster&sentinel_password=sentinel"
_COUNTS: Final = ("turned", "unended", "left", "succeeded_before", "acknowledged")
_LOST: Final = Scale(key="lost", unit="acknowledged jobs lost", digits=0)


@dataclass
class Seen:
    """Answers that clients had: jobs that were acknowledged, and those that then succeeded by the stream."""

    acknowledged: list[str] = field(default_factory=list)
    succeeded: set[str] = field(default_factory=set)
    unavailable: int = 0


def main() -> None:
    options = report.options(
        "failover",
        "A fail-over of Redis to a replica that is behind.",
        runs=1,
        budget_s=900.0,
        jobs=JOBS,
        lag_s=LAG_S,
        dir=tempfile.gettempdir(),
    )
    given = options.given
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir=report.place(given.dir)) as name:
        contenders = [
            Contender(called, functools.partial(_failed_over, Path(name), settings, given.jobs, given.lag_s))
            for called, settings in _settings().items()
        ]
        plan = replace(options.plan, warms=False, foreign=float("inf"))  # counts are not disturbed by others
        found = options.keep("failover", in_turn(contenders, plan, options.budget_s))
    more: dict[str, Cell] = {word: Scale(key=word, digits=0).median for word in _COUNTS}
    title = f"Replica {given.lag_s} s behind, master killed after {given.jobs // 2:,} acknowledged jobs"
    about = (
        "turned: succeeded before, by the stream, and not after; unended: not ended ten minutes later; "
        f"left: inputs in the spool {2 * _GRACE_S} s after the last end."
    )
    options.write([report.table(title, found, _LOST, more=more), about])


def _settings() -> Mapping[str, str]:
    """Settings of ``[kms.redis]`` by what they are called; those that this version knows."""
    found = {"no wait": ""}
    if "wait_replicas" in RedisSection.__struct_fields__:
        found["wait_replicas = 1"] = f"wait_replicas = 1\nwait_ms = {int(LAG_S * 4000)}\n"
    return found


def _failed_over(folder: Path, redis_settings: str, count: int, lag_s: float) -> Reading:
    with tempfile.TemporaryDirectory(dir=folder) as name, ExitStack() as stack:
        below, seen = Path(name), Seen()
        authority = make_localhost_tls(below)
        grace = f"input_grace_s = {_GRACE_S}\n" if "input_grace_s" in JobsSection.__struct_fields__ else ""
        settings = f'[kms.redis]\nca_file = "{authority.ca_file}"\n{redis_settings}'
        settings += f'[kms.jobs]\nlease_s = 5\nconcurrency = {PROCESSES}\n{grace}[kms.log]\nlevel = "error"\n'
        master = stack.enter_context(server(below / "master", authority))
        relay = LaggingProxy(master.port, lag_s)
        second = stack.enter_context(server(below / "second", authority, master=relay.port))
        watcher = stack.enter_context(
            sentinel(below / "sentinel", authority, master.port, failover_timeout_s=600)
        )
        until(lambda: master.admin().info("replication")["connected_slaves"] == 1, "the replica follows")
        login = master.url().removeprefix("rediss://").partition("@")[0]
        url = f"sentinels://{login}@localhost:{watcher.port}/0?{_LOGIN}"
        service = stack.enter_context(Service(below / "kms", settings, url)).start()
        stack.enter_context(_observed(master, seen))
        with ThreadPoolExecutor(SENDERS) as pool:
            sending = [
                pool.submit(_send, service.port, seen, count, half) for half in (False, True) * (SENDERS // 2)
            ]
            wait(
                lambda: len(seen.acknowledged) >= count // 2 or all(each.done() for each in sending),
                _PATIENCE_S,
                "the first half of the jobs",
            )
            master.process.kill()
            killed = time.monotonic()
            until(lambda: second.admin().info("replication")["role"] == "master", "another master")
            say(f"another master after {time.monotonic() - killed:.1f} s")
            stack.enter_context(server(below / "third", authority, master=second.port))
            for each in sending:
                each.result()
        return _compared(service, seen)


@contextmanager
def _observed(master: Server, seen: Seen) -> Iterator[None]:
    """Read the stream until the master is gone."""
    ends = Ends(master.admin())

    def read() -> None:
        try:
            for found in ends.later():
                if found.state == "succeeded":
                    seen.succeeded.add(found.job_id)
        except redis.RedisError:
            return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    yield
    thread.join()


def _send(port: int, seen: Seen, count: int, spooled: bool) -> None:
    """Submit jobs until all senders together have so many acknowledged; others may run, and do not count."""
    item = {"plaintext": _SPOOLED if spooled else b64(b"secret")}
    body = json.dumps({"kind": "encrypt", "context": CONTEXT, "items": [item]}).encode()
    ends = time.monotonic() + _PATIENCE_S
    while len(seen.acknowledged) < count and time.monotonic() < ends:
        try:
            status, answer = _ask(port, "POST", "/jobs", body)
        except (OSError, http.client.HTTPException):
            status, answer = 0, {}
        if status == http.HTTPStatus.ACCEPTED:
            seen.acknowledged.append(answer["job_id"])
        else:
            seen.unavailable += 1
            time.sleep(_PAUSE_S)


def _ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, f"{PREFIX}{path}", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    is_json = "json" in answer.headers.get("Content-Type", "")
    return answer.status, json.loads(text) if is_json else text


def _compared(service: Service, seen: Seen) -> Reading:
    """What has become of the jobs once all of them have ended, or ten minutes later."""
    states = dict.fromkeys(seen.acknowledged, "")
    ends = time.monotonic() + _PATIENCE_S
    while True:
        for job_id in [name for name, state in states.items() if state not in {*ENDED, "lost"}]:
            status, answer = _ask(service.port, "GET", f"/jobs/{job_id}")
            states[job_id] = "lost" if status == http.HTTPStatus.NOT_FOUND else answer.get("state", "")
        unended = [name for name, state in states.items() if state not in {*ENDED, "lost"}]
        if not unended or time.monotonic() > ends:
            break
        time.sleep(1)
    time.sleep(2 * _GRACE_S)
    had = seen.succeeded & states.keys()
    whole = {name for name in had if states[name] == "succeeded" and _has_result(service, name)}
    failed = Counter(_code(service, name) for name, state in states.items() if state == "failed")
    say(f"{dict(Counter(states.values()))}, by {dict(failed)}; refused calls: {seen.unavailable}")
    return {
        "acknowledged": len(states),
        "lost": sum(state == "lost" for state in states.values()),
        "succeeded_before": len(had),
        "turned": len(had) - len(whole),
        "unended": len(unended),
        "left": sum(states.get(path.parent.name) in ENDED for path in service.spool.glob(f"*/{ITEMS}")),
    }


def _has_result(service: Service, job_id: str) -> bool:
    return _ask(service.port, "GET", f"/jobs/{job_id}/result")[0] == http.HTTPStatus.OK


def _code(service: Service, job_id: str) -> str:
    error = _ask(service.port, "GET", f"/jobs/{job_id}")[1].get("error") or {}
    return str(error.get("code", "") if isinstance(error, dict) else error)


if __name__ == "__main__":
    main()
