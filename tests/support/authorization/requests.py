"""A good request for each row of docs/authorization.md, made anew each time: only the caller is left open."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from kms_protocol.wire import JobKind
from support.authorization.application import CONTEXT, OTHER_CONTEXT, Application
from support.service import b64

KEY: Final = "pay-1"
NEW: Final = "new-1"
ROTATED: Final = "turn-1"
_PLAIN: Final = b64(b"seventeen")
_FILE_KEY: Final = b64(bytes(range(16)))


@dataclass(frozen=True)
class GoodRequest:
    """``qualifiers`` are what a scope says of the key (and context) in each role of the table.

    ``allowed_codes`` are error codes of an answer to a caller who is allowed: what is wrong then is the call.
    ``has_context``: the call carries ``CONTEXT``, to which ``context=`` of a scope is held.
    """

    path: str
    body: object = None
    data: bytes | None = None
    form: Mapping[str, str] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    qualifiers: Mapping[str, str] = field(default_factory=lambda: {"key": f"key={KEY}"})
    allowed_codes: frozenset[str] = frozenset()
    has_context: bool = False


Make = Callable[[Application], GoodRequest]
API: Final = "/api/v1/kms"
TO_OTHER_KEY: Final = {"old": f"key={KEY}", "new": f"key={NEW}"}
TO_OTHER_CONTEXT: Final = {"old": f"key={KEY} context={CONTEXT}", "new": f"key={KEY} context={OTHER_CONTEXT}"}


def _on_key(path: str, **body: object) -> Make:
    """A call that names its key and its context."""
    return lambda _: GoodRequest(API + path, {"key_id": KEY, "context": CONTEXT, **body}, has_context=True)


def _sealed(application: Application) -> dict[str, object]:
    return {"ciphertext": b64(application.sealed(KEY)), "context": CONTEXT}


def _opening(path: str, qualifiers: Mapping[str, str] | None = None, **more: object) -> Make:
    """A call on a ciphertext, which names its key."""
    return lambda application: GoodRequest(
        API + path,
        {**_sealed(application), **more},
        qualifiers=qualifiers or {"key": f"key={KEY}"},
        has_context=qualifiers is None,
    )


def _batch(operation: str, qualifiers: Mapping[str, str] | None = None, **more: object) -> Make:
    def make(application: Application) -> GoodRequest:
        item = {"plaintext": _PLAIN, "context": CONTEXT, "key_id": KEY} | more
        if operation != "encrypt":
            item = {**_sealed(application), **more}
        body = {"operation": operation, "items": [item]}
        found = qualifiers or {"key": f"key={KEY}"}
        return GoodRequest(f"{API}/batch", body, qualifiers=found, has_context=qualifiers is None)

    return make


def _payload(data: bytes, encoding: bytes) -> dict[str, object]:
    return {"payloads": [{"metadata": {"encoding": b64(encoding)}, "data": b64(data)}]}


def _items(kind: str, **more: object) -> Make:
    def make(application: Application) -> GoodRequest:
        item = {"plaintext": _PLAIN} if kind == "encrypt" else {"ciphertext": b64(application.sealed(KEY))}
        body = {"kind": kind, "items": [item], "context": CONTEXT, "key_id": KEY, **more}
        key = f"key={more.get('key_id', KEY)}"
        return GoodRequest(
            f"{API}/jobs", body, qualifiers={"key": key, "new": f"{key} context={OTHER_CONTEXT}"}
        )

    return make


def _files(kind: str, source: str = "in/one", **more: object) -> Make:
    def make(application: Application) -> GoodRequest:
        target = application.new_target(is_folder="*" in source)
        files = {"source": application.url(source), "target": target}
        body = {"kind": kind, "context": CONTEXT, "key_id": KEY, **files, **more}
        qualifiers = {"key": f"key={KEY}", "new": f"key={KEY} context={OTHER_CONTEXT}"}
        return GoodRequest(f"{API}/jobs", body, qualifiers=qualifiers, has_context="new_context" not in more)

    return make


def _upload(kind: str) -> Make:
    def make(application: Application) -> GoodRequest:
        data = b"seventeen" if kind == "encrypt" else application.sealed(KEY)
        headers = {"X-KMS-Context": CONTEXT, "X-KMS-Key-Id": KEY}
        return GoodRequest(f"{API}/files/{kind}", data=data, headers=headers, has_context=True)

    return make


def _stream(application: Application) -> GoodRequest:
    del application
    line = b'{"plaintext":"aGk="}\n'
    headers = {"Content-Type": "application/x-ndjson", "X-KMS-Context": CONTEXT, "X-KMS-Key-Id": KEY}
    return GoodRequest(f"{API}/jobs?kind=encrypt", data=line, headers=headers)


def _plain(path: str, *allowed_codes: str, **more: object) -> Make:
    return lambda _: GoodRequest(path, allowed_codes=frozenset(allowed_codes), **more)  # type: ignore[arg-type]  # as ``GoodRequest`` has them


def _job(path: str, *, dead: bool = False, form: bool = False) -> Make:
    """A call on a job that is queued, or dead."""

    def make(application: Application) -> GoodRequest:
        job_id = application.job(dead=dead)
        return GoodRequest(path.replace("{job_id}", job_id), form={} if form else None)

    return make


def _result(kind: JobKind, *, own: bool) -> Make:
    def make(application: Application) -> GoodRequest:
        job_id = application.job(kind, KEY, owner=application.caller if own else None)
        return GoodRequest(f"{API}/jobs/{job_id}/result", allowed_codes=frozenset({"job_not_finished"}))

    return make


def _login(application: Application) -> GoodRequest:
    stamp, cookie = application.visitor()
    return GoodRequest(
        "/ui/login", form={"token": application.everything, "stamp": stamp}, headers={"Cookie": cookie}
    )


_TURN: Final = {"key": f"key={ROTATED}"}
CALLS: Final[dict[tuple[str, str, str], Make]] = {
    ("POST", f"{API}/encrypt", ""): _on_key("/encrypt", plaintext=_PLAIN),
    ("POST", f"{API}/decrypt", ""): _opening("/decrypt"),
    ("POST", f"{API}/generate-key", ""): _on_key("/generate-key"),
    ("POST", f"{API}/rewrap", "same key and context"): _opening("/rewrap"),
    ("POST", f"{API}/rewrap", "to another key"): _opening("/rewrap", TO_OTHER_KEY, key_id=NEW),
    ("POST", f"{API}/rewrap", "to another context"): _opening(
        "/rewrap", TO_OTHER_CONTEXT, new_context=OTHER_CONTEXT
    ),
    ("POST", f"{API}/wrap", ""): _on_key("/wrap", file_key=_FILE_KEY),
    ("POST", f"{API}/unwrap", ""): lambda application: GoodRequest(
        f"{API}/unwrap", {"stanzas": application.wrapped(KEY), "context": CONTEXT}, has_context=True
    ),
    ("POST", f"{API}/batch", "encrypt"): _batch("encrypt"),
    ("POST", f"{API}/batch", "decrypt"): _batch("decrypt"),
    ("POST", f"{API}/batch", "rewrap, same key"): _batch("rewrap"),
    ("POST", f"{API}/batch", "rewrap, to another key"): _batch("rewrap", TO_OTHER_KEY, key_id=NEW),
    ("POST", f"{API}/batch", "reseal, same key"): _batch("reseal"),
    ("POST", f"{API}/batch", "reseal, to another key"): _batch("reseal", TO_OTHER_KEY, key_id=NEW),
    ("POST", f"{API}/codec/encode", ""): lambda _: GoodRequest(
        f"{API}/codec/encode", _payload(b"1", b"json/plain"), headers={"X-KMS-Key-Id": KEY}
    ),
    ("POST", f"{API}/codec/decode", ""): lambda application: GoodRequest(
        f"{API}/codec/decode", _payload(application.encoded(KEY), b"binary/encrypted")
    ),
    ("GET", f"{API}/keys/{{key_id}}", ""): _plain(f"{API}/keys/{KEY}"),
    ("POST", f"{API}/keys/{{key_id}}/rotate", ""): _plain(f"{API}/keys/{ROTATED}/rotate", qualifiers=_TURN),
    ("POST", f"{API}/jobs", "items, encrypt"): _items("encrypt"),
    ("POST", f"{API}/jobs", "items, decrypt"): _items("decrypt"),
    ("POST", f"{API}/jobs", "items, rewrap"): _items("rewrap"),
    ("POST", f"{API}/jobs", "items, rewrap to another context"): _items("rewrap", new_context=OTHER_CONTEXT),
    ("POST", f"{API}/jobs", "items, reseal"): _items("reseal"),
    ("POST", f"{API}/jobs", "items, reseal to another context"): _items("reseal", new_context=OTHER_CONTEXT),
    ("POST", f"{API}/jobs", "items as a stream"): _stream,
    ("POST", f"{API}/jobs", "file to file, encrypt"): _files("encrypt"),
    ("POST", f"{API}/jobs", "file to file, decrypt"): _files("decrypt", "in/one.age"),
    ("POST", f"{API}/jobs", "file to file, rewrap"): _files("rewrap", "in/one.age"),
    ("POST", f"{API}/jobs", "file to file, reseal to another context"): _files(
        "reseal", "in/one.age", new_context=OTHER_CONTEXT
    ),
    ("POST", f"{API}/jobs", "many files, encrypt"): _files("encrypt", "in/*"),
    ("POST", f"{API}/files/encrypt", ""): _upload("encrypt"),
    ("POST", f"{API}/files/decrypt", ""): _upload("decrypt"),
    ("GET", f"{API}/jobs/events", ""): _plain(  # answered at once: the stream has no end
        f"{API}/jobs/events", "invalid_request", headers={"Last-Event-ID": "none"}
    ),
    ("GET", f"{API}/job-groups/{{name}}", ""): lambda application: GoodRequest(
        f"{API}/job-groups/{application.group()}"
    ),
    ("POST", f"{API}/jobs/status", ""): lambda application: GoodRequest(
        f"{API}/jobs/status", {"job_ids": [application.job()]}
    ),
    ("GET", f"{API}/jobs/{{job_id}}", ""): _job(f"{API}/jobs/{{job_id}}"),
    ("GET", f"{API}/jobs/{{job_id}}/result", "the caller's own job"): _result("encrypt", own=True),
    ("GET", f"{API}/jobs/{{job_id}}/result", "another caller's encrypt job"): _result("encrypt", own=False),
    ("GET", f"{API}/jobs/{{job_id}}/result", "another caller's decrypt job"): _result("decrypt", own=False),
    ("DELETE", f"{API}/jobs/{{job_id}}/result", "the caller's own job"): _result("encrypt", own=True),
    ("DELETE", f"{API}/jobs/{{job_id}}/result", "another caller's decrypt job"): _result(
        "decrypt", own=False
    ),
    ("DELETE", f"{API}/jobs/{{job_id}}", ""): _job(f"{API}/jobs/{{job_id}}"),
    ("POST", f"{API}/jobs/{{job_id}}/cancel", ""): _job(f"{API}/jobs/{{job_id}}/cancel"),
    ("POST", f"{API}/jobs/{{job_id}}/retry", ""): _job(f"{API}/jobs/{{job_id}}/retry", dead=True),
    ("POST", f"{API}/webhooks/dead/{{delivery_id}}/resend", ""): lambda application: GoodRequest(
        f"{API}/webhooks/dead/{application.exhausted_delivery()}/resend"
    ),
    ("GET", "/metrics", "from elsewhere"): _plain("/metrics"),
    ("GET", "/ui/jobs/{job_id}", ""): _job("/ui/jobs/{job_id}"),
    ("GET", "/ui/jobs/{job_id}/state", ""): _job("/ui/jobs/{job_id}/state"),
    ("POST", "/ui/jobs/{job_id}/cancel", ""): _job("/ui/jobs/{job_id}/cancel", form=True),
    ("POST", "/ui/jobs/{job_id}/retry", ""): _job("/ui/jobs/{job_id}/retry", dead=True, form=True),
    ("POST", "/ui/jobs/retry", ""): _plain("/ui/jobs/retry", form={}),
    ("GET", "/ui/audit/{audit_id}/receipt", ""): lambda application: GoodRequest(
        f"/ui/audit/{application.audit_id()}/receipt"
    ),
    ("GET", "/ui/keys/{key_id}/rotate", ""): _plain(f"/ui/keys/{KEY}/rotate"),
    ("POST", "/ui/keys/{key_id}/rotate", ""): _plain(f"/ui/keys/{ROTATED}/rotate", qualifiers=_TURN, form={}),
    ("POST", "/ui/login", "with a good token"): _login,
    ("POST", "/ui/logout", ""): _plain("/ui/logout", form={}),
    ("GET", "/ui/static/{name}", ""): _plain("/ui/static/page.css"),
}
_BARE: Final = (
    *("/livez", "/readyz", "/docs", "/openapi.json"),
    *(f"{API}/{path}" for path in ("keys", "jobs", "jobs/dead", "webhooks/dead")),
    *(f"{API}/{path}" for path in ("intake", "audit", "status", "health")),
    *(f"/ui{path}" for path in ("", "/jobs", "/audit", "/workers", "/keys", "/runbooks", "/login")),
    *(f"/v1/sys/{path}" for path in ("mounts", "internal/ui/mounts", "health", "seal-status")),
    *("/v1/sys/init", "/v1/sys/leader", "/v1/auth/token/lookup-self"),
)
"""Paths that are read as they stand in the table."""
CALLS.update({("GET", path, ""): _plain(path) for path in _BARE})


# -- the Vault API -------------------------------------------------------------------------------------


def _vault(path: str, *, many: bool = False, opens: bool = False, **body: object) -> Make:
    def make(application: Application) -> GoodRequest:
        item = {"ciphertext": application.of_vault(KEY)} if opens else body
        return GoodRequest(f"/v1/transit/{path}/{KEY}", {"batch_input": [item]} if many else item)

    return make


_MOUNT: Final = "/v1/{mount}"
_WRITTEN: Final[dict[tuple[str, str], Make]] = {
    (f"{_MOUNT}/encrypt/{{name}}", ""): _vault("encrypt", plaintext=_PLAIN),
    (f"{_MOUNT}/encrypt/{{name}}", "batch_input"): _vault("encrypt", many=True, plaintext=_PLAIN),
    (f"{_MOUNT}/decrypt/{{name}}", ""): _vault("decrypt", opens=True),
    (f"{_MOUNT}/decrypt/{{name}}", "batch_input"): _vault("decrypt", opens=True, many=True),
    (f"{_MOUNT}/rewrap/{{name}}", ""): _vault("rewrap", opens=True),
    (f"{_MOUNT}/rewrap/{{name}}", "batch_input"): _vault("rewrap", opens=True, many=True),
    (f"{_MOUNT}/datakey/plaintext/{{name}}", ""): _vault("datakey/plaintext"),
    (f"{_MOUNT}/datakey/wrapped/{{name}}", ""): _vault("datakey/wrapped"),
    (f"{_MOUNT}/keys/{{name}}", ""): _vault("keys"),
    (f"{_MOUNT}/keys/{{name}}/rotate", ""): _plain(f"/v1/transit/keys/{ROTATED}/rotate", qualifiers=_TURN),
    (f"{_MOUNT}/keys/{{name}}/config", ""): _plain(f"/v1/transit/keys/{KEY}/config"),
    ("/v1/auth/token/renew-self", ""): _plain("/v1/auth/token/renew-self", "lease is not renewable"),
    ("/v1/auth/token/revoke-self", ""): _plain("/v1/auth/token/revoke-self", "cannot be revoked"),
    ("/v1/auth/{mount}/login", "with a good JWT"): lambda application: GoodRequest(
        "/v1/auth/jwt/login", {"role": "all", "jwt": application.issuer.token()}
    ),
    ("/v1/sys/capabilities-self", ""): _plain("/v1/sys/capabilities-self", body={"path": "transit/keys"}),
}
CALLS.update({(method, *row): make for row, make in _WRITTEN.items() for method in ("POST", "PUT")})
CALLS.update(
    {
        ("GET", f"{_MOUNT}/keys", ""): _plain("/v1/transit/keys", "[]"),
        ("LIST", f"{_MOUNT}/keys", ""): _plain("/v1/transit/keys", "[]"),
        ("GET", f"{_MOUNT}/keys/{{name}}", ""): _plain(f"/v1/transit/keys/{KEY}"),
        ("DELETE", f"{_MOUNT}/keys/{{name}}", ""): _plain(
            f"/v1/transit/keys/{KEY}", "deletion is not allowed"
        ),
        ("GET", "/v1/sys/internal/ui/mounts/{mount}", ""): _plain("/v1/sys/internal/ui/mounts/transit"),
        ("HEAD", "/v1/sys/health", ""): _plain("/v1/sys/health"),
    }
)
