"""The process that opens sealed key files: when it asks a root, and what the other processes see."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from kms_core.envelope.sealed_files import FileSealer, NotOpenedYet
from kms_core.opened_files import InheritedFiles, KeyOpener
from kms_core.secure_memory import SharedSecrets
from kms_protocol.errors import BackendUnavailable, ConfigurationError
from support.clock import Clock
from support.documents import FaultySealer

CONTENT: Final = b"AGE-SECRET-KEY-1TEST\n"


@pytest.fixture
def sealer(tmp_path: Path) -> FaultySealer:
    return FaultySealer(tmp_path / "root")


def opener(
    folder: Path, sealer: FileSealer, *names: str, **clock: Callable[[], float]
) -> tuple[KeyOpener, SharedSecrets]:
    memory = SharedSecrets.create()
    paths = {name: folder / name for name in names}
    for name, path in paths.items():
        path.write_bytes(sealer.seal(name, CONTENT + name.encode(), "root"))
    return KeyOpener(paths, sealer, memory, look_s=0.01, **clock), memory


def reader(memory: SharedSecrets, sealer: FileSealer) -> InheritedFiles:
    return InheritedFiles(memory, sealer)


def test_a_file_is_opened_once_until_it_changes(tmp_path: Path, sealer: FaultySealer) -> None:
    thread, memory = opener(tmp_path, sealer, "a", "b")
    for _ in range(5):
        thread.round()

    assert sealer.calls == ["a", "b"]
    sealed = (tmp_path / "a").read_bytes()
    assert reader(memory, sealer).open("a", sealed) == CONTENT + b"a"

    (tmp_path / "a").write_bytes(sealer.seal("a", b"later", "root"))
    changed = (tmp_path / "a").read_bytes()
    inherited = reader(memory, sealer)
    with pytest.raises(NotOpenedYet):
        inherited.open("a", changed)
    thread.round()
    assert inherited.open("a", changed) == b"later"
    assert sealer.calls == ["a", "b", "a"]
    assert memory.generation() == 2, "nothing is written without a change"


def test_failures_are_retried_ever_more_rarely(tmp_path: Path, sealer: FaultySealer, clock: Clock) -> None:
    thread, memory = opener(tmp_path, sealer, "a", clock=clock)
    sealer.trouble = BackendUnavailable("the root is away")
    for _ in range(600):  # five minutes
        thread.round()
        clock.now += 0.5
    sealed = (tmp_path / "a").read_bytes()

    assert 7 <= len(sealer.calls) <= 15
    with pytest.raises(BackendUnavailable, match="the root is away"):
        reader(memory, sealer).open("a", sealed)

    sealer.trouble = None
    clock.now += 120
    thread.round()
    assert reader(memory, sealer).open("a", sealed) == CONTENT + b"a"


def test_a_new_file_is_not_kept_waiting(tmp_path: Path, sealer: FaultySealer, clock: Clock) -> None:
    thread, memory = opener(tmp_path, sealer, "a", clock=clock)
    sealer.trouble = BackendUnavailable("away")
    for _ in range(8):
        thread.round()
        clock.now += 60
    sealer.trouble = None
    thread.round()
    (tmp_path / "a").write_bytes(sealer.seal("a", b"mended", "root"))
    thread.round()

    assert reader(memory, sealer).open("a", (tmp_path / "a").read_bytes()) == b"mended"


def test_a_refusal_stops_the_start_and_names_the_file(tmp_path: Path, sealer: FaultySealer) -> None:
    thread, _ = opener(tmp_path, sealer, "a", "b")
    (tmp_path / "a").write_bytes((tmp_path / "b").read_bytes())

    with pytest.raises(ConfigurationError) as raised:
        thread.open_all()
    assert str(tmp_path / "a") in raised.value.detail
    assert "was not sealed as a" in raised.value.detail


def test_an_exchanged_file_is_refused_while_running(tmp_path: Path, sealer: FaultySealer) -> None:
    thread, memory = opener(tmp_path, sealer, "a", "b")
    thread.round()
    (tmp_path / "a").write_bytes((tmp_path / "b").read_bytes())
    thread.round()

    with pytest.raises(ConfigurationError, match="was not sealed as a"):
        reader(memory, sealer).open("a", (tmp_path / "b").read_bytes())
    assert reader(memory, sealer).open("b", (tmp_path / "b").read_bytes()) == CONTENT + b"b"


def test_the_start_waits_for_keys_of_the_service_only(
    tmp_path: Path, sealer: FaultySealer, clock: Clock
) -> None:
    sealed = sealer.seal("kms:spool", CONTENT, "root")
    sealer.trouble = BackendUnavailable("away")

    def until_the_third_try() -> float:
        clock.now += 1
        tries = sealer.calls.count("kms:spool")
        sealer.trouble = None if tries >= 3 else sealer.trouble
        return clock.now

    thread, memory = opener(tmp_path, sealer, "a", "kms:spool", clock=until_the_third_try)
    (tmp_path / "kms:spool").write_bytes(sealed)
    thread.open_all()

    assert sealer.calls.count("kms:spool") == 4
    assert reader(memory, sealer).open("kms:spool", sealed) == CONTENT


def test_the_start_does_not_wait_for_other_keys(tmp_path: Path, sealer: FaultySealer) -> None:
    thread, memory = opener(tmp_path, sealer, "a")
    sealer.trouble = BackendUnavailable("away")
    thread.open_all()

    with pytest.raises(BackendUnavailable):
        reader(memory, sealer).open("a", (tmp_path / "a").read_bytes())


def test_no_repr_shows_content(tmp_path: Path, sealer: FaultySealer) -> None:
    thread, _ = opener(tmp_path, sealer, "a")
    thread.round()

    assert "SECRET" not in repr(thread.found)
    assert "SECRET" not in repr(sealer)
