import pyrage
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kms_core.age import bech32, mlkem768x25519
from kms_core.age.header import Stanza, b64encode, hkdf
from kms_core.age.x25519 import NoMatch, X25519Identity, X25519Recipient
from kms_protocol.errors import DecryptFailed

FILE_KEY = bytes(range(16))
LOW_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]


@pytest.fixture(scope="module")
def identity() -> X25519Identity:
    return X25519Identity.generate()


def share_of(data: bytes) -> str:
    return b64encode(data).decode("ascii")


# -- keys as text ------------------------------------------------------------------------------------


def test_keys_go_through_text(identity: X25519Identity) -> None:
    assert X25519Identity.parse(identity.export()) == identity
    assert X25519Identity.parse(identity.export().lower()) == identity
    assert X25519Recipient.parse(str(identity.recipient)) == identity.recipient
    assert str(identity.recipient).startswith("age1")


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


# -- stanzas -----------------------------------------------------------------------------------------


def test_a_file_key_comes_back(identity: X25519Identity) -> None:
    stanza = identity.recipient.wrap(FILE_KEY)

    assert stanza.args[0] == "X25519"
    assert len(stanza.body) == 32
    assert identity.unwrap(stanza) == FILE_KEY


def test_every_wrap_has_a_fresh_share(identity: X25519Identity) -> None:
    stanzas = [identity.recipient.wrap(FILE_KEY) for _ in range(20)]

    assert len({stanza.args for stanza in stanzas}) == len({stanza.body for stanza in stanzas}) == 20


def test_the_stanza_of_somebody_else_is_no_match(identity: X25519Identity) -> None:
    with pytest.raises(NoMatch):
        identity.unwrap(X25519Identity.generate().recipient.wrap(FILE_KEY))


@pytest.mark.parametrize("kind", ["x25519", "X25519 ", "scrypt", "ssh-ed25519", "mlkem768x25519"])
def test_a_stanza_of_another_type_is_no_match(identity: X25519Identity, kind: str) -> None:
    stanza = identity.recipient.wrap(FILE_KEY)

    with pytest.raises(NoMatch):
        identity.unwrap(Stanza((kind, *stanza.args[1:]), stanza.body))


@pytest.mark.parametrize(
    "args",
    [
        (),
        (share_of(bytes(range(32))), "x"),
        (share_of(bytes(31)),),
        (share_of(bytes(33)),),
        ("A" * 42 + "B",),
        ("A" * 42 + "=",),
    ],
    ids=["no share", "two arguments", "31 bytes", "33 bytes", "spare bits", "padded"],
)
def test_a_malformed_stanza_fails_and_is_not_passed_over(
    identity: X25519Identity, args: tuple[str, ...]
) -> None:
    with pytest.raises(DecryptFailed) as caught:
        identity.unwrap(Stanza(("X25519", *args), bytes(32)))

    assert caught.type is DecryptFailed


@pytest.mark.parametrize("size", [0, 16, 31, 33, 48])
def test_a_wrap_of_another_size_is_not_even_tried(identity: X25519Identity, size: int) -> None:
    """A body that fits several keys would tell an attacker which of them was tried."""
    share, wrap_key = share_and_key(identity.recipient)
    body = ChaCha20Poly1305(wrap_key).encrypt(bytes(12), bytes(size - 16), None) if size > 15 else b""

    with pytest.raises(DecryptFailed) as caught:
        identity.unwrap(Stanza(("X25519", share), body))

    assert caught.type is DecryptFailed


def share_and_key(recipient: X25519Recipient) -> tuple[str, bytes]:
    """The age specification, step by step."""
    ephemeral = X25519PrivateKey.generate()
    share = ephemeral.public_key().public_bytes_raw()
    secret = ephemeral.exchange(X25519PublicKey.from_public_bytes(recipient.public))
    wrap_key = hkdf(secret, salt=share + recipient.public, info=b"age-encryption.org/v1/X25519")
    return share_of(share), wrap_key


def test_a_stanza_made_by_the_letter_of_the_specification_opens(identity: X25519Identity) -> None:
    share, wrap_key = share_and_key(identity.recipient)
    body = ChaCha20Poly1305(wrap_key).encrypt(bytes(12), FILE_KEY, None)

    assert identity.unwrap(Stanza(("X25519", share), body)) == FILE_KEY


@pytest.mark.parametrize("share", LOW_ORDER, ids=lambda share: share.hex()[:8])
def test_a_low_order_share_fails(identity: X25519Identity, share: bytes) -> None:
    with pytest.raises(DecryptFailed) as caught:
        identity.unwrap(Stanza(("X25519", share_of(share)), bytes(32)))

    assert caught.type is DecryptFailed


# -- the key derivation beneath ----------------------------------------------------------------------


def test_the_key_derivation_is_hkdf_of_rfc_5869() -> None:
    """Test cases 1 and 3 (no salt, no info), cut to their first 32 bytes: the first block."""
    first = hkdf(
        bytes.fromhex("0b" * 22),
        salt=bytes.fromhex("000102030405060708090a0b0c"),
        info=bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"),
    )
    third = hkdf(bytes.fromhex("0b" * 22), salt=b"", info=b"")

    assert first.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
    assert third.hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
