"""Names of keys in Redis, its scripts, the decoding of its answers, and the wake-ups in its lists."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from typing import Final, NamedTuple, Self

import msgspec
import redis
import structlog

from kms_core.jobs.model import Job, LeaseLost
from kms_core.jobs.spec import FEATURES, Fields
from kms_protocol.errors import (
    InvalidRequest,
    JobCancelled,
    JobExpired,
    JobsUnavailable,
    RecordRefused,
    RedisFull,
    RedisReadOnly,
    UnknownJob,
)

PREFIX: Final = "kms:"
MOST_WAKE_UPS: Final = 10
"""In the list of a queue. More would be taken one by one, after the jobs had been done."""
TALLY: Final = "tally:"  # of a campaign: fields of its parts that are summed up in the whole
_DERIVED: Final = frozenset({"job_id", "tallies", "end", "accepted", "is_replayed"})
_STOPS: Final = {b"lost": LeaseLost, b"cancel": JobCancelled, b"expired": JobExpired}
_NO_WRITES: Final = ("NOREPLICAS", "MISCONF")
_NUMBER: Final = re.compile(rb"[0-9]{1,15}(\.[0-9]{1,9})?")
_CURSOR: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)-([0-9a-f-]{36})")
_log = structlog.get_logger(__name__)


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
    def parse(cls, text: str) -> Self:
        """Raises InvalidRequest unless it is what ``str`` gave."""
        found = _CURSOR.fullmatch(text)
        if not found:
            raise InvalidRequest("cursor is what the page before gave as next")
        return cls(float(found[1]), found[2])

    def __str__(self) -> str:
        return f"{self.created_at!r}-{self.job_id}"


def reading(job_id: str, raw: Mapping[bytes, bytes], sure: Fields) -> Job:
    """The plain fields as a Job, but for those in ``sure``.

    Raises UnknownJob if another field has a value that cannot be read.
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


def named(raw: bytes) -> str:
    """A name as Redis holds it. One that the service did not write may be any bytes."""
    return raw.decode(errors="replace")


def number(raw: bytes | None) -> float:
    """A count, or a time in seconds since the epoch, as Redis holds it; 0 where there is none, or junk."""
    return float(raw) if raw and _NUMBER.fullmatch(raw) else 0.0


def flat(fields: Fields) -> list[str | int | float | bytes]:
    """The fields of a record as arguments of a script: names and values in turn."""
    return [part for pair in fields.items() for part in pair]


def raise_for(word: bytes) -> None:
    """Raise LeaseLost, JobCancelled or JobExpired for the word of a script that stands for it."""
    if word in _STOPS:
        raise _STOPS[word]


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


# The Lua scripts of jobs: each compares and sets in one step, on the clock of Redis (``lua/*.lua``).
#
# A script begins with ``#!lua`` (Redis 7.0 or later), so that a cluster refuses keys of other slots, and
# with its cost. It is sent with the definitions of ``library.lua`` that it uses behind its first line.
# ``allow-oom``: it ends or frees something, or must not be held up by a Redis that is full.

_BEGIN: Final = re.compile(r"^(?=local |function )", re.MULTILINE)
_NAMES: Final = re.compile(r"(?:local )?(?:function )?(\w+(?:, \w+)*)")
_WORD: Final = re.compile(r"\w+")
_COMMENT: Final = re.compile(r"--.*")


def used(library: str, body: str) -> str:
    """The definitions of a library that a script uses, by itself or through others.

    Redis makes them again for each call, which for the whole library takes as long as ten commands.
    A definition begins at the start of a line with ``local`` or ``function``, and uses earlier ones only.
    """
    words, kept = set(_WORD.findall(_COMMENT.sub("", body))), []
    for definition in reversed(_BEGIN.split(library)[1:]):
        found = _NAMES.match(definition)
        if found and not words.isdisjoint(found[1].split(", ")):
            words.update(_WORD.findall(_COMMENT.sub("", definition)))
            kept.append(definition)
    return "".join(reversed(kept))


def _read() -> Iterator[tuple[str, str]]:
    folder = files(__package__) / "lua"
    known = ", ".join(f'["{name}"] = true' for name in sorted(FEATURES))
    library = (folder / "library.lua").read_text("utf-8")
    library = library.replace("@KNOWN@", known).replace("@MOST_WAKE_UPS@", str(MOST_WAKE_UPS))
    for file in folder.iterdir():
        if file.name.endswith(".lua") and file.name != "library.lua":
            shebang, _, body = file.read_text("utf-8").partition("\n")
            yield file.name.removesuffix(".lua"), f"{shebang}\n{used(library, body)}\n{body}"


SCRIPTS: Final = dict(_read())
"""Name to text."""


# Wake-ups: messages of the broker that say only that a queue has work. The jobs are in the store.
#
# A wake-up is a constant and may be lost. It is written as kombu reads it from a list of Redis (Celery's
# message protocol 2), so that the script that stores a job can push one.

TASK: Final = "kms.run"


def list_key(queue: str) -> str:
    """The key of the list that workers take the messages of a queue from, at its right end."""
    return f"{PREFIX}{queue}"


def encode_message(queue: str) -> bytes:
    """A wake-up for a queue."""
    return msgspec.json.encode(
        {
            "body": "[[],{},null]",
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"task": TASK, "id": "wake-up"},
            "properties": {
                "delivery_tag": "wake-up",
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
            },
        }
    )
