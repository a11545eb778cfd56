"""Shared wrap keys: for how many files and how long one serves, and what ends it before its time."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

import pytest

from kms_core.age.header import Stanza
from kms_core.backends.remote import VERSIONS_FRESH_S, RemoteBackend, SharingBackend
from kms_core.backends.wrap_keys import MOST_FILES, MOST_OPENED, WrapKeys, wrap_key_name
from kms_core.envelope import binding
from kms_core.envelope.binding import KeyRef, Wrap
from kms_core.http_client import Unreachable
from kms_protocol.errors import BackendUnavailable, DecryptFailed, Forbidden
from support.age_kms import ADA, ROW_7, MemoryTrail, allowing, head_of, kms_over
from support.clock import Clock
from support.memory_kms import NO_RETRIES, MemoryCipher
from support.waiting import WAIT_S

KEY: Final = KeyRef("acme", "payroll", "1", "memory")
AAD: Final = b"names and context"
FILE_KEY: Final = bytes(range(16))
SHARE_S: Final = 300.0


class Shared:
    """A sharing backend over a server in memory, and the clock of its keys."""

    def __init__(self, *, most_files: int = MOST_FILES, most_opened: int = MOST_OPENED) -> None:
        self.cipher, self.clock = MemoryCipher(), Clock()
        self.remote = RemoteBackend(self.cipher, policy=NO_RETRIES)
        self.keys = WrapKeys(most_opened, most_files=most_files, clock=self.clock)
        self.backend = SharingBackend(self.remote, self.keys, SHARE_S)

    def another(self) -> SharingBackend:
        """The same key in another process."""
        remote = RemoteBackend(self.cipher, policy=NO_RETRIES)
        return SharingBackend(remote, WrapKeys(clock=self.clock), SHARE_S)

    def opened(self) -> Stanza:
        """A stanza that this process has wrapped and unwrapped."""
        stanza = wrapped(self.backend)
        assert self.backend.unwrap(stanza, KEY, AAD) == FILE_KEY
        return stanza

    @property
    def calls(self) -> tuple[int, int]:
        return self.cipher.calls["encrypt"], self.cipher.calls["decrypt"]


@pytest.fixture
def shared() -> Shared:
    return Shared()


def wrapped(backend: SharingBackend | RemoteBackend, key: KeyRef = KEY) -> Stanza:
    return backend.wrap(FILE_KEY, key, AAD)


def test_many_files_cost_one_call_each_way(shared: Shared) -> None:
    stanzas = [wrapped(shared.backend) for _ in range(100)]

    assert (
        len({stanza.body[:32] for stanza in stanzas}) == len({stanza.body[32:] for stanza in stanzas}) == 100
    )
    assert {shared.backend.unwrap(stanza, KEY, AAD) for stanza in stanzas} == {FILE_KEY}
    assert shared.calls == (1, 1)
    for stanza in stanzas:
        with pytest.raises(DecryptFailed):
            shared.backend.unwrap(stanza, KEY, b"another context")


def test_another_process_and_a_key_that_shares_nothing_open_the_files(shared: Shared) -> None:
    stanzas = [wrapped(shared.backend) for _ in range(10)]
    for opener in (shared.another(), shared.remote, shared.remote.for_job()):
        assert [opener.unwrap(stanza, KEY, AAD) for stanza in stanzas] == [FILE_KEY] * 10

    assert shared.backend.unwrap(wrapped(shared.remote), KEY, AAD) == FILE_KEY


def test_the_time_is_counted_from_the_wrap_and_not_from_a_use(shared: Shared) -> None:
    first = wrapped(shared.backend)
    for _ in range(3):
        shared.clock.now += SHARE_S / 3 - 1
        assert wrapped(shared.backend).args == first.args
    shared.clock.now += 3

    assert wrapped(shared.backend).args != first.args
    assert shared.calls == (2, 0)


def test_the_time_is_counted_from_the_unwrap_and_not_from_a_use(shared: Shared) -> None:
    stanza = wrapped(shared.backend)
    for _ in range(4):
        assert shared.backend.unwrap(stanza, KEY, AAD) == FILE_KEY
        shared.clock.now += SHARE_S / 4 + 0.01
    assert shared.calls == (1, 1)

    assert shared.backend.unwrap(stanza, KEY, AAD) == FILE_KEY
    assert shared.calls == (1, 2)


def test_after_its_time_a_key_needs_the_server_to_open_a_file(shared: Shared) -> None:
    stanza = shared.opened()
    shared.cipher.cut()
    assert shared.backend.unwrap(stanza, KEY, AAD) == FILE_KEY

    shared.clock.now += SHARE_S
    with pytest.raises(Unreachable):
        shared.backend.unwrap(stanza, KEY, AAD)


def test_a_key_seals_so_many_files_and_no_more() -> None:
    assert MOST_FILES == 2**20
    shared = Shared(most_files=50)
    with ThreadPoolExecutor(8) as threads:
        stanzas = list(threads.map(lambda _: wrapped(shared.backend), range(200)))
    by_key = [stanza.args[4] for stanza in stanzas]

    assert {by_key.count(job) for job in by_key} == {50}
    assert shared.calls == (4, 0)


def test_the_opened_keys_are_bounded_and_the_one_used_last_stays() -> None:
    assert MOST_OPENED == 4096
    shared = Shared(most_opened=3)
    stanzas = [wrapped(shared.another()) for _ in range(4)]
    for stanza in stanzas[:3]:
        shared.backend.unwrap(stanza, KEY, AAD)
    shared.backend.unwrap(stanzas[0], KEY, AAD)
    shared.backend.unwrap(stanzas[3], KEY, AAD)
    assert shared.cipher.calls["decrypt"] == 4

    shared.backend.unwrap(stanzas[0], KEY, AAD)
    assert shared.cipher.calls["decrypt"] == 4
    shared.backend.unwrap(stanzas[1], KEY, AAD)
    assert shared.cipher.calls["decrypt"] == 5


@pytest.mark.parametrize(
    "other",
    [KeyRef("rival", "payroll", "1", "memory"), KeyRef("acme", "orders", "1", "memory")],
    ids=["tenant", "key"],
)
def test_each_tenant_and_key_has_a_wrap_key_of_its_own(shared: Shared, other: KeyRef) -> None:
    mine, theirs = wrapped(shared.backend), wrapped(shared.backend, other)

    assert mine.args[4] != theirs.args[4]
    moved = binding.wrap_stanza(other, mine.body, binding.read_wrap(mine).job)
    with pytest.raises(DecryptFailed):
        shared.backend.unwrap(moved, other, AAD)


def test_credentials_that_only_encrypt_open_nothing(shared: Shared) -> None:
    """The process made the key; still the server has to unwrap it before it opens a file."""
    stanza = wrapped(shared.backend)
    shared.cipher.trouble = BackendUnavailable("decrypt is not granted")

    with pytest.raises(BackendUnavailable):
        shared.backend.unwrap(stanza, KEY, AAD)


# -- what ends a key before its time -----------------------------------------------------------------


def stale(shared: Shared) -> None:
    """Let the list of versions end, as it does every 30 seconds."""
    remote = shared.remote
    remote._known = replace(remote._known, asked_at=-VERSIONS_FRESH_S)  # noqa: SLF001 -- the test is the time


def test_a_rotation_ends_the_key(shared: Shared) -> None:
    before = wrapped(shared.backend)
    assert shared.backend.rotate().version == "2"
    new = KeyRef("acme", "payroll", "2", "memory")

    assert wrapped(shared.backend, new).args[3:] != before.args[3:]
    assert shared.backend.unwrap(before, KEY, AAD) == FILE_KEY
    assert shared.calls == (2, 1)


def test_a_version_that_another_process_made_ends_the_key(shared: Shared) -> None:
    stanza = shared.opened()
    shared.cipher.rotate()
    stale(shared)
    shared.backend.unwrap(stanza, KEY, AAD)

    assert shared.calls == (1, 2)


def test_a_version_that_the_server_retired_opens_nothing(shared: Shared) -> None:
    """Revoked at the backend: the list of versions says so within 30 seconds, also in the key's minutes."""
    shared.cipher.rotate()
    stanza = shared.opened()
    del shared.cipher.keys["1"]
    assert shared.backend.unwrap(stanza, KEY, AAD) == FILE_KEY

    stale(shared)
    with pytest.raises(DecryptFailed):
        shared.backend.unwrap(stanza, KEY, AAD)


def test_a_version_that_is_not_listed_yet_is_the_servers_to_judge(shared: Shared) -> None:
    """Else it could be retired again before the list ever names it, and no change would end its key."""
    shared.backend.versions()
    shared.cipher.rotate()
    new = KeyRef("acme", "payroll", "2", "memory")
    stanza = wrapped(shared.another(), new)
    for _ in range(2):
        assert shared.backend.unwrap(stanza, new, AAD) == FILE_KEY
    assert shared.cipher.calls["decrypt"] == 2

    del shared.cipher.keys["2"]
    with pytest.raises(DecryptFailed):
        shared.backend.unwrap(stanza, new, AAD)


def test_credentials_that_were_revoked_open_nothing(shared: Shared) -> None:
    stanza = shared.opened()
    shared.cipher.trouble = BackendUnavailable("the server refuses our token")
    stale(shared)

    for _ in range(2):
        with pytest.raises(BackendUnavailable):
            shared.backend.unwrap(stanza, KEY, AAD)
    shared.cipher.trouble = None
    assert shared.backend.unwrap(stanza, KEY, AAD) == FILE_KEY
    assert shared.cipher.calls["decrypt"] == 4


def test_another_token_ends_the_key(shared: Shared) -> None:
    stanza = shared.opened()
    shared.cipher.token.changes += 1
    stale(shared)
    shared.backend.unwrap(stanza, KEY, AAD)

    assert shared.calls == (1, 2)


def test_a_server_that_is_away_for_a_moment_is_not_missed(shared: Shared) -> None:
    stanza = shared.opened()
    shared.cipher.cut()
    stale(shared)

    assert shared.backend.unwrap(stanza, KEY, AAD) == FILE_KEY
    assert wrapped(shared.backend).args == stanza.args


def test_a_forked_process_has_no_keys(shared: Shared) -> None:
    stanza = shared.opened()
    child = os.fork()
    if not child:
        calls = shared.calls
        try:
            ready = shared.backend.is_ready("acme", "payroll", binding.read_wrap(stanza))
            opened = shared.backend.unwrap(stanza, KEY, AAD) == FILE_KEY
            new = wrapped(shared.backend).args != stanza.args
            asked = shared.calls == (calls[0] + 1, calls[1] + 1)
            os._exit(0 if opened and new and asked and not ready else 1)
        finally:
            os._exit(2)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert wrapped(shared.backend).args == stanza.args


# -- threads -----------------------------------------------------------------------------------------


class Slow(MemoryCipher):
    """A server that answers when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answer = threading.Semaphore(0), threading.Event()

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        self.asked.release()
        assert self.answer.wait(WAIT_S)
        return super().encrypt(secret, version, aad)


def test_callers_share_one_call_and_other_keys_do_not_wait_for_it() -> None:
    """No lock is held while the server is asked."""
    slow, keys = Slow(), WrapKeys()
    backend = SharingBackend(RemoteBackend(slow, policy=NO_RETRIES), keys, SHARE_S)
    quick = SharingBackend(RemoteBackend(MemoryCipher(), policy=NO_RETRIES), keys, SHARE_S)
    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(wrapped, backend) for _ in range(8)]
        assert slow.asked.acquire(timeout=WAIT_S)
        assert quick.unwrap(wrapped(quick), KEY, AAD) == FILE_KEY
        slow.answer.set()
        stanzas = [call.result(WAIT_S) for call in calls]

    assert len({stanza.args for stanza in stanzas}) == 1
    assert slow.calls["encrypt"] == 1


def test_an_error_is_the_error_of_all_that_wait_and_of_no_other() -> None:
    slow = Slow()
    backend = SharingBackend(RemoteBackend(slow, policy=NO_RETRIES), WrapKeys(), SHARE_S)
    backend.versions()
    slow.trouble = Unreachable("cut off")
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(wrapped, backend) for _ in range(4)]
        assert slow.asked.acquire(timeout=WAIT_S)
        slow.answer.set()
        assert all(isinstance(call.exception(WAIT_S), Unreachable) for call in calls)
    slow.trouble = None

    assert backend.unwrap(wrapped(backend), KEY, AAD) == FILE_KEY


# -- whether a call needs the server -----------------------------------------------------------------


def test_a_key_is_ready_while_nothing_ends_it_within_a_second(shared: Shared) -> None:
    wrap = Wrap("memory", "payroll", "1", b"", b"another")
    assert not shared.backend.is_ready("acme", "payroll", None)

    stanza = wrapped(shared.backend)
    shared.backend.versions()
    own = binding.read_wrap(stanza)
    assert shared.backend.is_ready("acme", "payroll", None)
    assert not shared.backend.is_ready("rival", "payroll", None)
    assert not shared.backend.is_ready("acme", "payroll", own)
    shared.backend.unwrap(stanza, KEY, AAD)
    assert shared.backend.is_ready("acme", "payroll", own)
    assert not shared.backend.is_ready("acme", "payroll", wrap)

    shared.clock.now += SHARE_S - 0.5
    assert not shared.backend.is_ready("acme", "payroll", own)
    shared.clock.now -= SHARE_S / 2
    assert shared.backend.is_ready("acme", "payroll", own)
    stale(shared)
    assert not shared.backend.is_ready("acme", "payroll", own)


def test_a_key_that_shares_nothing_is_never_ready(shared: Shared) -> None:
    stanza = wrapped(shared.remote)
    shared.remote.versions()

    assert not shared.remote.is_ready("acme", "payroll", None)
    assert not shared.remote.is_ready("acme", "payroll", binding.read_wrap(stanza))


def test_policy_comes_before_a_wrap_key(shared: Shared) -> None:
    sealed = kms_over(shared.backend).encrypt(ADA, b"salary", ROW_7).ciphertext
    kms_over(shared.backend).decrypt(ADA, sealed, ROW_7)
    strict = kms_over(shared.backend, policy=allowing())
    shared.remote.versions()
    before = shared.calls

    for call in (strict.decrypt, strict.encrypt, strict.rewrap):
        with pytest.raises(Forbidden):
            call(ADA, sealed, ROW_7)
    assert shared.calls == before


# -- the audit log -----------------------------------------------------------------------------------


def test_each_record_names_the_wrap_key(shared: Shared) -> None:
    trail = MemoryTrail()
    kms = kms_over(shared.backend, trail=trail)
    sealed = kms.encrypt(ADA, b"salary", ROW_7).ciphertext
    name = wrap_key_name(binding.read_wrap(head_of(sealed).stanzas[0]).job)
    kms.decrypt(ADA, sealed, ROW_7)
    kms.wrap(ADA, FILE_KEY, ROW_7)
    kms.unwrap(ADA, kms.wrap(ADA, FILE_KEY, ROW_7).stanza, ROW_7)
    kms.generate_data_key(ADA, 32, ROW_7)
    kms.encrypt_header(ADA, (FILE_KEY, FILE_KEY), ROW_7, size_bytes=1)
    kms.rewrap(ADA, sealed, ROW_7)
    kms.reseal(ADA, sealed, ROW_7)

    assert len(name) == 32
    assert [line["wrap_key"] for line in trail.lines] == [name] * 9


def test_a_record_of_a_file_without_a_shared_key_names_none(shared: Shared) -> None:
    trail = MemoryTrail()
    kms = kms_over(shared.remote, trail=trail)
    kms.decrypt(ADA, kms.encrypt(ADA, b"salary", ROW_7).ciphertext, ROW_7)
    kms.rewrap(ADA, kms_over(shared.backend).encrypt(ADA, b"salary", ROW_7).ciphertext, ROW_7)

    assert not any("wrap_key" in line for line in trail.lines)
