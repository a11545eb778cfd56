"""``kms up``, ``keygen`` and ``inspect``: what runs on this machine and asks no service."""

import os
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from kms_cli import words
from kms_cli.session import session
from kms_core.errors import InvalidRequest, TargetExists

if TYPE_CHECKING:
    from kms_core.backends.age import Identity

OTHERS: Final = 0o077


@click.command("up", short_help="Run the service here.")
@click.option("--bind", help="Address to listen on.", envvar="KMS_BIND")
@click.option("--port", type=click.IntRange(1, 65534), help="Port to listen on.", envvar="KMS_PORT")
def up_command(bind: str | None, port: int | None) -> int:
    """Run API, worker and an embedded Valkey until Ctrl-C; makes keys for development if there are none."""
    from kms_cli.up import Options, run

    return run(Options(config=session().config, state_dir=session().state_dir, bind=bind, port=port))


# -- keygen ------------------------------------------------------------------------------------------


@click.command("keygen", short_help="Make an age key pair.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write here (0600) instead of to stdout."
)
@click.option(
    "-y",
    "convert",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Show the recipients of a key file.",
)
@click.option("--pq", is_flag=True, help="Post-quantum hybrid (mlkem768x25519, age 1.3 and later).")
def keygen_command(output: Path | None, convert: Path | None, *, pq: bool) -> None:
    """Make an age identity in the format of age-keygen, or with -y show the recipients of one.

    \b
    kms keygen -o private_key.txt
    kms keygen -y private_key.txt > public_key.txt
    """
    if convert is not None:
        text = "".join(f"{identity.recipient}\n" for identity in _identities(convert))
    else:
        identity = _new_identity(post_quantum=pq)
        created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        text = f"# created: {created}\n# public key: {identity.recipient}\n{identity.export()}\n"
        sys.stderr.write(f"Public key: {identity.recipient}\n")
    if output is not None:
        _create(output, text)
        return
    if convert is None and _is_open_to_others(sys.stdout.fileno()):
        words.say("warning: writing a private key to a file that others can read")
    sys.stdout.write(text)


def _new_identity(*, post_quantum: bool) -> "Identity":
    from kms_core.envelope import hybrid, x25519

    return hybrid.Identity.generate() if post_quantum else x25519.Identity.generate()


def _identities(path: Path) -> "Iterator[Identity]":
    from kms_core.backends.age import parse_identity

    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            yield parse_identity(line.strip())
        except ValueError as exc:
            raise InvalidRequest(f"Line {number} of {path} is not an age identity ({exc})") from exc


def _create(path: Path, text: str) -> None:
    from kms_cli.private import create_file

    if not create_file(path, text):
        error = TargetExists(f"{path} exists")
        error.hint = "name another file; an old key is needed for what it encrypted"
        raise error


def _is_open_to_others(handle: int) -> bool:
    mode = os.fstat(handle).st_mode
    return stat.S_ISREG(mode) and bool(mode & OTHERS)


# -- inspect -----------------------------------------------------------------------------------------


@click.command("inspect", short_help="Show what an encrypted file says of itself.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def inspect_command(file: Path) -> None:
    """Show key, backend, stanzas and sizes of an encrypted FILE. No key is needed, and nothing is verified."""
    from kms_cli.inspection import inspect

    words.record(inspect(file), as_json=session().as_json)
