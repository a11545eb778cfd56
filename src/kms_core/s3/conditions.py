"""Conditions of writes: finds those that an object store ignores."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from kms_core.s3.bucket import Bucket, Completion, If
from kms_protocol.errors import KmsError

PROBE: Final = b"This object shows that the store honours conditions of writes.\n"
PROBE_MARK: Final = "probe"
_NO_ETAG: Final = '"00000000000000000000000000000000"'


def ignored_conditions(bucket: Bucket, key: str, *, uploads: bool) -> Sequence[str]:
    """The conditions that a bucket ignores, with ``uploads`` those of completed uploads too.

    Writes to the object ``key`` must fail, since it exists by then. It stays, so that this needs no right to
    delete. Raises what ``Bucket`` raises.
    """
    bucket.put(key, PROBE, If(absent=True), PROBE_MARK)
    found = [
        name
        for name, condition in (("If-None-Match", If(absent=True)), ("If-Match", If(etag=_NO_ETAG)))
        if bucket.put(key, PROBE, condition, PROBE_MARK)
    ]
    if uploads and _completes(bucket, key):
        found.append("If-None-Match of multipart uploads")
    return found


def _completes(bucket: Bucket, key: str) -> bool:
    """Return whether an upload to an object that exists is completed although it must not be."""
    upload = bucket.begin(key, PROBE_MARK)
    try:
        parts = [bucket.put_part(key, upload, 1, memoryview(PROBE))]
        return bucket.complete(key, upload, parts, If(absent=True)) is Completion.DONE
    finally:
        with suppress(KmsError):
            bucket.abort(key, upload)
