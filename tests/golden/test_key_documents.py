"""A signed document with a sealed Age key: opened by the tree, checked by other implementations."""

import base64
import json
from pathlib import Path
from typing import Any, Final

import pyrage

from support.golden import make_key_document, manifest, reference
from support.golden.jobs import SECRET

HELD: Final[dict[str, Any]] = json.loads(make_key_document.PATH.read_text())
STORED: Final[bytes] = HELD["stored"].encode()


def checked(stored: bytes) -> dict[str, Any]:
    """The document, if its MAC and its shape are those that version 1 describes."""
    line, mac, rest = stored.split(b"\n")
    key = reference.derived(SECRET, b"kms-service/document/1/keys")
    assert (mac, rest) == (reference.hmac_sha256(key, line).hex().encode(), b"")
    found: dict[str, Any] = json.loads(line)
    assert found.keys() == {"version", "name", "generation", "write_id", "earlier", "written_at", "body"}
    assert (found["version"], found["name"]) == (1, "key-orders")
    assert found["body"].keys() == {"sealed", "recipient"}
    return found


def by_age(found: dict[str, Any]) -> str:
    """The identities, as another implementation of age opens them with the identities of the root."""
    lines = (manifest.V1 / "keys/age-x25519.txt").read_text().splitlines()
    roots = [pyrage.x25519.Identity.from_str(line) for line in lines if line.startswith("AGE-SECRET-KEY-1")]
    return bytes(pyrage.decrypt(base64.b64decode(found["body"]["sealed"]), roots)).decode()


def recipient(block: str) -> str:
    identity = pyrage.x25519.Identity.from_str(block.splitlines()[-1])
    return str(identity.to_public())


def test_document_is_of_version_1() -> None:
    found = checked(STORED)

    assert (found["generation"], len(found["earlier"])) == (2, 1)
    assert by_age(found) == HELD["first"] + HELD["second"]
    assert found["body"]["recipient"] == recipient(HELD["first"])  # the second is not in use yet


def test_document_is_read_and_changed(tmp_path: Path) -> None:
    path = tmp_path / "document"
    path.write_bytes(STORED)
    (tmp_path / "key-orders.anchor").write_text(json.dumps({"generation": 1, "write_id": "older"}))
    key = make_key_document.document_at(path)

    found = key.read()
    assert found.identities.decode() == HELD["first"] + HELD["second"]
    assert found.recipient == recipient(HELD["first"]).encode()

    key.use(recipient(HELD["second"]))
    written = checked(path.read_bytes())
    assert (written["generation"], written["earlier"][0]) == (3, checked(STORED)["write_id"])
    assert by_age(written) == HELD["first"] + HELD["second"]
    assert written["body"]["recipient"] == recipient(HELD["second"])
