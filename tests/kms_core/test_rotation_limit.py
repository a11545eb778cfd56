"""How many versions of a key callers make in an hour: counted by what backends tell, else by process."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from kms_core.age import x25519
from kms_core.audit import AuditWriter
from kms_core.auth.policy import AllowAll, Principal
from kms_core.backends import Backend
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.key_rotation import SCHEDULE
from kms_core.key_selection import SelectionRules
from kms_core.keyring import Key, Keyring
from kms_core.rotation_limit import RotationLimit
from kms_core.service import Kms
from kms_protocol.errors import BackendUnavailable, RateLimited
from support.age_kms import ADA, Kept, age_backend
from support.memory_kms import MemoryCipher, memory_backend

EVE: Final = Principal("eve", "other", "token:eve")
MOST: Final = 3


class Clock:
    """Seconds since the epoch, moved by hand."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return datetime.now(UTC).timestamp() + self.ahead_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def service(clock: Clock, *backends: Backend, trail: AuditWriter | None = None, every_days: int = 0) -> Kms:
    """As one process has it: what it remembers is its own."""
    key, other = Key("payroll", backends[0], others=backends[1:]), Key("other", memory_backend()[0])
    rules = SelectionRules(rotations=RotationLimit(MOST, every_days, clock))
    return Kms(Keyring({"payroll": key, "other": other}, key), AllowAll(), trail or Kept(), rules)


@pytest.fixture
def age(tmp_path: Path) -> AgeBackend:
    return age_backend(tmp_path / "keys", x25519.X25519Identity.generate())


@pytest.fixture
def silent() -> tuple[Backend, MemoryCipher]:
    """A backend that tells no creation times."""
    return memory_backend()


def waits_s(kms: Kms, who: Principal = ADA) -> float:
    with pytest.raises(RateLimited) as caught:
        kms.rotate(who, "payroll")
    assert "max_per_hour" in caught.value.detail
    return caught.value.retry_after_s


def made_hours_ago(folder: Path, *hours: float) -> AgeBackend:
    """A key whose versions are so old; the last is in use."""
    folder.mkdir(mode=0o700)
    identities = [x25519.X25519Identity.generate() for _ in hours]
    lines = []
    for identity, ago in zip(identities, hours, strict=True):
        made = (datetime.now(UTC) - timedelta(hours=ago)).isoformat(timespec="seconds")
        lines += [f"# created: {made}", identity.export()]
    backend = age_backend(folder, *identities)
    (folder / "private_key.txt").write_text("\n".join(lines) + "\n")
    return backend


def test_a_key_gets_so_many_versions_in_an_hour(clock: Clock, age: AgeBackend) -> None:
    trail = Kept()
    kms = service(clock, age, trail=trail)
    for _ in range(MOST):
        kms.rotate(ADA, "payroll")

    assert 3590 <= waits_s(kms) <= 3600
    assert waits_s(kms, EVE) > 0, "it is the key's limit, whoever asks"
    assert len(age.versions()) == 1 + MOST
    assert [line["result"] for line in trail.lines[-2:]] == ["rate_limited"] * 2
    kms.rotate(ADA, "other")
    clock.ahead_s += 3601
    kms.rotate(ADA, "payroll")


def test_processes_and_hosts_that_share_a_key_share_its_limit(
    clock: Clock, age: AgeBackend, tmp_path: Path
) -> None:
    files = KeyFiles(tmp_path / "keys/private_key.txt", tmp_path / "keys/public_key.txt")
    for _ in range(MOST):
        service(clock, AgeBackend(files)).rotate(ADA, "payroll")

    assert waits_s(service(clock, AgeBackend(files))) > 3500
    assert len(age.versions()) == 1 + MOST


def test_the_wait_ends_when_the_oldest_of_them_is_an_hour_old(clock: Clock, tmp_path: Path) -> None:
    kms = service(clock, made_hours_ago(tmp_path / "old", 30, 2, 0.9, 0.5, 0.1))

    assert waits_s(kms) == pytest.approx(360, abs=5)
    clock.ahead_s += 366
    kms.rotate(ADA, "payroll")
    assert waits_s(kms) == pytest.approx(0.5 * 3600 - 366, abs=5)


def test_where_there_are_more_than_may_be_the_wait_ends_with_enough_of_them(
    clock: Clock, tmp_path: Path
) -> None:
    kms = service(clock, made_hours_ago(tmp_path / "old", 30, 0.9, 0.8, 0.5, 0.3, 0.1))

    assert waits_s(kms) == pytest.approx(1800, abs=5)


def test_a_clock_that_is_behind_makes_nobody_wait_longer_than_an_hour(clock: Clock, tmp_path: Path) -> None:
    assert waits_s(service(clock, made_hours_ago(tmp_path / "old", 5, -8, -9, -10))) == 3600


def test_a_new_key_has_all_its_rotations_left(clock: Clock, tmp_path: Path) -> None:
    kms = service(clock, made_hours_ago(tmp_path / "new", 0))
    for _ in range(MOST):
        kms.rotate(ADA, "payroll")

    waits_s(kms)


def test_a_backend_that_tells_no_times_is_limited_by_process(
    clock: Clock, silent: tuple[Backend, MemoryCipher]
) -> None:
    backend, cipher = silent
    kms = service(clock, backend)
    for _ in range(MOST):
        kms.rotate(ADA, "payroll")

    assert waits_s(kms) > 3590
    assert len(cipher.keys) == 1 + MOST
    service(clock, backend).rotate(ADA, "payroll")
    clock.ahead_s += 3601
    kms.rotate(ADA, "payroll")


def test_of_several_backends_the_one_with_the_most_decides(
    clock: Clock, silent: tuple[Backend, MemoryCipher], tmp_path: Path
) -> None:
    kms = service(clock, silent[0], made_hours_ago(tmp_path / "old", 30, 0.3, 0.2, 0.1))

    assert waits_s(kms) == pytest.approx(0.7 * 3600, abs=5)
    assert len(silent[1].keys) == 1


def test_calls_at_the_same_moment_are_counted_one_by_one(
    clock: Clock, silent: tuple[Backend, MemoryCipher]
) -> None:
    kms = service(clock, silent[0])

    def rotate(_: int) -> bool:
        try:
            kms.rotate(ADA, "payroll")
        except RateLimited:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(rotate, range(40))) == MOST


def test_a_rotation_that_fails_costs_nothing(clock: Clock, silent: tuple[Backend, MemoryCipher]) -> None:
    backend, cipher = silent
    kms = service(clock, backend)
    for _ in range(2 * MOST):
        cipher.trouble = BackendUnavailable("token refused")
        with pytest.raises(BackendUnavailable):
            kms.rotate(ADA, "payroll")
    cipher.trouble = None
    for _ in range(MOST):
        kms.rotate(ADA, "payroll")

    waits_s(kms)


# -- the schedule ------------------------------------------------------------------------------------------


def test_the_schedule_is_neither_limited_nor_counted(
    clock: Clock, silent: tuple[Backend, MemoryCipher]
) -> None:
    kms = service(clock, silent[0])
    for _ in range(2 * MOST):
        kms.rotate(SCHEDULE, "payroll")
    for _ in range(MOST):
        kms.rotate(ADA, "payroll")

    waits_s(kms)
    kms.rotate(SCHEDULE, "payroll")


def test_a_version_that_was_due_by_age_leaves_callers_their_number(clock: Clock, tmp_path: Path) -> None:
    kms = service(clock, made_hours_ago(tmp_path / "old", 40 * 24), every_days=30)
    kms.rotate(SCHEDULE, "payroll")
    for _ in range(MOST):
        kms.rotate(ADA, "payroll")

    waits_s(kms)
