"""Jobs over an uploaded file: the payload stays where it is, only its header is made anew.

Encrypt: the upload already rests sealed under the spool key, so its file key is wrapped for the target key.
Decrypt: every chunk is authenticated, then the file key is wrapped for the spool, and the download opens it.
Either way a result is ``head.<fence>`` followed by the payload of ``upload``.
"""

from contextlib import ExitStack
from typing import Final

from kms_core.envelope.extents import Extent
from kms_core.envelope.slabs import Pace
from kms_core.errors import DecryptFailed, InvalidRequest, NotACiphertext, TooLarge
from kms_core.jobs.blobs import UPLOAD, Blob, Label, Spool
from kms_core.jobs.lease import Held, Lease
from kms_core.results import Unwrapped
from kms_core.service import Kms

HEAD: Final = "head"


def run(lease: Lease, kms: Kms, spool: Spool) -> None:
    """Make the head of the result. Raises what ``Kms`` raises, DecryptFailed for a damaged payload."""
    job = lease.claim.accepted
    source = Label(job.tenant, job.job_id, UPLOAD)
    target = Label(job.tenant, job.job_id, HEAD, lease.claim.fence)
    work = {"encrypt": _encrypt, "decrypt": _decrypt, "rewrap": _rewrap}.get(job.kind)
    if work is None:
        raise InvalidRequest("An upload cannot be resealed: name a source and a target")
    with ExitStack() as stack:
        try:
            blob = stack.enter_context(spool.blob(source))
        except (NotACiphertext, DecryptFailed, TooLarge) as exc:
            kms.refused(job.who, job.kind, job.bound_context, exc)
        head = work(lease, kms, spool, blob)
        spool.put(target, head + blob.head.nonce)


def pace(lease: Held) -> Pace:
    """Slab by slab: tell progress, stop on loss or cancellation."""
    return Pace(progress=lease.advance, check=lease.check)


def _encrypt(lease: Lease, kms: Kms, spool: Spool, blob: Blob) -> bytes:
    job = lease.claim.accepted
    label = Label(job.tenant, job.job_id, UPLOAD)
    file_key = spool.unseal(label, blob.head)
    size = blob.plaintext_bytes
    lease.advance(size)
    found = Unwrapped(file_key, blob.head.nonce, spool.ref(label), "service")
    return kms.adopt_file(job.who, found, job.bound_context, size_bytes=size, key_id=job.key_id)


def _decrypt(lease: Lease, kms: Kms, spool: Spool, blob: Blob) -> bytes:
    job = lease.claim.accepted
    whole = Extent(blob.fd, blob.payload.offset + blob.payload.size)
    found = kms.decrypt_file(job.who, whole, None, job.bound_context, key_id=job.key_id, pace=pace(lease))
    label = Label(job.tenant, job.job_id, HEAD, lease.claim.fence)
    return spool.header_for(label, found.file_key, found.nonce)


def _rewrap(lease: Lease, kms: Kms, spool: Spool, blob: Blob) -> bytes:
    del spool
    job = lease.claim.accepted
    moved = kms.rewrap_file(
        job.who,
        blob.head,
        job.bound_context,
        new_context=job.new_bound_context,
        key_id=job.key_id,
        size_bytes=blob.payload.offset + blob.payload.size,
    )
    lease.advance(blob.payload.size)
    return moved.ciphertext
