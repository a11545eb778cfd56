"""Signed documents, with tokens or a sealed Age key: opened by the tree, checked by other implementations."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any, Final

import pyrage
import pytest

from kms_core.auth import tokens
from kms_core.auth.tokens import DocumentTokens, TokenRequest
from kms_core.documents.local_copy import LocalCopy
from kms_protocol.errors import Unauthenticated
from support.golden import golden_set, key_document, reference, tokens_document
from support.golden.jobs import SECRET

HELD: Final[dict[str, Any]] = json.loads(tokens_document.PATH.read_text())
KEY_HELD: Final[dict[str, Any]] = json.loads(key_document.PATH.read_text())
INFOS: Final = {"tokens": b"kms-service/document/1/tokens", "key-orders": b"kms-service/document/1/keys"}
BODIES: Final = {"tokens": {"version", "tokens", "revoked"}, "key-orders": {"sealed", "recipient"}}


def checked(stored: bytes, name: str = "tokens") -> dict[str, Any]:
    """The document, if its MAC and its shape are those that version 1 describes."""
    line, mac, rest = stored.split(b"\n")
    key = reference.derived(SECRET, INFOS[name])
    assert (mac, rest) == (reference.hmac_sha256(key, line).hex().encode(), b"")
    found: dict[str, Any] = json.loads(line)
    assert found.keys() == {"version", "name", "generation", "write_id", "earlier", "written_at", "body"}
    assert (found["version"], found["name"]) == (1, name)
    assert found["body"].keys() == BODIES[name]
    return found


def put(folder: Path, held: dict[str, Any], name: str, seen: int) -> Path:
    """The stored document, in a folder whose anchor saw an older generation."""
    (folder / "document").write_text(held["stored"])
    (folder / f"{name}.anchor").write_text(json.dumps({"generation": seen, "write_id": "older"}))
    return folder / "document"


def test_document_is_of_version_1() -> None:
    found = checked(HELD["stored"].encode())

    assert (found["generation"], len(found["earlier"])) == (5, 4)
    assert {token["name"] for token in found["body"]["tokens"]} == {"far", "forever"}
    digests = {token["name"]: token["digests"][0]["sha256"] for token in found["body"]["tokens"]}
    for name, digest in digests.items():
        assert base64.b64decode(digest) == hashlib.sha256(HELD["texts"][name].encode()).digest()
    (revoked,) = found["body"]["revoked"]
    assert revoked["id"] == HELD["texts"]["revoked"].split("_")[1]
    assert revoked["until"].startswith("2099-12-31") or revoked["until"].startswith("2100-01-01")


def test_document_is_read(tmp_path: Path) -> None:
    copy = LocalCopy(tokens_document.document_at(put(tmp_path, HELD, "tokens", 4)), tmp_path, 60)
    copy.reread()
    known = DocumentTokens(copy)

    for name in ("far", "forever"):
        found = known.authenticate(HELD["texts"][name])
        assert (found.name, found.tenant, found.scopes) == (name, "acme", ("encrypt key=a-*", "status"))
    with pytest.raises(Unauthenticated):
        known.authenticate(HELD["texts"]["revoked"])


def test_new_document_is_of_version_1(tmp_path: Path) -> None:
    path = put(tmp_path, HELD, "tokens", 4)
    document = tokens_document.document_at(path)
    tokens.create(document, TokenRequest("new", "acme", ("status",), None))

    found = checked(path.read_bytes())
    assert found["generation"] == 6
    assert found["earlier"][0] == checked(HELD["stored"].encode())["write_id"]
    assert json.loads((tmp_path / "tokens.anchor").read_text()) == {
        "generation": 6,
        "write_id": found["write_id"],
    }


# -- a sealed Age key --------------------------------------------------------------------------------


def by_age(found: dict[str, Any]) -> str:
    """The identities, as another implementation of age opens them with the identities of the root."""
    return golden_set.opened_by_pyrage(base64.b64decode(found["body"]["sealed"])).decode()


def recipient(block: str) -> str:
    identity = pyrage.x25519.Identity.from_str(block.splitlines()[-1])
    return str(identity.to_public())


def test_document_of_a_key_is_of_version_1() -> None:
    found = checked(KEY_HELD["stored"].encode(), "key-orders")

    assert (found["generation"], len(found["earlier"])) == (2, 1)
    assert by_age(found) == KEY_HELD["first"] + KEY_HELD["second"]
    assert found["body"]["recipient"] == recipient(KEY_HELD["first"])  # the second is not in use yet


def test_document_of_a_key_is_read_and_changed(tmp_path: Path) -> None:
    path = put(tmp_path, KEY_HELD, "key-orders", 1)
    key = key_document.document_at(path)

    found = key.read()
    assert found.identities.decode() == KEY_HELD["first"] + KEY_HELD["second"]
    assert found.recipient == recipient(KEY_HELD["first"]).encode()

    key.use(recipient(KEY_HELD["second"]))
    written = checked(path.read_bytes(), "key-orders")
    before = checked(KEY_HELD["stored"].encode(), "key-orders")
    assert (written["generation"], written["earlier"][0]) == (3, before["write_id"])
    assert by_age(written) == KEY_HELD["first"] + KEY_HELD["second"]
    assert written["body"]["recipient"] == recipient(KEY_HELD["second"])
