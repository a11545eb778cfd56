"""``kms keygen``: age identities in the format of age-keygen."""

import os
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

from kms_cli import terminal
from kms_cli.local.private_files import create_file
from kms_core.age import mlkem768x25519, x25519
from kms_core.age.recipients import Recipient, parse_identity
from kms_protocol import small_files
from kms_protocol.errors import InvalidRequest, TargetExists

OTHERS: Final = 0o077


class KeyFileExists(TargetExists):
    """A key file is never overwritten, not even by force."""

    hint = "name another file: the old key still opens what it encrypted"


@click.command(
    "keygen",
    short_help="Make an age key pair.",
    epilog="Example: kms keygen -o private.txt && kms keygen -y private.txt > public.txt",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write here (0600), not to stdout.")
@click.option(
    "-y",
    "convert",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Show the recipients of a key file.",
)
@click.option("--pq", is_flag=True, help="Post-quantum hybrid (mlkem768x25519, age 1.3 and later).")
def keygen_command(output: Path | None, convert: Path | None, *, pq: bool) -> None:
    """Make an age identity in the format of age-keygen, or with -y show the recipients of one."""
    text = _recipients(convert) if convert else _new_identity(post_quantum=pq)
    if output is None:
        if not convert and _is_open_to_others(sys.stdout.fileno()):
            terminal.say("warning: writing a private key to a file that others can read")
        sys.stdout.write(text)
    elif not create_file(output, text):
        raise KeyFileExists(f"{output} exists")


def _recipients(path: Path) -> str:
    return "".join(f"{recipient}\n" for recipient in _read(path))


def _new_identity(*, post_quantum: bool) -> str:
    identity = mlkem768x25519.HybridIdentity.generate() if post_quantum else x25519.X25519Identity.generate()
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    sys.stderr.write(f"Public key: {identity.recipient}\n")
    return f"# created: {created}\n# public key: {identity.recipient}\n{identity.export()}\n"


def _read(path: Path) -> Iterator[Recipient]:
    for number, line in enumerate(small_files.read(path).decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            yield parse_identity(line.strip()).recipient
        except ValueError as exc:
            raise InvalidRequest(f"Line {number} of {path} is not an age identity ({exc})") from exc


def _is_open_to_others(handle: int) -> bool:
    mode = os.fstat(handle).st_mode
    return stat.S_ISREG(mode) and bool(mode & OTHERS)
