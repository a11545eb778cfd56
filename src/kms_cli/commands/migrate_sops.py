"""``kms migrate sops``: adds the age recipient of the service to SOPS files, by the sops program.

Sops decrypts a file with its present keys and encrypts it under a new data key for all its recipients and the
service. The file is replaced after a check that its plaintext is unchanged and that the service can decrypt
the data key by itself.
"""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from kms_cli.age_files import recipients
from kms_cli.commands.migrate import MigrationReport
from kms_cli.connection import connect
from kms_cli.options import FILE, PATH, key_option
from kms_client import Client
from kms_core.age import armor
from kms_protocol import errors

DATA_KEY_BYTES: Final = frozenset({32, 33})  # 33: a share of a file with several key groups
_END: Final = b"-----END AGE ENCRYPTED FILE-----"


class SopsFailed(errors.KmsError):
    """An error of sops, which printed its message on stderr."""

    code = "sops_failed"
    summary = "sops failed"
    exit_code = errors.EXIT_BAD_DATA


@click.command("sops")
@click.option("--recipient", "-r", help="Age recipient of the service: age1…")
@click.option("--recipients-file", "-R", type=PATH, help="File that contains it, such as public_key.txt.")
@key_option
@click.option("--dry-run", is_flag=True, help="Decrypt all files; change nothing.")
@click.argument("files", nargs=-1, required=True, type=FILE)
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
    added = recipients(filter(None, [recipient]), filter(None, [recipients_file]))
    if len(added) != 1:
        raise click.UsageError("name one recipient, by -r or -R")
    report = MigrationReport()
    with connect() as client:
        for given in files:
            report.lines += 1
            file = given.resolve()
            if not file.is_file():
                raise errors.InvalidRequest(f"{given} is no plain file")
            try:
                if str(added[0]).encode() in file.read_bytes():
                    report.already_there += 1
                    continue
                plaintext = sops("decrypt", file)
                if not dry_run:
                    _replace(file, plaintext, str(added[0]), client, key_id)
                report.moved += 1
            except (SopsFailed, errors.DecryptFailed, errors.ForeignRefused) as exc:
                report.fail(str(given), exc)
    return report.show(dry_run=dry_run, on_stdout=True)


def sops(*words: str | Path) -> bytes:
    """Return the output of sops. Raises ConfigurationError if it is not installed, SopsFailed."""
    program = shutil.which("sops")
    if program is None:
        raise errors.ConfigurationError("sops is not on the PATH: install it from your system or getsops.io")
    done = subprocess.run([program, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SopsFailed(f"sops {words[0]} failed with exit code {done.returncode}")
    return done.stdout


def _replace(file: Path, plaintext: bytes, recipient: str, client: Client, key_id: str | None) -> None:
    """Add the recipient to a copy, check the copy, and replace the file with it."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".kms-migrate-") as folder:
        copy = Path(folder, file.name)  # sops infers the format from the name
        shutil.copy2(file, copy)
        sops("rotate", "--in-place", "--add-age", recipient, copy)
        if sops("decrypt", copy) != plaintext:
            raise SopsFailed("The plaintext would change: the file was not replaced")
        if not any(_is_data_key(block, client, key_id) for block in blocks_of(copy.read_bytes())):
            raise errors.DecryptFailed("The service cannot decrypt it: is this the recipient of its key")
        copy.replace(file)


def _is_data_key(block: bytes, client: Client, key_id: str | None) -> bool:
    """Return whether the service decrypts a block of the file to its data key."""
    with contextlib.suppress(errors.DecryptFailed):
        return len(client.decrypt(block, key_id=key_id).plaintext) in DATA_KEY_BYTES
    return False


def blocks_of(text: bytes) -> Iterator[bytes]:
    """Yield the age files in a SOPS file: indented in YAML, with escaped newlines in JSON and dotenv."""
    for begun in text.split(armor.BEGIN)[1:]:
        found, end, _ = begun.partition(_END)
        lines = (armor.BEGIN + found + end).replace(b"\\n", b"\n").split(b"\n")
        with contextlib.suppress(errors.DecryptFailed, errors.NotACiphertext):
            yield armor.dearmor(b"\n".join(map(bytes.strip, lines)) + b"\n")
