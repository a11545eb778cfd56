"""Makes the key material of a golden set, known to all and good for tests alone; run by ``golden.make``."""

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from kms_core.age import mlkem768x25519, x25519
from support.golden.manifest import b64
from support.openbao import bao

Identity = x25519.X25519Identity | mlkem768x25519.HybridIdentity

WARNING: Final = "# TEST KEY of tests/golden: it is published, and protects nothing\n"
CREATED: Final = ("2026-01-05T08:00:00Z", "2026-09-01T12:30:00Z")
COSMIAN_NAMESPACE: Final = uuid.UUID("5d9be8cf-0f4c-4c0d-9e5c-6d6b8f1e7a51")  # as docs/backends.md has it
KEY: Final = "golden"


def make(folder: Path) -> None:
    """Identity files, and one document for the remote backends."""
    folder.mkdir(parents=True)
    _identities(folder / "age-x25519.txt", [x25519.X25519Identity.generate() for _ in CREATED])
    _identities(
        folder / "age-mlkem768x25519.txt", [mlkem768x25519.HybridIdentity.generate() for _ in CREATED]
    )
    for name in ("spool", "intake"):
        _identities(folder / f"{name}.txt", [x25519.X25519Identity.generate()])
    (folder / "audit_signing.pem").write_bytes(
        Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    (folder / "audit.key").write_text(b64(os.urandom(32)) + "\n")
    document = {
        "about": WARNING.removeprefix("# ").strip(),
        "transit": {"name": KEY, "backup": _transit_backup()},
        "vault-kv": {"1": _random(), "2": {"key": _random(), "created_at": CREATED[1]}},
        "awskms": {"alias": f"alias/{KEY}", "keys": {str(uuid.uuid4()): _random() for _ in CREATED}},
        "cosmian": {"name": KEY, "versions": {number: _cosmian(number) for number in ("1", "2")}},
    }
    (folder / "remote.json").write_text(json.dumps(document, indent=1) + "\n")


def _identities(path: Path, made: Sequence[Identity]) -> None:
    pairs = zip(CREATED, made, strict=False)
    path.write_text(
        WARNING
        + "".join(f"# created: {at}\n# public key: {one.recipient}\n{one.export()}\n" for at, one in pairs)
    )


def _transit_backup() -> str:
    bao().admin("POST", f"transit/keys/{KEY}", {"exportable": True, "allow_plaintext_backup": True})
    bao().admin("POST", f"transit/keys/{KEY}/rotate")
    backup: str = bao().admin("GET", f"transit/backup/{KEY}")["data"]["backup"]
    return backup


def _cosmian(number: str) -> dict[str, str]:
    return {"uid": str(uuid.uuid5(COSMIAN_NAMESPACE, f"{KEY}/{number}")), "key": _random()}


def _random() -> str:
    return b64(os.urandom(32))
