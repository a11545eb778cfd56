"""``kms seal``, ``kms open`` and ``kms inspect``: age files on this machine, without a service.

A file that ``-o`` names appears complete or not at all. A pipe receives authenticated plaintext in order.
"""

import io
from pathlib import Path
from typing import Final, TypedDict, Unpack

import click

from kms_cli import age_files, terminal
from kms_cli.age_files import InputStream, RequiredBinding
from kms_cli.options import (
    FILE,
    SourceName,
    context_option,
    force_option,
    is_stdout,
    output_option,
    report_written,
    writing,
)
from kms_core.age import mlkem768x25519, stream, x25519
from kms_core.age.header import Header, Stanza
from kms_core.backends import wrap_keys
from kms_core.envelope import binding
from kms_core.envelope.binding import DEFAULT_KEY_ID, DEFAULT_TENANT
from kms_core.envelope.sealing import Sealing
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed
from kms_protocol.wire import ContextIn

recipient_option = click.option(
    "-r", "--recipient", "recipients", multiple=True, help="Recipient, age1…; repeatable."
)
recipients_file_option = click.option(
    "-R",
    "--recipients-file",
    "recipients_files",
    multiple=True,
    type=FILE,
    help="File of recipients, one a line.",
)
source_argument = click.argument("source", metavar="[IN]", type=SourceName(), default="-")
NATIVE: Final = frozenset({x25519.STANZA_TYPE, mlkem768x25519.STANZA_TYPE})
READ_BYTES: Final = 1024 * 1024


class InOut(TypedDict):
    """Options of both commands."""

    source: Path
    output: Path | None
    force: bool
    context: ContextIn


class SealOptions(InOut):
    """Options of ``kms seal``."""

    recipients: tuple[str, ...]
    recipients_files: tuple[Path, ...]
    identity: Path | None
    key_id: str | None
    armored: bool


class OpenOptions(InOut):
    """Options of ``kms open``."""

    identities: tuple[Path, ...]
    break_glass: bool
    tenant: str
    offset: int | None
    length: int | None


@click.command(
    "seal",
    epilog="Example: kms seal -r age1… -o backup.age backup.tar",
)
@recipient_option
@recipients_file_option
@click.option("-i", "--identity", type=FILE, help="Encrypt as the service does with this key file.")
@context_option
@click.option("--key-id", help=f"With -i: key id in the service [default: {DEFAULT_KEY_ID}].")
@click.option("-a", "--armor", "armored", is_flag=True, help="Write ASCII armor.")
@output_option
@force_option
@source_argument
def seal_command(**given: Unpack[SealOptions]) -> None:
    """Encrypt IN, or stdin, to a file that every age tool can decrypt.

    It is encrypted for recipients, or with -i as by the service: bound to --context, so that the service can
    decrypt it too. Without -o it is written to stdout.
    """
    _check_method(given)
    if not given["armored"] and given["output"] is None:
        terminal.refuse_binary("use -a for ASCII armor, name a file with -o, or force it with `-o -`")
    with (
        age_files.source(given["source"]) as opened,
        writing(given["output"], overwrite=given["force"]) as target,
        terminal.Meter(on_stdout=is_stdout(given["output"])) as line,
    ):
        begun, source = _sealing(given, opened)
        seal = age_files.seal_armored if given["armored"] else age_files.seal
        seal(begun, source, target, age_files.with_progress(line, "sealing", source.size))
    report_written("sealed", given["source"], given["output"])


@click.command(
    "open",
    epilog="Example: kms open -i private.txt -o backup.tar backup.age",
)
@click.option("-i", "--identity", "identities", multiple=True, type=FILE, help="Key file.")
@context_option
@click.option("--tenant", default=DEFAULT_TENANT, show_default=True, help="Tenant that encrypted it.")
@click.option("--break-glass", is_flag=True, help="Do not check context and origin.")
@click.option("--offset", type=click.IntRange(0), help="First byte of the plaintext.")
@click.option("--length", type=click.IntRange(0), help="Number of bytes.")
@output_option
@force_option
@source_argument
def open_command(**given: Unpack[OpenOptions]) -> None:
    """Decrypt IN, or stdin: a file of any age tool for an age key, armored or not.

    A file of the service needs the --context that it was encrypted with, and the key file of the service. For
    passphrases and SSH keys use age. Without -o the output is stdout.
    """
    required = _required(given)
    if not given["identities"]:
        raise click.UsageError("name your key file with -i; for a passphrase use `age -d`")
    identities = age_files.identities(given["identities"])
    with (
        age_files.source(given["source"]) as source,
        writing(given["output"], overwrite=given["force"]) as target,
        terminal.Meter(on_stdout=is_stdout(given["output"])) as line,
    ):
        sealed = age_files.read(source)
        offset, length, file_range = given["offset"], given["length"], sealed.file_range
        is_part = offset is not None or length is not None
        if is_part and file_range is None:
            raise click.UsageError("--offset and --length require a file without armor, not a pipe")
        key = age_files.by_identities(sealed.head, identities, required)
        if is_part and file_range:
            age_files.release_part(file_range, key, target, offset or 0, length)
        else:
            age_files.release(sealed, key, target, age_files.with_progress(line, "opening", source.size))
    report_written("opened", given["source"], given["output"])


# -- seal --------------------------------------------------------------------------------------------


def _check_method(given: SealOptions) -> None:
    if bool(given["recipients"] or given["recipients_files"]) == (given["identity"] is not None):
        raise click.UsageError(
            "give recipients (-r, -R) or a key file (-i), not both; for a passphrase use `age -p`"
        )
    if given["identity"] is None and (given["context"] or given["key_id"]):
        raise click.UsageError("--context and --key-id require -i: other files are not bound to a context")


def _sealing(given: SealOptions, source: InputStream) -> tuple[Sealing, InputStream]:
    if given["identity"] is not None:
        identities = age_files.identities([given["identity"]])
        padded, source = age_files.is_large(source)
        context = Context.parse(given["context"])
        key_id = given["key_id"] or DEFAULT_KEY_ID
        age_files.check_key_id(key_id)
        return age_files.for_service(identities, key_id, context, padded=padded), source
    return age_files.for_recipients(
        age_files.recipients(given["recipients"], given["recipients_files"])
    ), source


# -- open --------------------------------------------------------------------------------------------


def _required(given: OpenOptions) -> RequiredBinding:
    if not given["break_glass"]:
        return RequiredBinding(Context.parse(given["context"]), tenant=given["tenant"])
    if given["context"]:
        raise click.UsageError("--break-glass checks no context: leave out --context")
    terminal.say("warning: --break-glass: context and origin of the file are not checked")
    return RequiredBinding(checked=False, tenant=given["tenant"])


# -- inspect -----------------------------------------------------------------------------------------


@click.command("inspect")
@click.argument("file", type=FILE)
def inspect_command(file: Path) -> None:
    """Show key, backend, stanzas and sizes of an encrypted FILE. No key is used and nothing is verified."""
    terminal.record(inspect(file))


def inspect(path: Path) -> dict[str, object]:
    """Return named values in display order.

    Raises NotACiphertext, TooLarge for a header above 256 KiB, DecryptFailed for a malformed header.
    """
    with age_files.source(path) as opened:
        try:
            sealed = age_files.read(opened)
            bound = binding.read(sealed.head.stanzas)
        except DecryptFailed as exc:
            raise DecryptFailed(f"The header of {path} is damaged") from exc
        payload_bytes = sealed.file_range.size if sealed.file_range else _size_bytes(sealed.payload)
    head = sealed.head
    shared = ", ".join(wrap_keys.wrap_key_name(wrap.job) for wrap in bound.wraps if wrap.job) if bound else ""
    named = {"key_id": bound.key_id, "key_version": bound.key_version} if bound else {}
    return {
        "format": "age v1" if sealed.file_range else "age v1, armored",
        "made_by": "kms-service" if bound else "another age tool",
        "file_id": binding.file_id(head.nonce),
        **named,
        "backend": _backend(head),
        **({"wrap_key": shared} if shared else {}),
        "context": "bound" if bound else "none",
        "origin": "claimed" if bound and bound.origin else "none",
        "stanzas": ", ".join(map(_shown, head.stanzas)),
        "header_bytes": head.size,
        "payload_bytes": payload_bytes,
        "plaintext_bytes": _plaintext_bytes(payload_bytes),
    }


def _plaintext_bytes(payload_bytes: int) -> object:
    try:
        return stream.plaintext_size(payload_bytes)
    except DecryptFailed:
        return "impossible: the file is truncated"


def _backend(head: Header) -> str:
    wraps = {stanza.args[1] for stanza in head.stanzas if stanza.type == binding.WRAP and stanza.args[1:]}
    native = {"age" for stanza in head.stanzas if stanza.type in NATIVE}
    return ", ".join(sorted(wraps | native)) or "unknown"


def _shown(stanza: Stanza) -> str:
    return " ".join(stanza.args[:4]) if stanza.type == binding.WRAP else stanza.type


def _size_bytes(source: io.RawIOBase) -> int:
    size_bytes = 0
    while part := source.read(READ_BYTES):
        size_bytes += len(part)
    return size_bytes
