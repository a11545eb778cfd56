"""Jobs of a core in this process: submitted, run as a worker does, and read."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.execution import results
from kms_core.jobs.execution.lease import WorkerContext
from kms_core.jobs.execution.runner import run_claimed, tidy
from kms_core.jobs.model import Job, part_id
from kms_core.jobs.recovery.reaper import reap_all
from kms_protocol import wire
from kms_protocol.context import Context
from support.job_options import job_options
from support.job_stores import TENANT, expire_leases

WHO = Principal("local")
CONTEXT = Context.parse("env=test")
NEW = Context.parse("env=new")


def submit(  # noqa: PLR0913 -- what a job may name
    core: Core,
    kind: wire.JobKind,
    source: str | Path,
    target: str | Path | None,
    *,
    context: Context = CONTEXT,
    new: Context | None = None,
    **more: Any,  # noqa: ANN401 -- fields of ``JobIn``
) -> str:
    """The id of a job over files or objects, which go by path or URL."""
    more |= {"source": _url(source)} | ({} if target is None else {"target": _url(target)})
    return core.submitter.submit(job_options(WHO, kind, context, new_context=new, **more)).job_id


def _url(place: str | Path) -> str:
    return place.as_uri() if isinstance(place, Path) else place


def submit_items(core: Core, count: int = 1, bad: Collection[int] = ()) -> str:
    """The id of a job that seals so many items, of which the bad ones have a context that is none."""
    items = (
        wire.JobItem(plaintext=b"%d" % number, context="no equals sign" if number in bad else None)
        for number in range(count)
    )
    return core.submitter.items(job_options(WHO, "encrypt", CONTEXT), items).job_id


def now(core: Core, job_id: str) -> Job:
    return core.worker_context.store.get(job_id, TENANT)


def end_of(core: Core, job_id: str) -> tuple[str, str]:
    """State and error of a job."""
    job = now(core, job_id)
    return job.state, job.error


def run_job(job_id: str, worker_context: WorkerContext, worker: str) -> None:
    """Have a worker bring this job to an end, whichever is the next one.

    One that has ended, or that another attempt holds, is tidied, as a worker does that is sent to it.
    """
    claim = worker_context.store.claim(job_id, worker)
    if claim is None:
        tidy(worker_context.store.accepted(job_id), worker_context)
    else:
        run_claimed(claim, worker_context)


def split_into_parts(core: Core, job_id: str) -> list[str]:
    """Run a job, which cuts it into its parts if it is to have some; their ids. No part has run."""
    run_job(job_id, core.worker_context, "w/1")
    return [part_id(job_id, number) for number in range(now(core, job_id).parts)]


def run(core: Core, job_id: str) -> Job:
    """Run a job, then its parts if it has any; the job as it is then."""
    for part in split_into_parts(core, job_id):
        run_job(part, core.worker_context, "w/1")
    return now(core, job_id)


def done(
    core: Core,
    kind: wire.JobKind,
    source: str | Path,
    target: str | Path | None,
    **more: Any,  # noqa: ANN401 -- of ``submit``
) -> Job:
    """A job over files or objects that was submitted and run."""
    return run(core, submit(core, kind, source, target, **more))


def run_after_lease_expiry(core: Core, job_id: str) -> None:
    """Another worker has its turn with a job, or a part, whose worker died."""
    store = core.worker_context.store
    expire_leases(store)
    reap_all(store, [job_id])
    run_job(job_id, core.worker_context, "w/2")


def result(core: Core, job_id: str) -> bytes:
    found = results.of(now(core, job_id), core.worker_context.store, core.worker_context.spool)
    whole = b"".join(map(bytes, found.slabs(0, found.size)))
    assert len(whole) == found.size
    return whole


def lines(core: Core, job_id: str) -> list[dict[str, Any]]:
    """The lines of a result, one for each item or file."""
    return [json.loads(line) for line in result(core, job_id).splitlines()]


def opened(core: Core, path: Path, context: Context = CONTEXT) -> bytes:
    """The plaintext of a file."""
    return core.kms.decrypt(WHO, path.read_bytes(), context).plaintext
