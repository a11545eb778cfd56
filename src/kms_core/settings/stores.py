"""Tables of ``kms.toml`` for object stores: the buckets of jobs and that of the spool."""

from pathlib import Path
from typing import Annotated

from msgspec import Meta

from kms_core.sections import Section, Timeout
from kms_protocol.units import MiB

BucketName = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{2,62}(?!\\s)$")]


class StoreSection(Section, frozen=True, kw_only=True):
    """The address of an object store, and the credentials for a bucket.

    Without an ``access_key_id`` the credentials are those that AWS tools would find.
    """

    endpoint: str | None = None
    region: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}(?!\\s)$")] = "us-east-1"  # part of a host name
    access_key_id: str | None = None
    secret_key_file: Path | None = None
    path_style: bool = True
    allow_http: bool = False
    ca_file: Path | None = None
    timeout_s: Timeout = 60.0


class BucketSection(StoreSection, frozen=True, kw_only=True):
    """``[kms.jobs.buckets.<bucket>]``: a bucket and the rights of jobs.

    ``read`` and ``write`` are prefixes of keys that end in a slash; ``""`` is the whole bucket, no prefix
    means no right.
    """

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()


class SpoolBucketSection(StoreSection, frozen=True, kw_only=True):
    """``[kms.jobs.spool_bucket]``: the spool in a bucket, in place of ``spool_dir``.

    ``url`` is ``s3://bucket`` or ``s3://bucket/prefix``. The buffers of uploads, results and reads of one
    process have at most ``buffer_bytes``.
    """

    url: Annotated[str, Meta(pattern="^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_.=-]+)*/?(?!\\s)$")]
    timeout_s: Timeout = 20.0
    buffer_bytes: Annotated[int, Meta(ge=16 * MiB)] = 256 * MiB

    @property
    def bucket(self) -> str:
        return self.url.split("/")[2]

    @property
    def prefix(self) -> str:
        """The beginning of all keys: empty, or with a slash at its end."""
        path = self.url.split("/", 3)[3:]
        return f"{path[0].rstrip('/')}/" if path and path[0] else ""
