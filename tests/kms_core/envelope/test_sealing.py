import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_core.age import header, mlkem768x25519, stream, x25519
from kms_core.age.header import FILE_LIMITS, Stanza
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed, NotACiphertext
from support.age_kms import (
    NO_CONTEXT,
    ROW_7,
    NativeIdentity,
    age_backend,
    file_key_of,
    head_of,
    resigned,
    stanza_of,
    types_of,
    with_stanzas,
)

CHUNK: Final = 64 * 1024
MiB: Final = 1024 * 1024
PROPERTY: Final = settings(max_examples=200, deadline=None)
OWN: Final = ["X25519", "kms-service/context", "kms-service/origin"]
IDENTITY: Final = x25519.X25519Identity.generate()
STRANGER: Final = x25519.X25519Identity.generate()


class OneIdentity:
    """A wrapper over an identity in memory: the least that a backend is."""

    def __init__(self, identity: NativeIdentity) -> None:
        self._identity = identity

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        del key, aad
        return self._identity.recipient.wrap(file_key)

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        del key, aad
        return self._identity.unwrap(stanza)

    def origin_key(self, key: KeyRef) -> bytes | None:
        del key
        return binding.origin_key(self._identity.secret)


WRAPPER: Final = OneIdentity(IDENTITY)
KEY: Final = KeyRef("acme", "payroll", "1", "age")
SEALED: Final = sealing.seal(b"salary", [(WRAPPER, KEY)], ROW_7)
ANOTHER: Final = sealing.seal(b"raises", [(WRAPPER, KEY)], ROW_7)


def unseal(file: bytes, context: Context = ROW_7, key: KeyRef = KEY) -> bytes:
    head = header.parse(file, FILE_LIMITS)
    return sealing.open_(file, head, sealing.unwrap_file(head, WRAPPER, key, context=context).file_key)


def refused(file: bytes) -> bool:
    with pytest.raises((DecryptFailed, NotACiphertext)):
        unseal(file)
    return True


# -- shape -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [NO_CONTEXT, ROW_7], ids=["no context", "context"])
@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK + 1])
def test_what_is_sealed_opens(size: int, context: Context) -> None:
    plaintext = os.urandom(size)
    file = sealing.seal(plaintext, [(WRAPPER, KEY)], context)

    assert types_of(file) == OWN
    assert unseal(file, context) == plaintext
    assert len(file) == head_of(file).payload_offset + stream.sealed_size(size)


@pytest.mark.parametrize(
    "identity", [IDENTITY, mlkem768x25519.HybridIdentity.generate()], ids=["x25519", "hybrid"]
)
@pytest.mark.parametrize(("size", "padded"), [(MiB - 1, False), (MiB, True), (MiB + 1, True)])
def test_from_one_mebibyte_on_the_header_is_rounded(
    identity: NativeIdentity, size: int, *, padded: bool
) -> None:
    file = sealing.seal(bytes(size), [(OneIdentity(identity), KEY)], ROW_7)
    head = head_of(file)

    assert (head.size == 4096) == padded
    assert (binding.PAD in types_of(file)) == padded
    assert sealing.unwrap_file(head, OneIdentity(identity), KEY, context=ROW_7).file_key


@pytest.mark.parametrize("names", [("k", "1"), ("k" * 80, "v" * 80)], ids=["short", "long"])
def test_names_of_any_length_leave_a_rounded_header(names: tuple[str, str]) -> None:
    started = sealing.begin([(WRAPPER, KeyRef("acme", *names, "age"))], ROW_7, padded=True)

    assert len(started.header) == 4096
    assert started.head == started.header + started.nonce


def test_secrets_are_not_shown() -> None:
    started = sealing.begin([(WRAPPER, KEY)], ROW_7)

    assert repr(started.payload_key) not in repr(started)


# -- what is refused ---------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_every_edited_byte_is_refused(place: int, change: int) -> None:
    edited = bytearray(SEALED)
    edited[place] ^= change

    assert refused(bytes(edited))


def test_every_bit_of_a_header_matters() -> None:
    for place in range(head_of(SEALED).payload_offset):
        edited = bytearray(SEALED)
        edited[place] ^= 1 << place % 8

        assert refused(bytes(edited)), place


@PROPERTY
@given(st.integers(0, len(SEALED) - 1))
def test_every_cut_is_refused(size: int) -> None:
    assert refused(SEALED[:size])


@PROPERTY
@given(st.integers(0, len(SEALED)), st.binary(min_size=1, max_size=20))
def test_every_inserted_byte_is_refused(place: int, more: bytes) -> None:
    assert refused(SEALED[:place] + more + SEALED[place:])


@PROPERTY
@given(st.integers(0, len(SEALED) - 1), st.integers(1, 40))
def test_every_removed_byte_is_refused(place: int, count: int) -> None:
    assert refused(SEALED[:place] + SEALED[place + count :])


def test_the_payload_of_another_file_is_refused() -> None:
    start = head_of(SEALED).payload_offset

    assert refused(SEALED[:start] + ANOTHER[start:])
    assert refused(SEALED[: start - 16] + ANOTHER[start - 16 :])


# -- stanzas rearranged by somebody without the file key ----------------------------------------------

STANZAS: Final = head_of(SEALED).stanzas
EXTRA: Final = [
    Stanza(("kms-service/unknown", "1"), b""),
    Stanza(("kms-service/pad", "0"), b""),
    Stanza(("kms-service/wrap", "transit", "payroll", "1"), bytes(48)),
    Stanza(("x-grease", "1"), b"grease"),
    STRANGER.recipient.wrap(bytes(16)),
    *STANZAS,
]


@PROPERTY
@given(st.lists(st.sampled_from(EXTRA), min_size=1, max_size=6))
def test_only_the_stanzas_that_were_sealed_open(stanzas: list[Stanza]) -> None:
    if tuple(stanzas) == STANZAS:
        assert unseal(with_stanzas(SEALED, stanzas)) == b"salary"
    else:
        assert refused(with_stanzas(SEALED, stanzas))


# -- and by somebody with it -------------------------------------------------------------------------


def test_another_recipient_may_be_added_by_who_can_read_the_file() -> None:
    file_key = file_key_of(SEALED, IDENTITY)
    shared = resigned(SEALED, [STRANGER.recipient.wrap(file_key), *STANZAS], file_key)

    assert unseal(shared) == b"salary"


@pytest.mark.parametrize(
    "stanzas",
    [
        STANZAS[:2],
        [*STANZAS, Stanza(("kms-service/unknown", "1"), b"")],
        [*STANZAS, STANZAS[1]],
        [*STANZAS, STANZAS[2]],
        [STANZAS[0], STANZAS[2]],
        [STANZAS[0], STANZAS[1], Stanza(STANZAS[2].args, bytes(32))],
        [STANZAS[0], STANZAS[1], Stanza(STANZAS[2].args, os.urandom(32))],
        [STANZAS[0], STANZAS[1], stanza_of(ANOTHER, binding.ORIGIN)],
        [STANZAS[0], stanza_of(ANOTHER, binding.CONTEXT), STANZAS[2]],
        [Stanza(("X25519", "short"), bytes(31)), *STANZAS],
        STANZAS[1:],
    ],
    ids=[
        "no origin", "unknown", "context twice", "origin twice", "no context", "blank origin",
        "random origin", "lifted origin", "lifted context", "malformed stanza", "no wrap",
    ],
)  # fmt: skip
def test_what_is_signed_anew_still_has_to_be_right(stanzas: Sequence[Stanza]) -> None:
    assert refused(resigned(SEALED, stanzas, file_key_of(SEALED, IDENTITY)))


def test_origin_is_not_carried_to_another_nonce() -> None:
    """Who can read a file holds its file key, and could seal more under it if the nonce were free."""
    file_key, nonce = file_key_of(SEALED, IDENTITY), os.urandom(16)
    payload = stream.seal(stream.payload_key(file_key, nonce), b"raise!")

    assert refused(SEALED[: head_of(SEALED).size] + nonce + payload)


def test_a_foreign_file_is_not_opened_as_one_of_ours() -> None:
    file_key = file_key_of(SEALED, IDENTITY)

    assert refused(resigned(SEALED, STANZAS[:1], file_key))


class Unproven(OneIdentity):
    """A wrapper of native stanzas that has no MAC key of an origin stanza."""

    def origin_key(self, key: KeyRef) -> None:
        del key


class Remote(Unproven):
    """A wrapper whose wrap authenticates the AAD by itself, so that its files carry no origin."""

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        return binding.age_wrap(self._identity.secret, file_key, key, aad)

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        return binding.open_age_wrap(self._identity.secret, stanza, key, aad)


def test_origin_is_for_wrappers_that_prove_it() -> None:
    remote, unproven = Remote(IDENTITY), Unproven(IDENTITY)
    file = sealing.seal(b"salary", [(remote, KEY)], ROW_7)
    head = head_of(file)
    native = head_of(sealing.seal(b"salary", [(unproven, KEY)], ROW_7))

    assert types_of(file) == [binding.WRAP, binding.CONTEXT]
    assert (
        sealing.open_(file, head, sealing.unwrap_file(head, remote, KEY, context=ROW_7).file_key) == b"salary"
    )
    with pytest.raises(DecryptFailed):
        sealing.unwrap_file(native, unproven, KEY, context=ROW_7)


# -- foreign files -----------------------------------------------------------------------------------


def foreign(*recipients: x25519.X25519Recipient) -> bytes:
    file_key, nonce = os.urandom(16), os.urandom(16)
    head = header.render([recipient.wrap(file_key) for recipient in recipients], file_key)
    return head + nonce + stream.seal(stream.payload_key(file_key, nonce), b"theirs")


def test_a_foreign_file_opens_by_any_version_that_it_is_for(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, STRANGER, IDENTITY)
    keys = [KeyRef("acme", "k", version.version, "age") for version in backend.versions()]
    for recipient, key in zip([STRANGER.recipient, IDENTITY.recipient], keys, strict=True):
        file = foreign(x25519.X25519Identity.generate().recipient, recipient)
        file_key, found = sealing.foreign_file_key(head_of(file), backend, keys)

        assert found == key
        assert sealing.open_(file, head_of(file), file_key) == b"theirs"
    with pytest.raises(DecryptFailed):
        sealing.foreign_file_key(head_of(foreign(x25519.X25519Identity.generate().recipient)), backend, keys)


def test_a_foreign_file_with_a_wrong_mac_does_not_open() -> None:
    file = with_stanzas(foreign(IDENTITY.recipient), [IDENTITY.recipient.wrap(bytes(16))])

    with pytest.raises(DecryptFailed):
        sealing.foreign_file_key(head_of(file), WRAPPER, [KEY])


PASSPHRASE: Final = Stanza(("scrypt", "bBjlhJVYZeE4aqUdmtRHfw", "18"), bytes(32))


def test_a_passphrase_stanza_closes_a_file_to_every_other_recipient() -> None:
    """The specification: such a stanza stands alone. A sender that adds one may open what others sealed."""
    file_key, nonce = os.urandom(16), os.urandom(16)
    stanzas = [IDENTITY.recipient.wrap(file_key), PASSPHRASE]
    sealed = stream.seal(stream.payload_key(file_key, nonce), b"theirs")
    alone = header.render(stanzas[:1], file_key) + nonce + sealed
    both = header.render(stanzas, file_key) + nonce + sealed

    assert sealing.foreign_file_key(head_of(alone), WRAPPER, [KEY])[0] == file_key
    with pytest.raises(DecryptFailed):
        sealing.foreign_file_key(head_of(both), WRAPPER, [KEY])


class Guesses(OneIdentity):
    """A wrapper that would open a passphrase file."""

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        del stanza, key, aad
        return bytes(16)


def test_a_passphrase_is_never_tried_for_a_caller() -> None:
    """It takes memory and time that the sender of the file chooses."""
    file = header.render([PASSPHRASE], bytes(16)) + os.urandom(16)

    with pytest.raises(DecryptFailed):
        sealing.foreign_file_key(head_of(file), Guesses(IDENTITY), [KEY])
