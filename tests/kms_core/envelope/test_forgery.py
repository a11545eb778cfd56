"""What somebody can do who holds a recipient, a file or a file key, and no identity: nothing that opens."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Final

import pyrage
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kms_core.age import header, mlkem768x25519, stream, x25519
from kms_core.age.armor import VERSION_LINE
from kms_core.age.header import Stanza
from kms_core.auth.policy import AllowAll
from kms_core.backends import Backend
from kms_core.backends.age import AgeBackend
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef, version_of
from kms_core.key_selection import SelectionRules
from kms_core.keyring import Key, Keyring
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed, ForeignRefused, KmsError, NotACiphertext, UnknownKey
from support.age_kms import (
    ADA,
    NO_CONTEXT,
    ROW_7,
    MemoryTrail,
    NativeIdentity,
    age_backend,
    file_key_of,
    forged,
    head_of,
    kms_over,
    resigned,
    stanza_of,
    write_pair,
)
from support.memory_kms import memory_backend

IDENTITY: Final = x25519.X25519Identity.generate()
OTHER: Final = x25519.X25519Identity.generate()
HYBRID: Final = mlkem768x25519.HybridIdentity.generate()
PROPERTY: Final = settings(max_examples=200, deadline=None)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> AgeBackend:
    return age_backend(tmp_path_factory.mktemp("age"), IDENTITY)


@pytest.fixture(scope="module")
def kms(backend: AgeBackend, tmp_path_factory: pytest.TempPathFactory) -> Kms:
    return kms_over(backend, {"payroll": age_backend(tmp_path_factory.mktemp("payroll"), OTHER)})


@pytest.fixture(scope="module")
def sealed(kms: Kms) -> bytes:
    return kms.encrypt(ADA, b"salary", ROW_7).ciphertext


def foreign(plaintext: bytes = b"theirs", *recipients: x25519.X25519Recipient) -> bytes:
    """A file of another implementation."""
    named = [pyrage.x25519.Recipient.from_str(str(one)) for one in (*recipients, IDENTITY.recipient)]
    file: bytes = pyrage.encrypt(plaintext, named)
    return file


# -- forged files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [NO_CONTEXT, ROW_7], ids=["no context", "context"])
@pytest.mark.parametrize("origin", ["none", "random", "blank", "of another identity", "lifted"])
def test_a_recipient_is_not_enough_to_make_a_file(
    kms: Kms, backend: AgeBackend, sealed: bytes, context: Context, origin: str
) -> None:
    key = kms.keyring.default.ref("acme")
    by_another = binding.origin_tag(
        binding.origin_key(OTHER.secret), os.urandom(16), os.urandom(16), key=key, context=context
    )
    bodies = {"random": os.urandom(32), "blank": bytes(32), "of another identity": by_another}
    stanzas = {kind: [Stanza((binding.ORIGIN, "1"), body)] for kind, body in bodies.items()}
    stanzas |= {"none": [], "lifted": [stanza_of(sealed, binding.ORIGIN)]}
    file = forged(IDENTITY, key, context, *stanzas[origin])

    assert backend.unwrap(head_of(file).stanzas[0], key, b"")
    with pytest.raises(DecryptFailed):
        kms.decrypt(ADA, file, context)
    with pytest.raises(DecryptFailed):
        kms.rewrap(ADA, file, context)


@pytest.mark.parametrize("origin", ["none", "lifted"])
@pytest.mark.parametrize(
    "secret", ["recipient", "ephemeral exchange", "of another identity", "random", "lifted"]
)
def test_a_recipient_is_not_enough_to_make_a_wrap(kms: Kms, tmp_path: Path, secret: str, origin: str) -> None:
    """``native=false``: all that can be derived from the public recipient opens nothing."""
    genuine = kms_over(AgeBackend(write_pair(tmp_path, IDENTITY), native=False))
    lifted = genuine.encrypt(ADA, b"salary", ROW_7).ciphertext
    key, file_key = kms.keyring.default.ref("acme"), os.urandom(16)
    bound = binding.context_stanza(file_key, key, ROW_7)
    aad, public = binding.wrap_aad(key, bound), IDENTITY.recipient.public
    exchanged = X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    secrets = {
        "recipient": public,
        "ephemeral exchange": exchanged,
        "of another identity": OTHER.secret,
        "random": os.urandom(32),
    }
    if secret == "lifted":
        wrap = stanza_of(lifted, binding.WRAP)
    else:
        wrap = binding.age_wrap(secrets[secret], file_key, key, aad)
    more = [stanza_of(lifted, binding.ORIGIN)] if origin == "lifted" else []
    nonce = os.urandom(16)
    head = header.render([wrap, bound, *more], file_key) + nonce
    file = head + stream.seal(stream.payload_key(file_key, nonce), b"forged")

    assert genuine.decrypt(ADA, lifted, ROW_7).plaintext == b"salary"
    for service in (kms, genuine):
        for call in (service.decrypt, service.rewrap, service.reseal):
            with pytest.raises(DecryptFailed):
                call(ADA, file, ROW_7)


def test_a_job_key_for_the_recipient_opens_nothing(kms: Kms) -> None:
    """Anybody can wrap a key for a recipient, so an Age key takes none in place of the identity."""
    key, file_key, job_key = kms.keyring.default.ref("acme"), os.urandom(16), os.urandom(32)
    bound = binding.context_stanza(file_key, key, ROW_7)
    for info in (binding.WRAP_KEY_INFO, binding.AGE_WRAP_INFO):
        body = binding.seal_file_key(job_key, file_key, binding.wrap_aad(key, bound), info)
        wrapped = header.render_stanza(IDENTITY.recipient.wrap(job_key[:16]))
        wrap = binding.wrap_stanza(key, body, wrapped)
        with pytest.raises(DecryptFailed):
            kms.decrypt(ADA, header.render([wrap, bound], file_key) + bytes(16), ROW_7)


# -- stanzas that vouch for the one that opens -------------------------------------------------------

VOUCHERS: Final[Mapping[str, Callable[[KeyRef], Stanza]]] = {
    "none": lambda _: Stanza(("x-grease",), b""),
    "wrap": lambda key: binding.wrap_stanza(key, b"!"),
    "wrap under a shared key": lambda key: binding.wrap_stanza(key, b"!", b"job"),
    "wrap of another key id": lambda key: binding.wrap_stanza(replace(key, key_id="other"), b"!"),
    "wrap of another version": lambda key: binding.wrap_stanza(replace(key, version="0a1b2c3d"), b"!"),
    "wrap of another backend": lambda key: binding.wrap_stanza(replace(key, backend="memory"), b"!"),
}
ORIGINS: Final = {
    "none": [],
    "1": [Stanza((binding.ORIGIN, "1"), bytes(32))],
    "2": [Stanza((binding.ORIGIN, "2"), bytes(32))],
}
EACH_VOUCHER: Final = pytest.mark.parametrize("voucher", VOUCHERS)
EACH_ORIGIN: Final = pytest.mark.parametrize("origin", ORIGINS)
EACH_PLACE: Final = pytest.mark.parametrize("is_first", [True, False], ids=["before it", "after it"])


def key_of(identity: NativeIdentity) -> KeyRef:
    return KeyRef("acme", "default", version_of(identity.recipient), "age")


def vouched_for(identity: NativeIdentity, voucher: str, origin: str, *, is_first: bool) -> bytes:
    """A native stanza and its context, and stanzas beside it: all made from the recipient alone."""
    key = key_of(identity)
    beside, origins = [VOUCHERS[voucher](key)], ORIGINS[origin]
    if is_first:
        return forged(identity, key, ROW_7, *origins, before=beside)
    return forged(identity, key, ROW_7, *beside, *origins)


@pytest.mark.parametrize("identity", [IDENTITY, HYBRID], ids=["x25519", "mlkem768x25519"])
@EACH_VOUCHER
@EACH_ORIGIN
@EACH_PLACE
def test_no_other_stanza_proves_the_origin_of_the_one_that_opens(
    tmp_path: Path, identity: NativeIdentity, voucher: str, origin: str, is_first: bool
) -> None:
    """An age plugin asks without the nonce, which ``origin 1`` binds."""
    backend, key = age_backend(tmp_path, identity), key_of(identity)
    head = head_of(vouched_for(identity, voucher, origin, is_first=is_first))
    unwrap = partial(sealing.unwrap_for_plugin, head.stanzas, backend, key, context=ROW_7)

    if origin == "2" or (is_first and voucher in {"wrap", "wrap under a shared key"}):
        with pytest.raises(DecryptFailed):
            unwrap()
    else:
        found = unwrap()
        head.check_mac(found.file_key)
        assert (found.stanza, found.is_proven) == (head.stanzas[is_first], False)
    with pytest.raises(DecryptFailed):
        unwrap(nonce=head.nonce)


def test_a_wrap_that_opens_proves_its_origin(tmp_path: Path) -> None:
    """Here both stanzas are genuine: the recipient of the key can open the file as well."""
    backend, key = age_backend(tmp_path, IDENTITY, native=False), key_of(IDENTITY)
    started = sealing.begin([(backend, key)], ROW_7, recipients=[IDENTITY.recipient])
    wrap, *bound, native = head_of(started.head).stanzas

    for stanzas, opened in (([wrap, *bound, native], wrap), ([native, wrap, *bound], native)):
        for nonce in (b"", started.nonce):
            found = sealing.unwrap_for_plugin(stanzas, backend, key, context=ROW_7, nonce=nonce)
            assert (found.file_key, found.stanza) == (started.file_key, opened)
            assert found.is_proven == (opened is wrap or bool(nonce))


@pytest.mark.parametrize("peer", ["", "first", "last"], ids=["alone", "after a server", "before a server"])
@EACH_VOUCHER
@EACH_PLACE
def test_no_call_takes_such_a_file_for_one_of_the_service(
    backend: AgeBackend, peer: str, voucher: str, is_first: bool
) -> None:
    remote = memory_backend()[0]
    orders: Mapping[str, Sequence[Backend]] = {
        "": [backend],
        "first": [remote, backend],
        "last": [backend, remote],
    }
    first, *others = orders[peer]
    for origin, accept_foreign in product(ORIGINS, (False, True)):
        key = Key("default", first, accept_foreign, tuple(others))
        kms = Kms(Keyring({"default": key}, key), AllowAll(), MemoryTrail(), SelectionRules())
        file = vouched_for(IDENTITY, voucher, origin, is_first=is_first)
        head = head_of(file)
        for call in (kms.decrypt, kms.rewrap, kms.reseal):
            with pytest.raises(DecryptFailed):
                call(ADA, file, ROW_7)
        for stanzas in (head.stanzas, [header.bundle(head.stanzas)]):
            text = b"".join(map(header.render_stanza, stanzas))
            with pytest.raises(DecryptFailed):
                kms.unwrap(ADA, text, ROW_7, nonce=head.nonce)
            with suppress(DecryptFailed, ForeignRefused):
                assert (kms.unwrap(ADA, text, ROW_7).origin, accept_foreign) == ("foreign", True)


# -- files without our stanzas -----------------------------------------------------------------------


def test_a_file_without_its_stanzas_is_foreign_and_has_no_context(kms: Kms, sealed: bytes) -> None:
    """With the file key our stanzas come off; what is left then has no origin, and the answer says so."""
    file_key = file_key_of(sealed, IDENTITY)
    bare = resigned(sealed, head_of(sealed).stanzas[:1], file_key)

    assert kms.decrypt(ADA, bare, NO_CONTEXT).origin == "foreign"
    with pytest.raises(DecryptFailed):
        kms.decrypt(ADA, bare, ROW_7)


# -- foreign files -----------------------------------------------------------------------------------


def test_a_foreign_file_opens_by_the_default_key_or_a_named_one_and_says_so(kms: Kms) -> None:
    for file, key_id in ((foreign(), None), (foreign(b"theirs", OTHER.recipient), "payroll")):
        opened = kms.decrypt(ADA, file, NO_CONTEXT, key_id=key_id)

        found = opened.plaintext, opened.origin, opened.key.key_id
        assert found == (b"theirs", "foreign", key_id or "default")


@pytest.mark.parametrize(
    ("context", "key_id"), [(ROW_7, None), (NO_CONTEXT, "payroll")], ids=["a context", "another key"]
)
def test_a_foreign_file_opens_by_nothing_else(kms: Kms, context: Context, key_id: str | None) -> None:
    with pytest.raises(DecryptFailed):
        kms.decrypt(ADA, foreign(), context, key_id=key_id)


def test_a_foreign_file_is_refused_where_the_key_says_so(backend: AgeBackend, sealed: bytes) -> None:
    strict = kms_over(backend, accept_foreign=False)

    with pytest.raises(ForeignRefused):
        strict.decrypt(ADA, foreign(), NO_CONTEXT)
    with pytest.raises(ForeignRefused):
        strict.decrypt(ADA, foreign(), ROW_7)
    assert strict.decrypt(ADA, sealed, ROW_7).origin == "service"


# -- edits -------------------------------------------------------------------------------------------


@PROPERTY
@given(st.data())
def test_no_edit_gets_past_the_service(kms: Kms, sealed: bytes, data: st.DataObject) -> None:
    """UnknownKey alone tells edits apart: of the key id, which is in clear and chosen by the editor."""
    place = data.draw(st.integers(0, len(sealed) - 1))
    gone, put = data.draw(st.integers(0, 3)), data.draw(st.binary(max_size=3))
    edited = sealed[:place] + put + sealed[place + gone :]
    if edited == sealed:
        return
    for context in (ROW_7, NO_CONTEXT):
        with pytest.raises((DecryptFailed, NotACiphertext, UnknownKey)):
            kms.decrypt(ADA, edited, context)


@PROPERTY
@given(st.binary(max_size=200), st.booleans())
def test_nothing_but_our_errors_leaves_the_service(kms: Kms, data: bytes, headed: bool) -> None:
    for call in (kms.decrypt, kms.rewrap):
        with pytest.raises(KmsError):
            call(ADA, VERSION_LINE * headed + data, ROW_7)


# -- keys are fresh ----------------------------------------------------------------------------------


def test_no_operation_uses_a_file_key_twice(kms: Kms) -> None:
    files = [kms.encrypt(ADA, b"", ROW_7).ciphertext for _ in range(100)]
    files += [kms.generate_data_key(ADA, 32, ROW_7).ciphertext for _ in range(100)]

    assert len({file_key_of(file, IDENTITY) for file in files}) == 200
    assert len({head_of(file).nonce for file in files}) == 200
