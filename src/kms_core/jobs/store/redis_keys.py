"""What is said to Redis: names of keys, and what its answers mean. Knows no script and no connection."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Self

import msgspec
import redis
import structlog

from kms_core.jobs.model import MOST, Fields, Job, LeaseLost
from kms_protocol.errors import InvalidRequest, JobCancelled, JobsUnavailable, UnknownJob

PREFIX: Final = "kms:"
TALLY: Final = "tally:"  # of a campaign: fields of its parts that are summed up in the whole
_OF_THE_RECORD: Final = ("WRONGTYPE", "is not an integer", "is not a valid float")
_CURSOR: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)-([0-9a-f-]{36})")
_log = structlog.get_logger(__name__)


def job_key(job_id: str) -> str:
    return f"{PREFIX}job:{job_id}"


def busy_key(worker: str) -> str:
    """Where a worker's last sign of work stands; ``worker`` is ``<its name>/<pid of the child>``."""
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
    names = {name.encode(): name for name in Job.__struct_fields__ if name != "end"}
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
    if word == b"lost":
        raise LeaseLost
    if word == b"cancel":
        raise JobCancelled


def is_of_the_record(exc: Exception) -> bool:
    """Whether Redis answered so because of a key or a field that others wrote; else it is Redis's own."""
    return any(word in str(exc) for word in _OF_THE_RECORD)


def answered(answer: Any) -> Any:  # noqa: ANN401 -- each command has its own
    """An answer from a pipeline; None of a key that others wrote. Raises other errors of Redis."""
    if not isinstance(answer, Exception):
        return answer
    if not is_of_the_record(answer):
        raise answer
    return None


@contextmanager
def redis_errors() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as exc:
        _log.warning("redis.failed", error=type(exc).__name__)
        raise JobsUnavailable from exc


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
