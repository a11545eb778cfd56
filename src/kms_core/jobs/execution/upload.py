"""Jobs over an uploaded file: the payload stays where it is, only its header is made anew.

Encrypt: the upload already rests sealed under the spool key, so its file key is wrapped for the target key.
Decrypt: every chunk is authenticated, then the file key is wrapped for the spool, and the download opens it.
Either way a result is ``head.<fence>`` followed by the payload of ``upload``.
"""

from contextlib import ExitStack
from typing import Final

from kms_core.jobs.execution.lease import Held, Lease
from kms_core.jobs.model import JobSpec
from kms_core.jobs.storage.spool import UPLOAD, Blob, Label, Spool
from kms_core.payload.parallel import ParallelOptions
from kms_core.results import Unwrapped
from kms_core.service import Kms
from kms_protocol.errors import DecryptFailed, InvalidRequest, NotACiphertext, RecordRefused, TooLarge

HEAD: Final = "head"


def run(lease: Lease, kms: Kms, spool: Spool) -> None:
    """Make the head of the result.

    Raises what ``Kms`` raises, DecryptFailed for a damaged payload, RecordRefused for another upload.
    """
    job = lease.claim.accepted
    work = {"encrypt": _encrypt, "decrypt": _decrypt, "rewrap": _rewrap}.get(job.kind)
    if work is None:
        raise InvalidRequest("An upload cannot be resealed: name a source and a target")
    with ExitStack() as stack:
        try:
            blob = stack.enter_context(spool.blob(upload_label(job)))
        except (NotACiphertext, DecryptFailed, TooLarge, RecordRefused) as exc:
            kms.refused(job.who, job.kind, job.bound_context, exc)
        head = work(lease, kms, spool, blob)
        with spool.writing(_head_label(lease), sealed=False) as out:
            out.write(head + blob.head.nonce)
        lease.result_digest = out.ref


def upload_label(job: JobSpec) -> Label:
    """Where the upload of a job rests."""
    return Label(job.tenant, job.job_id, UPLOAD, ref=job.input_ref)


def _head_label(lease: Lease) -> Label:
    job = lease.claim.accepted
    return Label(job.tenant, job.job_id, HEAD, lease.claim.fence)


def pace(lease: Held) -> ParallelOptions:
    """Slab by slab: tell progress, stop on loss or cancellation."""
    return ParallelOptions(progress=lease.advance, check=lease.check)


def _encrypt(lease: Lease, kms: Kms, spool: Spool, blob: Blob) -> bytes:
    job = lease.claim.accepted
    file_key = spool.unseal(upload_label(job), blob.head)
    size = blob.plaintext_bytes
    lease.advance(size)
    found = Unwrapped(file_key, blob.head.nonce, spool.ref(upload_label(job)), "service")
    return kms.adopt_file(job.who, found, job.bound_context, size_bytes=size, key_id=job.key_id)


def _decrypt(lease: Lease, kms: Kms, spool: Spool, blob: Blob) -> bytes:
    job = lease.claim.accepted
    found = kms.decrypt_file(job.who, blob.file, None, job.bound_context, key_id=job.key_id, pace=pace(lease))
    return spool.header_for(_head_label(lease), found.file_key, found.nonce)


def _rewrap(lease: Lease, kms: Kms, spool: Spool, blob: Blob) -> bytes:
    del spool
    job = lease.claim.accepted
    moved = kms.rewrap_file(
        job.who,
        blob.head,
        job.bound_context,
        new_context=job.new_bound_context,
        key_id=job.key_id,
        size_bytes=blob.file.size,
    )
    lease.advance(blob.payload.size)
    return moved.ciphertext
