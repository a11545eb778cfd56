"""What the golden jobs were accepted with, by hand: the fields of each sealed record as MessagePack has them.

``VOLATILE`` fields differ from run to run of the maker and are checked apart. Fields at their default are not
in a record, so these names and values are the whole of the format.
"""

from typing import Any, Final

VOLATILE: Final = frozenset({"created_at", "expires_at", "digest", "job_id"})
FAR: Final = 4_102_444_800
INTAKE_ID: Final = "00000000-0000-4000-8000-0000000000a1"
INTAKE_JOB: Final = {
    "kind": "encrypt",
    "context": "env=prod,service=api",
    "items": [{"plaintext": "YnkgYSB3b3JrZmxvdw=="}],
}
INTAKE_CANONICAL: Final = (
    b'{"context":"env=prod,service=api",'
    b'"items":[{"ciphertext":null,"context":null,"plaintext":"YnkgYSB3b3JrZmxvdw=="}],"kind":"encrypt"}'
)
"""What its digest is made over: fields that it gives, in the order of their names; of an item all fields."""
UPLOADED: Final = b"an upload of the golden set\n" * 40
LOCAL: Final = {"tenant": "default", "principal": "local", "credential": "none", "authorized_until": 0.0}
ACME: Final = {
    "tenant": "acme",
    "principal": "golden",
    "credential": "token:abcdefghij",
    "request_id": "req-golden",
}
PAIRS: Final = [["env", "prod"], ["service", "api"]]
BOUND: Final = {"context": PAIRS}
NEW: Final = {"new_context": [["env", "archive"]]}
PLACE: Final = "file:///srv/golden"
SEALED_BYTES: Final = 525
ITEM_BYTES: Final = 720

RECORDS: Final[dict[str, dict[str, Any]]] = {
    "upload-encrypt": LOCAL
    | BOUND
    | {"kind": "encrypt", "source": "upload", "key_id": "default", "size_bytes": 1120},
    "upload-decrypt": LOCAL | {"kind": "decrypt", "source": "upload"},
    "upload-rewrap": LOCAL | NEW | {"kind": "rewrap", "source": "upload"},
    "items-encrypt": LOCAL
    | BOUND
    | {"kind": "encrypt", "source": "items", "items": 2, "priority": "high", "callback": "ci", "starts": [0]},
    "items-decrypt": LOCAL
    | {"kind": "decrypt", "source": "items", "items": 1, "priority": "low", "starts": [0]},
    "items-rewrap": LOCAL | NEW | {"kind": "rewrap", "source": "items", "items": 1, "starts": [0]},
    "items-reseal": LOCAL | NEW | {"kind": "reseal", "source": "items", "items": 1, "starts": [0]},
    "done-upload-encrypt": LOCAL
    | BOUND
    | {"kind": "encrypt", "source": "upload", "callback": "ci", "size_bytes": 1120},
    "done-upload-decrypt": LOCAL | {"kind": "decrypt", "source": "upload"},
    "done-items": LOCAL | BOUND | {"kind": "encrypt", "source": "items", "items": 1, "starts": [0]},
    "split": LOCAL | BOUND | {"kind": "encrypt", "source": "items", "items": 501},
    "intake": LOCAL
    | BOUND
    | {"principal": "celery", "kind": "encrypt", "source": "items", "items": 1, "starts": [0]},
    "file-encrypt": ACME
    | BOUND
    | {
        "credential": "jwt:ci:0a1b",
        "scopes": ["encrypt", "jobs:write"],
        "authorized_until": float(FAR),
        "kind": "encrypt",
        "source": f"{PLACE}/a.txt",
        "target": f"{PLACE}/a.txt.age",
    },
    "file-reseal": ACME
    | BOUND
    | NEW
    | {"kind": "reseal", "source": f"{PLACE}/b.age", "target": f"{PLACE}/c.age"},
    "file-committing": ACME
    | BOUND
    | {
        "kind": "rewrap",
        "source": f"{PLACE}/d.age",
        "target": f"{PLACE}/d.age",
        "overwrite": True,
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    },
    "campaign": ACME
    | BOUND
    | {
        "kind": "rewrap",
        "source": f"{PLACE}/**/*.age",
        "target": f"{PLACE}/**/*.age",
        "overwrite": True,
        "rate_per_s": 2.5,
        "key_id": "payroll",
    },
    "campaign-part": ACME
    | BOUND
    | {
        "kind": "rewrap",
        "source": f"{PLACE}/**/*.age",
        "target": f"{PLACE}/**/*.age",
        "overwrite": True,
        "rate_per_s": 2.5,
        "key_id": "payroll",
        "parent": "00000000-0000-4000-8000-00000000000f",
        "manifest": 1,
        "items": 4,
        "size_bytes": 303,
    },
    "campaign-dry": ACME
    | BOUND
    | {
        "kind": "reseal",
        "source": f"{PLACE}/*.age",
        "target": f"{PLACE}/*.age",
        "overwrite": True,
        "dry_run": True,
    },
    "tree-encrypt": ACME | BOUND | {"kind": "encrypt", "source": f"{PLACE}/in/**", "target": f"{PLACE}/out/"},
    "object-encrypt": ACME
    | BOUND
    | {"kind": "encrypt", "source": "s3://archive/in.bin", "target": "s3://archive/in.bin.age"},
    "dead": ACME | BOUND | {"kind": "decrypt", "source": f"{PLACE}/e.age", "target": f"{PLACE}/dead"},
    "failed": ACME | BOUND | {"kind": "decrypt", "source": f"{PLACE}/e.age", "target": f"{PLACE}/failed"},
    "cancelled": ACME | BOUND | {"kind": "decrypt", "source": f"{PLACE}/e.age", "target": f"{PLACE}/f"},
    "told": ACME
    | BOUND
    | {"kind": "decrypt", "source": f"{PLACE}/g.age", "target": f"{PLACE}/g", "callback": "ci"},
}
STATES: Final = {
    "file-committing": "committing",
    "object-encrypt": "committing",
    "campaign": "running",
    "campaign-part": "running",
    "split": "running",
    "done-upload-encrypt": "succeeded",
    "done-upload-decrypt": "succeeded",
    "done-items": "succeeded",
    "dead": "failed",
    "failed": "failed",
    "told": "failed",
    "cancelled": "cancelled",
}
"""Those that are not ``queued``."""
COMMITS: Final[dict[str, dict[str, Any]]] = {
    "file-committing": {
        "fence": 1,
        "size_bytes": 1234,
        "inode": 77,
        "mtime_ns": 1_790_000_000_123_456_789,
        "replaces": [78, 1000, 5],
        "upload": "",
        "parts": "",
        "over": "",
    },
    "object-encrypt": {
        "fence": 1,
        "size_bytes": 9,
        "inode": 0,
        "mtime_ns": 0,
        "replaces": None,
        "upload": "upload-1",
        "parts": "0" * 64,
        "over": '"etag"',
    },
}
LOG: Final[dict[str, Any]] = {
    "words": ["changed payroll/0a1b2c3d"],
    "outcomes": [0],
    "effect": "changed",
    "pending": {
        "fence": 1,
        "size_bytes": 102,
        "inode": 9,
        "mtime_ns": 8,
        "replaces": [7, 101, 6],
        "upload": "",
        "parts": "",
        "over": "",
    },
}
QUEUES: Final = {
    "kms:kms.bulk": (0, ["items-encrypt"]),
    "kms:kms.bulk\x06\x163": (3, ["items-reseal", "done-items", "split", "intake"]),
    "kms:kms.bulk\x06\x166": (6, ["items-decrypt"]),
    "kms:kms.files\x06\x163": (3, ["upload-encrypt", "upload-decrypt", "tree-encrypt", "object-encrypt"]),
    "kms:kms.maintenance\x06\x163": (3, ["upload-rewrap", "items-rewrap", "campaign"]),
}
"""Lists of the broker: the priority that kombu knows, and some of the jobs whose messages wait there."""
