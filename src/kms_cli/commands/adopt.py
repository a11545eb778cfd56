"""``kms keys adopt``: makes the document of a sealed Age key the newest, with all identities known here."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kms_cli import terminal
from kms_cli.options import FILE
from kms_core.observability import logs
from kms_protocol import small_files
from kms_protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from kms_core.documents.key_document import KeyDocument
    from kms_core.settings.model import Settings


@click.command("adopt")
@click.argument("key_id", metavar="KEY")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--from",
    "files",
    type=FILE,
    multiple=True,
    help="Add the identities of this sealed key file; repeatable.",
)
def adopt_command(key_id: str, yes: bool, files: tuple[Path, ...]) -> None:
    """Make the document of a sealed Age key the newest, with all identities that are known here.

    They come from the stored document, the copy of this host and the given files. Needed to take key files
    over, after an old document was put back, and if neither this host nor Redis has seen it.
    """
    from kms_cli import audited  # noqa: PLC0415 -- the rest of the service, which takes a second

    settings, document = document_of(key_id)
    if not yes and not click.confirm(f"Make {document.private} the newest document of {key_id}?", err=True):
        raise click.Abort
    with audited.effect(settings, "key.adopt", key_id):
        number = document.adopt(small_files.read(file) for file in files)
    terminal.say(f"adopted {document.private}: {number} versions of {key_id}")


def document_of(name: str) -> "tuple[Settings, KeyDocument]":
    """Return the document of a key. Raises InvalidRequest if the settings name none."""
    from kms_cli.local import installation  # noqa: PLC0415 -- a plain key needs neither settings nor backends
    from kms_cli.local.valkey import with_embedded  # noqa: PLC0415 -- as above
    from kms_core import key_opening  # noqa: PLC0415 -- as above

    logs.configure("error", json=False)  # stdout is for results
    settings = with_embedded(installation.settings(), os.environ)
    found = key_opening.documents(settings)
    if name not in found:
        raise InvalidRequest(
            f"The settings name no document for the key {name}: write age:s3://bucket/key under [kms.keys]"
        )
    return settings, found[name]
