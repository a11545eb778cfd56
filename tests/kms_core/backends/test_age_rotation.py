"""Rotation of an age key in its files: in use at once, old files open, any moment in between is readable."""

import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kms_core.age import mlkem768x25519, x25519
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.envelope.binding import KeyRef, version_of
from kms_protocol.errors import BackendUnavailable, TooManyVersions
from support.age_kms import age_backend, write_identities
from support.disk_trace import recorded
from support.programs import program


def ref(backend: AgeBackend) -> KeyRef:
    return KeyRef("acme", "default", backend.versions()[-1].version, "age")


@pytest.mark.parametrize("kind", [x25519.X25519Identity, mlkem768x25519.HybridIdentity])
def test_a_new_identity_of_the_same_type_is_in_use_and_the_old_one_opens(
    tmp_path: Path, kind: type[x25519.X25519Identity | mlkem768x25519.HybridIdentity]
) -> None:
    backend = age_backend(tmp_path, kind.generate())
    old = ref(backend)
    stanza = backend.wrap(bytes(16), old, b"")
    made = backend.rotate()

    assert backend.versions()[-1].version == made.version != old.version
    assert made.created_at is not None
    assert backend.unwrap(stanza, old, b"") == bytes(16)
    assert backend.wrap(bytes(16), ref(backend), b"").type == stanza.type


def test_other_processes_and_stock_tools_read_what_rotation_wrote(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, x25519.X25519Identity.generate())
    made = backend.rotate()
    again = AgeBackend(KeyFiles(tmp_path / "private_key.txt", tmp_path / "public_key.txt"))

    assert again.versions()[-1].version == made.version
    assert [version.version for version in again.versions()] == [v.version for v in backend.versions()]
    told = subprocess.run(
        [program("age-keygen"), "-y", tmp_path / "private_key.txt"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.splitlines()[-1] == (tmp_path / "public_key.txt").read_text().strip()


def test_mode_and_other_lines_stay(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, x25519.X25519Identity.generate())
    private = tmp_path / "private_key.txt"
    private.write_text("# ours since 2024\n" + private.read_text().rstrip("\n"))
    private.chmod(0o400)
    backend.rotate()

    assert private.read_text().startswith("# ours since 2024\n")
    assert stat.S_IMODE(private.stat().st_mode) == 0o400
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".new")]


def test_a_rotation_is_in_use_at_once_however_seldom_files_are_looked_at(tmp_path: Path) -> None:
    """Here without a public file, where the last identity is in use."""
    private = tmp_path / "private_key.txt"
    write_identities(private, x25519.X25519Identity.generate())
    backend = AgeBackend(KeyFiles(private), recheck_s=3600)
    before = backend.versions()[-1].version

    assert backend.rotate().version == backend.versions()[-1].version != before


def test_rotations_at_once_lose_none(tmp_path: Path) -> None:
    first = x25519.X25519Identity.generate()
    age_backend(tmp_path, first)
    files = KeyFiles(tmp_path / "private_key.txt", tmp_path / "public_key.txt")
    backends = [AgeBackend(files, recheck_s=0) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda backend: backend.rotate(), backends))
    versions = [version.version for version in AgeBackend(files).versions()]

    assert len(versions) == 5
    assert version_of(first.recipient) in versions


def test_a_crash_between_the_two_files_leaves_the_old_recipient_in_use(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, x25519.X25519Identity.generate())
    public, before = tmp_path / "public_key.txt", ref(backend)
    recipient = public.read_text()
    backend.rotate()
    public.write_text(recipient)  # as if the second rename had not happened

    assert backend.versions()[-1].version == before.version


def test_a_key_that_cannot_be_written_stays_in_use_and_says_why(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, x25519.X25519Identity.generate())
    before = backend.versions()[-1].version
    (tmp_path / "private_key.txt").rename(tmp_path / "elsewhere.txt")

    with pytest.raises(BackendUnavailable, match="Cannot rotate the age key"):
        backend.rotate()
    assert backend.versions()[-1].version == before


def test_a_key_file_that_does_not_open_is_no_error_of_the_settings(tmp_path: Path) -> None:
    """Those end a start; during a request their text, which names files, would be in the answer."""
    backend = age_backend(tmp_path, x25519.X25519Identity.generate())
    before = backend.versions()[-1].version
    private = tmp_path / "private_key.txt"
    private.write_bytes(b"age-encryption.org/v1\n")

    with pytest.raises(BackendUnavailable, match="Cannot rotate the age key"):
        backend.rotate()
    assert private.read_bytes() == b"age-encryption.org/v1\n"
    assert backend.versions()[-1].version == before


@pytest.mark.parametrize("kind", [x25519.X25519Identity, mlkem768x25519.HybridIdentity])
def test_no_rotation_makes_a_file_larger_than_what_is_read(
    tmp_path: Path, kind: type[x25519.X25519Identity | mlkem768x25519.HybridIdentity]
) -> None:
    """A key file of more than 1 MiB is read by no process, and stops each start."""
    backend = age_backend(tmp_path, kind.generate())
    private, public = tmp_path / "private_key.txt", tmp_path / "public_key.txt"
    line = f"#{'-' * 62}\n"
    private.write_text(line * ((2**20 - 4096) // 64) + private.read_text())
    before = private.read_bytes(), public.read_bytes()
    for _ in range(50):
        with pytest.raises(TooManyVersions):
            backend.rotate()

    assert (private.read_bytes(), public.read_bytes()) == before
    assert AgeBackend(KeyFiles(private, public)).versions()[-1].version == backend.versions()[-1].version


def test_a_key_with_two_thousand_versions_is_rotated(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, x25519.X25519Identity.generate())
    private = tmp_path / "private_key.txt"
    private.write_text(f"#{'-' * 182}\n" * 2000 + private.read_text())

    assert backend.rotate().version == backend.versions()[-1].version


@pytest.mark.parametrize("apart", [False, True], ids=["one folder", "two folders"])
def test_a_recipient_is_replaced_once_its_identity_survives_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, apart: bool
) -> None:
    private, public = tmp_path / "private_key.txt", tmp_path / "public_key.txt"
    backend = age_backend(tmp_path, x25519.X25519Identity.generate())
    if apart:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        private = private.rename(elsewhere / private.name)
        backend = AgeBackend(KeyFiles(private, public))
    disk = recorded(monkeypatch)
    backend.rotate()

    disk.assert_survives(private)
    disk.assert_survives(public)
    assert ("sync", private.parent) in disk.steps[: disk.steps.index(("name", public))]
