"""What the audit log, the tokens and the rest of the golden set were made of, by hand."""

from typing import Any, Final

API_RECORDS: Final = 14
"""Records that the API wrote; the file with the first ones was retired."""
CONTEXT: Final = {"env": "prod", "patient": "Kanarienvogel-4711"}
RECORD: Final[dict[str, Any]] = {
    "operation": "encrypt",
    "tenant": "acme",
    "credential": "token:abcdefghij",
    "request_id": "req-golden",
    "key_id": "payroll",
    "key_version": "0a1b2c3d",
    "backend": "age",
    "bytes_in": 26,
    "bytes_out": 600,
    "result": "ok",
    "duration_us": 120,
}
TOKENS: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "forever": ("default", ("*",), "none"),
    "narrow": ("acme", ("encrypt:key=payroll", "jobs:read,jobs:write"), "far"),
    "expired": ("acme", ("decrypt",), "over"),
    "rotated": ("acme", ("status",), "far"),
}
"""Name: tenant, scopes, term. ``rotated`` has a second text, ``rotated-new``."""
PAYLOAD: Final = {"metadata": {"encoding": "anNvbi9wbGFpbg=="}, "data": "IkhlbGxvIg=="}
NAMESPACE: Final = {"X-Namespace": "payroll"}
REWRAPPED_KEY: Final = {"key_id": "payroll", "key_version": "0a1b2c3d"}
