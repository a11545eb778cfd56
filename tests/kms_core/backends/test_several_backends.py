"""One key id, several backends: files that any of them opens, failover, moves between them, job keys."""

import subprocess
from pathlib import Path
from typing import Final

import pytest

from kms_core.age import x25519
from kms_core.age.header import Stanza
from kms_core.auth.policy import AllowAll
from kms_core.backends import Backend
from kms_core.envelope import binding
from kms_core.http_client import Unreachable
from kms_core.key_selection import SelectionRules
from kms_core.keyring import Key, Keyring
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import BackendUnavailable, DecryptFailed, ForeignRefused, KmsError
from support.age_kms import ADA, ROW, Kept, age_backend, head_of, resigned, types_of
from support.memory_kms import MemoryCipher, memory_backend
from support.programs import program

IDENTITY: Final = x25519.X25519Identity.generate()
SALARY: Final = b"salary"


def service(*backends: Backend, retired: tuple[Backend, ...] = ()) -> Kms:
    """A service with one key of these backends, the first of which names the files."""
    key = Key("payroll", backends[0], accept_foreign=True, others=backends[1:], retired=retired)
    return Kms(Keyring({"payroll": key}, key), AllowAll(), Kept(), SelectionRules())


@pytest.fixture
def age(tmp_path: Path) -> Backend:
    return age_backend(tmp_path / "age", IDENTITY)


def sealed_by(kms: Kms, plaintext: bytes = SALARY, context: Context = ROW) -> bytes:
    return kms.encrypt(ADA, plaintext, context).ciphertext


def opened_by(kms: Kms, file: bytes, context: Context = ROW) -> bytes:
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


def test_a_backend_that_is_silent_is_passed_over(age: Backend) -> None:
    remote, peer = memory_backend()
    kms = service(remote, age)
    file = sealed_by(kms)
    peer.cut()

    opened = kms.decrypt(ADA, file, ROW)
    assert (opened.plaintext, opened.key.backend) == (SALARY, "age")


def test_a_refusal_is_not_passed_over(age: Backend) -> None:
    remote, peer = memory_backend()
    kms = service(remote, age)
    file = sealed_by(kms)
    peer.trouble = DecryptFailed()

    with pytest.raises(DecryptFailed):
        opened_by(kms, file)


def test_encrypt_writes_for_all_or_fails(age: Backend) -> None:
    remote, peer = memory_backend()
    kms = service(age, remote)
    kms.encrypt(ADA, SALARY, ROW)
    peer.cut()

    with pytest.raises(Unreachable):
        kms.encrypt(ADA, SALARY, ROW)


def test_every_backend_that_seals_is_rotated_and_no_other() -> None:
    (first, one), (second, two), (retired, old) = map(memory_backend, ("memory", "second", "retired"))
    service(first, second, retired=(retired,)).rotate(ADA, "payroll")

    assert [peer.calls["rotate"] for peer in (one, two, old)] == [1, 1, 0]


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
        file = kms.rewrap(ADA, file, ROW).ciphertext
        assert file[head_of(file).size :] == payload
        assert opened_by(service(kms.keyring.default.backend), file) == bytes(100_000)


def test_a_wrap_is_for_its_context_stanza_alone() -> None:
    """Whoever learns a file key still cannot bind the file to another context: the peer's AAD says which."""
    remote, peer = memory_backend()
    kms = service(remote)
    file = sealed_by(kms)
    wrap, bound = head_of(file).stanzas
    aad = binding.wrap_aad(binding.KeyRef("acme", "payroll", "1", "memory"), bound)
    file_key = peer.decrypt(wrap.body, "1", aad)
    other = binding.context_stanza(
        file_key, binding.KeyRef("acme", "payroll", "1", "memory"), Context.parse("row=8")
    )

    with pytest.raises(DecryptFailed):
        opened_by(kms, resigned(file, [wrap, other], file_key), Context.parse("row=8"))


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


# -- versions ----------------------------------------------------------------------------------------


def test_versions_are_asked_for_once_and_outlive_the_peer() -> None:
    remote, peer = memory_backend()
    for _ in range(3):
        remote.current_version()
    peer.cut()

    assert remote.current_version() == "1"
    assert peer.calls["versions"] == 1


def test_a_wrap_that_fails_has_the_versions_asked_for_anew() -> None:
    remote, peer = memory_backend()
    kms = service(remote)
    sealed_by(kms)
    peer.rotate()  # elsewhere, and the old version no longer seals
    peer.trouble = BackendUnavailable("below min_encryption_version")
    with pytest.raises(BackendUnavailable):
        sealed_by(kms)
    peer.trouble = None

    assert kms.encrypt(ADA, SALARY, ROW).key.version == "2"


def test_rotation_is_in_use_at_once_and_old_files_open() -> None:
    remote, _ = memory_backend()
    kms = service(remote)
    old = sealed_by(kms)
    remote.rotate()

    assert kms.encrypt(ADA, SALARY, ROW).key.version == "2"
    assert opened_by(kms, old) == SALARY


def test_health_is_a_real_round_trip_and_never_raises() -> None:
    remote, peer = memory_backend()
    assert remote.health_check().healthy
    assert (peer.calls["encrypt"], peer.calls["decrypt"]) == (1, 1)
    other, gone = memory_backend()
    gone.cut()

    assert not other.health_check().healthy


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


def test_a_file_under_a_job_key_opens_by_itself_and_with_its_context_only() -> None:
    kms = service(memory_backend()[0])
    first, second = job_files(kms, 2)

    assert opened_by(kms, second, Context.parse("row=1")) == SALARY
    with pytest.raises(DecryptFailed):
        opened_by(kms, second, Context.parse("row=0"))
    assert head_of(first).stanzas[0].args[:4] == (binding.WRAP, "memory", "payroll", "1")


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


def test_a_job_key_is_for_one_tenant() -> None:
    kms = service(memory_backend()[0])
    (file,) = job_files(kms, 1)

    with pytest.raises(DecryptFailed):
        kms.decrypt(type(ADA)("eve", "rivals", "test"), file, Context.parse("row=0"))


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


def test_the_peer_of_another_service_opens_nothing() -> None:
    theirs = sealed_by(service(memory_backend()[0]))

    with pytest.raises(DecryptFailed):
        opened_by(service(memory_backend()[0]), theirs)
    assert MemoryCipher().keys
