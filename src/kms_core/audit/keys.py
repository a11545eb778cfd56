"""The two keys of an audit trail: one hides context values, one signs checkpoints. Made at first start."""

import base64
import hashlib
import hmac
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Final, Self

import structlog
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from kms_core.audit import chain
from kms_core.audit.chain import ChainLine
from kms_core.durable import sync_folder
from kms_core.secure_files import open_to_others
from kms_protocol import small_files
from kms_protocol.context import Context, length_prefixed
from kms_protocol.errors import ConfigurationError

KEY_BYTES: Final = 32
_REPEATED: Final = (
    1024  # contexts that callers say again and again: what is kept of them stays below a megabyte
)
_SHORT_BYTES: Final = 256
_SHOWN: Final = 32  # hex digits of a hash: 128 bits
_ENDS: Final = "-----END PUBLIC KEY-----\n"
_log = structlog.get_logger(__name__)


class Concealer:
    """HMAC-SHA256 of context values, cut to 128 bits: who knows the key can compare a guess, nobody else."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._tenants: dict[str, hmac.HMAC] = {}
        self._repeated = lru_cache(maxsize=_REPEATED)(self._conceal)

    @classmethod
    def at(cls, path: Path, *, strict: bool = False) -> Self:
        """The key in a file, made if there is none. Raises ConfigurationError."""
        _make(path, lambda: base64.b64encode(os.urandom(KEY_BYTES)) + b"\n")
        try:
            key = base64.b64decode(_secret(path, strict=strict), validate=False)
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES:
            raise ConfigurationError(f"{path} is not an audit key: move it away, and a new one is made")
        return cls(key)

    def conceal(self, tenant: str, context: Context) -> Mapping[str, str]:
        if not context:
            return {}
        short = len(context.canonical()) <= _SHORT_BYTES
        return self._repeated(tenant, context) if short else self._conceal(tenant, context)

    def _conceal(self, tenant: str, context: Context) -> Mapping[str, str]:
        keyed = self._tenants.get(tenant)
        if keyed is None:  # of callers known to the service: a handful
            keyed = self._tenants[tenant] = hmac.new(self._key, length_prefixed(tenant.encode()), "sha256")
        hidden = {}
        for name, value in context.pairs:
            each = keyed.copy()
            each.update(length_prefixed(name.encode(), value.encode()))
            hidden[name] = each.hexdigest()[:_SHOWN]
        return hidden


class Signer:
    """Ed25519 (RFC 8032). The private key is a PKCS #8 file; the public one lies beside it as ``.pub``."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = _raw(key.public_key())
        self.key_id = key_id(self.public)
        self.known = PublicKeys.of([self.public])
        """All keys that have signed here."""

    @classmethod
    def at(cls, path: Path, *, strict: bool = False) -> Self:
        """The key in a file, made if there is none. Raises ConfigurationError."""
        _make(path, _new_private_key)
        try:
            key = serialization.load_pem_private_key(_secret(path, strict=strict), None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigurationError(f"{path} is not an Ed25519 key in PEM: move it away, and one is made")
        made = cls(key)
        made._publish(public_path(path))
        return made

    def sign(self, text: bytes) -> bytes:
        """The signature in base64: 88 characters."""
        return base64.b64encode(self._key.sign(text))

    def _publish(self, path: Path) -> None:
        """Add the public key to those that have signed here: what a former key signed stays verifiable."""
        known = PublicKeys.read(path) if path.exists() else PublicKeys({})
        if self.key_id not in known.keys:
            with _configuring(path), path.open("a") as file:
                file.write(pem(self.public))
        self.known = PublicKeys(known.keys | self.known.keys)


class PublicKeys:
    """Keys that a verifier trusts, by their ids."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self.keys = dict(keys)
        self._loaded: dict[str, Ed25519PublicKey] = {}

    @classmethod
    def of(cls, raw: Iterable[bytes]) -> Self:
        return cls({key_id(each): each for each in raw})

    @classmethod
    def read(cls, path: Path) -> Self:
        """All keys of a PEM file. Raises ConfigurationError."""
        with _configuring(path):
            blocks = small_files.read(path).decode("ascii", "replace").split(_ENDS)
        try:
            keys = [
                serialization.load_pem_public_key((block + _ENDS).encode())
                for block in blocks
                if block.strip()
            ]
        except ValueError as exc:
            raise ConfigurationError(f"{path} holds no public keys in PEM") from exc
        return cls.of(_raw(key) for key in keys if isinstance(key, Ed25519PublicKey))

    def signed(self, line: bytes) -> ChainLine | None:
        """A signed line (without newline) whose head fits, and whose signature is by a key known here."""
        found, parts = chain.read(line), chain.parts_of_signed(line)
        if found is None or parts is None or found.kind not in chain.SIGNED:
            return None
        unsigned, signature = parts
        try:
            whole = chain.is_sound(bytes.fromhex(found.previous), line)
        except ValueError:
            return None
        good = whole and self._verifies(found.key, chain.text_to_sign(unsigned), signature)
        return found if good else None

    def _verifies(self, key: str, text: bytes, signature: str) -> bool:
        """Whether a key of this id is known and made this signature (base64)."""
        if key not in self.keys:
            return False
        if key not in self._loaded:
            self._loaded[key] = Ed25519PublicKey.from_public_bytes(self.keys[key])
        try:
            self._loaded[key].verify(base64.b64decode(signature, validate=True), text)
        except (InvalidSignature, ValueError):
            return False
        return True


def key_id(public: bytes) -> str:
    """The first 16 hex digits of SHA-256 over the raw public key."""
    return hashlib.sha256(public).hexdigest()[:16]


def public_path(private: Path) -> Path:
    return private.with_suffix(".pub")


def pem(public: bytes) -> str:
    """SubjectPublicKeyInfo, as ``openssl pkey -pubin`` reads it."""
    key = Ed25519PublicKey.from_public_bytes(public)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form).decode("ascii")


def _raw(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes_raw()


def _new_private_key() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _make(path: Path, content: Callable[[], bytes]) -> None:
    """A private file, whole or not there; of two processes that make it at once, one wins for both."""
    if path.exists():
        return
    with _configuring(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        fresh = Path(name)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content())
                file.flush()
                os.fsync(fd)
            with suppress(FileExistsError):
                os.link(fresh, path)
        finally:
            fresh.unlink()
        sync_folder(path.parent)


def _secret(path: Path, *, strict: bool) -> bytes:
    with _configuring(path):
        mode = open_to_others(path)
        content = small_files.read(path)
    if mode:
        advice = f"{path} can be read by others (mode {mode:04o}): run `chmod 600 {path}`"
        if strict:
            raise ConfigurationError(advice)
        _log.warning("key.file_open_to_others", path=str(path), mode=f"{mode:04o}", advice=advice)
    return content


@contextmanager
def _configuring(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ConfigurationError(f"The audit key {path} cannot be used ({exc.strerror})") from exc
