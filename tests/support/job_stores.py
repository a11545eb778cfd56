"""Job stores and jobs for tests: leases that run out, and what an intruder in Redis can do."""

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import redis

from kms_core import redis_client
from kms_core.container import Core
from kms_core.jobs.file_patterns import is_tree
from kms_core.jobs.model import Attempt, Commit, Job, QueuePriority
from kms_core.jobs.recovery.reaper import Reaper
from kms_core.jobs.recovery.spool_cleanup import SpoolCleanup
from kms_core.jobs.spec import BULK, QUEUES, AnyJob
from kms_core.jobs.storage.spool import Spool
from kms_core.jobs.storage.spool_folder import SpoolFolder
from kms_core.jobs.store import gauges
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import SubmissionOptions, new_id
from kms_core.settings.load import load
from kms_core.settings.model import KmsSection, RedisSection
from support.embedded_valkey import EmbeddedValkey
from support.golden import reference
from support.service import CANARY

TENANT = "default"
BASE = load(None, {"HOME": "/nonexistent"}).kms


def with_jobs(**changes: object) -> KmsSection:
    """Settings with leases that last and few attempts, but for these of ``[kms.jobs]``."""
    jobs = msgspec.structs.replace(BASE.jobs, **{"lease_s": 600, "attempts": 3, **changes})
    return msgspec.structs.replace(BASE, jobs=jobs)


LASTING_LEASES = with_jobs()
COMMIT = Commit(attempt_id="a" * 26, inode=2, size_bytes=3, mtime_ns=4)


def connect(url: str) -> redis.Redis:
    """A client as the service makes it."""
    return redis_client.connect(RedisSection(url=url, broker_url=url))


def store_of(
    core: Core, section: KmsSection, *, woken: list[str] | None = None, several_tenants: bool = False
) -> JobStore:
    """The core's store with other settings; the queues of its wake-ups are noted."""
    found = core.worker_context.store
    notify = ([] if woken is None else woken).append
    return JobStore(found.redis, found.record_key, notify, section, lambda: several_tenants)


@contextmanager
def alone(store: JobStore, folder: Path) -> Iterator[JobStore]:
    """The store on a server of its own, where ``commands`` counts those of no other test."""
    with EmbeddedValkey(folder) as server, closing(connect(server.url)) as client:
        woken: list[str] = []
        yield JobStore(client, store.record_key, woken.append, LASTING_LEASES, lambda: False)


def commands(store: JobStore) -> int:
    """The calls of commands that its server had, those within scripts too."""
    stats: Any = store.redis.info("commandstats")
    return sum(each["calls"] for name, each in stats.items() if name != "cmdstat_info")


def round_trips(store: JobStore) -> int:
    """The reads of its server from clients: of commands that are sent together one for some 16 KiB."""
    stats: Any = store.redis.info("stats")
    return int(stats["total_reads_processed"])


def depths(store: JobStore) -> dict[QueuePriority, int]:
    """The number of ready jobs by queue and priority."""
    return gauges.survey_queues(store).depths


def spool_folder(core: Core) -> Path:
    """The directory of the core's spool, to see and change what rests there."""
    store = core.worker_context.spool.store
    assert isinstance(store, SpoolFolder)
    return store.path


def uploaded(core: Core, options: SubmissionOptions, data: bytes) -> str:
    """The id of the job over an upload of this content."""
    receiving = core.submitter.receive_upload(options, 0)
    next(receiving)
    try:
        receiving.send((memoryview(data), False))
    except StopIteration as ended:
        return cast("Job", ended.value).job_id
    raise AssertionError("the upload goes on")


def accepted(**changes: object) -> AnyJob:
    """A job of the kind that its fields have: an upload, if they do not say."""
    now = time.time()
    fields: dict[str, object] = {
        "job_id": new_id(),
        "tenant": TENANT,
        "principal": "local",
        "credential": "none",
        "kind": "encrypt",
        "source": "items" if {"items", "parent"} & changes.keys() else "upload",
        "context": (("where", CANARY),),
        "created_at": now,
        "expires_at": now + 3600,
    }
    fields |= changes
    return _of({"start_by": fields["expires_at"], "run_by": fields["expires_at"], **fields})


def _of(fields: Mapping[str, object]) -> AnyJob:
    source = str(fields["source"])
    form = source if source in {"upload", "items"} else "file"
    if is_tree(source):
        form = "tree_part" if fields.get("parent") else "tree"
    return msgspec.convert({"target": "", "items": 0, "starts": (), **fields, "form": form}, AnyJob)  # type: ignore[no-any-return]  # a union


def claimed(store: JobStore, worker: str = "w1", **changes: object) -> Attempt:
    return take(store, store.submit(accepted(**changes)).job_id, worker)


def take(store: JobStore, job_id: str, worker: str = "w/1") -> Attempt:
    """The attempt of a worker that takes this job."""
    claim = store.claim(job_id, worker)
    assert claim
    return claim


def next_attempt(
    store: JobStore, worker: str = "w/1", queue: str = BULK, *, woken: bool = False
) -> Attempt | None:
    """An attempt at the job that a process is given; None if none is ready."""
    queues = [queue, *(each for each in QUEUES if each != queue)]
    found = store.next(worker, queues, woken=woken)
    assert not isinstance(found, str)
    return found


def attempt(store: JobStore, worker: str = "w/1", queue: str = BULK) -> Attempt:
    """An attempt at the job that a process is given."""
    found = next_attempt(store, worker, queue)
    assert found
    return found


def state(store: JobStore, claim: Attempt) -> str:
    return store.get(claim.accepted.job_id, TENANT).state


def record(store: JobStore, job_id: str) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = store.redis.hgetall(f"kms:job:{job_id}")  # type: ignore[assignment]  # sync client
    return found


def events(store: JobStore) -> list[dict[str, str]]:
    """What was told of all jobs, the newest last."""
    found = cast("list[tuple[bytes, dict[bytes, bytes]]]", store.redis.xrange("kms:events"))
    return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in found]


def forge(store: JobStore, job_id: str, **fields: str | bytes) -> None:
    """What somebody with access to Redis can do."""
    store.redis.hset(f"kms:job:{job_id}", mapping=fields)  # type: ignore[arg-type]  # its stubs want str keys in Any


def resealed(store: JobStore, job_id: str, *, version: int = 1, **changes: Any) -> bytes:  # noqa: ANN401 -- any
    """The record with other fields, as a later version would seal it."""
    fields = msgspec.to_builtins(store.accepted(job_id), builtin_types=(bytes,)) | changes
    secret = store.record_key._secrets[-1]  # noqa: SLF001 -- the test stands in for a later version
    sealed = reference.sealed_record(secret, job_id, bytes(32), msgspec.msgpack.encode(fields))
    return bytes([version]) + sealed[1:]


def expire_leases(store: JobStore) -> None:
    """Let every lease in the store's database have run out, as after the death of its worker."""
    past = time.time() - 1
    held: list[bytes] = store.redis.zrange("kms:leased", 0, -1)  # type: ignore[assignment]  # sync client
    for name in held:
        job_id = name.decode()
        fields = record(store, job_id)
        forge(store, job_id, lease_until=str(past))
        worker = fields.get(b"worker", b"").partition(b"/")[0]
        resources = fields.get(b"resources", b"").split()
        leases = [b"leased", b"running:" + fields[b"tenant"], b"large:" + worker]
        for key in (*leases, *(b"used:" + each for each in resources)):
            store.redis.zadd(b"kms:" + key, {name: past}, xx=True)
        for each in resources:
            store.redis.zadd(b"kms:probes:" + worker, {each: past}, xx=True)


def put_back_as_due(store: JobStore, job_id: str, dump: dict[bytes, bytes]) -> None:
    """What was taken down of a record earlier, as if it were due."""
    far = str(time.time() + 10 * 86_400)
    store.redis.delete(f"kms:job:{job_id}")
    forge(store, job_id, **{name.decode(): value for name, value in dump.items()})
    forge(store, job_id, expires_at=far, start_by=far, run_by=far, lease_until="0", not_before="0")


@contextmanager
def clock_ahead(seconds: float = 2 * 86_400) -> Iterator[pytest.MonkeyPatch]:
    """This machine's clock is so many seconds ahead of Redis's."""
    clock = time.time
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "time", lambda: clock() + seconds)
        yield patched


@contextmanager
def later(seconds: float = 2 * 86_400) -> Iterator[None]:
    """So many seconds later, for this machine and as Redis is asked for the time."""
    with clock_ahead(seconds) as patched:
        patched.setattr(JobStore, "now", lambda _: time.time())
        yield


def remove_inputs(core: Core, grace_s: float = -60) -> None:
    """Have the reaper remove the inputs of jobs that ended so long ago. Its clock may lag that of Redis."""
    reap(store_of(core, with_jobs(input_grace_s=grace_s)), core.worker_context.spool)


def reap(store: JobStore, spool: Spool) -> None:
    """Do a first round of the reaper, and one of the cleanup of the spool, by the clock of Redis."""
    store.ask_clock()
    Reaper(store, "r").step()
    SpoolCleanup(store, spool, "r").step()
