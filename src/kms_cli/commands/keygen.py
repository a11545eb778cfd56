"""``kms keygen``: makes age key files in the format of age-keygen, plain ones and sealed ones.

Also ``kms recipient`` and ``kms identity``, which name keys of the service for age tools.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

import click

from kms_cli import terminal
from kms_cli.age_files import check_key_id, parse_identities
from kms_cli.commands.adopt import document_of
from kms_cli.connection import service_url
from kms_cli.options import FILE, context_option, key_option
from kms_cli.plugin.names import PluginTarget
from kms_client.settings import checked_address
from kms_core.age import mlkem768x25519, x25519
from kms_core.age.header import is_age_file
from kms_core.age.recipients import identity_file
from kms_core.envelope.sealed_files import RECOVERY
from kms_core.secure_files import create, in_shell, open_to_others
from kms_protocol import small_files
from kms_protocol.context import Context
from kms_protocol.errors import ConfigurationError, InvalidRequest, TargetExists
from kms_protocol.wire import ContextIn

if TYPE_CHECKING:
    from kms_core.envelope.sealed_files import FileSealer
    from kms_core.settings.model import Settings

IDENTITY: Final = "kms:identity"
DOCUMENTS: Final = ("s3://", "file://")
AUDIT_KEYS: Final = ("kms:audit", "kms:audit-signing")
in_process_option = click.option(
    "--in-process", is_flag=True, help="Use the keys of KMS_CONFIG on this machine, without a service."
)
with_url_option = click.option(
    "--with-url", is_flag=True, help="Include --url; otherwise the plugin uses KMS_SERVICE_URL."
)


class KeyFileExists(TargetExists):
    """The output file exists. A key file is never overwritten."""

    hint = "name another file: the old key still decrypts its files"


@click.command(
    "keygen",
    epilog="Example: kms keygen -o private.txt && kms keygen -y private.txt > public.txt",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Write here (0600), not to stdout; with --sealed-by also to the document that the settings name for "
    "the key: s3://bucket/key.",
)
@click.option("-y", "convert", type=FILE, help="Show the recipients of a key file.")
@click.option("--pq", is_flag=True, help="Post-quantum hybrid (mlkem768x25519, age 1.3 and later).")
@click.option(
    "--sealed-by",
    metavar="KEY",
    help='Seal the file under this key of the settings (use = "seal"), or with kms:identity for '
    "seal_identity_path.",
)
@click.option(
    "--for",
    "name",
    metavar="NAME",
    help="The key id that the file is for, or kms:spool, kms:intake, kms:audit, kms:audit-signing "
    "(default: the default key).",
)
@click.option("--recovery", multiple=True, metavar="RECIPIENT", help="Seal for this age recipient, too.")
@click.option(
    "--from",
    "source",
    type=FILE,
    help="Seal this key file instead of a new identity; it may be sealed already.",
)
def keygen_command(  # noqa: PLR0913 -- the options of the command
    *,
    output: str | None,
    convert: Path | None,
    sealed_by: str | None,
    name: str | None,
    recovery: tuple[str, ...],
    source: Path | None,
    pq: bool,
) -> None:
    """Generate an age identity as age-keygen does, or with -y show the recipients of a key file.

    With --sealed-by the file is an age file, which the service opens at start by asking that key.
    """
    if sealed_by is None and (recovery or source or (name and not convert)):
        raise click.UsageError("--for, --recovery and --from are for sealed files: add --sealed-by KEY")
    public = ""
    if convert:
        content = _recipients(convert, name)
    elif sealed_by is None:
        content, public = _new_identity(post_quantum=pq)
    else:
        content, public = _sealed(sealed_by, name, recovery, source, output, post_quantum=pq)
    if content:
        _put(output, content, is_secret=not convert)
    if public:
        sys.stderr.write(f"Public key: {public}\n")


def _put(output: str | None, content: bytes, *, is_secret: bool) -> None:
    if output is None:
        if is_secret and open_to_others(sys.stdout.fileno()):
            terminal.say("warning: writing a private key to a file that others can read")
        sys.stdout.buffer.write(content)
    elif output.startswith(DOCUMENTS):
        raise click.UsageError("Only sealed keys are written to documents: add --sealed-by KEY")
    elif not create(Path(output), content):
        raise KeyFileExists(f"{output} exists")


def _sealed(  # noqa: PLR0913 -- the options of the command
    root: str,
    name: str | None,
    recovery: tuple[str, ...],
    source: Path | None,
    output: str | None,
    *,
    post_quantum: bool,
) -> tuple[bytes, str]:
    """Return a new identity, or the content of ``source``, sealed for ``name`` under ``root``.

    It is written to the document at ``output``, and an empty content is returned, if that is one. The
    recipient of a new identity is returned too.
    """
    from kms_core import key_opening  # noqa: PLC0415 -- a plain key needs neither settings nor backends

    settings, sealer, name = _sealer(name)
    own = key_opening.own_files(settings)
    known = (*key_opening.key_locations(settings), *own)
    public = ""
    if name not in known:
        raise InvalidRequest(f"The settings have no Age key {name}: --for names one of {', '.join(known)}")
    if source is not None:
        content = small_files.read(source)
        content = sealer.open(name, content) if is_age_file(content) else content
        if name not in AUDIT_KEYS:
            parse_identities(source, content.decode("utf-8", "replace"))
    elif name in AUDIT_KEYS:
        raise click.UsageError(f"{name}: let the service make it; seal it with --from {in_shell(own[name])}")
    else:
        content, public = _new_identity(post_quantum=post_quantum)
    content = "".join(f"{RECOVERY}{recipient}\n" for recipient in recovery).encode() + content
    root_id = None if root == IDENTITY else root
    try:
        if output and output.startswith(DOCUMENTS):
            _write_document(name, output, content, root_id)
            return b"", public
        return sealer.seal(name, content, root_id), public
    except ConfigurationError as exc:
        raise ConfigurationError(f"Cannot seal the key: {exc.detail}") from exc


def _write_document(name: str, output: str, content: bytes, root_id: str | None) -> None:
    """Make the document of a key. Raises KeyFileExists, and InvalidRequest for another place."""
    from kms_cli import audited  # noqa: PLC0415 -- as above

    settings, document = document_of(name)
    if str(document.private) != unquote(output.removeprefix("file://")):
        raise InvalidRequest(f"The settings name {document.private} for the key {name}, and not {output}")
    with audited.effect(settings, "key.create", name):
        if not document.make(content, root_id):
            raise KeyFileExists(f"{output} exists")


def _recipients(path: Path, name: str | None) -> bytes:
    content = small_files.read(path)
    if is_age_file(content):
        _, sealer, name = _sealer(name)
        try:
            content = sealer.open(name, content)
        except ConfigurationError as exc:
            raise ConfigurationError(f"{path} cannot be opened: {exc.detail}") from exc
    found = parse_identities(path, content.decode("utf-8", "replace"))
    return "".join(f"{identity.recipient}\n" for identity in found).encode()


def _sealer(name: str | None) -> "tuple[Settings, FileSealer, str]":
    """Return the settings, what opens and seals their key files, and ``name`` or that of the default key."""
    from kms_cli.local import installation  # noqa: PLC0415 -- as above
    from kms_core import key_opening, keyring  # noqa: PLC0415 -- as above

    settings = installation.settings()
    return settings, key_opening.direct(settings), name or keyring.default_key_id(settings)


def _new_identity(*, post_quantum: bool) -> tuple[bytes, str]:
    """Return the content of a key file, and its recipient."""
    identity = mlkem768x25519.HybridIdentity.generate() if post_quantum else x25519.X25519Identity.generate()
    return identity_file(identity), str(identity.recipient)


@click.command(
    "recipient",
    epilog='Example: age -r "$(kms recipient --context env=prod)" -o backup.age backup.tar',
)
@context_option
@key_option
@in_process_option
@with_url_option
def recipient_command(context: ContextIn, key_id: str | None, *, in_process: bool, with_url: bool) -> None:
    """Print a recipient, age1kms1…, with which age tools encrypt for a key of the service.

    It contains the key id, the context and the address. It is not secret: using it requires a token.
    """
    target = _target(context, key_id, in_process=in_process, with_url=with_url)
    if not terminal.printed_as_json({"recipient": target.recipient()}):
        terminal.result(target.recipient())


@click.command(
    "identity",
    epilog="Example: kms identity --context env=prod > kms.id; age -d -i kms.id backup.age",
)
@context_option
@key_option
@in_process_option
@with_url_option
def identity_command(context: ContextIn, key_id: str | None, *, in_process: bool, with_url: bool) -> None:
    """Print an identity, AGE-PLUGIN-KMS-1…, with which age tools decrypt files of a context.

    It contains no key: decryption requires a token that allows "unwrap". Without --key-id it is for files of
    any key.
    """
    target = _target(context, key_id, in_process=in_process, with_url=with_url)
    if terminal.printed_as_json({"identity": target.identity(), "recipient": target.recipient()}):
        return
    terminal.result(f"# recipient: {target.recipient()}")
    terminal.result(target.identity())


def _target(context: ContextIn, key_id: str | None, *, in_process: bool, with_url: bool) -> PluginTarget:
    if in_process and with_url:
        raise click.UsageError("--in-process uses no service: leave out --with-url")
    url = checked_address(service_url()) if with_url else None
    check_key_id(key_id)
    return PluginTarget(key_id, Context.parse(context), url, in_process)
