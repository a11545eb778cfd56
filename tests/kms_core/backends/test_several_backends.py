"""One key id, several backends: files that any of them opens, failover, moves, job keys, what headers say."""

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from kms_core import http_client
from kms_core.age import x25519
from kms_core.age.header import Stanza
from kms_core.auth.policy import AllowAll
from kms_core.backends import Backend, NotRotated
from kms_core.backends.remote import RemoteBackend
from kms_core.envelope import binding
from kms_core.envelope.sealed_files import FileSealer
from kms_core.http_client import Busy, Unreachable
from kms_core.key_selection import SelectionRules
from kms_core.keyring import Key, Keyring
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import BackendUnavailable, DecryptFailed, ForeignRefused, KmsError, UnknownKey
from support.age_kms import (
    ADA,
    ROW_7,
    MemoryTrail,
    age_backend,
    allowing,
    head_of,
    is_newest,
    resigned,
    types_of,
)
from support.documents import no_documents
from support.memory_kms import NO_RETRIES, MemoryCipher, memory_backend
from support.programs import program
from support.waiting import monotonic_ahead

IDENTITY: Final = x25519.X25519Identity.generate()
SALARY: Final = b"salary"


def service(*backends: Backend, retired: tuple[Backend, ...] = (), key_id: str = "payroll") -> Kms:
    """A service with one key of these backends, the first of which names the files."""
    key = Key(key_id, backends[0], accept_foreign=True, others=backends[1:], retired=retired)
    return Kms(Keyring({key_id: key}, key), AllowAll(), MemoryTrail(), SelectionRules())


@pytest.fixture
def age(tmp_path: Path) -> Backend:
    return age_backend(tmp_path / "age", IDENTITY)


def sealed_by(kms: Kms, plaintext: bytes = SALARY, context: Context = ROW_7) -> bytes:
    return kms.encrypt(ADA, plaintext, context).ciphertext


def opened_by(kms: Kms, file: bytes, context: Context = ROW_7) -> bytes:
    return kms.decrypt(ADA, file, context).plaintext


def test_a_file_of_two_backends_opens_by_each_alone(age: Backend) -> None:
    remote, _ = memory_backend()
    file = sealed_by(service(remote, age))

    assert types_of(file) == [binding.WRAP, "X25519", binding.CONTEXT, binding.ORIGIN]
    for alone in (service(remote), service(age), service(age, remote)):
        assert opened_by(alone, file) == SALARY


def test_stock_age_opens_a_file_of_two_backends(age: Backend, tmp_path: Path) -> None:
    file = sealed_by(service(memory_backend()[0], age))
    identity = tmp_path / "age" / "private_key.txt"
    done = subprocess.run(
        [program("age"), "-d", "-i", str(identity)], input=file, capture_output=True, check=True
    )

    assert done.stdout == SALARY


def test_a_backend_that_is_silent_is_passed_over_and_one_that_refuses_is_not(age: Backend) -> None:
    remote, peer = memory_backend()
    kms = service(remote, age)
    file = sealed_by(kms)
    peer.cut()

    opened = kms.decrypt(ADA, file, ROW_7)
    assert (opened.plaintext, opened.key.backend) == (SALARY, "age")
    refusing, peer = memory_backend()
    file = sealed_by(service(refusing, age))
    peer.trouble = DecryptFailed()
    with pytest.raises(DecryptFailed):
        opened_by(service(refusing, age), file)


class Hanging(MemoryCipher):
    """A peer that never answers, and notes the seconds that each call on it had."""

    hangs = False

    def __init__(self, name: str, timeout_s: float) -> None:
        super().__init__(name)
        self.server = replace(self.server, timeout_s=timeout_s)
        self.had_s: list[float] = []

    def _called(self, name: str) -> None:
        super()._called(name)
        if self.hangs:
            self.had_s.append(http_client.left_s())
            raise Unreachable("no answer")


def hanging(**timeouts_s: float) -> tuple[list[RemoteBackend], list[Hanging]]:
    peers = [Hanging(name, timeout_s) for name, timeout_s in timeouts_s.items()]
    return [RemoteBackend(peer, policy=NO_RETRIES) for peer in peers], peers


@pytest.mark.parametrize("by_job", [False, True], ids=["call", "job"])
def test_a_try_has_half_of_what_is_left_while_another_backend_remains(*, by_job: bool) -> None:
    """Of the largest timeout; the last one has all the rest."""
    backends, peers = hanging(one=2.0, two=8.0, three=8.0)
    whole = service(*backends)
    kms = whole.for_job() if by_job else whole
    file = sealed_by(kms)
    for peer in peers:
        peer.hangs = True
    with pytest.raises(Unreachable):
        opened_by(whole.for_job() if by_job else kms, file)

    first, second, third = (peer.had_s[0] for peer in peers)  # of which they take none
    assert first <= 2.0 < second <= 4.0 < third <= 8.0


class Slow(MemoryCipher):
    """A peer that takes 3 seconds for each answer, and notes the seconds that each call on it had."""

    def __init__(self, name: str, timeout_s: float, passed: ExitStack) -> None:
        super().__init__(name)
        self.server = replace(self.server, timeout_s=timeout_s)
        self.passed, self.had_s = passed, list[float]()

    def _called(self, name: str) -> None:
        super()._called(name)
        if name != "rotate":
            self.had_s.append(http_client.left_s())
            self.passed.enter_context(monotonic_ahead(3.0))


@pytest.mark.parametrize("operation", ["encrypt", "generate_data_key", "wrap", "seal a key file"])
def test_the_list_of_versions_and_each_wrap_share_one_timeout(operation: str) -> None:
    """Else an encryption takes one more timeout for the list, and one for each backend."""
    with ExitStack() as passed:
        peers = [Slow("one", 4.0, passed), Slow("two", 8.0, passed)]
        kms = service(*(RemoteBackend(peer, policy=NO_RETRIES) for peer in peers))
        calls: dict[str, Callable[[], object]] = {
            "encrypt": lambda: kms.encrypt(ADA, SALARY, ROW_7),
            "generate_data_key": lambda: kms.generate_data_key(ADA, 32, ROW_7),
            "wrap": lambda: kms.wrap(ADA, bytes(16), ROW_7),
            "seal a key file": lambda: FileSealer(lambda: kms.keyring.keys, list, no_documents).seal(
                "kms:spool", SALARY, "payroll"
            ),
        }
        with pytest.raises(Unreachable):
            calls[operation]()

    (listed, wrapped), (other_listed,) = (peer.had_s for peer in peers)
    assert 3 < listed <= 4, "its own timeout"
    assert 4 < other_listed <= 5, "what is left of the largest one"
    assert 1 < wrapped <= 2, "no more than that"


def test_a_file_that_one_backend_opens_leaves_it_all_the_time(age: Backend) -> None:
    (remote,), (peer,) = hanging(memory=5.0)
    file = sealed_by(service(remote))
    peer.hangs = True
    with pytest.raises(Unreachable):
        opened_by(service(remote, retired=(age, memory_backend("other")[0])), file)

    assert peer.had_s[0] > 2.5


def test_a_backend_that_was_silent_is_asked_last(age: Backend) -> None:
    (remote,), (peer,) = hanging(memory=5.0)
    kms = service(remote, age)
    file = sealed_by(kms)
    peer.hangs = True
    for _ in range(3):
        assert opened_by(kms, file) == SALARY

    assert len(peer.had_s) == 1
    assert kms.decrypt(ADA, file, ROW_7).key.backend == "age"


class Crowded(MemoryCipher):
    """A peer whose connections are all held by calls that hang, until the time of the next one is over."""

    def _called(self, name: str) -> None:
        super()._called(name)
        if name == "decrypt":
            self.passed.enter_context(monotonic_ahead(3.0))
            raise Busy("All connections are in use")

    def __init__(self, passed: ExitStack) -> None:
        super().__init__()
        self.passed = passed


def test_one_that_used_up_its_time_is_passed_over_whatever_it_says(age: Backend) -> None:
    with ExitStack() as passed:
        kms = service(RemoteBackend(Crowded(passed), policy=NO_RETRIES), age)

        assert opened_by(kms, sealed_by(kms)) == SALARY


def test_encrypt_writes_for_all_or_fails(age: Backend) -> None:
    remote, peer = memory_backend()
    kms = service(age, remote)
    kms.encrypt(ADA, SALARY, ROW_7)
    peer.cut()

    with pytest.raises(Unreachable):
        kms.encrypt(ADA, SALARY, ROW_7)


def test_every_backend_that_seals_is_rotated_and_no_other() -> None:
    (first, one), (second, two), (retired, old) = map(memory_backend, ("memory", "second", "retired"))
    service(first, second, retired=(retired,)).rotate(ADA, "payroll")

    assert [peer.calls["rotate"] for peer in (one, two, old)] == [1, 1, 0]


@pytest.mark.parametrize(("away", "is_unchanged"), [("memory", True), ("second", False)])
def test_a_rotation_that_one_backend_made_is_not_called_without_effect(
    away: str, *, is_unchanged: bool
) -> None:
    backends, ciphers = zip(*map(memory_backend, ("memory", "second")), strict=True)
    next(each for each in ciphers if each.name == away).cut()

    with pytest.raises(BackendUnavailable) as refused:
        service(*backends).rotate(ADA, "payroll")
    assert isinstance(refused.value, NotRotated) == is_unchanged


def test_a_retired_backend_opens_and_no_longer_seals(age: Backend) -> None:
    remote, _ = memory_backend()
    old = sealed_by(service(age))
    kms = service(remote, retired=(age,))

    assert opened_by(kms, old) == SALARY
    assert types_of(sealed_by(kms)) == [binding.WRAP, binding.CONTEXT]


def test_a_file_moves_from_age_to_a_peer_and_back_without_its_payload(age: Backend) -> None:
    remote, _ = memory_backend()
    steps = [service(age), service(remote, retired=(age,)), service(age, retired=(remote,))]
    file = sealed_by(steps[0], bytes(100_000))
    payload = file[head_of(file).size :]
    for kms in steps[1:]:
        file = kms.rewrap(ADA, file, ROW_7).ciphertext
        assert file[head_of(file).size :] == payload
        assert opened_by(service(kms.keyring.default.backend), file) == bytes(100_000)


@pytest.mark.parametrize(
    "wrap",
    [
        Stanza((binding.WRAP, "memory", "payroll"), bytes(44)),
        Stanza((binding.WRAP, "memory", "payroll", "1", "AAAA", "more"), bytes(44)),
        Stanza((binding.WRAP, "memory", "payroll", "1", "not base64!"), bytes(44)),
        Stanza((binding.WRAP, "memory", "pay/roll", "1"), bytes(44)),
        Stanza((binding.WRAP, "memory", "payroll", "1"), b""),
        Stanza((binding.WRAP, "memory", "payroll", "1"), bytes(binding.MAX_WRAP_BYTES + 1)),
        Stanza((binding.WRAP, "other", "payroll", "1"), bytes(44)),
        Stanza((binding.WRAP, "memory", "payroll", "2"), bytes(44)),
    ],
)
def test_a_wrap_of_another_shape_or_name_opens_nothing(wrap: Stanza) -> None:
    remote, _ = memory_backend()
    kms = service(remote)
    bound = head_of(sealed_by(kms)).stanzas[1]

    with pytest.raises(KmsError) as refused:
        opened_by(kms, resigned(sealed_by(kms), [wrap, bound], bytes(16)))
    assert refused.value.code == "decrypt_failed"


def test_two_wraps_of_one_backend_are_refused_before_any_call() -> None:
    remote, peer = memory_backend()
    kms = service(remote)
    file = sealed_by(kms)
    wrap, bound = head_of(file).stanzas
    peer.calls.clear()

    with pytest.raises(DecryptFailed):
        opened_by(kms, resigned(file, [wrap, wrap, bound], bytes(16)))
    assert not peer.calls


def test_a_foreign_file_needs_a_key_with_age_identities() -> None:
    foreign = resigned(
        sealed_by(service(memory_backend()[0])), [IDENTITY.recipient.wrap(bytes(16))], bytes(16)
    )

    with pytest.raises(ForeignRefused):
        opened_by(service(memory_backend()[0]), foreign, Context())


# -- job keys ----------------------------------------------------------------------------------------


def job_files(kms: Kms, count: int) -> list[bytes]:
    job = kms.for_job()
    return [sealed_by(job, context=Context.parse(f"row={row}")) for row in range(count)]


def test_a_thousand_items_cost_the_peer_one_call_each_way() -> None:
    remote, peer = memory_backend()
    kms = service(remote)
    files = job_files(kms, 1000)
    job = kms.for_job()
    for row, file in enumerate(files):
        assert opened_by(job, file, Context.parse(f"row={row}")) == SALARY

    assert (peer.calls["encrypt"], peer.calls["decrypt"]) == (1, 1)


def test_every_flipped_bit_of_a_wrap_under_a_job_key_is_refused() -> None:
    kms = service(memory_backend()[0])
    (file,) = job_files(kms, 1)
    wrap, bound = head_of(file).stanzas
    for at in range(len(wrap.body)):
        body = bytearray(wrap.body)
        body[at] ^= 1
        changed = resigned(file, [Stanza(wrap.args, bytes(body)), bound], bytes(16))
        with pytest.raises(DecryptFailed):
            opened_by(kms, changed, Context.parse("row=0"))


def test_a_job_key_is_not_a_file_key() -> None:
    """A wrapped job key, put where a wrapped file key belongs, opens nothing."""
    remote, _ = memory_backend()
    kms = service(remote)
    (file,) = job_files(kms, 1)
    wrap, bound = head_of(file).stanzas
    job = binding.read_wrap(wrap).job
    swapped = resigned(file, [Stanza(wrap.args[:4], job), bound], bytes(16))

    with pytest.raises(DecryptFailed):
        opened_by(kms, swapped, Context.parse("row=0"))


# -- what a header says of its key, and whether a rewrap would say the same, without opening anything ----


def test_own_file_is_on_the_newest_version_until_the_key_is_rotated() -> None:
    kms = service(memory_backend()[0])
    file = sealed_by(kms)
    before = is_newest(kms, file)
    kms.rotate(ADA, "payroll")
    moved = kms.rewrap(ADA, file, ROW_7).ciphertext

    assert (before, is_newest(kms, file), is_newest(kms, moved)) == (True, False, True)


def test_file_that_lacks_a_wrap_or_has_one_too_many_is_not_as_a_new_one(age: Backend) -> None:
    remote = memory_backend()[0]
    alone, both, native = service(remote), service(remote, age), service(age)

    assert [is_newest(alone, sealed_by(kms)) for kms in (alone, both)] == [True, False]
    assert [is_newest(both, sealed_by(kms)) for kms in (alone, both)] == [False, True]
    assert [is_newest(native, sealed_by(kms)) for kms in (native, both)] == [True, False]


def test_other_key_is_not_the_newest_of_this_one(age: Backend) -> None:
    keys = {name: Key(name, age) for name in ("payroll", "other")}
    kms = Kms(Keyring(keys, keys["payroll"]), AllowAll(), MemoryTrail(), SelectionRules())
    head = head_of(sealed_by(kms))

    moved = kms.key_version_status(ADA, head, "other")
    with pytest.raises(UnknownKey):
        kms.key_version_status(ADA, head, "missing")
    with pytest.raises(UnknownKey):
        service(age, key_id="elsewhere").key_version_status(ADA, head, None)

    assert moved
    assert (moved.key_id, moved.newest) == ("payroll", False)


def test_version_that_the_backend_does_not_know_is_not_named(age: Backend, tmp_path: Path) -> None:
    other = service(age_backend(tmp_path / "other", x25519.X25519Identity.generate()))

    found = service(age).key_version_status(ADA, head_of(sealed_by(other)), None)

    assert found
    assert (found.key_version, found.newest) == ("", False)


def test_a_header_says_nothing_of_a_key_that_the_caller_may_not_see(age: Backend) -> None:
    kms = service(age)
    blind = Kms(kms.keyring, allowing(), MemoryTrail(), SelectionRules())

    with pytest.raises(UnknownKey):
        blind.key_version_status(ADA, head_of(sealed_by(kms)), None)
