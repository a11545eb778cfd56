"""Names of keys in Redis, and the decoding of its answers."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Self, TypeVar

import msgspec
import redis
import structlog

from kms_core.jobs.model import MOST, Job, LeaseLost
from kms_core.jobs.spec import Fields
from kms_protocol.errors import (
    InvalidRequest,
    JobCancelled,
    JobExpired,
    JobsUnavailable,
    RedisFull,
    RedisReadOnly,
    UnknownJob,
)

PREFIX: Final = "kms:"
TALLY: Final = "tally:"  # of a campaign: fields of its parts that are summed up in the whole
_OF_THE_RECORD: Final = ("WRONGTYPE", "is not an integer", "is not a valid float")
_DERIVED: Final = frozenset({"job_id", "tallies", "end", "accepted", "is_replayed"})
_NO_WRITES: Final = ("NOREPLICAS", "MISCONF")
_CURSOR: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)-([0-9a-f-]{36})")
_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


def job_key(job_id: str) -> str:
    """Return the key of a job's record."""
    return f"{PREFIX}job:{job_id}"


def busy_key(worker: str) -> str:
    """The key of a worker's last sign of work; ``worker`` is ``<its name>/<pid of the child>``."""
    return f"{PREFIX}busy:{worker.partition('/')[0]}"


class Cursor(NamedTuple):
    """A place in a tenant's list of jobs: the age and id of one of them. Later ones are greater."""

    created_at: float
    job_id: str

    @classmethod
    def newest(cls) -> Self:
        return cls(math.inf, "")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises InvalidRequest unless it is what ``str`` gave."""
        found = _CURSOR.fullmatch(text)
        if not found:
            raise InvalidRequest("cursor is what the page before gave as next")
        return cls(float(found[1]), found[2])

    @classmethod
    def of(cls, member: bytes, score: float) -> Self | None:
        """The place of a member of that list; None for one that no script of ours put there."""
        at = cls(score, member.decode(errors="replace"))
        return at if _CURSOR.fullmatch(str(at)) else None

    def __str__(self) -> str:
        return f"{self.created_at!r}-{self.job_id}"


def reading(job_id: str, raw: Mapping[bytes, bytes], sure: Fields) -> Job:
    """The plain fields as a Job, but for those in ``sure``.

    Raises UnknownJob if another field has a value that no script of the service writes.
    """
    names = {name.encode(): name for name in Job.__struct_fields__ if name not in _DERIVED}
    known = {names[name]: value.decode(errors="replace") for name, value in raw.items() if name in names}
    tallies = {
        name.decode(errors="replace").removeprefix(TALLY): value.decode(errors="replace")
        for name, value in raw.items()
        if name.startswith(TALLY.encode())
    }
    try:
        return msgspec.convert({**known, **sure, "job_id": job_id, "tallies": tallies}, Job, strict=False)
    except msgspec.ValidationError as exc:
        raise UnknownJob from exc


def number(raw: bytes | None, default: float = 0.0) -> float:
    """A number as Redis holds it; ``default`` where there is none, or one that no script of ours wrote."""
    try:
        found = float(raw or b"")
    except ValueError:
        return default
    return found if abs(found) <= MOST else default  # which NaN is not either


def raise_for(word: bytes) -> None:
    """Raise LeaseLost, JobCancelled or JobExpired for the word of a script that stands for it."""
    if word == b"lost":
        raise LeaseLost
    if word == b"cancel":
        raise JobCancelled
    if word == b"expired":
        raise JobExpired


def is_of_the_record(exc: Exception) -> bool:
    """True if Redis answered so because of a key or a field that others wrote; else it is Redis's own."""
    return any(word in str(exc) for word in _OF_THE_RECORD)


def answered(answer: Any) -> Any:  # noqa: ANN401 -- each command has its own
    """An answer from a pipeline; None of a key that others wrote. Raises other errors of Redis."""
    if not isinstance(answer, Exception):
        return answer
    if not is_of_the_record(answer):
        raise answer
    return None


def asked(client: redis.Redis, key: str, ask: Callable[[], _T]) -> _T:
    """An answer about a key; what others wrote there, of a wrong type, is deleted first.

    Raises as ``redis_errors``.
    """
    with redis_errors():
        try:
            return ask()
        except redis.ResponseError as exc:
            if not is_of_the_record(exc):
                raise
            client.delete(key)
            return ask()


@contextmanager
def redis_errors() -> Iterator[None]:
    """Turn errors of Redis into JobsUnavailable; RedisFull, RedisReadOnly where it refused to write."""
    try:
        yield
    except redis.RedisError as exc:
        _log.warning("redis.failed", error=type(exc).__name__)
        kind = refusal_of(exc)
        raise kind from exc


def refusal_of(exc: redis.RedisError) -> type[JobsUnavailable]:
    """The error of the service for one of Redis."""
    if isinstance(exc, redis.exceptions.OutOfMemoryError):
        return RedisFull
    if isinstance(exc, redis.exceptions.ReadOnlyError) or str(exc).startswith(_NO_WRITES):
        return RedisReadOnly
    return JobsUnavailable


@contextmanager
def record_errors() -> Iterator[None]:
    """As ``redis_errors``, but UnknownJob where something else than a record is at the key of one."""
    with redis_errors():
        try:
            yield
        except redis.ResponseError as exc:
            if not is_of_the_record(exc):
                raise
            raise UnknownJob from exc
