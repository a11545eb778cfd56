"""Fields of records as Redis holds them: a job's plain fields, names and numbers."""

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from kms_core.jobs.model import Job
from kms_core.jobs.spec import Fields
from kms_protocol.errors import UnknownJob

TALLY: Final = "tally:"  # of a campaign: fields of its parts that are summed up in the whole
_DERIVED: Final = frozenset({"job_id", "tallies", "end", "accepted", "is_replayed"})
_NUMBER: Final = re.compile(rb"[0-9]{1,15}(\.[0-9]{1,9})?")


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
