"""Files of settings, keys and credentials have a bound: a huge one is refused before it fills memory."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kms_client import Client
from kms_core.audit.keys import PublicKeys
from kms_core.auth import tokens
from kms_core.jobs.events.webhook import read_secret
from kms_core.jobs.submission import celery_intake
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
}


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
