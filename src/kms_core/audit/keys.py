"""The two keys of an audit log, created at first start: one hides context values, one signs checkpoints."""

import base64
import hashlib
import hmac
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Final, Self

import structlog
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from kms_core import secure_files
from kms_core.age.header import is_age_file
from kms_core.audit import chain
from kms_core.audit.chain import ChainLine
from kms_protocol import small_files
from kms_protocol.context import Context, length_prefixed
from kms_protocol.errors import AuditUnavailable, BackendUnavailable, ConfigurationError

KEY_BYTES: Final = 32
CONCEALING: Final = "kms:audit"
SIGNING: Final = "kms:audit-signing"
"""The names under which the two keys may be sealed (``envelope.sealed_files``)."""
_REPEATED: Final = 1024  # cached contexts, which take less than a megabyte
_SHORT_BYTES: Final = 256
_SHOWN: Final = 32  # hex digits of a hash: 128 bits
_ENDS: Final = "-----END PUBLIC KEY-----\n"
_log = structlog.get_logger(__name__)
OpenSealed = Callable[[str, bytes], bytes]
"""Opens a sealed key file by its name, as ``envelope.sealed_files.SealedFiles.open``."""


class Concealer:
    """HMAC-SHA256 of context values, cut to 128 bits: only a holder of the key can test a guess."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._repeated = lru_cache(maxsize=_REPEATED)(self._conceal)

    @classmethod
    def at(cls, path: Path, *, strict: bool = False, open_sealed: OpenSealed | None = None) -> Self:
        """The key in a file, which is created if it does not exist; ``open_sealed`` opens a sealed one.

        Raises ConfigurationError, AuditUnavailable while the root of a sealed file is away.
        """
        try:
            key = base64.b64decode(_secret(path, CONCEALING, _new_key, open_sealed, strict=strict))
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES:
            raise ConfigurationError(f"{path} is not an audit key: move it away, and a new one is created")
        return cls(key)

    def conceal(self, tenant: str, context: Context) -> Mapping[str, str]:
        if not context:
            return {}
        short = len(context.canonical()) <= _SHORT_BYTES
        return self._repeated(tenant, context) if short else self._conceal(tenant, context)

    def _conceal(self, tenant: str, context: Context) -> Mapping[str, str]:
        hidden = {}
        for name, value in context.pairs:
            text = length_prefixed(tenant.encode(), name.encode(), value.encode())
            hidden[name] = hmac.digest(self._key, text, "sha256").hex()[:_SHOWN]
        return hidden


class Signer:
    """Ed25519 (RFC 8032). The private key is a PKCS #8 file; the public one lies beside it as ``.pub``."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw()
        self.key_id = key_id(self.public)
        self.known = PublicKeys([self.public])
        """This key and all former keys of the file beside it."""

    @classmethod
    def at(cls, path: Path, *, strict: bool = False, open_sealed: OpenSealed | None = None) -> Self:
        """The key in a file, which is created if it does not exist; ``open_sealed`` opens a sealed one.

        Raises ConfigurationError, AuditUnavailable while the root of a sealed file is away.
        """
        content = _secret(path, SIGNING, _new_private_key, open_sealed, strict=strict)
        try:
            key = serialization.load_pem_private_key(content, None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigurationError(
                f"{path} is not an Ed25519 key in PEM: move it away, and a new one is created"
            )
        made = cls(key)
        made._publish(public_path(path))
        return made

    def sign(self, text: bytes) -> bytes:
        """The signature in base64: 88 characters."""
        return base64.b64encode(self._key.sign(text))

    def _publish(self, path: Path) -> None:
        """Add the public key to the file of public keys: lines signed by former keys stay verifiable."""
        known = PublicKeys.read(path) if path.exists() else PublicKeys([])
        if self.key_id not in known.keys:
            with _configuring(path), path.open("a") as file:
                file.write(pem(self.public))
        self.known = PublicKeys([*known.keys.values(), self.public])


class PublicKeys:
    """Public keys that a verifier trusts, by their ids."""

    def __init__(self, raw: Iterable[bytes]) -> None:
        self.keys = {key_id(each): each for each in raw}
        self._loaded = {name: Ed25519PublicKey.from_public_bytes(key) for name, key in self.keys.items()}

    @classmethod
    def read(cls, path: Path) -> Self:
        """All keys of a PEM file. Raises ConfigurationError."""
        with _configuring(path):
            blocks = small_files.read(path).decode("ascii", "replace").split(_ENDS)
        try:
            load = serialization.load_pem_public_key
            keys = [load((block + _ENDS).encode()) for block in blocks if block.strip()]
        except ValueError as exc:
            raise ConfigurationError(f"{path} holds no public keys in PEM") from exc
        return cls(key.public_bytes_raw() for key in keys if isinstance(key, Ed25519PublicKey))

    def signed(self, line: bytes) -> ChainLine | None:
        """Decode a signed line (without newline); None unless a known key signed it and its head is right."""
        found, parts = chain.read(line), chain.parts_of_signed(line)
        if found is None or parts is None or found.kind not in chain.SIGNED:
            return None
        unsigned, signature = parts
        before = chain.from_hex(found.previous)
        whole = before is not None and chain.is_sound(before, line)
        good = whole and self._verifies(found.key, chain.LABEL + unsigned, signature)
        return found if good else None

    def _verifies(self, key: str, text: bytes, signature: str) -> bool:
        """Return whether this is a signature (base64) by a known key of this id."""
        try:
            self._loaded[key].verify(base64.b64decode(signature, validate=True), text)
        except (KeyError, InvalidSignature, ValueError):
            return False
        return True


def key_id(public: bytes) -> str:
    """The first 16 hex digits of SHA-256 over the raw public key."""
    return hashlib.sha256(public).hexdigest()[:16]


def public_path(private: Path) -> Path:
    """Return the path of the public key beside a private one."""
    return private.with_suffix(".pub")


def pem(public: bytes) -> str:
    """SubjectPublicKeyInfo, as ``openssl pkey -pubin`` reads it."""
    key = Ed25519PublicKey.from_public_bytes(public)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form).decode("ascii")


def _new_key() -> bytes:
    return base64.b64encode(os.urandom(KEY_BYTES)) + b"\n"


def _new_private_key() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _secret(
    path: Path, name: str, new: Callable[[], bytes], open_sealed: OpenSealed | None, *, strict: bool
) -> bytes:
    """The content of a key file; of a sealed one as ``name``. One that does not exist is created.

    Two processes that create it at the same time both use the file of the first.
    """
    with _configuring(path):
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            secure_files.create(path, new())
        content = small_files.read(path)
        secure_files.check_secret(path, _log.warning, "key.file_open_to_others", strict=strict)
    if not is_age_file(content):
        return content
    if open_sealed is None:
        raise ConfigurationError(f"The audit key {path} is sealed, and this program opens no sealed keys")
    try:
        return open_sealed(name, content)
    except ConfigurationError as exc:
        raise ConfigurationError(f"The audit key {path} cannot be opened: {exc.detail}") from exc
    except BackendUnavailable as exc:
        raise AuditUnavailable(f"The audit key {path} cannot be opened: {exc.detail}") from exc


@contextmanager
def _configuring(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ConfigurationError(f"The audit key {path} cannot be used ({exc.strerror})") from exc
