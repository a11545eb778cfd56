"""Errors of Redis, as errors of the service."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import redis
import structlog

from kms_protocol.errors import JobsUnavailable, RecordRefused, RedisFull, RedisReadOnly

_NO_WRITES: Final = ("NOREPLICAS", "MISCONF")
_log = structlog.get_logger(__name__)


def is_unreadable(exc: Exception) -> bool:
    """True if a script failed because of the content of a record; else Redis refused it."""
    text = str(exc)
    return type(exc) is redis.ResponseError and "@user_script" in text and not text.startswith(_NO_WRITES)


@contextmanager
def redis_errors() -> Iterator[None]:
    """Turn errors of Redis into JobsUnavailable; RedisFull, RedisReadOnly where it refused to write.

    A ValueError says that Redis holds what the service does not write: it becomes RecordRefused.
    """
    try:
        yield
    except redis.RedisError as exc:
        _log.warning("redis.failed", error=type(exc).__name__)
        raise refusal_of(exc) from exc
    except ValueError as exc:
        raise RecordRefused("Redis holds a value that the service did not write: tell the operator") from exc


def refusal_of(exc: redis.RedisError) -> type[JobsUnavailable]:
    """The error of the service for one of Redis."""
    if isinstance(exc, redis.exceptions.OutOfMemoryError):
        return RedisFull
    if isinstance(exc, redis.exceptions.ReadOnlyError) or str(exc).startswith(_NO_WRITES):
        return RedisReadOnly
    return JobsUnavailable
