"""Bulk jobs: many small items, each with its own context, file key and outcome; a bad one sinks no other."""

from typing import Final

import msgspec

from kms_core.jobs.bulk_lines import PART_ITEMS, decode, lines
from kms_core.jobs.execution.lease import Lease
from kms_core.jobs.model import JobSpec, part_id
from kms_core.jobs.storage.spool import ITEMS, Label, Spool
from kms_core.service import Kms
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import KmsError, Unavailable

RESULT: Final = "result"


def run(lease: Lease, kms: Kms, spool: Spool) -> None:
    """Work through the items of a job, or of its part, and write one result line each, in order.

    Raises Unavailable as it comes: the part is then done again, from its first item.
    """
    job, one = lease.claim.accepted, _Items(lease.claim.accepted, kms.for_job()).one
    label = Label(job.tenant, job.owner, ITEMS, ref=job.input_ref)
    begin = job.starts[0]
    first = job.part * PART_ITEMS
    with (
        kms.trail.together(),
        spool.opened(label) as reader,
        spool.writing(result_label(job.tenant, job.owner, job.part, lease.claim.fence)) as out,
    ):
        for index, line in enumerate(lines(reader.slabs(begin, begin + job.size_bytes)), start=first):
            lease.check()
            answer = one(index, decode(line))
            out.write(wire.encode(answer) + b"\n")
            lease.item(len(line) + 1, failed=not isinstance(answer.error, msgspec.UnsetType))
    lease.result_digest = out.ref


def result_label(tenant: str, job_id: str, part: int, fence: int, ref: bytes = b"") -> Label:
    """Where the result lines of one part rest; a job that was not split is its own part 0."""
    return Label(tenant, job_id, f"{RESULT}{part}", fence, ref)


def parts(job: JobSpec) -> list[JobSpec]:
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
            digest=b"",
        )
        for number, (start, end) in enumerate(zip(job.starts, ends, strict=True))
    ]


class _Items:
    """What holds for every item of one run."""

    def __init__(self, job: JobSpec, kms: Kms) -> None:
        self._job, self._kms = job, kms
        self._who, self._context = job.who, job.bound_context

    def one(self, index: int, item: wire.JobItem) -> wire.ItemResult:
        kms, who, key_id = self._kms, self._who, self._job.key_id
        try:
            context = self._context if item.context is None else Context.parse(item.context)
            if self._job.kind == "encrypt":
                sealed = kms.encrypt(who, item.plaintext or b"", context, key_id=key_id)
                return wire.ItemResult(index=index, ciphertext=sealed.ciphertext)
            ciphertext = item.ciphertext or b""
            if self._job.kind == "decrypt":
                opened = kms.decrypt(who, ciphertext, context, key_id=key_id)
                return wire.ItemResult(index=index, plaintext=opened.plaintext)
            move = kms.rewrap if self._job.kind == "rewrap" else kms.reseal
            new_context = self._job.new_bound_context
            moved = move(who, ciphertext, context, new_context=new_context, key_id=key_id)
            return wire.ItemResult(index=index, ciphertext=moved.ciphertext)
        except Unavailable:
            raise
        except KmsError as exc:
            return wire.ItemResult(index=index, error=wire.ErrorCode(code=exc.code))
