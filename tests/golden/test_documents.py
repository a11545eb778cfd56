"""A signed document with tokens: opened by the code of the tree, and checked by a second implementation."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any, Final

import pytest

from kms_core.auth import tokens
from kms_core.auth.tokens import DocumentTokens, TokenRequest
from kms_core.signed_documents import LocalCopy
from kms_protocol.errors import Unauthenticated
from support.golden import make_document, reference
from support.golden.jobs import SECRET

HELD: Final[dict[str, Any]] = json.loads(make_document.PATH.read_text())
STORED: Final[bytes] = HELD["stored"].encode()


def checked(stored: bytes) -> dict[str, Any]:
    """The document, if its MAC is the one that version 1 describes."""
    line, mac, rest = stored.split(b"\n")
    key = reference.derived(SECRET, b"kms-service/document/1/tokens")
    assert (mac, rest) == (reference.hmac_sha256(key, line).hex().encode(), b"")
    found: dict[str, Any] = json.loads(line)
    assert found.keys() == {"version", "name", "generation", "write_id", "earlier", "written_at", "body"}
    assert (found["version"], found["name"]) == (1, "tokens")
    assert found["body"].keys() == {"version", "tokens", "revoked"}
    return found


def test_document_is_of_version_1() -> None:
    found = checked(STORED)

    assert (found["generation"], len(found["earlier"])) == (5, 4)
    assert {token["name"] for token in found["body"]["tokens"]} == {"far", "forever"}
    digests = {token["name"]: token["digests"][0]["sha256"] for token in found["body"]["tokens"]}
    for name, digest in digests.items():
        assert base64.b64decode(digest) == hashlib.sha256(HELD["texts"][name].encode()).digest()
    (revoked,) = found["body"]["revoked"]
    assert revoked["id"] == HELD["texts"]["revoked"].split("_")[1]
    assert revoked["until"].startswith("2099-12-31") or revoked["until"].startswith("2100-01-01")


def test_document_is_read(tmp_path: Path) -> None:
    path = tmp_path / "document"
    path.write_bytes(STORED)
    (tmp_path / "tokens.anchor").write_text(json.dumps({"generation": 4, "write_id": "older"}))
    copy = LocalCopy(make_document.document_at(path), tmp_path, 60)
    copy.reread()
    known = DocumentTokens(copy)

    for name in ("far", "forever"):
        found = known.authenticate(HELD["texts"][name])
        assert (found.name, found.tenant, found.scopes) == (name, "acme", ("encrypt key=a-*", "status"))
    with pytest.raises(Unauthenticated):
        known.authenticate(HELD["texts"]["revoked"])


def test_new_document_is_of_version_1(tmp_path: Path) -> None:
    path = tmp_path / "document"
    path.write_bytes(STORED)
    (tmp_path / "tokens.anchor").write_text(json.dumps({"generation": 4, "write_id": "older"}))
    document = make_document.document_at(path)
    tokens.create(document, TokenRequest("new", "acme", ("status",), None))

    found = checked(path.read_bytes())
    assert found["generation"] == 6
    assert found["earlier"][0] == checked(STORED)["write_id"]
    assert json.loads((tmp_path / "tokens.anchor").read_text()) == {
        "generation": 6,
        "write_id": found["write_id"],
    }
