"""What all backends over a network share: versions that are asked for seldom, wraps, and keys of jobs."""

from typing import Final

import pytest

from kms_core.age.x25519 import NoMatch
from kms_core.backends import NotRotated
from kms_core.backends.remote import RemoteBackend
from kms_core.envelope import binding
from kms_core.envelope.binding import KeyRef
from kms_core.http_client import Busy
from kms_protocol.errors import BackendUnavailable, DecryptFailed, TooManyVersions
from support.memory_kms import NO_RETRIES, MemoryCipher, memory_backend

KEY: Final = KeyRef("acme", "payroll", "1", "memory")
AAD: Final = b"names and context"
FILE_KEY: Final = bytes(range(16))


class Wrong(MemoryCipher):
    """A peer that decrypts to something else."""

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
        return super().decrypt(wrapped, version, aad)[::-1]


def test_a_peer_is_asked_for_versions_once_in_a_while() -> None:
    backend, cipher = memory_backend()
    assert backend.versions()[-1].version == "1"
    cipher.cut()
    for _ in range(10):
        assert backend.versions()[-1].version == "1"

    assert cipher.calls["versions"] == 1


@pytest.mark.parametrize("trouble", [BackendUnavailable("no such version"), Busy("later")])
def test_versions_are_asked_for_again_after_a_wrap_that_failed(trouble: BackendUnavailable) -> None:
    backend, cipher = memory_backend()
    backend.versions()
    cipher.trouble = trouble
    with pytest.raises(BackendUnavailable):
        backend.wrap(FILE_KEY, KEY, AAD)
    cipher.trouble = None
    cipher.rotate()

    assert backend.versions()[-1].version == "2"
    assert cipher.calls["versions"] == 2


def test_what_is_no_file_key_is_not_handed_out() -> None:
    """A peer wraps 32-byte keys of jobs, too: one in the place of a file key opens nothing."""
    backend, cipher = memory_backend()
    stanza = binding.wrap_stanza(KEY, cipher.encrypt(bytes(32), "1", AAD))

    with pytest.raises(DecryptFailed):
        backend.unwrap(stanza, KEY, AAD)


@pytest.mark.parametrize(
    "other",
    [
        KeyRef("acme", "other", "1", "memory"),
        KeyRef("acme", "payroll", "2", "memory"),
        KeyRef("acme", "payroll", "1", "elsewhere"),
    ],
    ids=["key", "version", "backend"],
)
def test_a_wrap_of_another_name_is_for_somebody_else(other: KeyRef) -> None:
    backend, cipher = memory_backend()
    stanza = backend.wrap(FILE_KEY, KEY, AAD)

    with pytest.raises(NoMatch):
        backend.unwrap(stanza, other, AAD)
    assert not cipher.calls["decrypt"]


def test_a_peer_that_answers_wrong_is_not_healthy() -> None:
    health = RemoteBackend(Wrong(), policy=NO_RETRIES).health_check()

    assert (health.healthy, health.detail) == (False, "wrong answer")
    backend, cipher = memory_backend()
    assert backend.health_check().healthy
    assert (cipher.calls["encrypt"], cipher.calls["decrypt"]) == (1, 1)
    cut_off, cipher = memory_backend()
    cipher.cut()
    assert not cut_off.health_check().healthy


def test_what_a_job_wraps_opens_by_a_single_call_and_the_reverse() -> None:
    backend, _ = memory_backend()
    job = backend.for_job()
    by_job, by_call = job.wrap(FILE_KEY, KEY, AAD), backend.wrap(FILE_KEY, KEY, AAD)

    for opener in (backend, job, backend.for_job()):
        assert opener.unwrap(by_job, KEY, AAD) == opener.unwrap(by_call, KEY, AAD) == FILE_KEY
        with pytest.raises(DecryptFailed):
            opener.unwrap(by_job, KEY, b"another context")


def test_a_server_that_does_not_answer_is_not_asked_to_rotate() -> None:
    """A frozen one might do it once it goes on, after the caller was refused."""
    backend, cipher = memory_backend()
    backend.versions()
    cipher.cut()

    with pytest.raises(NotRotated):
        backend.rotate()
    assert not cipher.calls["rotate"]


def test_a_key_has_five_hundred_versions_at_most() -> None:
    """Servers list the versions of a key in an answer and a time that have bounds."""
    backend, cipher = memory_backend()
    for _ in range(498):
        cipher.rotate()
    assert backend.rotate().version == "500"

    with pytest.raises(TooManyVersions):
        backend.rotate()
    assert len(cipher.keys) == 500
    assert backend.versions()[-1].version == "500"
