"""Reads a golden set: its ciphertexts and the keys that open them. Imports nothing of the service."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import pyrage

from support.golden import reference
from support.golden.reference import Names

V1: Final = Path(__file__).parents[2] / "golden/v1"
SMALL: Final = "Grüße aus dem Archiv, 42\n".encode()
Json = dict[str, Any]


def plaintext(size: int) -> bytes:
    """``size`` bytes: those of ``SMALL``, or of SHA-256 over 0, 1, 2… (8 bytes, big-endian) joined."""
    if size == len(SMALL):
        return SMALL
    blocks = -(-size // 32)
    return b"".join(hashlib.sha256(number.to_bytes(8, "big")).digest() for number in range(blocks))[:size]


@dataclass(frozen=True)
class Entry:
    """One ciphertext: what it was made of, and what came out.

    ``head`` is header and payload nonce. ``wraps`` are the names under which each backend wrapped, the first
    of which the context stanza holds.
    """

    name: str
    backend: str
    tenant: str
    key_id: str
    version: str
    context: Mapping[str, str]
    size: int
    origin: str
    file_key: bytes = field(repr=False)
    head: bytes = field(repr=False)
    sha256: str
    wraps: tuple[str, ...] = ()
    clear: bytes = field(default=b"", repr=False)

    @property
    def plaintext(self) -> bytes:
        return self.clear or plaintext(self.size)

    @property
    def file(self) -> bytes:
        """The whole file: its payload follows from file key, nonce and plaintext (C2SP age, STREAM)."""
        payload = reference.sealed_payload(self.file_key, self.nonce, self.plaintext)
        whole = self.head + payload
        assert hashlib.sha256(whole).hexdigest() == self.sha256
        return whole

    @property
    def nonce(self) -> bytes:
        return self.head[-16:]

    @property
    def names(self) -> Names:
        return Names(self.tenant, self.key_id, self.version, self.scheme)

    @property
    def scheme(self) -> str:
        """The backend's name as it stands in stanzas."""
        return "vault-kv" if self.backend == "vault-kv" else self.backend.partition("-")[0]


def entry_of(stored: Mapping[str, Any]) -> Entry:
    octets = {name: unb64(stored[name]) for name in ("file_key", "head", "clear")}
    return Entry(**{**stored, **octets, "wraps": tuple(stored["wraps"])})


@cache
def entries() -> tuple[Entry, ...]:
    return tuple(
        entry_of(stored)
        for path in sorted((V1 / "ciphertexts").iterdir())
        for stored in json.loads(path.read_text())
    )


def entry(name: str) -> Entry:
    return next(one for one in entries() if one.name == name)


def document(name: str) -> Any:  # noqa: ANN401 -- JSON
    """A JSON file of the set."""
    return json.loads((V1 / name).read_text())


@cache
def keys() -> Json:
    found: Json = document("keys/remote.json")
    return found


def identity_secret(name: str, number: int = -1) -> bytes:
    """The secret of an identity of an identity file: the last one, or another by its place."""
    lines = (V1 / f"keys/{name}.txt").read_text().splitlines()
    return reference.bech32_data([line for line in lines if line.startswith("AGE-SECRET-KEY-")][number])


def recipients(name: str) -> list[str]:
    """The recipients of an identity file, which stand in comments."""
    return re.findall(r"^# public key: (.*)$", (V1 / f"keys/{name}.txt").read_text(), re.MULTILINE)


def opened_by_pyrage(file: bytes) -> bytes:
    """What another implementation of age makes of a file for the X25519 key of the set."""
    lines = (V1 / "keys/age-x25519.txt").read_text().splitlines()
    known = [pyrage.x25519.Identity.from_str(line) for line in lines if line.startswith("AGE-SECRET-KEY-")]
    return bytes(pyrage.decrypt(file, known))


def copied(name: str, folder: Path) -> Path:
    """A folder or file of the set, copied for a test with the modes that the service wants (0700, 0600)."""
    target = folder / Path(name).name
    source = V1 / name
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    for path in (target, *target.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return target


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def unb64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
