"""What ``v2/ends.json`` was made of, written by hand: job records whose ends are signed."""

import uuid
from pathlib import Path
from typing import Any, Final

PARTS: Final = uuid.UUID("6f1f3c4e-0d0a-5c0b-9a57-6b6d732d7061")
PATH: Final = Path(__file__).parents[2] / "golden/v2/ends.json"
WHOLE: Final = "00000000-0000-4000-8000-0000000000e0"
FILE: Final = "00000000-0000-4000-8000-0000000000e1"
COMMITTING: Final = "00000000-0000-4000-8000-0000000000e2"
FAR: Final = 4_102_444_800.0
DAY_S: Final = 86_400.0
DIGEST: Final = bytes(range(32))
_COMMON: Final = {
    "tenant": "acme",
    "principal": "golden",
    "credential": "token:abcdefghij",
    "signed_end": True,
    "created_at": 1_790_000_000.25,
    "expires_at": FAR,
}
_FILE: Final = {"kind": "rewrap", "source": "file:///srv/golden/d.age", "target": "file:///srv/golden/d.age"}
_TREE: Final = {
    "kind": "rewrap",
    "source": "file:///srv/golden/*.age",
    "target": "file:///srv/golden/*.age",
    "overwrite": True,
}
RECORDS: Final[dict[str, dict[str, Any]]] = {
    "whole": _COMMON | _TREE | {"job_id": WHOLE},
    "part-0": _COMMON
    | _TREE
    | {
        "job_id": str(uuid.uuid5(PARTS, f"{WHOLE}/0")),
        "parent": WHOLE,
        "items": 3,
        "size_bytes": 300,
        "manifest": 1,
    },
    "part-1": _COMMON
    | _TREE
    | {
        "job_id": str(uuid.uuid5(PARTS, f"{WHOLE}/1")),
        "parent": WHOLE,
        "part": 1,
        "first": 3,
        "items": 2,
        "size_bytes": 200,
        "manifest": 1,
    },
    "file": _COMMON | _FILE | {"job_id": FILE},
    "committing": _COMMON | _FILE | {"job_id": COMMITTING},
}
"""The sealed parts."""

ENDS: Final[dict[str, dict[str, Any]]] = {
    "part-0": {
        "fence": 2,
        "attempt": 1,
        "state": "failed",
        "error": "items_failed",
        "items": 3,
        "items_done": 3,
        "items_failed": 1,
        "size_bytes": 300,
        "bytes_done": 290,
        "tallies": {"changed": 2, "found payroll/0a1b2c3d": 2},
        "kept_until": FAR + DAY_S,
    },
    "file": {
        "fence": 1,
        "attempt": 1,
        "state": "succeeded",
        "bytes_done": 1234,
        "target": {
            "size_bytes": 1234,
            "inode": 77,
            "mtime_ns": 1_790_000_000_123_456_789,
        },
        "kept_until": FAR + DAY_S,
    },
}
"""Signed ends, without ``DIGEST``, which each has as that of its result."""

COMMITS: Final[dict[str, dict[str, Any]]] = {
    "committing": {
        "fence": 1,
        "size_bytes": 1234,
        "inode": 77,
        "mtime_ns": 8,
        "replaces": [78, 1000, 5],
        "upload": "",
        "parts": "",
        "over": "",
    }
}
LOGS: Final[dict[str, dict[str, Any]]] = {
    "part-1": {"words": ["changed payroll/0a1b2c3d"], "outcomes": [0], "pending": None, "effect": ""}
}
_PLAIN: Final = {
    "tenant": "acme",
    "kind": "rewrap",
    "queue": "kms.maintenance",
    "priority": "normal",
    "created_at": "1790000000.25",
    "expires_at": "4102444800",
    "fence": "1",
    "attempt": "1",
}
PLAIN: Final[dict[str, dict[str, str]]] = {
    "whole": _PLAIN
    | {"state": "running", "campaign": "wet", "items": "5", "bytes": "500", "parts": "2", "parts_left": "0"},
    "part-0": _PLAIN | {"state": "failed", "error": "items_failed", "fence": "2", "parent": WHOLE},
    "part-1": _PLAIN | {"state": "failed", "error": "attempts_exhausted", "parent": WHOLE},
    "file": _PLAIN | {"state": "succeeded"},
    "committing": _PLAIN | {"state": "committing", "lease_until": "0"},
}
"""The fields that are not signed. The whole's parts have ended, and no worker has ended it."""
