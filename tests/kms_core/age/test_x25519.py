"""X25519 recipients and identities; test_vectors.py holds what their stanzas open to and how they fail."""

import pyrage
import pytest

from kms_core.age import bech32, mlkem768x25519
from kms_core.age.header import Stanza, b64encode
from kms_core.age.x25519 import X25519Identity, X25519Recipient
from kms_protocol.errors import DecryptFailed

SHARE = b64encode(bytes(range(32))).decode()


@pytest.fixture(scope="module")
def identity() -> X25519Identity:
    return X25519Identity.generate()


# -- keys as text ------------------------------------------------------------------------------------


def test_the_recipient_is_what_another_implementation_derives(identity: X25519Identity) -> None:
    theirs = pyrage.x25519.Identity.from_str(identity.export())

    assert str(theirs.to_public()) == str(identity.recipient)


def test_an_identity_is_never_shown(identity: X25519Identity) -> None:
    for text in (repr(identity), str(identity), f"{identity}"):
        assert identity.export() not in text
        assert repr(identity.secret) not in text
        assert str(identity.recipient) in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "age1",
        "AGE-SECRET-KEY-1",
        "hunter2",
        bech32.encode("AGE-SECRET-KEY-", bytes(31)),
        bech32.encode("AGE-SECRET-KEY-", bytes(33)),
        bech32.encode("AGE-SECRET-KEY-PQ-", bytes(32)),
        bech32.encode("age", bytes(32)),
    ],
    ids=["empty", "recipient prefix", "prefix", "text", "short", "long", "hybrid", "recipient"],
)
def test_what_is_no_identity_is_refused_and_not_quoted(text: str) -> None:
    with pytest.raises(ValueError, match=r"key|identity") as caught:
        X25519Identity.parse(text)

    assert len(text) < 20 or text not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "age1",
        bech32.encode("age", bytes(31)),
        bech32.encode("AGE", bytes(32)),
        bech32.encode("age1pq", bytes(32)),
        bech32.encode("AGE-SECRET-KEY-", bytes(32)),
        str(mlkem768x25519.HybridIdentity.generate().recipient),
    ],
    ids=["empty", "prefix", "short", "upper case", "other prefix", "identity", "hybrid"],
)
def test_what_is_no_recipient_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"key|recipient"):
        X25519Recipient.parse(text)


# -- stanzas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "size"),
    [((), 32), ((f"{SHARE}=",), 32), ((SHARE,), 0), ((SHARE,), 31), ((SHARE,), 33)],
    ids=["no share", "padded share", "no body", "short body", "long body"],
)
def test_a_malformed_stanza_fails_and_is_not_passed_over(
    identity: X25519Identity, args: tuple[str, ...], size: int
) -> None:
    """Beside the vectors. A body that fits several keys would tell an attacker which of them was tried."""
    with pytest.raises(DecryptFailed) as caught:
        identity.unwrap(Stanza(("X25519", *args), bytes(size)))

    assert caught.type is DecryptFailed
