"""Callers for tests: an install that asks for credentials, tokens, an issuer of JWTs, and certificates."""

import json
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, Final
from unittest.mock import Mock

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kms_core.auth import authenticator, client_certificates, jwt_verifier, tokens
from kms_core.auth.authenticator import Authenticator
from kms_core.auth.client_certificates import PresentedCertificate
from kms_core.auth.jwt_verifier import Jwts
from kms_core.auth.policy import Principal
from kms_core.auth.tokens import Token, TokenFile, TokenRequest
from kms_core.container import token_source
from kms_core.settings.model import Settings
from support.http_servers import QuietHandler, served
from support.service import Service

REQUIRED: Final = '[kms.auth]\nmode = "required"\n'
DAY: Final = timedelta(days=1)
HOUR: Final = timedelta(hours=1)
AUDIENCE: Final = "kms-service"
ISSUER: Final = "https://id.example.com"
_numbers: Final = count(1)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


class SecuredService(Service):
    """An install whose tokens a test makes. Other ``settings`` begin with REQUIRED, or it is open to all."""

    def __init__(self, folder: Path, settings: str = REQUIRED, redis: str | None = None) -> None:
        super().__init__(folder, settings, redis)
        self.token_file = self.settings.kms.auth.tokens_path

    def new_token(
        self, *scopes: str, tenant: str = "default", ttl: timedelta | None = DAY
    ) -> tuple[Token, str]:
        """A new token and its text."""
        return tokens.create(self.token_file, TokenRequest(f"caller-{next(_numbers)}", tenant, scopes, ttl))

    def token_header(self, *scopes: str, tenant: str = "default") -> dict[str, str]:
        """The header of a new token."""
        return bearer(self.new_token(*scopes, tenant=tenant)[1])


# -- JWTs ------------------------------------------------------------------------------------------------

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass
class Issuer:
    """A local issuer: its keys, of which the last one signs, and how often its JWKS was asked for."""

    kid: InitVar[str] = "one"
    algorithm: InitVar[str] = "ES256"
    keys: dict[str, tuple[PrivateKey, str]] = field(default_factory=dict)
    asked: int = 0
    broken: bool = False
    answering: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self, kid: str, algorithm: str) -> None:
        self.answering.set()
        self.rollover(kid, algorithm)

    def hang(self) -> None:
        """Take requests for keys, and answer none until ``resume``, for a minute at most."""
        self.answering.clear()

    def resume(self) -> None:
        self.answering.set()

    def fetched(self) -> bytes:
        """Its JWKS as a fetch gets it. Raises OSError while it is broken."""
        self.asked += 1
        self.answering.wait(60)
        if self.broken:
            raise OSError("not today")
        return self.jwks

    def rollover(self, kid: str, algorithm: str = "ES256", *, keep: bool = True) -> None:
        """A new key signs from now on."""
        made: PrivateKey
        if algorithm.startswith(("RS", "PS")):
            made = rsa.generate_private_key(65537, 2048)
        elif algorithm == "EdDSA":
            made = ed25519.Ed25519PrivateKey.generate()
        else:
            made = ec.generate_private_key(ec.SECP256R1())
        self.keys = {**(self.keys if keep else {}), kid: (made, algorithm)}

    @property
    def jwks(self) -> bytes:
        return json.dumps({"keys": [public_jwk(key, kid) for kid, (key, _) in self.keys.items()]}).encode()

    def token(self, kid: str | None = None, /, **changes: object) -> str:
        """A token as it should be, but for what is changed; a claim changed to None is left out."""
        kid = kid or list(self.keys)[-1]
        key, algorithm = self.keys[kid]
        body = json.dumps(claims(**changes)).encode()  # the library would not sign claims that are odd
        return jwt.api_jws.encode(body, key, algorithm, headers={"kid": kid, "typ": "JWT"})


def claims(**changes: object) -> dict[str, object]:
    now = int(time.time())
    whole: dict[str, object] = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "ada",
        "iat": now,
        "exp": now + 600,
        "kms_scopes": ["encrypt,decrypt", "jobs:read,jobs:write", "status"],
    } | changes
    return {name: value for name, value in whole.items() if value is not None}


def authenticator_of(settings: Settings) -> Authenticator | None:
    """The authenticator of settings, with the tokens of their file."""
    return authenticator.build(settings, token_source(settings, None))


def verified(jwts: Jwts, text: str) -> Principal:
    """The principal of a JWT, after one look-up if that is needed."""
    return Authenticator(TokenFile(Path("/nonexistent")), jwts, {}).principal(text)


def counted_signatures(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts the JWTs whose signature is verified from now on, as its ``call_count``."""
    counted = Mock(wraps=jwt_verifier._decoded)  # noqa: SLF001 -- nothing else tells
    monkeypatch.setattr(jwt_verifier, "_decoded", counted)
    return counted


def public_jwk(key: PrivateKey, kid: str) -> dict[str, Any]:
    public = key.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        made = jwt.algorithms.RSAAlgorithm.to_jwk(public, as_dict=True)
    elif isinstance(public, ec.EllipticCurvePublicKey):
        made = jwt.algorithms.ECAlgorithm.to_jwk(public, as_dict=True)
    else:
        made = jwt.algorithms.OKPAlgorithm.to_jwk(public, as_dict=True)
    return {**made, "kid": kid, "use": "sig"}


@contextmanager
def serving(issuer: Issuer) -> Iterator[str]:
    """Its JWKS over HTTP on loopback; the URL."""

    class Handler(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802 -- the library's name
            try:
                self.reply(200, issuer.fetched())
            except OSError:
                self.reply(503, b"not today")

    with served(Handler) as port:
        yield f"http://127.0.0.1:{port}/jwks"


def required_with_issuer(keys: str, more: str = "") -> str:
    """The section of this issuer; ``keys`` is its line ``jwks_url`` or ``jwks_file``."""
    return (
        f'{REQUIRED}[kms.auth.issuers.corp]\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\n{keys}\n'
        f'scopes_claim = "kms_scopes"\nleeway_s = 5\n{more}\n'
    )


# -- certificates ----------------------------------------------------------------------------------------


_USAGES: Final = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


@dataclass(frozen=True)
class CertAndKey:
    """A certificate and its key, as PEM files."""

    cert: Path
    key: Path


def der_of(path: Path) -> bytes:
    return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(Encoding.DER)


def shown(pair: CertAndKey, *authorities: "Authority") -> PresentedCertificate:
    """A client certificate as TLS gives it to a connection; ``authorities`` from its own to the root."""
    return client_certificates.read(der_of(pair.cert), [der_of(one.ca_file) for one in authorities])


class Authority:
    """A CA of its own, or one below ``parent``; a ``plain`` one, as ``openssl req -x509`` makes it, has no
    keyUsage."""

    def __init__(
        self,
        folder: Path,
        name: str = "a CA for tests",
        parent: "Authority | None" = None,
        *,
        plain: bool = False,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.ca_file = folder / "ca.pem"
        extensions: list[x509.ExtensionType] = [x509.BasicConstraints(ca=True, path_length=None)]
        if not plain:
            extensions.append(_usage("key_cert_sign", "crl_sign"))
        signed = (parent or self)._signed(self._name, self._key, extensions)  # noqa: SLF001 -- of the same class
        self.ca_file.write_bytes(signed.public_bytes(Encoding.PEM))

    def issue(
        self,
        file: str,
        *names: x509.GeneralName,
        subject: str = "someone",
        server: bool | None = False,
        lasts: timedelta = DAY,
    ) -> CertAndKey:
        """A certificate for these names: for clients, for a server, or (``None``) for both."""
        key = ec.generate_private_key(ec.SECP256R1())
        purposes = [] if server else [ExtendedKeyUsageOID.CLIENT_AUTH]
        purposes += [] if server is False else [ExtendedKeyUsageOID.SERVER_AUTH]
        extensions: list[x509.ExtensionType] = [_usage("digital_signature"), x509.ExtendedKeyUsage(purposes)]
        if names:
            extensions.append(x509.SubjectAlternativeName(names))
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
        pair = CertAndKey(self._folder / f"{file}.crt", self._folder / f"{file}.key")
        pair.key.touch(0o600)
        pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        pair.cert.write_bytes(self._signed(name, key, extensions, lasts).public_bytes(Encoding.PEM))
        return pair

    def crl(
        self, *revoked: Path, lasts: timedelta = DAY, ago: timedelta = HOUR, delta: bool = False
    ) -> bytes:
        """A list (PEM) of some time ago that revokes the certificates in these files."""
        now = datetime.now(UTC)
        made = x509.CertificateRevocationListBuilder(self._name)
        made = made.last_update(min(now, now + lasts) - ago).next_update(now + lasts)
        for path in revoked:
            serial = x509.load_pem_x509_certificate(path.read_bytes()).serial_number
            entry = x509.RevokedCertificateBuilder(serial, now - timedelta(minutes=1))
            made = made.add_revoked_certificate(entry.build())
        key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        made = made.add_extension(key, critical=False)  # tells OpenSSL the lists of a re-keyed CA apart
        if delta:
            made = made.add_extension(x509.DeltaCRLIndicator(1), critical=True)
        return made.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def context(self, client: CertAndKey | None = None) -> ssl.SSLContext:
        """What a client of a server of this CA connects with: as strict as Python 3.13, on any."""
        made = ssl.create_default_context(cafile=self.ca_file)
        made.verify_flags |= ssl.VERIFY_X509_STRICT
        if client:
            made.load_cert_chain(client.cert, client.key)
        return made

    def _signed(
        self,
        name: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        extensions: Sequence[x509.ExtensionType],
        lasts: timedelta = DAY,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(self._name, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + lasts)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        subject = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        for extension in (*extensions, issuer, subject):
            critical = isinstance(extension, x509.BasicConstraints | x509.KeyUsage)
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self._key, hashes.SHA256())


def _usage(*names: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in names for name in _USAGES})


def header_of(token: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = jwt.get_unverified_header(token)
    return found
