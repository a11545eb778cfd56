"""Files of ours before stock age and pyrage, and theirs before us: the format is one."""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import pyrage
import pytest

from kms_core.age import x25519
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.envelope import binding
from kms_core.service import Kms
from kms_protocol.context import Context
from support import programs
from support.age_kms import (
    ADA,
    NO_CONTEXT,
    ROW_7,
    age_backend,
    file_key_of,
    head_of,
    kms_over,
    resigned,
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

    def encrypt(self, plaintext: bytes, recipients: Sequence[x25519.X25519Recipient]) -> bytes:
        return self._run([word for recipient in recipients for word in ("-r", str(recipient))], plaintext)

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


# -- ours before others ------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [NO_CONTEXT, ROW_7, WIDE], ids=["no context", "context", "wide context"])
@pytest.mark.parametrize("size", SIZES)
def test_others_open_what_we_seal(peer: Peer, kms: Kms, size: int, context: Context) -> None:
    plaintext = os.urandom(size)
    file = kms.encrypt(ADA, plaintext, context).ciphertext

    assert peer.decrypt(file, IDENTITY) == plaintext
    assert (head_of(file).size == 4096) == (size >= MiB)


def test_others_open_a_data_key(peer: Peer, kms: Kms) -> None:
    made = kms.generate_data_key(ADA, 32, ROW_7)

    assert peer.decrypt(made.ciphertext, IDENTITY) == made.plaintext


@pytest.mark.parametrize("size", [6, MiB])
def test_others_open_what_we_rewrap(peer: Peer, kms: Kms, tmp_path: Path, size: int) -> None:
    file = kms.encrypt(ADA, bytes(size), ROW_7).ciphertext
    rotated = kms_over(age_backend(tmp_path, IDENTITY, COLLEAGUE))
    moved = rotated.rewrap(ADA, file, ROW_7).ciphertext

    assert peer.decrypt(moved, COLLEAGUE) == bytes(size)
    with pytest.raises(Refused):
        peer.decrypt(moved, IDENTITY)


def test_others_open_it_by_a_recipient_that_was_added(peer: Peer, kms: Kms) -> None:
    file = kms.encrypt(ADA, b"salary", ROW_7).ciphertext
    file_key = file_key_of(file, IDENTITY)
    shared = resigned(file, [COLLEAGUE.recipient.wrap(file_key), *head_of(file).stanzas], file_key)

    assert peer.decrypt(shared, COLLEAGUE) == peer.decrypt(shared, IDENTITY) == b"salary"
    assert kms.decrypt(ADA, shared, ROW_7).origin == "service"


CHANGES: Final[dict[str, Callable[[bytes], bytes]]] = {
    "without its context": lambda file: without(file, binding.CONTEXT),
    "without its origin": lambda file: without(file, binding.ORIGIN),
    "another chunk": lambda file: file[:-20] + bytes([file[-20] ^ 1]) + file[-19:],
    "cut": lambda file: file[: -CHUNK - 16],
}


def without(file: bytes, kind: str) -> bytes:
    return with_stanzas(file, [stanza for stanza in head_of(file).stanzas if stanza.type != kind])


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_others_refuse_what_was_changed(peer: Peer, kms: Kms, change: Callable[[bytes], bytes]) -> None:
    """As the service does: tests/kms_core/envelope/test_sealing.py."""
    with pytest.raises(Refused):
        peer.decrypt(change(kms.encrypt(ADA, bytes(2 * CHUNK), ROW_7).ciphertext), IDENTITY)


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


# -- key files ---------------------------------------------------------------------------------------


def test_a_key_file_of_age_keygen_serves(age: StockAge, tmp_path: Path) -> None:
    private = tmp_path / "private_key.txt"
    subprocess.run([programs.program("age-keygen"), "-o", str(private)], check=True, capture_output=True)
    public = subprocess.run(
        [programs.program("age-keygen"), "-y", str(private)], check=True, capture_output=True
    )
    (tmp_path / "public_key.txt").write_bytes(public.stdout)
    backend = AgeBackend(KeyFiles(private, tmp_path / "public_key.txt", strict=True))
    file = kms_over(backend).encrypt(ADA, b"salary", ROW_7).ciphertext
    opened = subprocess.run(
        [age.program, "-d", "-i", str(private)], input=file, capture_output=True, check=True
    )

    assert opened.stdout == b"salary"
    assert backend.versions()[0].created_at is not None
