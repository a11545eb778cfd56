"""What it costs to ask who calls: POST /encrypt through the whole application, without a credential and with.

The application runs in this process and is called as uvicorn would call it. What is counted is the processor
time of this process, which other programs on the machine disturb less than they do the clock.
"""

import asyncio
import json
import tempfile
import time
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import jwt
from benchmarks import report
from benchmarks.measure import Contender, Reading, in_turn
from benchmarks.report import Scale
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from starlette.types import ASGIApp

from kms_api import app
from kms_cli.local import up
from kms_core.auth import tokens
from kms_core.auth.client_certificates import PresentedCertificate, authority_of, key_of
from kms_core.auth.tokens import TokenRequest
from kms_core.http_protocol import CERTIFICATE
from kms_core.observability import logs
from kms_core.settings.load import load as load_settings
from kms_protocol.wire import PREFIX

CALLS: Final = 1500
SCOPES: Final = (
    "jobs:read,jobs:write key=x",
    "decrypt key=other-*",
    "encrypt key=def* context=env=prod,service=*",
)
ISSUER: Final = "https://id.example.com"
BODY: Final = json.dumps(
    {"plaintext": b64encode(bytes(1024)).decode(), "context": "env=prod,service=api"}
).encode()
_SCALE: Final = Scale(unit="µs of processor a call", factor=1e6, digits=1)
Headers = list[tuple[bytes, bytes]]


def main() -> None:
    options = report.options("auth", "Calls with and without a credential, in turn.", runs=15, budget_s=35.0)
    logs.configure("error", json=True)
    with tempfile.TemporaryDirectory(prefix="kms-bench-") as name:
        folder = Path(name)
        open_to_all, guarded = built(folder / "open", ""), built(folder / "guarded", _settings(folder))
        _, token = tokens.create(
            folder / "guarded/tokens.json", TokenRequest("ci", "default", SCOPES, timedelta(days=1))
        )
        ways: dict[str, tuple[ASGIApp, Headers, dict[str, Any]]] = {
            "no credential": (open_to_all, [], {}),
            "API token": (guarded, [(b"authorization", b"Bearer " + token.encode())], {}),
            "API token, X-API-Key": (guarded, [(b"x-api-key", token.encode())], {}),
            "JWT, seen before": (guarded, [(b"authorization", b"Bearer " + _jwt(folder).encode())], {}),
            "client certificate": (guarded, [], {CERTIFICATE: _certificate(folder)}),
        }
        found = in_turn(
            [Contender(name, lambda way=way: run(*way)) for name, way in ways.items()],  # type: ignore[misc]  # the default is the way
            options.plan,
            options.budget_s,
        )
    title = "POST /encrypt, 1,024 B, in process"
    table = report.table(title, options.keep(title, found), _SCALE)
    options.write([table, f"Three scopes of which the last one fits; {CALLS:,} calls a run."])


def run(application: ASGIApp, headers: Headers, state: dict[str, Any]) -> Reading:
    """The processor time of one call, over many; RuntimeError unless each is answered 200."""
    return {"seconds": asyncio.run(_calls(application, headers, state)) / CALLS}


async def _calls(application: ASGIApp, headers: Headers, state: dict[str, Any]) -> float:
    begun = time.process_time()
    for _ in range(CALLS):
        await _call(application, headers, state)
    return time.process_time() - begun


async def _call(application: ASGIApp, headers: Headers, state: dict[str, Any]) -> None:
    status = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: Any) -> None:  # noqa: ANN401 -- of several shapes
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8082),
        "client": ("127.0.0.1", 50_000),
        "scheme": "http",
        "root_path": "",
        "method": "POST",
        "path": f"{PREFIX}/encrypt",
        "raw_path": f"{PREFIX}/encrypt".encode(),
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), *headers],
        "state": dict(state),
    }
    await application(scope, receive, send)
    if status != 200:  # noqa: PLR2004 -- as HTTP says
        raise RuntimeError(f"answered {status}")


def built(state: Path, text: str) -> ASGIApp:
    """The application over a state directory of its own; no Redis is asked by this call."""
    state.mkdir(parents=True)
    config = state / "kms.toml"
    config.write_text(f"[kms]\n{text}[kms.log]\nlevel = 'error'\n")
    environ = {"HOME": str(state), "KMS_STATE_DIR": str(state), "KMS_REDIS_URL": "unix:///nonexistent.sock"}
    settings = load_settings(config, environ)
    up.make_dev_keys(settings)
    return app.build(settings)


def _settings(folder: Path) -> str:
    """Token, JWT and certificate with the same scopes."""
    lines = json.dumps(SCOPES)
    key = ec.generate_private_key(ec.SECP256R1())
    public = jwt.algorithms.ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    (folder / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "k"}]}))
    exp = int(time.time()) + 3600
    claims = {"iss": ISSUER, "aud": "kms", "sub": "ci", "exp": exp}
    (folder / "jwt").write_text(jwt.encode(claims, key, "ES256", headers={"kid": "k"}))
    return (
        f'[kms.auth]\nmode = "required"\n[kms.auth.issuers.corp]\nissuer = "{ISSUER}"\naudience = "kms"\n'
        f'jwks_file = "{folder}/jwks.json"\nscopes = {lines}\n'
        f'[kms.auth.certificates.ci]\nsubject = "DNS:ci"\nscopes = {lines}\n'
        f'[kms.server]\ntls_cert = "/c"\ntls_key = "/k"\nclient_ca = "{_authority(folder)}"\n'
    )


def _authority(folder: Path) -> Path:
    """A file with a certificate authority."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a CA")])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    (folder / "ca.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    return folder / "ca.pem"


def _certificate(folder: Path) -> PresentedCertificate:
    """A client certificate of the authority."""
    authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    return PresentedCertificate(("DNS:ci",), 4e9, f"2:{authority_of(authority.subject)}:{key_of(authority)}")


def _jwt(folder: Path) -> str:
    return (folder / "jwt").read_text()


if __name__ == "__main__":
    main()
