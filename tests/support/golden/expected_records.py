"""What ``v2/records.json`` was made of, written by hand: a sealed record of each kind of job."""

from pathlib import Path
from typing import Any, Final

PATH: Final = Path(__file__).parents[2] / "golden/v2/records.json"
FAR: Final = 4_102_444_800.0
WHOLE: Final = "00000000-0000-4000-8000-0000000000d2"
_REF: Final = bytes(range(24))
_COMMON: Final = {
    "tenant": "acme",
    "principal": "golden",
    "credential": "token:abcdefghij",
    "context": [["env", "prod"]],
    "signed_end": True,
    "created_at": 1_790_000_000.25,
    "expires_at": FAR,
}
_TREE: Final = {
    "kind": "rewrap",
    "source": "file:///srv/golden/*.age",
    "target": "file:///srv/golden/*.age",
    "overwrite": True,
    "rate_per_s": 2.5,
}
RECORDS: Final[dict[str, dict[str, Any]]] = {
    "upload": _COMMON
    | {
        "form": "upload",
        "job_id": "00000000-0000-4000-8000-0000000000d0",
        "kind": "decrypt",
        "source": "upload",
        "size_bytes": 1234,
        "input_ref": _REF,
    },
    "items": _COMMON
    | {
        "form": "items",
        "job_id": "00000000-0000-4000-8000-0000000000d1",
        "kind": "encrypt",
        "source": "items",
        "items": 501,
        "starts": [0, 20_000],
        "size_bytes": 20_040,
        "priority": "low",
        "callback": "hook",
        "input_ref": _REF,
    },
    "items-part": _COMMON
    | {
        "form": "items",
        "job_id": "00000000-0000-4000-8000-0000000000d3",
        "kind": "encrypt",
        "source": "items",
        "items": 1,
        "starts": [20_000],
        "size_bytes": 40,
        "parent": "00000000-0000-4000-8000-0000000000d1",
        "part": 1,
        "input_ref": _REF,
    },
    "file": _COMMON
    | {
        "form": "file",
        "job_id": "00000000-0000-4000-8000-0000000000d4",
        "kind": "reseal",
        "source": "s3://golden/b.age",
        "target": "file:///srv/golden/c.age",
        "size_bytes": 5,
        "key_id": "payroll",
        "new_context": [["env", "new"]],
        "scopes": ["encrypt", "jobs:write"],
        "authorized_until": FAR,
    },
    "tree": _COMMON | _TREE | {"form": "tree", "job_id": WHOLE},
    "tree-part": _COMMON
    | _TREE
    | {
        "form": "tree_part",
        "job_id": "00000000-0000-4000-8000-0000000000d5",
        "parent": WHOLE,
        "part": 1,
        "first": 500,
        "items": 2,
        "starts": [100, 150],
        "size_bytes": 200,
        "manifest": 1,
        "input_ref": _REF,
    },
}
QUEUES: Final = {
    "upload": "kms.files",
    "items": "kms.bulk",
    "items-part": "kms.bulk",
    "file": "kms.files",
    "tree": "kms.maintenance",
    "tree-part": "kms.maintenance",
}
