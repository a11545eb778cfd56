"""What has to be on disk before it counts: files, and the entries of the directories that name them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kms_core.audit.keys import Concealer, Signer
from kms_core.audit.maintenance import FolderSink
from kms_core.auth import tokens
from kms_core.auth.tokens import TokenRequest
from support.audit_logs import Place, audit_section, record

Event = tuple[str, str, int]
"""A call, the path that it is about, and the size of the file then, in bytes (of a directory 0)."""


def named(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}").readlink()


class Calls:
    """The calls of this process that put files and their names on disk, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.made: list[Event] = []
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, self._syncing(getattr(os, name)))
        for name in ("replace", "link"):
            patch.setattr(os, name, self._naming(name, getattr(os, name)))

    def _syncing(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def recorded(fd: int) -> None:
            call(fd)
            path = named(fd)
            self.made.append(("sync", path.name, 0 if path.is_dir() else os.fstat(fd).st_size))

        return recorded

    def _naming(self, name: str, call: Callable[..., None]) -> Callable[..., None]:
        def recorded(source: Any, target: Any, **more: Any) -> None:  # noqa: ANN401 -- as os has it
            call(source, target, **more)
            self.made.append((name, Path(target).name, 0))

        return recorded


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def create_token(path: Path) -> None:
    tokens.create(path, TokenRequest(name="ci", tenant="default", scopes=("status",), ttl=None))


@pytest.mark.parametrize(
    ("make", "naming"),
    [(Concealer.at, "link"), (Signer.at, "link"), (create_token, "replace")],
    ids=["hiding", "signing", "tokens"],
)
def test_keys_and_tokens_are_on_disk_before_they_count(
    tmp_path: Path, calls: Calls, make: Callable[[Path], object], naming: str
) -> None:
    """A power cut would take the key of values and lines, or bring back a revoked token."""
    path = tmp_path / "made.key"
    make(path)
    temporary = calls.made[0][1]

    assert temporary.startswith(".made.key.")
    assert calls.made == [
        ("sync", temporary, path.stat().st_size),
        (naming, path.name, 0),
        ("sync", tmp_path.name, 0),
    ]


def test_a_folder_that_is_made_for_tokens_keeps_its_name(tmp_path: Path, calls: Calls) -> None:
    create_token(tmp_path / "made" / "tokens.json")

    assert calls.made[0] == ("sync", tmp_path.name, 0)


def test_the_end_of_a_log_is_on_disk_when_it_is_closed(place: Place, calls: Calls) -> None:
    log = place.trail(audit_section(durability="fsync"))
    log.append(record(1))
    calls.made.clear()
    log.close()
    (file,) = place.files()

    assert calls.made == [("sync", file.name, file.stat().st_size)]


def test_a_new_file_of_anchors_keeps_its_name(place: Place, calls: Calls) -> None:
    log = place.trail()
    log.append(record(1))
    log.close()
    anchors = FolderSink(place.at / "anchors")
    calls.made.clear()
    anchors.put(log.last_signed)
    anchors.put(log.last_signed)
    (file,) = (place.at / "anchors").iterdir()
    size = len(log.last_signed)

    assert calls.made == [
        ("sync", file.name, size),
        ("sync", "anchors", 0),
        ("sync", file.name, 2 * size),
    ]
