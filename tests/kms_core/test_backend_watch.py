"""Which backends work: who asks them and how often, what is told of it, and for how long it is believed."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from kms_core import backend_watch, keyring, secure_files
from kms_core.age import x25519
from kms_core.backend_watch import BackendWatch
from kms_core.backends.remote import RemoteBackend
from kms_core.http_client import Unreachable
from kms_core.keyring import Key
from kms_protocol.errors import BackendUnavailable, ConfigurationError
from support.age_kms import age_backend, write_pair
from support.clock import Clock
from support.memory_kms import NO_RETRIES, MemoryCipher, memory_backend
from support.settings_files import read
from support.waiting import WAIT_S, until

PAYROLL: Final = ("payroll", "memory", "data")
LOCAL: Final = ("default", "age", "data")
ROOT: Final = ("root", "root-server", "seal")


class Host:
    """One host: a key on a server, a local one, and a root; and any number of processes that watch them."""

    def __init__(self, folder: Path, key: MemoryCipher | None = None, round_s: float = WAIT_S) -> None:
        self.clock, self._folder, self._round_s = Clock(), folder, round_s
        self.key, self.root = key or MemoryCipher(), MemoryCipher("root-server")
        self._age = age_backend(folder / "age", x25519.X25519Identity.generate())
        self.watch = self.process()

    def process(self, roots: Callable[[], dict[str, Key]] | None = None) -> BackendWatch:
        """The watch of one more process, which has checked the health of none yet."""
        remote, root = (RemoteBackend(each, policy=NO_RETRIES) for each in (self.key, self.root))
        keys, path = [Key("payroll", remote), Key("default", self._age)], self._folder / "answers.json"
        opened = roots or (lambda: {"root": Key("root", root)})
        return BackendWatch(path, keys, ([ROOT], opened), self.clock, self._round_s)

    def asked(self) -> list[int]:
        """How often the server of the key and that of the root were asked to wrap."""
        return [self.key.calls["encrypt"], self.root.calls["encrypt"]]

    def next_round(self, watch: BackendWatch | None = None) -> None:
        """Another process asks, unless one is given: it is its turn after 30 seconds."""
        self.clock.now += 30
        (watch or self.process()).round()


def states(watch: BackendWatch) -> dict[tuple[str, str, str], bool | None]:
    return {each.backend: each.healthy for each in watch.condition()}


def names(watch: BackendWatch) -> list[tuple[str, str, str]]:
    return [each.backend for each in watch.down()]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_each_backend_is_asked_roots_too_and_each_has_its_series(host: Host) -> None:
    assert states(host.watch) == dict.fromkeys([PAYROLL, LOCAL, ROOT])
    assert names(host.watch) == []
    host.watch.round()
    host.watch.export()

    assert states(host.watch) == dict.fromkeys([PAYROLL, LOCAL, ROOT], True)
    for key_id, backend, use in (PAYROLL, LOCAL, ROOT):
        labels = {"key_id": key_id, "backend": backend, "use": use}
        assert REGISTRY.get_sample_value("kms_backend_up", labels) == 1


def test_a_root_that_is_away_is_named_and_logged_once_and_so_is_its_return(host: Host) -> None:
    host.watch.round()
    host.root.cut()
    with capture_logs() as logs:
        host.next_round()
        host.next_round()
        (named,) = host.watch.down()
        host.root.trouble = None
        host.next_round()

    assert named.backend == ROOT
    assert [(line["event"], line["key_id"], line["use"], line["reason"]) for line in logs] == [
        ("backend.down", "root", "seal", "cut off"),
        ("backend.up", "root", "seal", ""),
    ]
    assert names(host.watch) == []


def test_the_time_of_a_failure_stays_while_it_lasts(host: Host) -> None:
    host.root.cut()
    host.watch.round()
    (first,) = host.watch.down()
    host.next_round()
    (second,) = host.watch.down()

    assert second.since == first.since


def test_of_several_processes_one_asks_and_all_know(host: Host) -> None:
    other = host.process()
    for _ in range(3):
        host.watch.round()
        other.round()
        host.clock.now += 9

    assert host.asked() == [1, 1]
    assert states(other) == states(host.watch) == dict.fromkeys([PAYROLL, LOCAL, ROOT], True)
    host.next_round()  # as if the others had ended
    host.watch.round()
    assert host.asked()[0] == 2


def test_no_process_asks_while_another_one_does(host: Host, tmp_path: Path) -> None:
    with secure_files.lock(tmp_path / "answers.lock"):
        host.watch.round()

    assert host.asked() == [0, 0]


def test_old_answers_are_not_believed(host: Host) -> None:
    host.watch.round()
    host.clock.now += 91
    host.watch.export()

    assert states(host.watch) == dict.fromkeys([PAYROLL, LOCAL, ROOT])
    value = REGISTRY.get_sample_value(
        "kms_backend_up", dict(zip(("key_id", "backend", "use"), ROOT, strict=True))
    )
    assert value != value  # noqa: PLR0124 -- NaN
    assert names(host.watch) == [PAYROLL, LOCAL, ROOT]
    new = host.process()
    assert names(new) == [], "a process that has just begun waits for the first answers"
    host.clock.now += 91
    assert names(new) == [PAYROLL, LOCAL, ROOT]


def test_answers_of_another_boot_or_version_count_as_none(host: Host, tmp_path: Path) -> None:
    host.watch.round()
    host.clock.now = 5.0
    assert set(states(host.watch).values()) == {None}
    host.watch.round()
    assert set(states(host.watch).values()) == {True}

    (tmp_path / "answers.json").write_bytes(b'{"asked_at": "yesterday"}')
    assert set(states(host.watch).values()) == {None}
    host.watch.round()
    assert set(states(host.watch).values()) == {True}


class Hanging(MemoryCipher):
    """A server that answers nothing until it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = threading.Event()

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        self.calls["encrypt"] += 1
        assert self.answer.wait(WAIT_S)
        return super().encrypt(secret, version, aad)


def test_a_server_that_hangs_is_down_delays_no_other_and_is_asked_once(tmp_path: Path) -> None:
    hanging = Hanging()
    host = Host(tmp_path, hanging, round_s=0.0)

    def told() -> bool:
        host.next_round(host.watch)
        return states(host.watch) == {PAYROLL: False, LOCAL: True, ROOT: True}

    until(told, "the others were asked", poll_s=0.001)
    for _ in range(3):
        host.next_round(host.watch)
    until(lambda: sum("(_ask)" in each.name for each in threading.enumerate()) == 1, "one thread hangs")
    hanging.answer.set()


def test_a_server_that_is_silent_is_asked_for_one_of_its_keys(tmp_path: Path) -> None:
    a, b = ("a", "memory", "data"), ("b", "memory", "data")
    for number, (trouble, expected) in enumerate(
        [
            (Unreachable("cut off"), {a: False, b: False}),
            (BackendUnavailable("refused"), {a: False, b: True}),
        ]
    ):
        (one, first), (two, second) = memory_backend(), memory_backend()
        first.trouble = trouble
        keys = [Key("a", one), Key("b", two)]
        watch = BackendWatch(tmp_path / f"answers-{number}.json", keys, ([], dict))
        watch.round()

        assert states(watch) == expected
        assert bool(second.calls) is expected[b]


def test_a_root_that_cannot_be_opened_is_down_and_other_keys_are_asked(host: Host) -> None:
    def missing() -> dict[str, Key]:
        raise ConfigurationError("its file is on a stick")

    watch = host.process(missing)
    watch.round()

    assert states(watch) == {PAYROLL: True, LOCAL: True, ROOT: False}


def test_settings_name_the_roots_and_each_backend(tmp_path: Path) -> None:
    for name in ("state/age", "root"):
        write_pair(tmp_path / name, x25519.X25519Identity.generate())
    text = (
        f'[kms.transit]\naddress = "http://127.0.0.1:9"\ntoken = "t"\n[kms.keys]\n'
        f'root = {{ uri = ["age://{tmp_path}/root/private_key.txt", "transit:root"], use = "seal" }}\n'
    )
    settings = read(tmp_path, text, state_dir=tmp_path / "state")
    watch = backend_watch.build(settings, keyring.build(settings))

    assert list(states(watch)) == [LOCAL, ("root", "age", "seal"), ("root", "transit", "seal")]


def test_nothing_secret_is_in_the_file(host: Host, tmp_path: Path) -> None:
    host.root.cut()
    host.watch.round()
    found = msgspec.json.decode((tmp_path / "answers.json").read_bytes())

    assert set(found) == {"asked_at", "states"}
    assert {key for state in found["states"] for key in state} == {"backend", "healthy", "since"}
    assert (tmp_path / "answers.json").stat().st_mode & 0o777 == 0o600
