"""Private files: written whole, and which modes keep a secret to its owner or may share it with a group."""

import os
import stat
from pathlib import Path

import pytest

from kms_core import secure_files
from kms_core.secure_files import is_open
from kms_protocol import whole_files
from kms_protocol.errors import ConfigurationError

ROOT, SERVICE, STRANGER = 0, 10001, 1000


def found(mode: int, owner: int) -> os.stat_result:
    return os.stat_result((0o100000 | mode, 0, 0, 1, owner, 10001, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("mode", "owner", "reader", "others_read"),
    [
        (0o600, SERVICE, SERVICE, False),
        (0o700, SERVICE, SERVICE, False),
        (0o400, ROOT, SERVICE, False),
        (0o440, ROOT, SERVICE, False),  # with the group of a Kubernetes Secret or a credential
        (0o400, ROOT, ROOT, False),
        (0o640, SERVICE, SERVICE, True),
        (0o440, STRANGER, SERVICE, True),
        (0o440, ROOT, ROOT, True),
        (0o460, ROOT, SERVICE, True),
        (0o450, ROOT, SERVICE, True),
        (0o444, ROOT, SERVICE, True),
        (0o604, SERVICE, SERVICE, True),
    ],
)
def test_a_file_is_private_or_open_to_others(
    mode: int, owner: int, reader: int, *, others_read: bool
) -> None:
    assert is_open(found(mode, owner), reader) == others_read


# -- writing -------------------------------------------------------------------------------------------


def test_a_written_file_replaces_another_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o644)
    secure_files.write(path, b"new")

    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_not_created_again(tmp_path: Path) -> None:
    path = tmp_path / "secret"

    assert secure_files.create(path, b"first")
    assert not secure_files.create(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"old")

    def fail() -> None:
        with whole_files.replacing(path) as file:
            file.write(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_excludes_others_removes_the_temporary_file_of_a_killed_one(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    (tmp_path / ".secret.tmp").write_bytes(b"half a secr")
    secure_files.write(path, b"new", locked=True)

    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_no_link_in_the_place_of_the_temporary_file_is_followed(tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / "secret"
    (tmp_path / ".secret.tmp").symlink_to(other)
    secure_files.write(path, b"new", locked=True)

    assert not other.exists()


# -- checks --------------------------------------------------------------------------------------------


def test_a_secret_that_others_can_read_is_a_warning_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0o644)
    warnings: list[tuple[str, dict[str, str]]] = []

    def warn(event: str, **fields: str) -> None:
        warnings.append((event, fields))

    secure_files.check_secret(path, warn, "secret.open", strict=False)
    with pytest.raises(ConfigurationError, match=rf"kms.x: .*mode 0644.*chmod 600 \'{path}\'"):
        secure_files.check_secret(path, warn, "secret.open", strict=True, setting="kms.x")
    path.chmod(0o600)
    secure_files.check_secret(path, warn, "secret.open", strict=True)

    assert [(event, fields["mode"]) for event, fields in warnings] == [("secret.open", "0644")]


def test_a_pipe_counts_as_private() -> None:
    reader, writer = os.pipe()
    os.fchmod(reader, 0o666)

    assert secure_files.open_to_others(reader) == 0
    os.close(reader)
    os.close(writer)
