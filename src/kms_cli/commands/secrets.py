"""``kms encrypt`` and its like: one secret from stdin to stdout."""

import binascii
import sys
from pathlib import Path
from typing import Final, Literal

import click

from kms_cli import terminal
from kms_cli.connection import connect
from kms_cli.options import context_of, context_option, force_option, key_option, output_option, writing
from kms_core.age import armor
from kms_protocol.errors import NotACiphertext, TooLarge
from kms_protocol.units import MiB
from kms_protocol.wire import ContextIn

READ_LIMIT_BYTES: Final = 8 * MiB  # above what any setting allows in a single call


class FromStdin(click.Command):
    """A command that reads stdin. Its arguments may be the secret, so errors do not show them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as exc:
            if type(exc) is not click.UsageError:
                raise
            raise click.UsageError("arguments are not read: give the input on stdin", ctx) from None


@click.command(
    "encrypt",
    cls=FromStdin,
    epilog="Example: printf secret-data | kms encrypt --context env=prod,service=api",
)
@context_option
@key_option
def encrypt_command(context: ContextIn, key_id: str | None) -> None:
    """Encrypt stdin and write the ciphertext to stdout as one line of base64."""
    plaintext = _stdin()
    with connect() as kms:
        sealed = kms.encrypt(plaintext, context=context, key_id=key_id)
    if not terminal.printed_as_json(sealed):
        terminal.result(_base64(sealed.ciphertext))


@click.command("decrypt", cls=FromStdin)
@output_option
@context_option
@key_option
@force_option
def decrypt_command(output: Path | None, context: ContextIn, key_id: str | None, *, force: bool) -> None:
    """Decrypt base64, or an age file, from stdin and write the plaintext to stdout unchanged.

    A terminal is shown only text, unless --output - is given.

    --key-id is needed only for files of other age tools.
    """
    ciphertext = _ciphertext()
    with connect() as kms:
        opened = kms.decrypt(ciphertext, context=context, key_id=key_id)
    if output is not None or not terminal.printed_as_json(opened):
        with writing(output, overwrite=force) as target:
            target.write(opened.plaintext)


@click.command("generate-key")
@click.option("--key-spec", type=click.Choice(["AES_128", "AES_256"]), default="AES_256", show_default=True)
@context_option
@key_option
@click.option("--without-plaintext", is_flag=True, help="Return only the encrypted key.")
def generate_key_command(
    key_spec: Literal["AES_128", "AES_256"],
    context: ContextIn,
    key_id: str | None,
    *,
    without_plaintext: bool,
) -> None:
    """Generate a random data key and print it in base64, plain and encrypted."""
    with connect() as kms:
        made = kms.generate_data_key(
            key_spec, context=context, key_id=key_id, without_plaintext=without_plaintext
        )
    if terminal.printed_as_json(made):
        return
    plain = {"plaintext": _base64(made.plaintext)} if isinstance(made.plaintext, bytes) else {}
    terminal.record({**plain, "ciphertext": _base64(made.ciphertext), "key_spec": made.key_spec})


@click.command("rewrap", cls=FromStdin)
@context_option
@click.option("--new-context", callback=context_of, help="Bind this context instead of the old one.")
@key_option
def rewrap_command(context: ContextIn, new_context: ContextIn, key_id: str | None) -> None:
    """Rewrap the base64 ciphertext on stdin under the current version of its key, or under --key-id.

    The payload is not changed: anyone who could read the old ciphertext can read the new one.
    """
    ciphertext = _ciphertext()
    with connect() as kms:
        sealed = kms.rewrap(ciphertext, context=context, new_context=new_context, key_id=key_id)
    if not terminal.printed_as_json(sealed):
        terminal.result(_base64(sealed.ciphertext))


def _stdin() -> bytes:
    """Read stdin. Raises TooLarge above 8 MiB."""
    if sys.stdin.isatty():
        terminal.say("reading from the terminal, end with Ctrl-D")
    given = sys.stdin.buffer.read(READ_LIMIT_BYTES + 1)
    if len(given) > READ_LIMIT_BYTES:
        raise TooLarge(f"stdin exceeds {READ_LIMIT_BYTES // MiB} MiB")
    return given


def _ciphertext() -> bytes:
    """Read a ciphertext from stdin. Raises NotACiphertext, TooLarge."""
    found = ciphertext_in(_stdin())
    if found is None:
        raise NotACiphertext("stdin is not an age file, nor one in base64")
    return found


def ciphertext_in(given: bytes) -> bytes | None:
    """Return an age file without its armor or base64; None for anything else. Raises DecryptFailed."""
    if given.startswith(armor.VERSION_LINE):
        return given
    if given.lstrip().startswith(armor.BEGIN):
        return armor.dearmor(given)
    try:
        found = binascii.a2b_base64(b"".join(given.split()), strict_mode=True)
    except binascii.Error:
        return None
    return found if found.startswith(armor.VERSION_LINE) else None


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")
