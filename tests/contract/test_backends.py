"""The laws that every backend keeps, whatever holds its keys. A new law goes here first."""

import os
from collections.abc import Callable
from typing import Final

import pytest
from msgspec.structs import replace

from kms_core.age import header
from kms_core.age.header import FILE_KEY_BYTES, Stanza
from kms_core.age.x25519 import NoMatch
from kms_core.backends import SCHEMES, Backend
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed
from support.age_kms import NO_CONTEXT, ROW_7, head_of, resigned
from support.contract.rigs import Rig
from support.waiting import until

CHUNK: Final = 64 * 1024
FILE_KEY: Final = bytes(range(FILE_KEY_BYTES))
AAD: Final = b"names and a context"


def ref(backend: Backend) -> KeyRef:
    """The version of a key that seals now."""
    return KeyRef("acme", "payroll", backend.versions()[-1].version, backend.name)


def seal(backend: Backend, plaintext: bytes, context: Context = ROW_7, key: KeyRef | None = None) -> bytes:
    return sealing.seal(plaintext, [(backend, key or ref(backend))], context)


def unseal(backend: Backend, file: bytes, context: Context = ROW_7, key: KeyRef | None = None) -> bytes:
    head = head_of(file)
    return sealing.open_(
        file, head, sealing.unwrap_file(head, backend, key or ref(backend), context=context).file_key
    )


# -- round trips -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_what_was_sealed_opens(backend: Backend, size: int) -> None:
    plaintext = os.urandom(size)

    assert unseal(backend, seal(backend, plaintext)) == plaintext


def test_a_file_key_comes_back(backend: Backend) -> None:
    key = ref(backend)

    assert backend.unwrap(backend.wrap(FILE_KEY, key, AAD), key, AAD) == FILE_KEY


def test_two_wraps_of_one_file_key_differ(backend: Backend) -> None:
    key = ref(backend)

    assert backend.wrap(FILE_KEY, key, AAD).body != backend.wrap(FILE_KEY, key, AAD).body


def test_two_seals_of_one_plaintext_share_nothing(backend: Backend) -> None:
    first, second = head_of(seal(backend, b"salary")), head_of(seal(backend, b"salary"))

    assert first.nonce != second.nonce
    assert {stanza.body for stanza in first.stanzas}.isdisjoint(stanza.body for stanza in second.stanzas)


def test_names_of_a_backend_fit_a_stanza(backend: Backend) -> None:
    assert backend.name in SCHEMES
    assert binding.read(head_of(seal(backend, b"")).stanzas) is not None


# -- what is bound -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "wrong"),
    [(ROW_7, {}), (ROW_7, {"row": "8"}), (ROW_7, {"row": "7", "x": ""}), (NO_CONTEXT, {"row": "7"})],
    ids=["none", "other", "extra", "instead of none"],
)
def test_context_is_bound(backend: Backend, context: Context, wrong: dict[str, str]) -> None:
    sealed = seal(backend, b"salary", context)

    assert unseal(backend, sealed, context) == b"salary"
    with pytest.raises(DecryptFailed):
        unseal(backend, sealed, Context.parse(wrong))


@pytest.mark.parametrize("wrong", [{"tenant": "evil"}, {"key_id": "other"}, {"version": "0"}], ids=str)
def test_names_are_bound(backend: Backend, wrong: dict[str, str]) -> None:
    sealed = seal(backend, b"salary")

    with pytest.raises(DecryptFailed):
        unseal(backend, sealed, key=replace(ref(backend), **wrong))


@pytest.mark.parametrize(
    ("names", "context"),
    [
        ({"tenant": "evil"}, ROW_7),
        ({"key_id": "other"}, ROW_7),
        ({}, Context.parse("row=8")),
        ({}, NO_CONTEXT),
    ],
    ids=["tenant", "key id", "other context", "no context"],
)
def test_who_holds_the_file_key_cannot_bind_anew(
    backend: Backend, names: dict[str, str], context: Context
) -> None:
    """Context tag and header MAC are within reach of every reader of a file; AAD or origin is not."""
    sealed = seal(backend, b"salary")
    head, target = head_of(sealed), replace(ref(backend), **names)
    file_key = sealing.unwrap_file(head, backend, ref(backend), context=ROW_7).file_key
    bound = binding.context_stanza(file_key, target, context)
    forged = [bound if stanza.type == binding.CONTEXT else stanza for stanza in head.stanzas]

    with pytest.raises(DecryptFailed):
        unseal(backend, resigned(sealed, forged, file_key), context, target)


def test_a_file_key_that_is_handed_over_is_bound_as_a_file_is(backend: Backend) -> None:
    key = ref(backend)
    bundle = sealing.wrap_for_plugin(FILE_KEY, [(backend, key)], ROW_7)
    stanzas = header.unbundled([bundle], header.FILE_LIMITS)

    found = sealing.unwrap_for_plugin(stanzas, backend, key, context=ROW_7)

    assert (found.file_key, found.is_proven) == (FILE_KEY, True)
    with pytest.raises(DecryptFailed):
        sealing.unwrap_for_plugin(stanzas, backend, key, context=NO_CONTEXT)
    with pytest.raises(DecryptFailed):
        sealing.unwrap_for_plugin(stanzas, backend, replace(key, tenant="other"), context=ROW_7)


def test_the_aad_is_authenticated_or_origin_is_proven(backend: Backend) -> None:
    key = ref(backend)
    stanza = backend.wrap(FILE_KEY, key, AAD)

    if stanza.type == binding.WRAP:
        with pytest.raises(DecryptFailed):
            backend.unwrap(stanza, key, AAD + b"!")
    else:
        assert backend.origin_key(key) is not None


# -- stanzas of others, and damaged ones -------------------------------------------------------------


@pytest.mark.parametrize(
    "stanza",
    [
        Stanza(("example.com/other", "1"), bytes(32)),
        Stanza(("scrypt", "bBjlhJVYZeE4aqUdmtRHfw", "18"), bytes(32)),
        Stanza(("kms-service/wrap", "elsewhere", "payroll", "1"), bytes(48)),
        Stanza(("piv-p256", "AAAA", "BBBB"), bytes(32)),
    ],
    ids=lambda stanza: stanza.type,
)
def test_a_stanza_of_another_backend_is_no_match(backend: Backend, stanza: Stanza) -> None:
    with pytest.raises(NoMatch):
        backend.unwrap(stanza, ref(backend), AAD)


def test_a_stanza_of_another_key_does_not_open(rig: Rig) -> None:
    stanza = rig.other.wrap(FILE_KEY, ref(rig.other), AAD)

    with pytest.raises(DecryptFailed):
        rig.backend.unwrap(stanza, ref(rig.backend), AAD)


def test_every_byte_of_a_wrap_matters(backend: Backend) -> None:
    key = ref(backend)
    stanza = backend.wrap(FILE_KEY, key, AAD)
    for place in range(len(stanza.body)):
        body = bytearray(stanza.body)
        body[place] ^= 1

        with pytest.raises(DecryptFailed):
            backend.unwrap(Stanza(stanza.args, bytes(body)), key, AAD)


def cut(size: int) -> Callable[[Stanza], Stanza]:
    return lambda wrap: replace(wrap, body=wrap.body[:size])


CHANGES: Final[dict[str, Callable[[Stanza], Stanza]]] = {
    **{f"{size} bytes left": cut(size) for size in (0, 1, 16, 31)},
    "longer": lambda wrap: replace(wrap, body=wrap.body + b"\0"),
    "without its arguments": lambda wrap: replace(wrap, args=wrap.args[:1]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_wrap_of_another_shape_fails(backend: Backend, change: Callable[[Stanza], Stanza]) -> None:
    with pytest.raises(DecryptFailed):
        backend.unwrap(change(backend.wrap(FILE_KEY, ref(backend), AAD)), ref(backend), AAD)


@pytest.mark.parametrize("version", ["0", "ffffffff", "latest"])
def test_a_version_that_is_not_there_does_not_open(backend: Backend, version: str) -> None:
    stanza = backend.wrap(FILE_KEY, ref(backend), AAD)

    with pytest.raises(DecryptFailed):
        backend.unwrap(stanza, replace(ref(backend), version=version), AAD)


# -- rotation ----------------------------------------------------------------------------------------


def test_after_rotation_the_new_version_wraps_and_the_old_one_opens(rig: Rig) -> None:
    old = ref(rig.backend)
    sealed_before = seal(rig.backend, b"before")
    rig.rotate()
    new = ref(rig.backend)
    sealed_after = seal(rig.backend, b"after")

    assert new.version != old.version
    assert [version.version for version in rig.backend.versions()] == [old.version, new.version]
    assert unseal(rig.backend, sealed_before, key=old) == b"before"
    assert unseal(rig.backend, sealed_after, key=new) == b"after"


def test_only_the_version_that_sealed_opens(rig: Rig) -> None:
    old = ref(rig.backend)
    stanza = rig.backend.wrap(FILE_KEY, old, AAD)
    rig.rotate()

    assert rig.backend.unwrap(stanza, old, AAD) == FILE_KEY
    with pytest.raises(DecryptFailed):
        rig.backend.unwrap(stanza, ref(rig.backend), AAD)


def test_a_file_cannot_be_moved_to_another_version(rig: Rig) -> None:
    sealed, old = seal(rig.backend, b"salary"), ref(rig.backend)
    head = head_of(sealed)
    file_key = sealing.unwrap_file(head, rig.backend, old, context=ROW_7).file_key
    rig.rotate()
    new = ref(rig.backend)
    stanzas = [
        rig.backend.wrap(file_key, new, AAD),
        binding.context_stanza(file_key, new, ROW_7),
        *(stanza for stanza in head.stanzas[1:] if stanza.type != binding.CONTEXT),
    ]

    with pytest.raises(DecryptFailed):
        unseal(rig.backend, resigned(sealed, stanzas, file_key), key=new)


# -- health ------------------------------------------------------------------------------------------


def test_a_working_backend_is_healthy(backend: Backend) -> None:
    assert backend.health_check().healthy


def test_a_broken_backend_is_unhealthy_and_says_why(rig: Rig) -> None:
    rig.break_it()
    health = rig.backend.health_check()

    assert not health.healthy
    assert health.detail


def test_a_mended_backend_is_healthy_again(rig: Rig) -> None:
    rig.break_it()
    assert not rig.backend.health_check().healthy
    rig.mend()

    until(lambda: rig.backend.health_check().healthy, "the health check, which calls share for a moment")
