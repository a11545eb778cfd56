"""Checks of the bucket that holds the spool: a probe object, and what of its settings keeps or loses data."""

import os
from collections.abc import Iterator
from contextlib import closing
from typing import Final

from kms_cli.doctor import Finding
from kms_core.jobs.storage import spool_bucket
from kms_core.jobs.storage.spool_bucket import SpoolBucket
from kms_core.s3.bucket import If
from kms_core.settings.model import Settings
from kms_protocol.errors import ConfigurationError, KmsError
from kms_protocol.units import size_text

_PROBES: Final = "probe"
_SUBJECT: Final = "spool bucket"
_NEXT: Final = (
    "check address, credentials and policy of [kms.jobs.spool_bucket] (docs/hosts.md has the permissions)"
)
_HAVE_IT_ABORT: Final = "add a lifecycle rule AbortIncompleteMultipartUpload of 2 days"
_EXPIRE: Final = "turn it off, or add a lifecycle rule NoncurrentVersionExpiration of 1 day"


def check(settings: Settings) -> Iterator[Finding]:
    """Write, read, list and delete a probe object; tell versioning, object lock, rules and use."""
    section = settings.kms.jobs.spool_bucket
    if section is None:
        return
    try:
        store = spool_bucket.build(settings, section)
        with closing(store.bucket.line):
            yield from _works(store, section.url, settings.kms.jobs.spool_max_bytes)
            yield from _settings(store)
    except ConfigurationError as exc:
        yield Finding("FAIL", _SUBJECT, exc.detail)
    except KmsError as exc:
        yield Finding("FAIL", _SUBJECT, f"{section.url}: {exc.detail or exc.summary}", _NEXT, away=True)


def _works(store: SpoolBucket, url: str, most_bytes: int) -> Iterator[Finding]:
    name, content = os.urandom(16).hex(), os.urandom(16)
    key = f"{store.prefix}{_PROBES}/{name}"
    with store.errors():
        honours = store.bucket.put(key, content, If(absent=True), "probe")
        honours = honours and not store.bucket.put(key, content, If(absent=True), "probe")
    same = store.get(_PROBES, name, len(content)).data == content and name in store.names(_PROBES)
    store.remove(_PROBES, name)
    if not same:
        yield Finding("FAIL", _SUBJECT, f"{url} does not give back or list what was written", _NEXT)
        return
    used = size_text(store.used_bytes())
    yield Finding("ok", _SUBJECT, f"{url} can be written, read and listed; {used} of {size_text(most_bytes)}")
    if not honours:
        text = "the store ignores If-None-Match: a write does not notice another one of the same name"
        yield Finding("warn", _SUBJECT, text, "docs/hosts.md says what that costs")


def _settings(store: SpoolBucket) -> Iterator[Finding]:
    with store.errors():
        versioning = store.bucket.setting("versioning") or ""
        locked = store.bucket.setting("object-lock") or ""
        rules = store.bucket.setting("lifecycle") or ""
    if "<Status>Enabled<" in versioning and "NoncurrentVersionExpiration" not in rules:
        text = "versioning is on: deleted uploads and results stay as older versions, and take room"
        yield Finding("warn", _SUBJECT, text, _EXPIRE)
    if "<ObjectLockEnabled>Enabled<" in locked:
        text = "object lock is on: what is deleted or released may stay until its retention ends"
        yield Finding("warn", _SUBJECT, text, "use a bucket without object lock for the spool")
    if "AbortIncompleteMultipartUpload" not in rules:
        text = "no rule of the bucket aborts uploads that a killed process left; workers do so after a day"
        yield Finding("warn", _SUBJECT, text, _HAVE_IT_ABORT)
