"""Age keys with ``native=false``: files without a native stanza, sealed under a key of the identity."""

from pathlib import Path
from typing import Final

import pyrage
import pytest

from kms_core.age import header, mlkem768x25519, x25519
from kms_core.age.header import FILE_LIMITS
from kms_core.auth.policy import AllowAll
from kms_core.backends.age import AgeBackend
from kms_core.envelope import binding, sealing
from kms_core.key_selection import SelectionRules
from kms_core.keyring import Key, Keyring
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed
from support.age_kms import (
    ADA,
    NO_CONTEXT,
    ROW_7,
    MemoryTrail,
    NativeIdentity,
    age_backend,
    head_of,
    is_newest,
    kms_over,
    types_of,
)
from support.memory_kms import memory_backend

CLASSIC: Final = x25519.X25519Identity.generate()
HYBRID: Final = mlkem768x25519.HybridIdentity.generate()
WRAPPED: Final = [binding.WRAP, binding.CONTEXT, binding.ORIGIN]


def wrapping(directory: Path, *identities: NativeIdentity) -> AgeBackend:
    return age_backend(directory, *identities, native=False)


@pytest.mark.parametrize("identity", [CLASSIC, HYBRID], ids=["X25519", "mlkem768x25519"])
@pytest.mark.parametrize("context", [NO_CONTEXT, ROW_7], ids=["no context", "context"])
def test_a_file_has_a_wrap_instead_of_a_native_stanza(
    tmp_path: Path, identity: NativeIdentity, context: Context
) -> None:
    backend = wrapping(tmp_path, identity)
    kms = kms_over(backend)
    sealed = kms.encrypt(ADA, b"salary", context)
    wrap = head_of(sealed.ciphertext).stanzas[0]

    assert types_of(sealed.ciphertext) == WRAPPED
    assert wrap.args == (binding.WRAP, "age", "default", backend.versions()[-1].version)
    assert len(wrap.body) == 64
    opened = kms.decrypt(ADA, sealed.ciphertext, context)
    assert (opened.plaintext, opened.origin, opened.key) == (b"salary", "service", sealed.key)


def test_each_kind_of_key_opens_files_of_the_other(tmp_path: Path) -> None:
    spare, native = (kms_over(age_backend(tmp_path, CLASSIC, native=native)) for native in (False, True))

    for made, opens in ((spare, native), (native, spare)):
        sealed = made.encrypt(ADA, b"salary", ROW_7).ciphertext
        assert opens.decrypt(ADA, sealed, ROW_7).plaintext == b"salary"


def test_stock_age_refuses_such_a_file(tmp_path: Path) -> None:
    sealed = kms_over(wrapping(tmp_path, CLASSIC)).encrypt(ADA, b"salary", ROW_7).ciphertext

    with pytest.raises(pyrage.DecryptError, match="No matching keys found"):
        pyrage.decrypt(sealed, [pyrage.x25519.Identity.from_str(CLASSIC.export())])


def test_data_keys_and_reseals_have_the_same_form(tmp_path: Path) -> None:
    kms = kms_over(wrapping(tmp_path, CLASSIC))
    key = kms.generate_data_key(ADA, 32, ROW_7)

    assert types_of(key.ciphertext) == types_of(kms.reseal(ADA, key.ciphertext, ROW_7).ciphertext) == WRAPPED
    assert kms.decrypt(ADA, key.ciphertext, ROW_7).plaintext == key.plaintext


def test_an_age_plugin_gets_the_file_key_with_its_origin(tmp_path: Path) -> None:
    """The wrap authenticates names and context, so nothing depends on the nonce that a plugin lacks."""
    kms = kms_over(wrapping(tmp_path, CLASSIC), accept_foreign=False)
    head = head_of(kms.encrypt(ADA, b"salary", ROW_7).ciphertext)
    found = kms.unwrap(ADA, b"".join(map(header.render_stanza, head.stanzas)), ROW_7)
    made = kms.wrap(ADA, bytes(16), ROW_7)

    head.check_mac(found.file_key)
    assert found.origin == "service"
    assert kms.unwrap(ADA, made.stanza, ROW_7).file_key == bytes(16)
    inner = header.unbundled(header.parse_stanzas(made.stanza, FILE_LIMITS), FILE_LIMITS)
    assert [stanza.type for stanza in inner] == WRAPPED


def test_a_campaign_rewraps_what_is_of_the_other_kind_and_nothing_twice(tmp_path: Path) -> None:
    spare, native = (kms_over(age_backend(tmp_path, CLASSIC, native=native)) for native in (False, True))
    old = native.encrypt(ADA, b"salary", ROW_7).ciphertext
    new = spare.rewrap(ADA, old, ROW_7).ciphertext

    assert (is_newest(spare, old), is_newest(spare, new)) == (False, True)
    assert (is_newest(native, old), is_newest(native, new)) == (True, False)


def test_of_several_backends_each_opens_the_file(tmp_path: Path) -> None:
    age, (remote, _) = wrapping(tmp_path, CLASSIC), memory_backend()
    several = Key("default", remote, others=(age,))
    kms = Kms(Keyring({"default": several}, several), AllowAll(), MemoryTrail(), SelectionRules())
    sealed = kms.encrypt(ADA, b"salary", ROW_7).ciphertext

    assert types_of(sealed) == [binding.WRAP, *WRAPPED]
    assert is_newest(kms, sealed)
    for backend in (age, remote):
        assert kms_over(backend).decrypt(ADA, sealed, ROW_7).plaintext == b"salary"


def test_a_wrap_with_a_wrapped_key_is_refused(tmp_path: Path) -> None:
    """Age keys share none: a recipient is public, so anybody could make such a key."""
    backend = wrapping(tmp_path, CLASSIC)
    key = kms_over(backend).keyring.default.ref("acme")
    ours = backend.wrap(bytes(16), key, b"aad")

    with pytest.raises(DecryptFailed):
        backend.unwrap(binding.wrap_stanza(key, ours.body, b"job key"), key, b"aad")
    assert backend.unwrap(ours, key, b"aad") == bytes(16)


def test_no_two_seals_are_under_one_key(tmp_path: Path) -> None:
    backend = wrapping(tmp_path, CLASSIC)
    key = kms_over(backend).keyring.default.ref("acme")
    bodies = [backend.wrap(bytes(16), key, b"aad").body for _ in range(100)]

    assert len({body[:32] for body in bodies}) == len({body[32:] for body in bodies}) == 100


def test_break_glass_needs_the_names_but_no_context(tmp_path: Path) -> None:
    backend = wrapping(tmp_path, CLASSIC)
    kms = kms_over(backend)
    head = head_of(kms.encrypt(ADA, b"salary", ROW_7).ciphertext)
    bound, key = binding.read(head.stanzas), kms.keyring.default.ref("acme")
    assert bound is not None

    head.check_mac(sealing.unwrap_unchecked(head, backend, key, bound))
    with pytest.raises(DecryptFailed):
        sealing.unwrap_unchecked(head, backend, kms.keyring.default.ref("rival"), bound)
