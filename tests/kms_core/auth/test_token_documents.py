"""Tokens in a signed document: tombstones, tokens that are new elsewhere, a document of a later version."""

import hashlib
import json
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from kms_core.auth import tokens
from kms_core.auth.tokens import DocumentTokens, TokenRequest, UnknownToken
from kms_core.documents.anchors import Anchors
from kms_core.documents.document import SignedDocument
from kms_core.documents.local_copy import LocalCopy
from kms_core.documents.storage import FileStorage
from kms_protocol.errors import Unauthenticated, Unavailable
from support.job_stores import connect

HOUR: Final = timedelta(hours=1)


def wish(name: str = "ci", tenant: str = "acme", ttl: timedelta | None = HOUR) -> TokenRequest:
    return TokenRequest(name, tenant, ("encrypt",), ttl)


@pytest.fixture
def document(tmp_path: Path, redis_url: str) -> SignedDocument:
    anchors = Anchors("tokens", tmp_path / "state", connect(redis_url), b"k" * 32)
    return SignedDocument("tokens", FileStorage(tmp_path / "document"), b"k" * 32, anchors)


@pytest.fixture
def copy(document: SignedDocument, tmp_path: Path) -> LocalCopy:
    made = LocalCopy(document, tmp_path / "state", 60)
    made.reread()
    return made


@pytest.fixture
def known(copy: LocalCopy) -> DocumentTokens:
    return DocumentTokens(copy)


def body(document: SignedDocument) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(document.read().body)
    return found


def test_a_new_token_is_found_by_reading_again(document: SignedDocument, known: DocumentTokens) -> None:
    token, text = tokens.create(document, wish())
    with pytest.raises(UnknownToken) as caught:
        known.authenticate(text)

    caught.value.look_up()
    assert known.authenticate(text) == token
    assert known.by_id(token.id) == token
    assert known.tenants() == {"acme"}


def test_a_new_token_of_a_job_is_looked_for(document: SignedDocument, known: DocumentTokens) -> None:
    token, _ = tokens.create(document, wish())

    assert known.by_id(token.id) == token
    assert known.by_id("a" * 10) is None


def test_a_revoked_token_leaves_a_tombstone_until_it_would_have_expired(
    document: SignedDocument, known: DocumentTokens, copy: LocalCopy
) -> None:
    short, _ = tokens.create(document, wish("short", ttl=timedelta(seconds=0)))
    (long, text), (forever, _) = (
        tokens.create(document, wish(n, ttl=t)) for n, t in (("a", HOUR), ("b", None))
    )
    for token in (short, long, forever):
        tokens.revoke(document, token.id)
    tokens.create(document, wish("later"))
    copy.reread()

    found = {one["id"]: one["until"] for one in body(document)["revoked"]}
    assert found.keys() == {long.id, forever.id}
    assert found[forever.id] is None
    assert long.expires_at
    assert datetime.fromisoformat(found[long.id] or "") == long.expires_at
    with pytest.raises(Unauthenticated) as caught:
        known.authenticate(text)
    assert not isinstance(caught.value, UnknownToken), "it was revoked: nothing newer is looked for"
    assert known.by_id(long.id) is None


def test_a_tombstone_outweighs_a_token(
    document: SignedDocument, known: DocumentTokens, copy: LocalCopy
) -> None:
    """As a tool that merges two documents would leave it."""
    token, text = tokens.create(document, wish())
    raw = document.read().body
    tokens.revoke(document, token.id)
    both = json.loads(raw) | {"revoked": json.loads(document.read().body)["revoked"]}
    document.write(document.read(), lambda _: json.dumps(both).encode())
    copy.reread()

    with pytest.raises(Unauthenticated):
        known.authenticate(text)
    assert known.by_id(token.id) is None


def test_a_change_that_others_overtook_gives_the_text_that_is_valid(
    document: SignedDocument, known: DocumentTokens, copy: LocalCopy
) -> None:
    """``record`` is entered between the first reading and the write."""
    entered = []

    class Overtaken:
        def __enter__(self) -> None:
            entered.append(1)
            tokens.create(document, wish("other"))

        def __exit__(self, *_: object) -> None:
            pass

    token, text = tokens.create(document, wish(), lambda _: Overtaken())
    copy.reread()
    assert known.authenticate(text) == token
    assert {one.name for one in tokens.listed(document)} == {"ci", "other"}
    assert entered == [1], "it is recorded once"


def test_tokens_of_a_file_are_taken_over_but_for_revoked_ones(
    document: SignedDocument, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.json"
    kept, _ = tokens.create(path, wish("kept"))
    gone, _ = tokens.create(path, wish("gone"))
    assert tokens.adopt(document, tokens.read(path).tokens) == 2
    tokens.revoke(document, gone.id)

    assert tokens.adopt(document, tokens.read(path).tokens) == 1
    assert tokens.listed(document) == [kept]


def test_a_document_of_a_later_version_is_no_refusal(
    document: SignedDocument, known: DocumentTokens, copy: LocalCopy
) -> None:
    document.write(document.read(), lambda _: b'{"version":2,"tokens":[]}')
    copy.reread()

    with pytest.raises(Unavailable, match="later version"):
        known.authenticate(f"kms_{'a' * 10}_{'A' * 43}")


def test_a_document_holds_digests_only(document: SignedDocument, tmp_path: Path) -> None:
    _, text = tokens.create(document, wish())
    raw = (tmp_path / "document").read_bytes()

    assert text.split("_", 2)[2].encode() not in raw
    assert body(document)["tokens"][0]["digests"] == [
        {"sha256": b64encode(hashlib.sha256(text.encode()).digest()).decode(), "until": None}
    ]
    assert datetime.fromisoformat(json.loads(raw.splitlines()[0])["written_at"]) <= datetime.now(UTC)
