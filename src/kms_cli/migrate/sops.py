"""``kms migrate sops``: adds the age recipient of the service to SOPS files, by the sops program.

sops decrypts a file with its present keys and encrypts it under a new data key for all its recipients and the
service. The file is replaced after a check that its plaintext is unchanged and that the service alone can
decrypt the data key.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from kms_cli.age_file.keys import recipients
from kms_cli.migrate.command import a_path, show
from kms_cli.migrate.pipeline import MigrationReport
from kms_cli.options import key_option
from kms_cli.session import connect
from kms_client import Client
from kms_core.age import armor
from kms_protocol.errors import (
    EXIT_BAD_DATA,
    ConfigurationError,
    DecryptFailed,
    ForeignRefused,
    KmsError,
    NotACiphertext,
)

DATA_KEY_BYTES: Final = frozenset({32, 33})  # 33: a share of a file with several key groups
_END: Final = b"-----END AGE ENCRYPTED FILE-----"


class SopsFailed(KmsError):
    """An error of sops, which printed its message on stderr."""

    code = "sops_failed"
    summary = "sops failed"
    exit_code = EXIT_BAD_DATA


class Sops:
    """The sops program, the service and the recipient to add."""

    def __init__(self, client: Client, recipient: str, key_id: str | None) -> None:
        found = shutil.which("sops")
        if found is None:
            raise ConfigurationError("sops is not on the PATH: install it from your system or getsops.io")
        self._program = found
        self._client = client
        self._recipient = recipient
        self._key_id = key_id

    def has(self, file: Path) -> bool:
        """Return whether the file names the recipient."""
        return self._recipient.encode() in file.read_bytes()

    def decrypt(self, file: Path) -> bytes:
        """Return the plaintext, decrypted with the present keys of the file."""
        return self._run("decrypt", file)

    def add_recipient(self, file: Path) -> None:
        """Add the recipient to a copy, check the copy, and replace the file with it."""
        before = self.decrypt(file)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".kms-migrate-") as folder:
            copy = Path(folder, file.name)  # sops infers the format from the name
            shutil.copy2(file, copy)
            self._run("rotate", "--in-place", "--add-age", self._recipient, copy)
            if self.decrypt(copy) != before:
                raise SopsFailed("The plaintext would change: the file was not replaced")
            self._check_service(copy)
            copy.replace(file)

    def _check_service(self, file: Path) -> None:
        """Raise DecryptFailed unless the service decrypts the data key of the file."""
        for block in blocks_of(file.read_bytes()):
            try:
                opened = self._client.decrypt(block, key_id=self._key_id)
            except DecryptFailed:
                continue
            if len(opened.plaintext) in DATA_KEY_BYTES:
                return
        raise DecryptFailed("The service cannot decrypt it: is this the recipient of its key")

    def _run(self, *words: str | Path) -> bytes:
        done = subprocess.run(
            [self._program, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False
        )
        if done.returncode:
            raise SopsFailed(f"sops {words[0]} failed with exit code {done.returncode}")
        return done.stdout


def blocks_of(text: bytes) -> Iterator[bytes]:
    """Yield the age files in a SOPS file: indented in YAML, with escaped newlines in JSON and dotenv."""
    for begun in text.split(armor.BEGIN)[1:]:
        found, end, _ = begun.partition(_END)
        lines = (armor.BEGIN + found + end).replace(b"\\n", b"\n").split(b"\n")
        try:
            yield armor.dearmor(b"\n".join(map(bytes.strip, lines)) + b"\n")
        except (DecryptFailed, NotACiphertext):
            continue


@click.command("sops")
@click.option("--recipient", "-r", help="Age recipient of the service: age1…")
@click.option("--recipients-file", "-R", type=a_path, help="File that contains it, such as public_key.txt.")
@key_option
@click.option("--dry-run", is_flag=True, help="Decrypt all files; change nothing.")
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False)
)
def sops_command(
    recipient: str | None,
    recipients_file: Path | None,
    key_id: str | None,
    files: tuple[Path, ...],
    *,
    dry_run: bool,
) -> int:
    """Add the age recipient of the service to FILES, in place, each verified by sops and by the service.

    sops must be able to decrypt them. Files that have the recipient are skipped. The other recipients remain:
    remove them with sops afterwards.
    """
    added = recipients([recipient] if recipient else [], [recipients_file] if recipients_file else [])
    if len(added) != 1:
        raise click.UsageError("name one recipient, by -r or -R")
    report = MigrationReport()
    with connect() as client:
        sops = Sops(client, str(added[0]), key_id)
        for file in files:
            report.lines += 1
            try:
                _one(sops, file.resolve(), report, dry_run=dry_run)
            except (SopsFailed, DecryptFailed, ForeignRefused) as exc:
                report.fail(str(file), exc)
    show(report, dry_run=dry_run, on_stdout=True)
    return EXIT_BAD_DATA if report.failed else 0


def _one(sops: Sops, file: Path, report: MigrationReport, *, dry_run: bool) -> None:
    if sops.has(file):
        report.already_there += 1
        return
    if dry_run:
        sops.decrypt(file)
    else:
        sops.add_recipient(file)
    report.moved += 1
