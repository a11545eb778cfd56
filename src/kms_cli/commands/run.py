"""``kms run``: a program with sealed values in its environment, and nowhere else.

The program replaces this process (execve), so its signals and its exit code are its own, and nothing of ours
stays in memory.
"""

import binascii
import os
import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NoReturn, TypedDict, Unpack

import click

from kms_cli import terminal
from kms_cli.commands import env_file
from kms_cli.options import context_option, key_option
from kms_cli.remote_service import connect
from kms_client import Client
from kms_core.age import armor
from kms_protocol.errors import InvalidRequest, TooLarge
from kms_protocol.wire import ContextIn

NOT_EXECUTABLE: Final = 126  # as a shell says it
NOT_FOUND: Final = 127
LIMIT_BYTES: Final = 2 * 1024 * 1024
_AGE: Final = b"age-encryption.org/"
_SEALED_TEXT: Final = "YWdlLWVuY3J5cHRpb24ub3JnL3Yx"  # how an age file begins in base64
_IGNORED: Final = ("SIGPIPE", "SIGXFSZ")  # Python ignores them, and a program would inherit that


class RunOptions(TypedDict):
    """What ``kms run`` is given."""

    env_files: tuple[Path, ...]
    env: tuple[str, ...]
    allow: tuple[str, ...]
    context: ContextIn
    key_id: str | None
    command: tuple[str, ...]


@click.command(
    "run",
    short_help="Run a program with sealed values.",
    epilog="Example: kms run --env-file app.env.enc --context env=prod -- ./deploy --all",
)
@click.option(
    "--env-file",
    "env_files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="NAME=value lines or a JSON object: sealed as a whole, or with sealed values in it.",
)
@click.option("--env", multiple=True, metavar="NAME=FILE", help="The sealed content of one file.")
@click.option("--allow", multiple=True, metavar="NAME", help="A name that steers programs, such as PATH.")
@context_option
@key_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run_command(**given: Unpack[RunOptions]) -> None:
    """Open sealed values into the environment of COMMAND, and become it.

    A value in a plain --env-file is opened if it is base64 of an encrypted text, or @FILE, relative to it;
    any other is taken as it is. Later values win, and all win over those that are set already. Nothing is
    written to disk, and no value is in any argument. The program leaves no core file.
    """
    with connect() as kms:
        opener = _Opener(kms, given["context"], given["key_id"])
        values = dict(_values(given, opener))
    if not values:
        raise click.UsageError("nothing to open: --env-file or --env", click.get_current_context())
    _become(given["command"], values)


run_command.allow_interspersed_args = False  # options behind COMMAND are its own


class _Opener:
    """The service, with the context of this run."""

    def __init__(self, kms: Client, context: ContextIn, key_id: str | None) -> None:
        self._kms, self._context, self._key_id = kms, context, key_id

    def open(self, ciphertext: bytes, where: str) -> str:
        opened = self._kms.decrypt(ciphertext, context=self._context, key_id=self._key_id)
        try:
            return opened.plaintext.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f"{where} holds bytes that are no UTF-8 text") from None


def _values(given: RunOptions, opener: _Opener) -> Iterator[tuple[str, str]]:
    allowed = frozenset(given["allow"])
    for path in given["env_files"]:
        for name, value in _of_file(path, opener).items():
            env_file.check(name, value, str(path), allowed)
            yield name, value
    for pair in given["env"]:
        name, equals, file = pair.partition("=")
        if not equals or not file:
            raise click.UsageError("--env takes NAME=FILE", click.get_current_context())
        value = _content(Path(file), opener)
        env_file.check(name, value, "--env", allowed)
        yield name, value


def _of_file(path: Path, opener: _Opener) -> Mapping[str, str]:
    """The values of an environment file, opened."""
    data = _read(path)
    sealed = _ciphertext(data)
    if sealed is not None:
        return env_file.parse(opener.open(sealed, str(path)), str(path))
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{path} is neither text nor an encrypted file") from None
    values = env_file.parse(text, str(path))
    return {name: _opened(name, value, path, opener) for name, value in values.items()}


def _opened(name: str, value: str, path: Path, opener: _Opener) -> str:
    if value.startswith("@"):
        return _content(path.parent / value[1:], opener)
    if not value.startswith(_SEALED_TEXT):
        return value
    sealed = _ciphertext(value.encode())
    if sealed is None:
        raise InvalidRequest(
            f"The value of {name} in {path} begins as base64 of an encrypted text, and is none"
        )
    return opener.open(sealed, f"{name} in {path}")


def _content(path: Path, opener: _Opener) -> str:
    """What a sealed file holds, without the end of its last line."""
    sealed = _ciphertext(_read(path))
    if sealed is None:
        raise InvalidRequest(f"{path} is not an encrypted file: seal it with kms encrypt or kms encrypt-file")
    return opener.open(sealed, str(path)).removesuffix("\n")


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(LIMIT_BYTES + 1)
    if len(data) > LIMIT_BYTES:
        raise TooLarge(f"{path} is above {terminal.size(LIMIT_BYTES)}, which no environment holds")
    return data


def _ciphertext(data: bytes) -> bytes | None:
    """An age file out of its armor or base64; None if it is neither."""
    if data.startswith(_AGE):
        return data
    if data.lstrip().startswith(armor.BEGIN):
        return armor.dearmor(data)
    if not data.lstrip().startswith(_SEALED_TEXT.encode()):
        return None
    try:
        return binascii.a2b_base64(re.sub(rb"\s", b"", data), strict_mode=True)
    except binascii.Error:
        return None


def _become(command: tuple[str, ...], values: Mapping[str, str]) -> NoReturn:
    for name in _IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, {**os.environ, **values})  # noqa: S606 -- whoever calls names it
    except FileNotFoundError:
        terminal.say(f"error: {command[0]} is not on the PATH")
        raise SystemExit(NOT_FOUND) from None
    except OSError as exc:
        terminal.say(f"error: {command[0]}: {terminal.plain(exc.strerror or '')}")
        raise SystemExit(NOT_EXECUTABLE) from None
