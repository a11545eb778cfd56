"""``kms token``: creates, lists, rotates and revokes API tokens, in the service's token file or document."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import click

from kms_cli import audited, terminal
from kms_cli.local import installation
from kms_cli.options import PATH, duration, placed
from kms_cli.session import global_options
from kms_core import scopes
from kms_core.auth import tokens
from kms_core.auth.tokens import Token, TokenRequest
from kms_core.observability import logs
from kms_core.settings.model import Settings
from kms_protocol.errors import InvalidRequest, TargetExists
from kms_protocol.units import time_text

file_option = click.option("--file", type=PATH, help="Token file [default: that of the settings].")
which_argument = click.argument("which", metavar="TOKEN")
output_option = click.option("-o", "--output", type=PATH, help="Write the token here (0600), not to stdout.")


@click.command(
    "create",
    epilog="Example: kms token create --name ci --scope 'encrypt,decrypt key=ci-*' --ttl 30d",
)
@click.option("--name", required=True, help="Principal of the token, as in the audit log.")
@click.option("--tenant", default="default", show_default=True)
@click.option(
    "--scope",
    "lines",
    multiple=True,
    required=True,
    help="Operations that it allows; repeatable (docs/auth.md).",
)
@click.option("--ttl", default="90d", show_default=True, help='Lifetime: 12h, 30d, or "never" for no expiry.')
@output_option
@file_option
def create_command(  # noqa: PLR0913, PLR0917 -- one for each option
    name: str, tenant: str, lines: tuple[str, ...], ttl: str, output: Path | None, file: Path | None
) -> None:
    """Create a token and print it. It cannot be shown again: the service stores only its hash."""
    for label, text in (("--name", name), ("--tenant", tenant)):
        if not tokens.NAME.fullmatch(text):
            raise InvalidRequest(f"{label} takes at most 80 letters, digits, _ . and -")
    granted = [_scope(line) for line in lines]
    wish, here = TokenRequest(name, tenant, lines, _ttl(ttl)), _token_file(file)
    with _placed(output) as written:
        _print_token("created", *tokens.create(here.where, wish, here.recorded("create")), written)
    _note_excluded(granted)


@click.command("list")
@file_option
def list_command(file: Path | None) -> None:
    """List tokens: id, tenant, name, expiry and scopes."""
    here = _token_file(file)
    found = tokens.listed(here.where)
    if global_options().as_json:
        for token in found:
            terminal.record(_described(token))
        return
    if not found:
        terminal.say(f"no tokens in {here}")
        return
    terminal.table(("ID", "TENANT", "NAME", "EXPIRES", "SCOPES"), [_row(token) for token in found])


@click.command("rotate")
@which_argument
@click.option(
    "--overlap", default="1h", show_default=True, help="Time for which the old secret stays valid: 0 or 1h."
)
@click.option("--ttl", help="New lifetime [default: unchanged].")
@output_option
@file_option
def rotate_command(which: str, overlap: str, ttl: str | None, output: Path | None, file: Path | None) -> None:
    """Replace the secret of a token. Its id, name, scopes and jobs stay."""
    kept = timedelta() if overlap == "0" else duration("--overlap", overlap)
    renewed = None if ttl is None else _ttl(ttl)
    here = _token_file(file)
    with _placed(output) as written:
        made = tokens.rotate(here.where, which, kept, renewed, here.recorded("rotate"))
        _print_token("rotated", *made, written)


@click.command("revoke")
@which_argument
@file_option
def revoke_command(which: str, file: Path | None) -> None:
    """Revoke a token immediately and permanently. Its queued jobs fail with the code forbidden."""
    here = _token_file(file)
    _report("revoked", tokens.revoke(here.where, which, here.recorded("revoke")))


@click.command("adopt")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--file", type=PATH, help="Add the tokens of this token file to them.")
def adopt_command(yes: bool, file: Path | None) -> None:
    """Accept the tokens stored at [kms.auth] tokens, even if newer ones were seen before.

    Needed once after the document was put back from a backup, and if neither this host nor Redis has seen it.
    Tokens that were revoked in a newer document are valid again: revoke them again.
    """
    here = _token_file(None)
    if isinstance(here.where, Path):
        raise InvalidRequest("The settings name a token file and no document: see [kms.auth] tokens")
    taken = () if file is None else tokens.read(file).tokens
    if not yes and not click.confirm(f"Make {here} the newest document of tokens?", err=True):
        raise click.Abort
    with audited.effect(here.settings, "token.adopt", str(here)):
        number = tokens.adopt(here.where, taken)
    terminal.say(f"adopted {here}: {number} tokens")


@dataclass(frozen=True, slots=True)
class _TokenFile:
    """Place of the tokens, and the settings of the service, whose audit log records the changes."""

    where: tokens.Where
    settings: Settings

    def __str__(self) -> str:
        return str(self.where if isinstance(self.where, Path) else self.where.storage)

    def recorded(self, change: str) -> tokens.Recorder:
        return lambda token: audited.effect(self.settings, f"token.{change}", token.id, token.tenant)


def _token_file(file: Path | None) -> _TokenFile:
    """Return ``file``, or the document or token file of the settings. Raises ConfigurationError."""
    settings = installation.settings()
    if file is None and settings.kms.auth.mode != "required":
        terminal.say('note: this service requires no tokens: set mode = "required" under [kms.auth]')
    if file is None and settings.kms.auth.tokens:
        from kms_core import container  # noqa: PLC0415 -- the rest of the service, which takes a second

        logs.configure("error", json=False)  # stdout is for results
        return _TokenFile(container.token_document(settings, audited.redis_of(settings)), settings)
    return _TokenFile(file or settings.kms.auth.tokens_path, settings)


class TokenFileExists(TargetExists):
    """The output file exists; a token is not worth overwriting one."""

    hint = "name another file with --output"


def _placed(output: Path | None) -> AbstractContextManager[BinaryIO | None]:
    """Open the output before a token is made, with room for its text, which cannot be shown again.

    Raises TokenFileExists.
    """
    if output is not None and os.path.lexists(output):
        raise TokenFileExists(f"{output} exists")
    return nullcontext() if output is None else placed(output, overwrite=False, room_bytes=59)


def _print_token(done: str, token: Token, text: str, written: BinaryIO | None) -> None:
    _report(done, token)
    if written is not None:
        written.write(f"{text}\n".encode())
    elif not terminal.printed_as_json({**_described(token), "token": text}):
        terminal.result(text)


def _report(done: str, token: Token) -> None:
    expires = f", expires {time_text(token.expires_at)}" if token.expires_at else ", does not expire"
    ending = expires if done != "revoked" else ""
    terminal.say(f"{done} token {token.id}: {token.name} of tenant {token.tenant}{ending}")


def _described(token: Token) -> dict[str, object]:
    return {
        "id": token.id,
        "name": token.name,
        "tenant": token.tenant,
        "scopes": list(token.scopes),
        "created_at": time_text(token.created_at),
        "expires_at": time_text(token.expires_at) if token.expires_at else None,
    }


def _row(token: Token) -> tuple[str, ...]:
    expires = "never" if token.expires_at is None else time_text(token.expires_at)
    if token.has_expired(datetime.now(UTC)):
        expires = "expired"
    return token.id, token.tenant, token.name, expires, " | ".join(token.scopes)


def _scope(line: str) -> scopes.Scope:
    try:
        return scopes.parse(line)
    except ValueError as exc:
        raise InvalidRequest(f"--scope: {exc}") from exc


def _note_excluded(found: Sequence[scopes.Scope]) -> None:
    """Name the operations that ``*`` excludes and no scope adds."""
    held = frozenset().union(*(scope.operations for scope in found))
    left_out = sorted(frozenset().union(*(scope.left_out for scope in found)) - held)
    if left_out:
        terminal.say(
            f"note: * excludes {', '.join(left_out)}: add those that are needed, as in *,{left_out[0]}"
        )


def _ttl(text: str) -> timedelta | None:
    return None if text == "never" else duration("--ttl", text)
