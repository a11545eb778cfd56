"""Small blobs of the spool in Redis, beside the record of their job: such a job needs no file of its own.

The scripts that submit and end a job store its blobs with the record. They leave with it.
"""

from collections.abc import Callable
from typing import Any, cast

import redis

from kms_core.jobs.spec import SmallBlob
from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.keys import PREFIX, job_key


class SmallBlobs:
    """Sealed blobs by job and name. Raises JobsUnavailable, RedisFull.

    ``has_room`` says whether Redis has memory for more of them.
    """

    def __init__(self, client: redis.Redis, most_bytes: int, has_room: Callable[[], bool]) -> None:
        self._client, self._most_bytes, self._has_room = client, most_bytes, has_room

    @property
    def most_bytes(self) -> int:
        """The most bytes of a new blob to be stored here; 0 while Redis has little room."""
        return self._most_bytes if self._has_room() else 0

    def get(self, job_id: str, name: str) -> bytes | None:
        """A blob; None if it is not here."""
        with redis_errors():
            return cast("bytes | None", self._client.hget(_key(job_id), name))

    def names(self, job_id: str) -> tuple[list[str], bool]:
        """The names of the blobs of a job, and whether these are all that it has."""
        names, are_all = self._with_mark(job_id, "HKEYS")
        return [name.decode() for name in cast("list[bytes]", names)], are_all

    def remove(self, job_id: str, name: str) -> None:
        with redis_errors():
            self._client.hdel(_key(job_id), name)

    def delete(self, job_id: str) -> bool:
        """Remove the blobs of a job; whether these were all that it had."""
        return self._with_mark(job_id, "UNLINK")[1]

    def _with_mark(self, job_id: str, command: str) -> tuple[object, bool]:
        """The answer of a command, and whether the job's record says that all of its blobs are here."""
        with redis_errors():
            pipeline: Any = self._client.pipeline(transaction=False)
            pipeline.execute_command(command, _key(job_id))
            pipeline.hexists(job_key(job_id), "small")
            answer, is_marked = pipeline.execute()
        return answer, bool(is_marked)


def blob_arguments(blob: SmallBlob | None) -> list[int | str | bytes]:
    """A blob as arguments of a script, behind their number."""
    return [2, *blob] if blob else [0]


def _key(job_id: str) -> str:
    return f"{PREFIX}blobs:{job_id}"
