"""The line to Redis: connections that give up, names of keys, and what its answers mean. Knows no script."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import msgspec
import redis
import structlog

from kms_core.errors import ConfigurationError, JobCancelled, JobsUnavailable
from kms_core.jobs.model import Job, LeaseLost

PREFIX: Final = "kms:"
_TIMEOUT_S: Final = 5.0
_log = structlog.get_logger(__name__)


def connect(url: str) -> redis.Redis:
    """A client that gives up in seconds, so that a lost Redis is noticed. Raises ConfigurationError."""
    try:
        return redis.Redis.from_url(url, socket_timeout=_TIMEOUT_S, health_check_interval=25)
    except ValueError as exc:  # its text may quote the URL
        raise ConfigurationError(
            "kms.redis.url (or KMS_REDIS_URL) is not a Redis URL: expected redis://, rediss:// or unix://"
        ) from exc


def job_key(job_id: str) -> str:
    return f"{PREFIX}job:{job_id}"


def busy_key(worker: str) -> str:
    """Where a worker's last sign of work stands; ``worker`` is ``<its name>/<pid of the child>``."""
    return f"{PREFIX}busy:{worker.partition('/')[0]}"


def reading(job_id: str, raw: Mapping[bytes, bytes]) -> Job:
    names = {name.encode(): name for name in Job.__struct_fields__}
    known = {names[name]: value.decode() for name, value in raw.items() if name in names}
    return msgspec.convert({**known, "job_id": job_id}, Job, strict=False)


def raise_for(word: bytes) -> None:
    if word == b"lost":
        raise LeaseLost
    if word == b"cancel":
        raise JobCancelled


@contextmanager
def redis_errors() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as exc:
        _log.warning("redis.failed", error=type(exc).__name__)
        raise JobsUnavailable from exc
