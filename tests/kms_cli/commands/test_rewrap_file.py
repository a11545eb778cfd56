"""``kms rewrap-file``: only the header travels, the payload is copied, the target is absent or complete."""

import base64
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from kms_cli import age_files
from kms_cli.commands.rewrap_file import copy_payload
from kms_cli.terminal import Meter
from kms_core.age import header
from kms_core.age.header import FILE_LIMITS, Header
from kms_protocol.errors import InvalidRequest
from support.cli.fixtures import RunningService
from support.cli.offline import Done, Workspace

Answer = Callable[[str, dict[str, str]], dict[str, str]]
MIB = 1024 * 1024
OLD, NEW = "env=dev", "env=prod"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class ServiceAndFiles:
    """A workspace beside a running service, whose key it may read."""

    workspace: Workspace
    place: RunningService

    @property
    def key(self) -> str:
        return str(self.place.state_dir / "age" / "private_key.txt")

    def seal(self, name: str, size: int, context: str = OLD) -> bytes:
        plaintext = os.urandom(size)
        self.workspace.stdout_of("seal", "-i", self.key, "--context", context, "-o", name, given=plaintext)
        return plaintext

    def open(self, name: str, context: str) -> bytes:
        return self.workspace.stdout_of("open", "-i", self.key, "--context", context, name)

    def rewrap(self, *args: str, given: bytes = b"") -> Done:
        return self.workspace.kms("rewrap-file", *args, given=given, KMS_SERVICE_URL=self.place.url)


@pytest.fixture
def service_and_files(workspace: Workspace, real_service: RunningService) -> ServiceAndFiles:
    return ServiceAndFiles(workspace, real_service)


def head_of(file: bytes) -> Header:
    return header.parse(file, FILE_LIMITS)


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, 5 * MIB + 3])
def test_the_context_changes_and_the_payload_does_not(service_and_files: ServiceAndFiles, size: int) -> None:
    plaintext = service_and_files.seal("old", size)
    done = service_and_files.rewrap("--context", OLD, "--new-context", NEW, "-o", "new", "old")
    old, new = service_and_files.workspace.read("old"), service_and_files.workspace.read("new")

    assert done.returncode == 0, done.stderr
    assert b"kms: rewrapped old to new (key default, version " in done.stderr
    assert head_of(new).signed != head_of(old).signed
    assert new[head_of(new).size :] == old[head_of(old).size :]
    assert (head_of(new).size == 4096) == (size >= MIB)
    assert service_and_files.open("new", NEW) == plaintext
    assert service_and_files.open("old", OLD) == plaintext
    assert service_and_files.workspace.names() == {"key.txt", "old", "new"}


def test_only_force_takes_the_place_of_the_source_and_keeps_its_mode(
    service_and_files: ServiceAndFiles,
) -> None:
    plaintext = service_and_files.seal("old", 1000)
    (service_and_files.workspace.folder / "old").chmod(0o640)
    before = service_and_files.workspace.read("old")
    refused = service_and_files.rewrap("--context", OLD, "--new-context", NEW, "old")

    assert refused.returncode == 73
    assert service_and_files.workspace.read("old") == before
    done = service_and_files.rewrap("--force", "--context", OLD, "--new-context", NEW, "old")
    assert done.returncode == 0, done.stderr
    assert service_and_files.open("old", NEW) == plaintext
    assert (service_and_files.workspace.folder / "old").stat().st_mode & 0o777 == 0o640
    assert service_and_files.workspace.names() == {"key.txt", "old"}


def test_a_link_stays_a_link_to_what_was_rewrapped(service_and_files: ServiceAndFiles) -> None:
    plaintext = service_and_files.seal("old", 1000)
    (service_and_files.workspace.folder / "link").symlink_to("old")
    done = service_and_files.rewrap("--force", "--context", OLD, "--new-context", NEW, "link")

    assert done.returncode == 0, done.stderr
    assert (service_and_files.workspace.folder / "link").is_symlink()
    assert service_and_files.open("old", NEW) == plaintext


def test_an_existing_target_is_replaced_by_force_only(service_and_files: ServiceAndFiles) -> None:
    """And without a new context the old one stays."""
    plaintext = service_and_files.seal("old", 1000)
    service_and_files.workspace.write("new", b"precious")

    assert service_and_files.rewrap("--context", OLD, "-o", "new", "old").returncode == 73
    assert service_and_files.workspace.read("new") == b"precious"
    done = service_and_files.rewrap("-f", "--json", "--context", OLD, "-o", "new", "old")
    assert json.loads(done.stdout)["key_id"] == "default"
    assert service_and_files.open("new", OLD) == plaintext


def test_a_wrong_context_is_refused_and_nothing_is_written(service_and_files: ServiceAndFiles) -> None:
    service_and_files.seal("old", 1000)
    done = service_and_files.rewrap("--context", NEW, "-o", "new", "old")
    piped = service_and_files.rewrap("--context", NEW, "-", given=service_and_files.workspace.read("old"))

    assert (done.returncode, piped.returncode, piped.stdout) == (65, 65, b"")
    assert service_and_files.workspace.names() == {"key.txt", "old"}


def test_a_file_of_stock_age_gets_no_origin_by_rewrapping(service_and_files: ServiceAndFiles) -> None:
    service_and_files.workspace.stdout_of(
        "seal", "-r", service_and_files.workspace.recipient, "-o", "old", given=b"salary"
    )
    done = service_and_files.rewrap("-o", "new", "old")

    assert done.returncode == 65
    assert not service_and_files.workspace.has("new")


def test_an_armored_file_has_no_header_to_replace(workspace: Workspace) -> None:
    workspace.stdout_of("seal", "-a", "-i", "key.txt", "-o", "old", given=b"salary")
    done = workspace.kms("rewrap-file", "-o", "new", "old")
    piped = workspace.kms("rewrap-file", "-", given=workspace.read("old"))

    assert (done.returncode, piped.returncode, piped.stdout) == (65, 65, b"")
    assert b"old is armored" in done.stderr
    assert b"stdin is armored" in piped.stderr


@pytest.mark.parametrize("size", [0, MIB, 5 * MIB + 3])
@pytest.mark.parametrize("words", [("-",), ("old", "-o", "-"), ("-", "-o", "new")], ids=" ".join)
def test_a_pipe_is_rewrapped_while_it_arrives(
    service_and_files: ServiceAndFiles, size: int, words: tuple[str, ...]
) -> None:
    plaintext = service_and_files.seal("old", size)
    old = service_and_files.workspace.read("old")
    done = service_and_files.rewrap("--context", OLD, "--new-context", NEW, *words, given=old)
    if "new" not in words:
        service_and_files.workspace.write("new", done.stdout)
    new = service_and_files.workspace.read("new")

    assert done.returncode == 0, done.stderr
    assert new[head_of(new).size :] == old[head_of(old).size :]
    assert service_and_files.open("new", NEW) == plaintext
    assert (b"rewrapped stdin to new" in done.stderr) == ("new" in words)


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="it takes a second file system")
def test_the_payload_goes_to_another_file_system(service_and_files: ServiceAndFiles) -> None:
    plaintext = service_and_files.seal("old", 3 * MIB + 5)
    with TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        target = f"{folder}/new"
        done = service_and_files.rewrap("--context", OLD, "--new-context", NEW, "-o", target, "old")

        assert done.returncode == 0, done.stderr
        assert service_and_files.open(target, NEW) == plaintext


def test_a_source_that_changes_while_it_is_copied_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "old"
    source.write_bytes(bytes(MIB))

    class Writer(Meter):
        """Writes to the source when the first part was copied."""

        def show(self, label: str, done: int, total: int | None, unit: str = "") -> None:
            del label, done, total, unit
            source.write_bytes(bytes(MIB + 1))

    with (
        age_files.source(source) as opened,
        (tmp_path / "new").open("wb") as target,
        pytest.raises(InvalidRequest, match="changed"),
    ):
        copy_payload(opened, b"", target, Writer())


# -- a service that is not to be trusted ------------------------------------------------------------


@pytest.mark.parametrize("lie", ["another file", "no context", "payload", "text", "nothing"])
def test_the_header_of_another_file_is_not_written(
    workspace: Workspace, lie: str, stub_service: Callable[[Answer], str]
) -> None:
    other = workspace.stdout_of("seal", "-i", "key.txt", given=b"another")
    plain = workspace.stdout_of("seal", "-r", workspace.recipient, given=b"another")
    own = workspace.stdout_of("seal", "-i", "key.txt", given=bytes(MIB))
    workspace.write("old", own)
    lies = {
        "another file": other[: head_of(other).payload_offset],
        "no context": plain[: head_of(plain).size] + head_of(own).nonce,
        "payload": own,
        "text": b"salary",
        "nothing": b"",
    }
    seen: list[bytes] = []

    def lying(_: str, given: dict[str, str]) -> dict[str, str]:
        seen.append(base64.b64decode(given["ciphertext"]))
        key = {"key_id": "default", "key_version": "0a1b2c3d", "backend": "age"}
        return {"ciphertext": base64.b64encode(lies[lie]).decode(), **key}

    done = workspace.kms("rewrap-file", "-o", "new", "old", KMS_SERVICE_URL=stub_service(lying))

    assert done.returncode == 1
    assert workspace.names() == {"key.txt", "old"}
    assert seen == [own[: head_of(own).payload_offset]], "the header and nonce, and nothing of the payload"
