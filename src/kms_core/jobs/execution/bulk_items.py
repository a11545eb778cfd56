"""Bulk jobs: many small items, each with its own context, file key and outcome; a bad one sinks no other."""

from typing import Final

import msgspec

from kms_core.jobs.bulk_lines import PART_ITEMS, decode, lines
from kms_core.jobs.ends import Work
from kms_core.jobs.execution.lease import Lease
from kms_core.jobs.model import part_id
from kms_core.jobs.spec import NOT_OF_PARTS, ItemsJob
from kms_core.jobs.storage.spool import ITEMS, Label, Spool
from kms_core.results import Opened
from kms_core.service import Kms
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import KmsError, Unavailable

RESULT: Final = "result"


def run(lease: Lease, job: ItemsJob, kms: Kms, spool: Spool) -> None:
    """Work through the items of a job, or of its part, and write one result line each, in order.

    Raises Unavailable as it comes: the part is then done again, from its first item.
    """
    kms, context = kms.for_job(), job.bound_context
    label = Label(job.tenant, job.owner, ITEMS, ref=job.input_ref)
    begin = job.starts[0]
    first = job.part * PART_ITEMS
    with (
        kms.audit_log.together(),
        spool.opened(label) as reader,
        spool.writing(
            result_label(job.tenant, job.owner, job.part, lease.claim.attempt_id), may_be_small=True
        ) as out,
    ):
        for index, line in enumerate(lines(reader.slabs(begin, begin + job.size_bytes)), start=first):
            lease.check()
            answer = _answer(kms, job, context, index, decode(line))
            out.write(wire.encode(answer) + b"\n")
            lease.item(len(line) + 1, failed=isinstance(answer.error, wire.ErrorCode))
            if isinstance(answer.error, wire.ErrorCode):
                lease.failures.add(index, answer.error.code)
    lease.made = Work(result_digest=out.ref, blob=out.small)


def result_label(tenant: str, job_id: str, part: int, attempt: str, ref: bytes = b"") -> Label:
    """The spool label of the result lines of one part; a job that was not split is its own part 0."""
    return Label(tenant, job_id, f"{RESULT}{part}", attempt, ref)


def parts(job: ItemsJob) -> list[ItemsJob]:
    """The job cut into parts, which several workers can run at once. Doing it again gives the same ids."""
    ends = (*job.starts[1:], job.size_bytes)
    return [
        msgspec.structs.replace(
            job,
            job_id=part_id(job.job_id, number),
            parent=job.job_id,
            part=number,
            items=min(PART_ITEMS, job.items - number * PART_ITEMS),
            starts=(start,),
            size_bytes=end - start,
            **NOT_OF_PARTS,
        )
        for number, (start, end) in enumerate(zip(job.starts, ends, strict=True))
    ]


def _answer(kms: Kms, job: ItemsJob, bound: Context, index: int, item: wire.JobItem) -> wire.ItemResult:
    """Work on one item; ``bound`` is the context of those without one. Raises Unavailable."""
    data = item.plaintext or item.ciphertext or b""
    try:
        context = bound if item.context is None else Context.parse(item.context)
        new_context = job.new_bound_context
        made = kms.run(job.kind, job.who, data, context, new_context=new_context, key_id=job.key_id)
    except Unavailable:
        raise
    except KmsError as exc:
        return wire.ItemResult(index=index, error=wire.ErrorCode(code=exc.code))
    if isinstance(made, Opened):
        return wire.ItemResult(index=index, plaintext=made.plaintext, file_id=made.file_id)
    return wire.ItemResult(index=index, ciphertext=made.ciphertext, file_id=made.file_id)
