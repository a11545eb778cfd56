"""``kms encrypt``, ``decrypt``, ``generate-key``, ``rewrap``: one secret at a time through a pipe."""

import binascii
import sys
from typing import Final, Literal

import click

from kms_cli import terminal
from kms_cli.options import context_of, context_option, key_option
from kms_cli.remote_service import connect, show
from kms_cli.session import session
from kms_core.age import armor
from kms_protocol.errors import InvalidRequest, TooLarge
from kms_protocol.wire import ContextIn

READ_LIMIT_BYTES: Final = 8 * 1024 * 1024  # above any setting of the single calls; a file goes another way
AGE_LINE: Final = b"age-encryption.org/v1\n"


@click.command(
    "encrypt",
    short_help="Encrypt stdin.",
    epilog="Example: printf secret-data | kms encrypt --context env=prod,service=api",
)
@context_option
@key_option
def encrypt_command(context: ContextIn, key_id: str | None) -> None:
    """Encrypt stdin and write the ciphertext to stdout as one line of base64."""
    plaintext = _stdin()
    with connect() as kms:
        sealed = kms.encrypt(plaintext, context=context, key_id=key_id)
    if session().as_json:
        show(sealed)
    else:
        terminal.result(_base64(sealed.ciphertext))


@click.command("decrypt", short_help="Decrypt stdin.")
@context_option
@key_option
def decrypt_command(context: ContextIn, key_id: str | None) -> None:
    """Decrypt base64, or an age file, from stdin and write the plaintext to stdout, as it was.

    --key-id is needed only for files that another age tool made.
    """
    ciphertext = _ciphertext(_stdin())
    with connect() as kms:
        opened = kms.decrypt(ciphertext, context=context, key_id=key_id)
    if session().as_json:
        show(opened)
    else:
        sys.stdout.buffer.write(opened.plaintext)
        sys.stdout.buffer.flush()


@click.command("generate-key", short_help="Make a data key.")
@click.option("--key-spec", type=click.Choice(["AES_128", "AES_256"]), default="AES_256", show_default=True)
@context_option
@key_option
@click.option("--without-plaintext", is_flag=True, help="Give out the encrypted key only.")
def generate_key_command(
    key_spec: Literal["AES_128", "AES_256"],
    context: ContextIn,
    key_id: str | None,
    *,
    without_plaintext: bool,
) -> None:
    """Make a random data key and show it in base64, plain and encrypted."""
    with connect() as kms:
        made = kms.generate_data_key(
            key_spec, context=context, key_id=key_id, without_plaintext=without_plaintext
        )
    if session().as_json:
        show(made)
        return
    plain = {"plaintext": _base64(made.plaintext)} if isinstance(made.plaintext, bytes) else {}
    terminal.record(
        {**plain, "ciphertext": _base64(made.ciphertext), "key_spec": made.key_spec}, as_json=False
    )


@click.command("rewrap", short_help="Move a ciphertext to another key or context.")
@context_option
@click.option(
    "--new-context", callback=context_of, help="Bind this context instead; without it the old one stays."
)
@key_option
def rewrap_command(context: ContextIn, new_context: ContextIn, key_id: str | None) -> None:
    """Wrap the base64 ciphertext on stdin anew, under the current version of its key or under --key-id.

    The payload stays as it is, and whoever could read the old ciphertext still can.
    """
    ciphertext = _ciphertext(_stdin())
    with connect() as kms:
        sealed = kms.rewrap(ciphertext, context=context, new_context=new_context, key_id=key_id)
    if session().as_json:
        show(sealed)
    else:
        terminal.result(_base64(sealed.ciphertext))


def _stdin() -> bytes:
    if sys.stdin.isatty():
        terminal.say("reading from the terminal, end with Ctrl-D")
    given = sys.stdin.buffer.read(READ_LIMIT_BYTES + 1)
    if len(given) > READ_LIMIT_BYTES:
        raise TooLarge(f"stdin is above {terminal.size(READ_LIMIT_BYTES)}")
    return given


def _ciphertext(given: bytes) -> bytes:
    if given.startswith(AGE_LINE):
        return given
    if given.lstrip().startswith(armor.BEGIN):
        return armor.dearmor(given)
    try:
        return binascii.a2b_base64(b"".join(given.split()), strict_mode=True)
    except binascii.Error as exc:
        raise InvalidRequest("stdin is neither base64 nor an age file") from exc


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")
