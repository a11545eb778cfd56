"""``kms seal`` and ``kms open``: the whole age format with keys at hand, and no service.

A file that ``-o`` names appears complete or not at all; a pipe gets what has been authenticated, in order.
"""

import re
from pathlib import Path
from typing import Final, TypedDict, Unpack

import click

from kms_cli import terminal
from kms_cli.age_file import decrypt, encrypt, keys, streams
from kms_cli.age_file.decrypt import LIMITS, AgeFile, Demand, NotAsBound, NotForThese, PlaintextRange
from kms_cli.age_file.keys import Identities
from kms_cli.age_file.streams import STDIO, InputStream, OutputStream
from kms_cli.options import context_option, force_option
from kms_cli.progress import Meter
from kms_cli.session import session
from kms_core.age.header import Header
from kms_core.envelope.binding import DEFAULT_KEY_ID
from kms_core.envelope.sealing import Sealing
from kms_core.payload.parallel import STEADY, ParallelOptions
from kms_protocol.context import Context
from kms_protocol.errors import InvalidRequest
from kms_protocol.wire import KEY_ID_PATTERN, ContextIn

KEY_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
MAX_WORK_FACTOR: Final = 24  # 16 GiB

source_argument = click.argument(
    "source",
    metavar="[IN]",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    default="-",
)
output_option = click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    default="-",
    help="Write here (0600), not to stdout.",
)
passphrase_option = click.option("-p", "--passphrase", is_flag=True, help="Ask for a passphrase.")
passphrase_file_option = click.option("--passphrase-file", type=KEY_FILE, help="Read the passphrase here.")


class InOut(TypedDict):
    """What both commands are given."""

    source: Path
    output: Path
    force: bool
    passphrase: bool
    passphrase_file: Path | None
    context: ContextIn


class SealOptions(InOut):
    """What ``kms seal`` is given."""

    recipients: tuple[str, ...]
    recipients_files: tuple[Path, ...]
    identity: Path | None
    key_id: str | None
    armored: bool


class OpenOptions(InOut):
    """What ``kms open`` is given."""

    identities: tuple[Path, ...]
    break_glass: bool
    offset: int | None
    length: int | None
    max_work_factor: int


@click.command(
    "seal",
    short_help="Encrypt without a service.",
    epilog="Example: kms seal -r age1… -o backup.age backup.tar",
)
@click.option("-r", "--recipient", "recipients", multiple=True, help="Seal for this recipient, age1….")
@click.option(
    "-R",
    "--recipients-file",
    "recipients_files",
    multiple=True,
    type=KEY_FILE,
    help="Recipients, one a line.",
)
@passphrase_option
@passphrase_file_option
@click.option("-i", "--identity", type=KEY_FILE, help="Seal as the service does with this key file.")
@context_option
@click.option("--key-id", help=f"With -i: the service's name for the key [default: {DEFAULT_KEY_ID}].")
@click.option("-a", "--armor", "armored", is_flag=True, help="Write text.")
@output_option
@force_option
@source_argument
def seal_command(**given: Unpack[SealOptions]) -> None:
    """Encrypt IN, or stdin, into a file that every age tool opens.

    Either for recipients, or with a passphrase, or with -i as the service would: bound to --context, so that
    the service opens it too.
    """
    _check_ways(given)
    if not given["armored"]:
        streams.refuse_terminal(given["output"])
    with (
        streams.source(given["source"]) as opened,
        streams.target(given["output"], force=given["force"]) as target,
        Meter() as meter,
    ):
        begun, source = _begun(given, opened)
        seal = encrypt.seal_armored if given["armored"] else encrypt.seal
        seal(begun, source, target, _pace(meter, "sealing", source, target))
    _report("sealed", given)


@click.command(
    "open",
    short_help="Decrypt without a service.",
    epilog="Example: kms open -i private.txt -o backup.tar backup.age",
)
@click.option("-i", "--identity", "identities", multiple=True, type=KEY_FILE, help="Key file, age or ssh.")
@passphrase_option
@passphrase_file_option
@click.option(
    "--max-work-factor",
    type=click.IntRange(1, MAX_WORK_FACTOR),
    default=LIMITS.scrypt_work_factor,
    show_default=True,
    help="Highest cost of a passphrase, log2; each step doubles time and memory.",
)
@context_option
@click.option("--break-glass", is_flag=True, help="Check neither context nor origin.")
@click.option("--offset", type=click.IntRange(0), help="Start at this byte of the plaintext.")
@click.option("--length", type=click.IntRange(0), help="Stop after so many bytes.")
@output_option
@force_option
@source_argument
def open_command(**given: Unpack[OpenOptions]) -> None:
    """Decrypt IN, or stdin: an age file by whatever tool, armored or not.

    A file that a service sealed needs the --context it was sealed with, and the service's key file.
    """
    demand = _demand(given)
    identities = keys.identities(given["identities"])
    with (
        streams.source(given["source"]) as source,
        streams.target(given["output"], force=given["force"]) as target,
        Meter() as meter,
    ):
        sealed = decrypt.read(source)
        part = _part(given, sealed)
        key = _key(sealed.head, given, identities, demand)
        if key is None:
            decrypt.release_by_ssh(sealed, identities, target)
        elif part and sealed.extent:
            decrypt.release_part(sealed.extent, key, target, part)
        else:
            decrypt.release(sealed, key, target, _pace(meter, "opening", source, target))
    _report("opened", given)


# -- seal --------------------------------------------------------------------------------------------


def _check_ways(given: SealOptions) -> None:
    ways = (
        bool(given["recipients"] or given["recipients_files"]),
        given["passphrase"] or given["passphrase_file"] is not None,
        given["identity"] is not None,
    )
    if sum(ways) != 1:
        raise _misuse("say for whom: -r and -R, or -p, or -i, and one of them only")
    if given["identity"] is None and (given["context"] or given["key_id"]):
        raise _misuse("--context and --key-id go with -i: what else is sealed is bound to nothing")


def _begun(given: SealOptions, source: InputStream) -> tuple[Sealing, InputStream]:
    if given["identity"] is not None:
        identities = keys.identities([given["identity"]])
        if not identities.native:
            raise _misuse("-i of seal takes an age key file, not an ssh key")
        padded, source = encrypt.is_large(source)
        context = Context.parse(given["context"])
        return encrypt.for_service(identities, _key_id(given), context, padded=padded), source
    if given["recipients"] or given["recipients_files"]:
        recipients = keys.recipients(given["recipients"], given["recipients_files"])
        return encrypt.for_recipients(recipients), source
    return encrypt.for_passphrase(keys.passphrase(given["passphrase_file"], confirm=True)), source


def _key_id(given: SealOptions) -> str:
    key_id = given["key_id"] or DEFAULT_KEY_ID
    if not re.fullmatch(KEY_ID_PATTERN, key_id):
        raise InvalidRequest("A key id is 1 to 80 of A-Z a-z 0-9 _ . -")
    return key_id


# -- open --------------------------------------------------------------------------------------------


def _demand(given: OpenOptions) -> Demand:
    if not given["break_glass"]:
        return Demand(Context.parse(given["context"]))
    if given["context"]:
        raise _misuse("--break-glass checks no context: leave out --context")
    terminal.say("warning: --break-glass: neither the context nor the origin of the file is checked")
    return Demand(checked=False)


def _part(given: OpenOptions, sealed: AgeFile) -> PlaintextRange | None:
    if given["offset"] is None and given["length"] is None:
        return None
    if sealed.extent is None:
        raise _misuse("--offset and --length need a file that is not armored, and not a pipe")
    return PlaintextRange(given["offset"] or 0, given["length"])


def _key(head: Header, given: OpenOptions, identities: Identities, demand: Demand) -> bytes | None:
    """The payload key, or None if an ssh key has to do it."""
    asked = given["passphrase"] or given["passphrase_file"] is not None
    if decrypt.needs_passphrase(head):
        if demand.context:
            raise NotAsBound("A passphrase file is bound to no context: open it without --context")
        if identities and not asked:
            raise _misuse("the file is sealed with a passphrase: open it with -p")
        passphrase = keys.passphrase(given["passphrase_file"], confirm=False)
        return decrypt.by_passphrase(head, passphrase, given["max_work_factor"])
    if not identities:
        raise _misuse("the file is sealed for keys: name your key file with -i")
    try:
        return decrypt.by_identities(head, identities, demand)
    except NotForThese:
        if identities.ssh and decrypt.is_for_ssh(head, demand) and given["offset"] is given["length"] is None:
            return None
        raise


# -- both --------------------------------------------------------------------------------------------


def _pace(meter: Meter, label: str, source: InputStream, target: OutputStream) -> ParallelOptions:
    """Progress is for files: what comes out of a pipe shows on its own."""
    return STEADY if target.fd is None else streams.pace(meter, label, source.size)


def _report(done: str, given: InOut) -> None:
    output = given["output"]
    if output == STDIO or not output.is_file():
        return
    size_bytes = output.stat().st_size
    source = "stdin" if given["source"] == STDIO else str(given["source"])
    if session().as_json:
        terminal.record({"source": source, "output": str(output), "bytes": size_bytes}, as_json=True)
    else:
        terminal.say(f"{done} {source} to {output} ({terminal.size(size_bytes)})")


def _misuse(text: str) -> click.UsageError:
    return click.UsageError(text, click.get_current_context())
