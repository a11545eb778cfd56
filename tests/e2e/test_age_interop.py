"""Files of ours before stock age and pyrage, and theirs before us: the format is one."""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import pyrage
import pytest

from kms_core.age import x25519
from kms_core.age.header import Stanza
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.envelope import binding
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed, NotACiphertext
from support import programs
from support.age_kms import (
    ADA,
    NO_CONTEXT,
    ROW,
    age_backend,
    file_key_of,
    head_of,
    kms_over,
    resigned,
    types_of,
    with_stanzas,
    write_identities,
)

CHUNK: Final = 64 * 1024
MiB: Final = 1024 * 1024
SIZES: Final = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, MiB - 1, MiB]
IDENTITY: Final = x25519.X25519Identity.generate()
COLLEAGUE: Final = x25519.X25519Identity.generate()
WIDE: Final = Context.parse({f"key-{number}": "ü" * 40 for number in range(64)})


class Refused(Exception):
    """The other implementation does not open a file."""


class Peer(Protocol):
    """Another implementation of age."""

    def encrypt(self, plaintext: bytes, recipients: Sequence[x25519.X25519Recipient]) -> bytes: ...
    def decrypt(self, file: bytes, identity: x25519.X25519Identity) -> bytes: ...


class StockAge:
    """The ``age`` program."""

    def __init__(self, program: str, directory: Path) -> None:
        self.program = program
        self._directory = directory

    def encrypt(self, plaintext: bytes, recipients: Sequence[x25519.X25519Recipient], *options: str) -> bytes:
        named = [word for recipient in recipients for word in ("-r", str(recipient))]
        return self._run([*options, *named], plaintext)

    def decrypt(self, file: bytes, identity: x25519.X25519Identity) -> bytes:
        path = self._directory / "identity.txt"
        write_identities(path, identity)
        return self._run(["-d", "-i", str(path)], file)

    def _run(self, words: list[str], data: bytes) -> bytes:
        done = subprocess.run([self.program, *words], input=data, capture_output=True, check=False)
        if done.returncode:
            raise Refused(done.stderr.decode())
        return done.stdout


class Pyrage:
    """The Rust implementation, as Python sees it. It adds a grease stanza to every file."""

    def encrypt(self, plaintext: bytes, recipients: Sequence[x25519.X25519Recipient]) -> bytes:
        named = [pyrage.x25519.Recipient.from_str(str(recipient)) for recipient in recipients]
        file: bytes = pyrage.encrypt(plaintext, named)
        return file

    def decrypt(self, file: bytes, identity: x25519.X25519Identity) -> bytes:
        try:
            plaintext: bytes = pyrage.decrypt(file, [pyrage.x25519.Identity.from_str(identity.export())])
        except pyrage.DecryptError as exc:
            raise Refused from exc
        return plaintext


@pytest.fixture(scope="module")
def age(tmp_path_factory: pytest.TempPathFactory) -> StockAge:
    return StockAge(programs.program("age"), tmp_path_factory.mktemp("identity"))


@pytest.fixture(scope="module", params=["age", "pyrage"])
def peer(request: pytest.FixtureRequest) -> Peer:
    stock: StockAge | Pyrage = request.getfixturevalue("age") if request.param == "age" else Pyrage()
    return stock


@pytest.fixture(scope="module")
def kms(tmp_path_factory: pytest.TempPathFactory) -> Kms:
    return kms_over(age_backend(tmp_path_factory.mktemp("age"), IDENTITY))


def refused_by_all(file: bytes, peer: Peer, kms: Kms) -> None:
    with pytest.raises(Refused):
        peer.decrypt(file, IDENTITY)
    for context in (ROW, NO_CONTEXT):
        with pytest.raises(DecryptFailed):
            kms.decrypt(ADA, file, context)


# -- ours before others ------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [NO_CONTEXT, ROW, WIDE], ids=["no context", "context", "wide context"])
@pytest.mark.parametrize("size", SIZES)
def test_others_open_what_we_seal(peer: Peer, kms: Kms, size: int, context: Context) -> None:
    plaintext = os.urandom(size)
    file = kms.encrypt(ADA, plaintext, context).ciphertext

    assert peer.decrypt(file, IDENTITY) == plaintext
    assert (head_of(file).size == 4096) == (size >= MiB)


def test_others_open_a_data_key(peer: Peer, kms: Kms) -> None:
    made = kms.generate_data_key(ADA, 32, ROW)

    assert peer.decrypt(made.ciphertext, IDENTITY) == made.plaintext


@pytest.mark.parametrize("size", [6, MiB])
def test_others_open_what_we_rewrap(peer: Peer, kms: Kms, tmp_path: Path, size: int) -> None:
    file = kms.encrypt(ADA, bytes(size), ROW).ciphertext
    rotated = kms_over(age_backend(tmp_path, IDENTITY, COLLEAGUE))
    moved = rotated.rewrap(ADA, file, ROW).ciphertext

    assert peer.decrypt(moved, COLLEAGUE) == bytes(size)
    with pytest.raises(Refused):
        peer.decrypt(moved, IDENTITY)


def test_others_open_it_by_a_recipient_that_was_added(peer: Peer, kms: Kms) -> None:
    file = kms.encrypt(ADA, b"salary", ROW).ciphertext
    file_key = file_key_of(file, IDENTITY)
    shared = resigned(file, [COLLEAGUE.recipient.wrap(file_key), *head_of(file).stanzas], file_key)

    assert peer.decrypt(shared, COLLEAGUE) == peer.decrypt(shared, IDENTITY) == b"salary"
    assert kms.decrypt(ADA, shared, ROW).origin == "service"


# -- ours, tampered with -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [binding.CONTEXT, binding.ORIGIN, binding.PAD])
@pytest.mark.parametrize(
    "change",
    [
        lambda _: [],
        lambda stanza: [stanza, stanza],
        lambda stanza: [Stanza(stanza.args, stanza.body + b"\0")],
        lambda stanza: [Stanza((*stanza.args[:-1], stanza.args[-1] + "0"), stanza.body)],
    ],
    ids=["removed", "doubled", "body changed", "argument changed"],
)
def test_a_changed_stanza_is_refused_by_all(
    peer: Peer, kms: Kms, kind: str, change: Callable[[Stanza], list[Stanza]]
) -> None:
    file = kms.encrypt(ADA, bytes(MiB), ROW).ciphertext
    stanzas = [part for one in head_of(file).stanzas for part in (change(one) if one.type == kind else [one])]

    assert kind in types_of(file)
    refused_by_all(with_stanzas(file, stanzas), peer, kms)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)], ids=str)
def test_moved_stanzas_are_refused_by_all(peer: Peer, kms: Kms, order: tuple[int, ...]) -> None:
    file = kms.encrypt(ADA, b"salary", ROW).ciphertext
    stanzas = head_of(file).stanzas

    refused_by_all(with_stanzas(file, [stanzas[place] for place in order]), peer, kms)


@pytest.mark.parametrize("place", ["nonce", "first chunk", "last chunk"])
def test_a_changed_payload_is_refused_by_all(peer: Peer, kms: Kms, place: str) -> None:
    file = bytearray(kms.encrypt(ADA, bytes(2 * CHUNK), ROW).ciphertext)
    start = head_of(bytes(file)).size
    file[{"nonce": start, "first chunk": start + 20, "last chunk": -1}[place]] ^= 1

    refused_by_all(bytes(file), peer, kms)


@pytest.mark.parametrize("kept", [-1, -16, -CHUNK - 16], ids=["a byte", "a tag", "a chunk"])
def test_a_cut_payload_is_refused_by_all(peer: Peer, kms: Kms, kept: int) -> None:
    file = kms.encrypt(ADA, bytes(2 * CHUNK), ROW).ciphertext

    refused_by_all(file[:kept], peer, kms)


# -- theirs before us --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_we_open_what_others_seal(peer: Peer, kms: Kms, size: int) -> None:
    plaintext = os.urandom(size)
    opened = kms.decrypt(ADA, peer.encrypt(plaintext, [IDENTITY.recipient]), NO_CONTEXT)

    assert opened.plaintext == plaintext
    assert opened.origin == "foreign"


@pytest.mark.parametrize("place", [0, 1, 9], ids=["first", "second", "last"])
def test_we_open_what_others_seal_for_many(peer: Peer, kms: Kms, place: int) -> None:
    recipients = [x25519.X25519Identity.generate().recipient for _ in range(9)]
    recipients.insert(place, IDENTITY.recipient)

    assert kms.decrypt(ADA, peer.encrypt(b"salary", recipients), NO_CONTEXT).plaintext == b"salary"


def test_what_others_seal_for_others_stays_shut(peer: Peer, kms: Kms) -> None:
    with pytest.raises(DecryptFailed):
        kms.decrypt(ADA, peer.encrypt(b"salary", [COLLEAGUE.recipient]), NO_CONTEXT)


def test_what_others_seal_has_no_context(peer: Peer, kms: Kms) -> None:
    with pytest.raises(DecryptFailed):
        kms.decrypt(ADA, peer.encrypt(b"salary", [IDENTITY.recipient]), ROW)


def test_armored_files_are_for_the_command(age: StockAge, kms: Kms) -> None:
    armored = age.encrypt(b"salary", [IDENTITY.recipient], "-a")

    with pytest.raises(NotACiphertext):
        kms.decrypt(ADA, armored, NO_CONTEXT)


# -- key files ---------------------------------------------------------------------------------------


def test_a_key_file_of_age_keygen_serves(age: StockAge, tmp_path: Path) -> None:
    private = tmp_path / "private_key.txt"
    subprocess.run([programs.program("age-keygen"), "-o", str(private)], check=True, capture_output=True)
    public = subprocess.run(
        [programs.program("age-keygen"), "-y", str(private)], check=True, capture_output=True
    )
    (tmp_path / "public_key.txt").write_bytes(public.stdout)
    backend = AgeBackend(KeyFiles(private, tmp_path / "public_key.txt", strict=True))
    file = kms_over(backend).encrypt(ADA, b"salary", ROW).ciphertext
    opened = subprocess.run(
        [age.program, "-d", "-i", str(private)], input=file, capture_output=True, check=True
    )

    assert opened.stdout == b"salary"
    assert backend.versions()[0].created_at is not None
