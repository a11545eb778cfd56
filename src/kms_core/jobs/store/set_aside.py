"""Messages of ``kms.submit`` that were refused: a bounded list in Redis, kept for operators.

A message may hold anything. Its content is kept only if it is an age file, which the broker has seen already.
"""

import hashlib
from collections.abc import Callable
from typing import Final, TypeVar, cast

import msgspec
import redis

from kms_core.jobs.store.redis_keys import PREFIX, is_of_the_record, redis_errors
from kms_protocol.wire import NOT_JSON

MOST: Final = 100
"""Messages kept; older ones make room."""
MOST_CONTENT: Final = 65_536
"""Characters of a message that are kept; of a longer one its digest alone."""
KEPT_S: Final = 7 * 24 * 3600
QUEUE: Final = "kms.submit"
"""The queue whose refused messages are kept."""
_MOST_DIGESTED: Final = 64 * 1024 * 1024
_KEY: Final = f"{PREFIX}set_aside"
_T = TypeVar("_T")
_AGE: Final = "YWdlLWVuY3J5cHRpb24ub3JnL3Yx"  # base64 of "age-encryption.org/v1"


class SetAside(msgspec.Struct):
    """One message: when it was set aside (seconds since the epoch), why, and what it was.

    ``digest`` is the SHA-256 of its argument, or of all of it where it has none, of ``size`` bytes; it is
    empty above 64 MiB.
    """

    at: float
    reason: str
    task_id: str
    size: int
    digest: str
    message: str | None = None


_decode: Final = msgspec.json.Decoder(SetAside).decode


def describe(at: float, reason: str, task_id: str, message: bytes | str) -> SetAside:
    """The stored description of ``message``: the argument of the task, or bytes of no known form."""
    raw = message if isinstance(message, bytes) else message.encode()
    sealed = isinstance(message, str) and message.startswith(_AGE) and len(message) <= MOST_CONTENT
    kept = message if isinstance(message, str) and sealed else None
    digest = hashlib.sha256(raw).hexdigest() if len(raw) <= _MOST_DIGESTED else ""
    return SetAside(at, reason, task_id[:255], len(raw), digest, kept)


def add(client: redis.Redis, entry: SetAside) -> None:
    """Keep ``entry``, the newest first, for seven days after the last one. Raises JobsUnavailable."""
    raw = msgspec.json.encode(entry)
    with redis_errors():
        if not _or_none(lambda: _add(client, raw)):
            client.delete(_KEY)
            _add(client, raw)


def _add(client: redis.Redis, raw: bytes) -> bool:
    pipeline = client.pipeline(transaction=False)
    pipeline.lpush(_KEY, raw)
    pipeline.ltrim(_KEY, 0, MOST - 1)
    pipeline.expire(_KEY, KEPT_S)
    pipeline.execute()
    return True


def count(client: redis.Redis) -> int:
    """Count the messages kept; in a pipeline the answer comes with the others."""
    return _or_none(lambda: client.llen(_KEY)) or 0


def entries(client: redis.Redis) -> list[SetAside]:
    """All of them, the newest first. Raises JobsUnavailable."""
    with redis_errors():
        found = cast("list[bytes]", _or_none(lambda: client.lrange(_KEY, 0, MOST - 1)) or [])
    return [entry for raw in found if (entry := _entry(raw)) is not None]


def purge(client: redis.Redis) -> int:
    """Delete all of them; how many there were. Raises JobsUnavailable."""
    with redis_errors():
        found = count(client)
        client.delete(_KEY)
    return found


def _or_none(ask: Callable[[], _T]) -> _T | None:
    """The answer of Redis; None where the key holds something else than a list."""
    try:
        return ask()
    except redis.ResponseError as exc:
        if not is_of_the_record(exc):
            raise
        return None


def _entry(raw: bytes) -> SetAside | None:
    """None for what no worker wrote."""
    try:
        return _decode(raw)
    except NOT_JSON:
        return None
