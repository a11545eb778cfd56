"""What callers show at the door, and the files that it is held against: known, or refused, and nothing else.

The first byte says what the input is: headers of a request; the header and claims of a JWT, which a trusted
issuer then signs; a key set; a token file; a scope.
"""

import base64
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kms_api.transport.authentication import token_of
from kms_core import scopes
from kms_core.auth import jwks, tokens
from kms_core.auth.authenticator import Authenticator
from kms_core.auth.jwks import IssuerKey, RemoteKeys
from kms_core.auth.jwt_verifier import Jwts, Trusted
from kms_core.auth.tokens import TokenFile
from kms_core.scopes import Access
from kms_core.settings.model import IssuerSection
from kms_protocol.context import Context
from kms_protocol.errors import ConfigurationError, Unauthenticated
from support.fuzz.harness import parts

MOST_BYTES: Final = 2 * 1024
ISSUER: Final = "https://id.example.com"
TOKEN: Final = "kms_abcdefghij_" + "s" * 43
EXPIRES: Final = 4_000_000_000  # 2096
WORDS: Final = (
    b"authorization: Bearer ",
    b"x-api-key: ",
    b"x-vault-token: ",
    TOKEN.encode(),
    b"eyJhbGciOiJFZERTQSJ9.",
    b'{"alg":"EdDSA","typ":"JWT","kid":"k"}',
    b'{"alg":"none"}',
    b'"crit":["b64"],"b64":false',
    b'"iss":"' + ISSUER.encode() + b'"',
    b'"aud":"kms"',
    b'"exp":',
    b'"nbf":1e999',
    b'"kms_scopes":["encrypt key=*"]',
    b'"kty":"OKP","crv":"Ed25519","x":"',
    b"encrypt,decrypt key=",
    b" context=env=prod",
    b" read=file:///srv/",
    b"%2f..%2f",
)
_KEY: Final = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
_folder: Final = tempfile.TemporaryDirectory(prefix="kms-fuzz-")
_FILE: Final = Path(_folder.name, "tokens.json")


class _Known(RemoteKeys):
    """The issuer's one key, which is not fetched."""

    def candidate_keys(self, kid: str | None, algorithm: str) -> Sequence[IssuerKey]:
        fits = kid in {None, "k"} and algorithm == "EdDSA"
        return [IssuerKey("k", _KEY.public_key(), frozenset({"EdDSA"}))] if fits else []


def _jwts() -> Jwts:
    """One that has seen no token yet."""
    section = IssuerSection(
        issuer=ISSUER,
        audience="kms",
        tenant_claim="tenant",
        tenants=("acme",),
        scopes_claim="kms_scopes",
        scopes=("status",),
    )
    return Jwts([Trusted("corp", section, _Known(bytes))])


def _authenticator() -> Authenticator:
    path = Path(_folder.name, "known.json")
    digest = base64.b64encode(hashlib.sha256(TOKEN.encode()).digest()).decode()
    token = {
        "id": "abcdefghij",
        "name": "ci",
        "tenant": "acme",
        "scopes": ["encrypt"],
        "created_at": "2026-01-01T00:00:00Z",
        "digests": [{"sha256": digest}],
    }
    path.touch(0o600)
    path.write_text(json.dumps({"version": 1, "tokens": [token]}))
    return Authenticator(TokenFile(path), _jwts(), {})


_AUTHENTICATOR: Final = _authenticator()


def seeds() -> Iterable[bytes]:
    claims = {"iss": ISSUER, "aud": "kms", "sub": "ci", "exp": EXPIRES, "tenant": "acme"}
    good = jwt.encode(claims, _KEY, "EdDSA", headers={"kid": "k"})
    told = json.dumps(claims | {"kms_scopes": ["encrypt key=a*"]}).encode()
    for text in (TOKEN, good, "", TOKEN[:-1]):
        yield b"\x00authorization: Bearer " + text.encode()
    yield b"\x00x-api-key: " + TOKEN.encode() + b"\nx-vault-token: other"
    yield b"\x01" + b'{"alg":"EdDSA","kid":"k","typ":"JWT"}\x00\x00' + told
    yield b"\x01" + b'{"alg":"EdDSA","crit":["b64"],"b64":false}\x00\x00' + told
    for claims_of in (b'{"a":' + b"[" * 3000, b'{"exp":1e400,"iss":"x"}', b'{"exp":' + b"9" * 5000 + b"}"):
        yield b"\x01" + b'{"alg":"EdDSA","kid":"k"}\x00\x00' + claims_of
        yield b"\x02" + claims_of
        yield b"\x03" + claims_of
    for number in (b"1e400", b"NaN", b"9" * 400, b"true", b'"4000000000"', b"-1"):
        strange = told.replace(str(EXPIRES).encode(), number)
        yield b"\x01" + b'{"alg":"EdDSA","kid":"k"}\x00\x00' + strange
    public = jwt.algorithms.OKPAlgorithm.to_jwk(_KEY.public_key(), as_dict=True)
    yield b"\x02" + json.dumps({"keys": [{**public, "kid": "k", "use": "sig"}]}).encode()
    yield b"\x03" + Path(_folder.name, "known.json").read_bytes()
    yield b"\x04encrypt,decrypt key=payroll-* context=env=prod,service=*"
    yield b"\x04encrypt key=backup read=file:///srv/data/ write=s3://bucket/sealed/"


def check(data: bytes) -> None:
    WAYS[(data[:1] or b"\x00")[0] % len(WAYS)](data[1:])


def _request(data: bytes) -> None:
    """Nobody gets in but who shows the token or something that the issuer signed."""
    headers = [
        tuple(part.strip() for part in line.split(b":", 1)) for line in data.split(b"\n") if b":" in line
    ]
    try:
        text = token_of((name.lower(), value) for name, value in headers)
        who = _AUTHENTICATOR.principal(text)
    except Unauthenticated as exc:
        assert exc.reason in {
            "missing",
            "malformed",
            "unknown",
            "untrusted",
            "signature",
            "claims",
            "expired",
        }
        return
    assert text == TOKEN or _is_signed(text)
    assert who.tenant == "acme"


def _is_signed(text: str) -> bool:
    """By the key alone, read without our code."""
    said, _, signature = text.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
    _KEY.public_key().verify(raw, said.encode())
    return True


def _signed(data: bytes) -> None:
    """A trusted issuer may say what he likes, and gets no further than his settings."""
    header, claims = parts(data, 2)
    said = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in (header, claims))
    signature = base64.urlsafe_b64encode(_KEY.sign(said)).rstrip(b"=")
    text = b".".join([said, signature]).decode()
    jwts = _jwts()
    try:
        who = jwts.verify(text)
    except Unauthenticated:
        return
    assert who.tenant == "acme"
    assert who.name.startswith("corp:")
    assert who.grant is not None
    assert who.grant.until > time.time()
    assert json.loads(header)["alg"] == "EdDSA"
    assert json.loads(claims)["iss"] == ISSUER
    assert jwts.verify(text) == who
    assert len(list(Authenticator(TokenFile(_FILE), jwts, {}).scopes_of(who))) == len(who.grant.scopes)


def _key_set(data: bytes) -> None:
    try:
        keys = jwks.parse(data)
    except ValueError:
        return
    assert keys
    assert not any({"none", "HS256", "HS384", "HS512"} & key.algorithms for key in keys)


def _token_file(data: bytes) -> None:
    _FILE.write_bytes(data)
    try:
        found = tokens.read(_FILE)
    except ConfigurationError as exc:
        assert str(_FILE) in exc.detail
        return
    assert all(isinstance(token.scopes, tuple) for token in found.tokens)


def _scope(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    try:
        scope = scopes.parse(text)
    except ValueError:
        return
    assert scope.operations <= set(scopes.OPERATIONS)
    context = Context.parse("env=prod,service=api")
    long = "file:///srv/" + "a/" * 500
    for operation in sorted(scope.operations):
        wanted = Access(operation, "payroll-1", context, long, "s3://bucket/../x")
        assert scope.missing(wanted) in {"key", "context", "read", "write"}


WAYS: Final[Sequence[Callable[[bytes], None]]] = (_request, _signed, _key_set, _token_file, _scope)
