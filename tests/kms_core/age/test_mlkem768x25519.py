"""Post-quantum recipients and identities; the vectors in test_vectors.py hold their interoperability."""

from dataclasses import replace

import pytest

from kms_core.age import bech32, mlkem768x25519, x25519
from kms_core.age.header import Stanza, b64decode, b64encode
from kms_core.age.mlkem768x25519 import HybridIdentity, HybridRecipient
from kms_core.age.x25519 import NoMatch
from kms_protocol.errors import DecryptFailed

FILE_KEY = bytes(range(16))
IDENTITY = HybridIdentity(bytes(range(32)))
STANZA = IDENTITY.recipient.wrap(FILE_KEY)
TYPE, SHARE = STANZA.args


def test_the_identity_opens_what_its_recipient_wrapped() -> None:
    assert IDENTITY.unwrap(STANZA) == FILE_KEY


def test_two_wraps_share_nothing() -> None:
    again = IDENTITY.recipient.wrap(FILE_KEY)

    assert again.args[1] != SHARE
    assert again.body != STANZA.body


def test_keys_survive_their_text() -> None:
    made = HybridIdentity.generate()

    assert HybridIdentity.parse(made.export()) == made
    assert HybridIdentity.parse(made.export().lower()) == made
    assert HybridRecipient.parse(str(made.recipient)) == made.recipient
    assert made.export().startswith("AGE-SECRET-KEY-PQ-1")
    assert str(made.recipient).startswith("age1pq1")


def test_secrets_do_not_show() -> None:
    assert IDENTITY.export() not in repr(IDENTITY)
    assert IDENTITY.secret.hex() not in repr(IDENTITY)
    assert repr(IDENTITY.secret) not in repr(IDENTITY)


@pytest.mark.parametrize(
    "text",
    [
        x25519.X25519Identity(bytes(32)).export(),
        str(IDENTITY.recipient),
        bech32.encode(mlkem768x25519.IDENTITY_PREFIX, bytes(31)),
        IDENTITY.export()[:-1],
    ],
    ids=["classic", "recipient", "short", "cut"],
)
def test_other_texts_are_no_identity(text: str) -> None:
    with pytest.raises(ValueError, match=r"key|identity") as caught:
        HybridIdentity.parse(text)
    assert text not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        str(x25519.X25519Identity(bytes(32)).recipient),
        IDENTITY.export(),
        bech32.encode(mlkem768x25519.RECIPIENT_PREFIX, bytes(1215)),
    ],
    ids=["classic", "identity", "short"],
)
def test_other_texts_are_no_recipient(text: str) -> None:
    with pytest.raises(ValueError, match="recipient"):
        HybridRecipient.parse(text)


def test_a_recipient_that_is_no_ml_kem_key_is_refused() -> None:
    with pytest.raises(ValueError):  # noqa: PT011 -- the text is OpenSSL's
        HybridRecipient.parse(bech32.encode(mlkem768x25519.RECIPIENT_PREFIX, b"\xff" * 1216))


@pytest.mark.parametrize(
    "stanza",
    [
        HybridIdentity.generate().recipient.wrap(FILE_KEY),
        x25519.X25519Identity.generate().recipient.wrap(FILE_KEY),
        replace(STANZA, body=bytes(32)),
    ],
    ids=["other-identity", "classic", "tag"],
)
def test_stanzas_for_others_do_not_match(stanza: Stanza) -> None:
    with pytest.raises(NoMatch):
        IDENTITY.unwrap(stanza)


def with_share(share: bytes) -> Stanza:
    return replace(STANZA, args=(TYPE, b64encode(share).decode()))


@pytest.mark.parametrize(
    "stanza",
    [
        replace(STANZA, args=(TYPE,)),
        replace(STANZA, args=(TYPE, SHARE, SHARE)),
        replace(STANZA, args=(TYPE, SHARE + "=")),
        replace(STANZA, body=STANZA.body + b"\0"),
        with_share(bytes(32)),
        with_share(b64decode(SHARE.encode())[:1088] + bytes(32)),
    ],
    ids=["short", "long", "padded", "body", "classic-share", "low-order"],
)
def test_malformed_stanzas_fail_the_file(stanza: Stanza) -> None:
    with pytest.raises(DecryptFailed) as caught:
        IDENTITY.unwrap(stanza)
    assert not isinstance(caught.value, NoMatch)
