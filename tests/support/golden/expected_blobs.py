"""What is in ``v2/blobs.json``: names and contents, written by hand. Imports nothing of the service."""

from pathlib import Path
from typing import Any, Final

from support.golden import manifest, reference
from support.golden.reference import Stanza

PATH: Final = Path(__file__).parents[2] / "golden/v2/blobs.json"
JOB_ID: Final = "00000000-0000-4000-8000-0000000000b1"
TENANT: Final = "acme"
PLAIN: Final = b'{"plaintext":"YQ=="}\n'
"""Of the blobs that are sealed for the spool."""
_HEADER: Final = reference.header_of([Stanza(("X25519", "golden"), bytes(32))], bytes(16)) + bytes(16)
AS_THEY_ARE: Final[dict[str, bytes]] = {
    "upload": _HEADER + manifest.plaintext(300_000),
    "head.3": _HEADER,
}
SEALED: Final = ("items", "result0.3", "files.3")
RECORD: Final[dict[str, Any]] = {
    "job_id": JOB_ID,
    "tenant": TENANT,
    "principal": "ada",
    "credential": "none",
    "kind": "decrypt",
    "source": "upload",
    "size_bytes": 300_000,
    "created_at": 1.0,
    "expires_at": 4_102_444_800.0,
}


def names(name: str) -> tuple[str, str, str, str]:
    """Tenant, job, role and attempt of a blob, to which its MACs are bound."""
    role, _, attempt = name.partition(".")
    return TENANT, JOB_ID, role, attempt or "0"
