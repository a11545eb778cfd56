"""Jobs over an uploaded file: the payload stays in place, only the header is replaced.

Encrypt: the upload already rests sealed under the spool key, so its file key is wrapped for the target key.
Decrypt: every chunk is authenticated, then the file key is wrapped for the spool, and the download opens it.
Either way a result is ``head.<attempt id>`` followed by the payload of ``upload``.
"""

from contextlib import ExitStack
from typing import Final

from kms_core.envelope import binding
from kms_core.jobs.execution.lease import Held, Lease
from kms_core.jobs.spec import UploadJob
from kms_core.jobs.storage.spool import UPLOAD, Blob, Label, Spool
from kms_core.payload.parallel import ParallelOptions
from kms_core.service import Kms
from kms_protocol.errors import DecryptFailed, InvalidRequest, NotACiphertext, RecordRefused, TooLarge

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
        except (NotACiphertext, DecryptFailed, TooLarge, RecordRefused) as exc:
            kms.raise_recorded(job.who, job.kind, job.bound_context, exc)
        head = work(lease, job, kms, spool, blob)
        with spool.writing(_head_label(lease), sealed=False, may_be_small=blob.is_small) as out:
            out.write(head + blob.head.nonce)
        lease.blob = out.small
        lease.result_digest, lease.file_id = out.ref, binding.file_id(blob.head.nonce)


def upload_label(job: UploadJob) -> Label:
    """The spool label of a job's upload."""
    return Label(job.tenant, job.job_id, UPLOAD, ref=job.input_ref)


def _head_label(lease: Lease) -> Label:
    job = lease.claim.accepted
    return Label(job.tenant, job.job_id, HEAD, lease.claim.attempt_id)


def options(lease: Held) -> ParallelOptions:
    """Slab by slab: tell progress, stop on loss or cancellation."""
    return ParallelOptions(progress=lease.advance, check=lease.check)


def _encrypt(lease: Lease, job: UploadJob, kms: Kms, spool: Spool, blob: Blob) -> bytes:
    file_key = spool.unseal(upload_label(job), blob.head)
    size = blob.plaintext_bytes
    lease.advance(size)
    payload = file_key, blob.head.nonce
    return kms.encrypt_header(job.who, payload, job.bound_context, size_bytes=size, key_id=job.key_id)


def _decrypt(lease: Lease, job: UploadJob, kms: Kms, spool: Spool, blob: Blob) -> bytes:
    found = kms.decrypt_header(
        job.who, blob.file, job.bound_context, key_id=job.key_id, options=options(lease)
    )
    return spool.header_for(_head_label(lease), found.file_key, found.nonce)


def _rewrap(lease: Lease, job: UploadJob, kms: Kms, spool: Spool, blob: Blob) -> bytes:
    del spool
    moved = kms.rewrap_header(
        job.who,
        blob.head,
        job.bound_context,
        new_context=job.new_bound_context,
        key_id=job.key_id,
        size_bytes=blob.file.size,
    )
    lease.advance(blob.payload.size)
    return moved.ciphertext
