"""Jobs over an uploaded file: the payload stays in place, and the result of the job is a new head for it.

Encrypt: the upload is already sealed under the spool key, so its file key is wrapped for the target key. The
result is that header and the stored payload of the blob. Other uploads are the content of theirs. Decrypt:
every chunk is authenticated; the head is the file key, with which a download opens the payload. Rewrap: the
head is the new header of the same payload. Every head ends with the payload nonce of the file.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from kms_core.age import header, stream
from kms_core.envelope import binding
from kms_core.jobs.ends import Work
from kms_core.jobs.execution.lease import Lease
from kms_core.jobs.spec import UploadJob
from kms_core.jobs.storage.spool import UPLOAD, Blob, Label, Spool
from kms_core.payload.parallel import ParallelOptions
from kms_core.payload.streaming import RangeReader
from kms_core.service import Kms
from kms_protocol.errors import InvalidRequest, RecordRefused

HEAD: Final = "head"


def run(lease: Lease, job: UploadJob, kms: Kms, spool: Spool) -> None:
    """Make the head of the result.

    Raises what ``Kms`` raises, DecryptFailed for a damaged payload, RecordRefused for another upload.
    """
    work = {"encrypt": _encrypt, "decrypt": _decrypt, "rewrap": _rewrap}.get(job.kind)
    if work is None:
        raise InvalidRequest("An upload cannot be resealed: name a source and a target")
    with ExitStack() as stack:
        try:
            blob = stack.enter_context(spool.blob(upload_label(job)))
        except RecordRefused as exc:
            kms.raise_recorded(job.who, job.kind, job.bound_context, exc)
        head = work(lease, job, kms, blob)
        label = Label(job.tenant, job.job_id, HEAD, lease.claim.attempt_id)
        with spool.writing(label, may_be_small=blob.is_small) as out:
            out.write(head)
        lease.made = Work(result_digest=out.ref, blob=out.small, file_id=file_id(head))


def upload_label(job: UploadJob) -> Label:
    """The spool label of a job's upload."""
    return Label(job.tenant, job.job_id, UPLOAD, ref=job.input_ref)


def file_id(head: bytes) -> str:
    """The id of the file of a head (see ``binding.file_id``)."""
    return binding.file_id(head[-stream.NONCE :])


@contextmanager
def payload(job: UploadJob, head: bytes, spool: Spool) -> Iterator[RangeReader]:
    """Reader of the result of a job behind its header; of a decrypted one, which has none, all of it.

    That of an encrypted one is the reader's payload, sealed. Raises ResultExpired; RecordRefused and
    DecryptFailed, now or when a part of it is read.
    """
    with spool.opened(upload_label(job)) as content:
        if job.kind == "encrypt":
            yield content
            return
        sealed = content.tail(header.read_by(content.read_at, header.FILE_LIMITS).payload_offset)
        if job.kind == "rewrap":
            yield sealed
            return
        file_key, nonce = head[: header.FILE_KEY_BYTES], head[header.FILE_KEY_BYTES :]
        yield RangeReader(stream.payload_key(file_key, nonce), sealed)


def options(lease: Lease) -> ParallelOptions:
    """Slab by slab: tell progress, stop on loss or cancellation."""
    return ParallelOptions(progress=lease.advance, check=lease.check)


def _encrypt(lease: Lease, job: UploadJob, kms: Kms, blob: Blob) -> bytes:
    size = blob.content.size
    lease.advance(size)
    made = kms.encrypt_header(
        job.who, (blob.file_key, blob.nonce), job.bound_context, size_bytes=size, key_id=job.key_id
    )
    return made + blob.nonce


def _decrypt(lease: Lease, job: UploadJob, kms: Kms, blob: Blob) -> bytes:
    found = kms.decrypt_header(
        job.who, blob.content, job.bound_context, key_id=job.key_id, options=options(lease)
    )
    return found.file_key + found.nonce


def _rewrap(lease: Lease, job: UploadJob, kms: Kms, blob: Blob) -> bytes:
    moved, nonce = kms.rewrap_header(
        job.who, blob.content, job.bound_context, new_context=job.new_bound_context, key_id=job.key_id
    )
    lease.advance(blob.content.size)
    return moved.ciphertext + nonce
