"""Examples of answers for the OpenAPI page. They are decoded by a test, so they stay what the wire says."""

from typing import Any, Final

_JOB: Final = "0192f0c1-7a3e-4c55-9d0a-1f2e3d4c5b6a"
_AT: Final = "2027-01-31T12:00:00.000Z"
_LATER: Final = "2027-02-01T12:00:00.000Z"
_LINKS: Final = {
    "self": f"/api/v1/kms/jobs/{_JOB}",
    "result": f"/api/v1/kms/jobs/{_JOB}/result",
    "events": f"/api/v1/kms/jobs/{_JOB}/events",
}
_KEY: Final = {"key_id": "default", "key_version": "1f0c52b7", "backend": "age"}
_SEALED: Final = {"ciphertext": "YWdlLWVuY3J5cHRpb24ub3JnL3YxCg==", **_KEY}
_ENDED: Final = {
    "job_id": _JOB,
    "kind": "encrypt",
    "state": "succeeded",
    "priority": "normal",
    "attempt": 1,
    "progress": {"items": 1, "items_done": 1, "items_failed": 0, "bytes": 5, "bytes_done": 5},
    "created_at": _AT,
    "expires_at": _LATER,
    "error": None,
    "links": _LINKS,
}
_KEY_OUT: Final = {
    "id": "default",
    "backend": "age",
    "current_version": "1f0c52b7",
    "versions": [{"version": "1f0c52b7", "created_at": None, "operations": 12, "bytes": 4096}],
    "default": True,
    "others": [],
    "rotate_at": None,
    "budget": 0.0,
}

OF_SHAPES: Final[dict[str, list[dict[str, Any]]]] = {
    "EncryptOut": [_SEALED],
    "DecryptOut": [{"plaintext": "SGVsbG8sIFdvcmxkIQ==", **_KEY, "origin": "service"}],
    "GenerateKeyOut": [
        {"plaintext": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", **_SEALED, "key_spec": "AES_256"}
    ],
    "BatchOut": [
        {
            "results": [
                {"index": 0, "reference": "salary", **_SEALED},
                {"index": 1, "error": {"code": "unknown_key"}},
            ],
            "failed": 1,
        }
    ],
    "CodecOut": [
        {"payloads": [{"metadata": {"encoding": "YmluYXJ5L2VuY3J5cHRlZA=="}, "data": _SEALED["ciphertext"]}]}
    ],
    "HealthOut": [{"status": "healthy", "backend": "age", "checked_at": "2027-01-31T12:00:00Z"}],
    "ReadyOut": [{"status": "ready", "jobs": "available", "audit": "available"}],
    "StatusOut": [
        {
            "backend": "age",
            "environment": "prod",
            "version": "0.1.0",
            "uptime_s": 86400.5,
            "operations": {"total": 13, "by": {"encrypt": {"ok": 12, "failed": 1}}},
            "jobs": {"queued": 0, "running": 1, "committing": 0},
            "queue_depth": 0,
            "workers": 2,
            "degraded": [],
        }
    ],
    "KeysOut": [{"keys": [_KEY_OUT]}],
    "KeyOut": [_KEY_OUT],
    "RotateOut": [_KEY],
    "JobAccepted": [{"job_id": _JOB, "state": "queued", "links": _LINKS}],
    "JobOut": [_ENDED],
    "JobList": [{"jobs": [_ENDED], "next": None}],
    "ItemResult": [{"index": 0, "ciphertext": _SEALED["ciphertext"]}],
    "IntakeOut": [
        {
            "recipient": "age1cy0su9fwf3gf9mw868g5yut09p6nytfmmnktexz2ya5uqg9vl9sss4euqm",
            "key_version": "1f0c52b7",
            "version": 1,
        }
    ],
    "DeliveryList": [{"deliveries": []}],
    "AuditOut": [
        {
            "events": [
                {
                    "id": "5b1d2c3a-api:42",
                    "time": "2027-01-31T12:00:00.000000Z",
                    "operation": "encrypt",
                    "principal": "ada",
                    "credential": "token:7f3a",
                    **_KEY,
                    "context": {"env": "c0ffee"},
                    "bytes_in": 5,
                    "bytes_out": 420,
                    "result": "ok",
                    "duration_us": 180,
                }
            ],
            "next": "5b1d2c3a-api:42",
            "more": False,
        }
    ],
}
