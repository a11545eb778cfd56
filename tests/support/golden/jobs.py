"""The jobs of the golden set as they lie in Redis, and what opens them. Imports nothing of the service."""

from pathlib import Path
from typing import Any, Final

import msgspec

from support.golden import manifest, reference
from support.golden.manifest import unb64

IDS: Final[dict[str, str]] = manifest.document("jobs/ids.json")
DUMP: Final[dict[str, Any]] = manifest.document("jobs/redis.json")
SECRET: Final = reference.origin_key(manifest.identity_secret("spool"))
"""The key that seals records: derived from the spool identity."""
HOOK_SECRET: Final = b"golden-golden-golden-golden-secret"
BLOBS: Final = sorted((manifest.V1 / "jobs/spool").glob("*-*-*-*-*/*"))


def fields(job_id: str) -> dict[str, bytes]:
    """The record of a job as it lay in Redis."""
    return {name: unb64(value) for name, value in DUMP[f"kms:job:{job_id}"]["value"].items()}


def record(job_id: str) -> dict[str, Any]:
    """The sealed part of a record."""
    found: dict[str, Any] = msgspec.msgpack.decode(
        reference.opened_record(SECRET, job_id, fields(job_id)["sealed"])
    )
    return found


def is_sealed_by_the_spool(path: Path) -> bool:
    """Not so: uploads that rest as they came, and the heads of results over them."""
    stanzas = reference.unverified_stanzas(path.read_bytes())
    names = [stanza.args[2] for stanza in stanzas if stanza.args[0] == "kms-service/context"]
    return names == ["spool"]
