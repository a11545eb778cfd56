"""Objects that jobs name by ``s3://``: the buckets of the settings, and where jobs may read and write there.

A URL is read as a file's is: its parts are percent-decoded, so that a key with ``%``, ``?``, ``#`` or, for
jobs over many, ``*`` can be written. Knows no job.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import quote

from kms_core.jobs.file_patterns import path_names
from kms_core.s3 import conditions
from kms_core.s3.bucket import Bucket
from kms_core.s3.connection import S3Connection
from kms_core.settings.model import Settings
from kms_core.stores import line_of
from kms_protocol.errors import PathRefused

SCHEME: Final = "s3://"
ANY_NAME: Final = "any"
"""Stands for each name below a directory, where permissions are checked."""
KEY_MAX_BYTES: Final = 1024
_PROBE: Final = ".kms-probe"


@dataclass(frozen=True, slots=True)
class Allowed:
    """A bucket, and the prefixes beneath which jobs may read and write."""

    bucket: Bucket
    read: tuple[str, ...]
    write: tuple[str, ...]


class Buckets:
    """The buckets that jobs may use. Safe for threads and across forks."""

    def __init__(self, allowed: Mapping[str, Allowed]) -> None:
        self._allowed = dict(allowed)
        self._checked: set[str] = set()

    def reading(self, url: str) -> tuple[Bucket, str]:
        """Bucket and key of an object that jobs may read; asks no store. Raises PathRefused."""
        return self._found(url, "reading")

    def writing(self, url: str) -> tuple[Bucket, str]:
        """The bucket and key of an object that jobs may write."""
        return self._found(url, "writing")

    def _found(self, url: str, use: Literal["reading", "writing"]) -> tuple[Bucket, str]:
        name, key = parse(url)
        found = self._allowed.get(name)
        if found is None or not key.startswith(found.read if use == "reading" else found.write):
            raise PathRefused(f"[kms.jobs.buckets] allows no such object for {use}")
        return found.bucket, key

    def require_conditions(self, url: str) -> None:
        """Try whether the store of an object that a job writes honours conditions, once for each bucket.

        By an object ``.kms-probe`` beneath the prefix where jobs may write. Raises PathRefused if it ignores
        any: a target could not appear once, as by ``writing``, Unavailable.
        """
        bucket, key = self.writing(url)
        if bucket.name in self._checked:
            return
        prefix = next(each for each in self._allowed[bucket.name].write if key.startswith(each))
        if found := conditions.ignored(bucket, prefix + _PROBE, uploads=True):
            raise PathRefused(
                f"Bucket {bucket.name} ignores {' and '.join(found)}, so a write could replace another one: "
                "use a store with conditional writes, or another target with overwrite (docs/s3.md)"
            )
        self._checked.add(bucket.name)

    def listing(self, url_prefix: str) -> Iterator[tuple[str, int]]:
        """URL and size in bytes of every object beneath ``s3://bucket/`` or ``s3://bucket/folder/``.

        In the order of keys; empty objects that stand for folders, and probes, are left out. A URL may yet be
        refused by ``reading``, if its key could be read in two ways. Raises PathRefused, Unavailable.
        """
        bucket, below = self.reading(f"{url_prefix}{ANY_NAME}")
        for key, size, _ in bucket.listed(below.removesuffix(ANY_NAME)):
            if (size or not key.endswith("/")) and key.rpartition("/")[2] != _PROBE:
                yield f"{SCHEME}{bucket.name}/{quote(key)}", size


def parse(url: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``.

    Raises PathRefused where a store, or what stands before it, could read the key in another way: ``.``,
    ``..`` or nothing between slashes, an encoded slash, control characters, more than 1,024 bytes.
    """
    name, slash, path = url.removeprefix(SCHEME).partition("/")
    if not url.startswith(SCHEME) or not name or not slash:
        raise PathRefused("Expected s3://bucket/key")
    key = "/".join(path_names(path))
    if len(key.encode()) > KEY_MAX_BYTES:
        raise PathRefused(f"A key has at most {KEY_MAX_BYTES} bytes")
    return name, key


def build(settings: Settings) -> Buckets:
    """The buckets of ``[kms.jobs.buckets]``; reads files of secrets and authorities, connects to nothing.

    Raises ConfigurationError.
    """
    lines: dict[tuple[object, ...], S3Connection] = {}
    allowed = {}
    for name, section in settings.kms.jobs.buckets.items():
        # On one line an object is copied by the store itself, from bucket to bucket.
        same = (section.endpoint, section.region, section.access_key_id, section.secret_key_file)
        line = lines.setdefault(
            (*same, section.ca_file, section.timeout_s),
            line_of(f"kms.jobs.buckets.{name}", section, strict=settings.is_prod),
        )
        bucket = Bucket(name, line, path_style=section.path_style)
        allowed[name] = Allowed(bucket, section.read, section.write)
    return Buckets(allowed)
