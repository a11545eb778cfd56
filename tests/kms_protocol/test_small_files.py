"""Files of settings, keys and credentials: huge ones, and what is no file, are refused without waiting."""

import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kms_cli import age_files
from kms_client import Client
from kms_core.audit import segments
from kms_core.audit.keys import PublicKeys
from kms_core.auth import tokens
from kms_core.auth.jwks import FileKeys
from kms_core.backends.key_files import KeyFiles
from kms_core.envelope.sealed_files import read_identities
from kms_core.jobs.events.webhook import read_secret
from kms_core.jobs.submission import celery_intake
from kms_core.s3.connection import credentials_from_file
from kms_core.settings.load import load
from kms_protocol import small_files
from kms_protocol.errors import KmsError
from support.waiting import RealTime

MIB = 1024 * 1024
THREE_GIB = 3 * 1024 * MIB


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A sparse file of 3 GiB, which takes no room on the disk."""
    path = tmp_path / "huge"
    path.touch(0o600)
    os.truncate(path, THREE_GIB)
    return path


def test_a_file_of_a_mebibyte_is_read_and_a_byte_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * MIB)
    assert small_files.read(path) == b"x" * MIB

    path.write_bytes(b"x" * (MIB + 1))
    with pytest.raises(OSError, match="it is above 1024 KiB"):
        small_files.read(path)


def test_a_pipe_is_read_to_its_end() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "wb", buffering=0) as file:
        for _ in range(3):
            file.write(b"part ")
        os.close(os.dup(reader))
        file.close()
        assert small_files.read(Path(f"/dev/fd/{reader}")) == b"part part part "


READS: dict[str, Callable[[Path], object]] = {
    "settings": lambda path: load(path, {"HOME": "/home/ada"}),
    "token": lambda path: Client("http://127.0.0.1:1", token_file=path, retries=0).status(),
    "tokens": tokens.read,
    "webhook secret": read_secret,
    "intake key": celery_intake.recipient,
    "audit keys": PublicKeys.read,
    "issuer keys": FileKeys,
    "key of the service": lambda path: KeyFiles(path).read(),
    "identities that open sealed keys": read_identities,
    "secret of a bucket": lambda path: credentials_from_file("id", path, "kms.x", strict=False),
    "identities of a command": lambda path: age_files.identities([path]),
    "recipients of a command": lambda path: age_files.recipients([], [path]),
}


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def a_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)  # the path may be longer than the name of a socket
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


NO_FILES: tuple[Callable[[Path], object], ...] = (
    os.mkfifo, Path.mkdir, a_link_to_itself, a_broken_link, a_device, a_socket
)  # fmt: skip


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_is_no_file_is_refused_at_once(
    read: Callable[[Path], object], make: Callable[[Path], object], tmp_path: Path
) -> None:
    """A pipe that no program writes to would be waited for without end."""
    make(tmp_path / "file")

    with pytest.raises((KmsError, OSError)):
        read(tmp_path / "file")


def test_a_pipe_without_a_writer_is_told_from_an_empty_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()

    assert small_files.read(tmp_path / "empty") == b""
    with pytest.raises(OSError, match="it is a pipe, and no program has written to it"):
        small_files.read(tmp_path / "pipe")


def test_a_pipe_in_place_of_an_audit_log_is_not_waited_for(tmp_path: Path) -> None:
    """It may take the place of a file between the listing of the directory and the reading."""
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(OSError, match="seek"):
        list(segments.lines_of(tmp_path / "pipe"))


SOURCE = Path(small_files.__file__).parents[1]
OPENS = re.compile(r"""\.open\("r|\.read_bytes\(\)|\.read_text\(""")
OTHERS = {
    "kms_api/app.py": "its own package",
    "kms_api/ui/render.py": "its own package",
    "kms_cli/backup/files.py": "the private directory of the embedded server",
    "kms_cli/command_line.py": "its own package",
    "kms_cli/commands/completion.py": "its own package",
    "kms_cli/commands/config.py": "its own package",
    "kms_cli/commands/migrate.py": "the input of the user, which may be a pipe that is written to later",
    "kms_cli/commands/migrate_sops.py": "checked to be a file",
    "kms_cli/local/valkey.py": "the private directory of the embedded server",
    "kms_core/audit/verification/scan.py": "listed as a file",
    "kms_core/audit/verification/verify.py": "listed as a file",
    "kms_core/backends/aws/client.py": "its own package",
    "kms_core/container.py": "checked to be a file",
    "kms_core/jobs/hosts/notes.py": "/proc",
    "kms_core/jobs/store/scripts.py": "its own package",
    "kms_core/observability/degraded.py": "its own package",
    "kms_core/payload/files.py": "/proc",
    "kms_protocol/error_texts.py": "its own package",
    "kms_core/programs/supervisor.py": "a log that it opened itself",
}
"""Modules that open a file by another way, and what it is."""


def test_each_other_way_to_open_a_file_is_known() -> None:
    found = {str(path.relative_to(SOURCE)): path.read_text() for path in SOURCE.rglob("*.py")}

    assert {name for name, text in found.items() if OPENS.search(text)} == OTHERS.keys()


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_huge_file_is_refused_at_once(read: Callable[[Path], object], huge: Path) -> None:
    began = RealTime.processor_s()

    with pytest.raises((KmsError, OSError)):
        read(huge)

    assert RealTime.processor_s() - began < 1


def test_huge_settings_take_no_memory(huge: Path) -> None:
    most = 1024 * MIB
    done = subprocess.run(
        [sys.executable, "-m", "kms_cli.main", "config", "lint", "--config", str(huge)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
    )

    assert (done.returncode, done.stdout) == (78, "")
    assert "it is above 1024 KiB" in done.stderr
