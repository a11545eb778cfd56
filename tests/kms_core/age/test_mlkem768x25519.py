"""Post-quantum recipients and identities; test_vectors.py holds what stanzas open to and how they fail."""

import pytest
from msgspec.structs import replace

from kms_core.age import bech32, mlkem768x25519
from kms_core.age.mlkem768x25519 import HybridIdentity, HybridRecipient
from kms_core.age.recipients import parse_identity, parse_recipient
from kms_core.age.x25519 import NoMatch, X25519Identity
from kms_protocol.errors import DecryptFailed

FILE_KEY = bytes(range(16))
IDENTITY = HybridIdentity(bytes(range(32)))
STANZA = IDENTITY.recipient.wrap(FILE_KEY)
TYPE, SHARE = STANZA.args


@pytest.mark.parametrize(
    ("kind", "prefixes"),
    [(X25519Identity, ("AGE-SECRET-KEY-1", "age1")), (HybridIdentity, ("AGE-SECRET-KEY-PQ-1", "age1pq1"))],
)
def test_keys_of_both_native_types_survive_their_text(
    kind: type[X25519Identity | HybridIdentity], prefixes: tuple[str, str]
) -> None:
    made = kind.generate()

    assert parse_identity(made.export()) == parse_identity(made.export().lower()) == made
    assert parse_recipient(str(made.recipient)) == made.recipient
    assert made.export().startswith(prefixes[0])
    assert str(made.recipient).startswith(prefixes[1])


def test_secrets_do_not_show() -> None:
    assert IDENTITY.export() not in repr(IDENTITY)
    assert IDENTITY.secret.hex() not in repr(IDENTITY)
    assert repr(IDENTITY.secret) not in repr(IDENTITY)


@pytest.mark.parametrize(
    "text",
    [
        X25519Identity(bytes(32)).export(),
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
        str(X25519Identity(bytes(32)).recipient),
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


@pytest.mark.parametrize("args", [(TYPE,), (TYPE, f"{SHARE}=")], ids=["no share", "padded share"])
def test_malformed_stanzas_fail_the_file(args: tuple[str, ...]) -> None:
    with pytest.raises(DecryptFailed) as caught:
        IDENTITY.unwrap(replace(STANZA, args=args))
    assert not isinstance(caught.value, NoMatch)
