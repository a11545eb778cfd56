"""``kms token``: create, list, rotate and revoke API tokens on the machine where the service keeps them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from kms_cli import audited, terminal
from kms_cli.durations import span
from kms_cli.local import machine_settings
from kms_cli.local.private_files import create_file
from kms_cli.main import TOKEN_COMMANDS, LazyGroup
from kms_cli.session import session
from kms_core import scopes
from kms_core.auth import tokens
from kms_core.auth.tokens import Token, TokenRequest
from kms_core.settings.model import Settings
from kms_protocol.errors import InvalidRequest, TargetExists

token_command = LazyGroup("token", TOKEN_COMMANDS, "Create, list, rotate and revoke API tokens.")
file_option = click.option(
    "--file", "file", type=click.Path(path_type=Path), help="Token file, instead of the one of the settings."
)
which_argument = click.argument("which", metavar="TOKEN")
output_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the token here (0600), not to stdout."
)


@click.command(
    "create",
    short_help="Make a token.",
    epilog="Example: kms token create --name ci --scope 'encrypt,decrypt key=ci-*' --ttl 30d",
)
@click.option("--name", required=True, help="Who it is for: the principal in the audit trail.")
@click.option("--tenant", default="default", show_default=True)
@click.option(
    "--scope", "lines", multiple=True, required=True, help="What it may do; repeatable (docs/auth.md)."
)
@click.option("--ttl", default="90d", show_default=True, help='How long it is valid: 12h, 30d, or "never".')
@output_option
@file_option
def create_command(  # noqa: PLR0913, PLR0917 -- one for each option
    name: str, tenant: str, lines: tuple[str, ...], ttl: str, output: Path | None, file: Path | None
) -> None:
    """Make a token and print it. This is the only time that it is shown: the service keeps its hash."""
    for label, text in (("--name", name), ("--tenant", tenant)):
        if not tokens.NAME.fullmatch(text):
            raise InvalidRequest(f"{label} takes letters, digits, _ . and -, at most 80")
    for line in lines:
        _check_scope(line)
    wish, here = TokenRequest(name, tenant, lines, _ttl(ttl)), _here(file)
    _check_free(output)
    _hand_out("made", *tokens.create(here.path, wish, here.recorded("create")), output)
    _tell_left_out(lines)


@click.command("list", short_help="List tokens.")
@file_option
def list_command(file: Path | None) -> None:
    """List tokens: id, tenant, name, when they expire, and what they may do."""
    path = _here(file).path
    found = tokens.read(path) if path.exists() else ()
    if session().as_json:
        for token in found:
            terminal.record(_described(token), as_json=True)
        return
    if not found:
        terminal.say(f"no tokens in {path}")
        return
    terminal.table(("ID", "TENANT", "NAME", "EXPIRES", "SCOPES"), [_row(token) for token in found])


@click.command("rotate", short_help="Give a token a new secret.")
@which_argument
@click.option(
    "--overlap", default="1h", show_default=True, help="How long the old secret stays valid: 0 or 1h."
)
@click.option("--ttl", help="A new term; else it keeps its own.")
@output_option
@file_option
def rotate_command(which: str, overlap: str, ttl: str | None, output: Path | None, file: Path | None) -> None:
    """Make a new secret for a token. Its id, name and scopes stay, and so do its jobs."""
    kept = timedelta() if overlap == "0" else span("--overlap", overlap)
    renewed = None if ttl is None else _ttl(ttl)
    here = _here(file)
    _check_free(output)
    _hand_out("rotated", *tokens.rotate(here.path, which, kept, renewed, here.recorded("rotate")), output)


@click.command("revoke", short_help="Take a token out.")
@which_argument
@file_option
def revoke_command(which: str, file: Path | None) -> None:
    """Take a token out, at once and for good: its queued jobs end as failed, with the code forbidden."""
    here = _here(file)
    _tell("revoked", tokens.revoke(here.path, which, here.recorded("revoke")))


@dataclass(frozen=True, slots=True)
class _Here:
    """The token file, and the settings of the service on this machine, whose trail tells of changes."""

    path: Path
    settings: Settings

    def recorded(self, change: str) -> tokens.Witness:
        def witness(token: Token) -> AbstractContextManager[None]:
            return audited.effect(self.settings, f"token.{change}", token.id, token.tenant)

        return witness


def _here(file: Path | None) -> _Here:
    """``file``, or the one that the settings name."""
    settings = machine_settings.settings()
    if file is None and settings.kms.auth.mode != "required":
        terminal.say('note: the service here asks for no tokens: write mode = "required" under [kms.auth]')
    return _Here(file or settings.kms.auth.tokens_path, settings)


def _check_free(output: Path | None) -> None:
    """Before a token is made: its text cannot be shown a second time."""
    if output is not None and output.exists():
        raise TargetExists(f"{output} exists")


def _hand_out(done: str, token: Token, text: str, output: Path | None) -> None:
    _tell(done, token)
    if output is not None:
        if not create_file(output, f"{text}\n"):
            raise TargetExists(f"{output} exists, so the token is lost: rotate it")
    elif session().as_json:
        terminal.record({**_described(token), "token": text}, as_json=True)
    else:
        terminal.result(text)


def _tell(done: str, token: Token) -> None:
    expires = f", expires {_time(token.expires_at)}" if token.expires_at else ", does not expire"
    ending = expires if done != "revoked" else ""
    terminal.say(f"{done} token {token.id}: {token.name} of tenant {token.tenant}{ending}")


def _described(token: Token) -> dict[str, object]:
    return {
        "id": token.id,
        "name": token.name,
        "tenant": token.tenant,
        "scopes": list(token.scopes),
        "created_at": _time(token.created_at),
        "expires_at": _time(token.expires_at) if token.expires_at else None,
    }


def _row(token: Token) -> tuple[str, ...]:
    expires = "never" if token.expires_at is None else _time(token.expires_at)
    if token.has_expired(datetime.now(UTC)):
        expires = "expired"
    return token.id, token.tenant, token.name, expires, " | ".join(token.scopes)


def _time(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _check_scope(line: str) -> None:
    try:
        scopes.parse(line)
    except ValueError as exc:
        raise InvalidRequest(f"--scope: {exc}") from exc


def _tell_left_out(lines: Sequence[str]) -> None:
    """A star sounds like everything, and is not."""
    found = [scopes.parse(line) for line in lines]
    held = frozenset().union(*(scope.operations for scope in found))
    left_out = sorted(frozenset().union(*(scope.left_out for scope in found)) - held)
    if left_out:
        terminal.say(
            f"note: * does not hold {', '.join(left_out)}: name what is needed, as in *,{left_out[0]}"
        )


def _ttl(text: str) -> timedelta | None:
    return None if text == "never" else span("--ttl", text)
