"""``kms keys``: list, usage, rotate."""

from datetime import UTC, datetime

import click

from kms_cli import terminal
from kms_cli.main import KEYS_COMMANDS, LazyGroup
from kms_cli.remote_service import connect, show
from kms_cli.session import session
from kms_protocol.wire import KeyOut

keys_command = LazyGroup("keys", KEYS_COMMANDS, "List, show and rotate keys.")
key_argument = click.argument("key_id", metavar="KEY")


@click.command("list", short_help="List keys.")
def list_command() -> None:
    """List the keys of the service: backend, version that seals, its age, and when a new one is due."""
    with connect() as kms:
        found = kms.keys()
    if session().as_json:
        show(found)
        return
    terminal.table(
        ("KEY", "BACKEND", "VERSION", "AGE", "ROTATE", "SEALED"), [_row(key) for key in found.keys]
    )


@click.command("usage", short_help="Show the versions of a key.")
@key_argument
def usage_command(key_id: str) -> None:
    """Show each version of a key with what it has sealed. Counts may lack the last seconds of a process."""
    with connect() as kms:
        key = kms.key(key_id)
    if session().as_json:
        show(key)
        return
    if key.current_version is None:
        terminal.say("the backend does not answer, so its versions are not known")
    rows = [
        (
            version.version,
            "in use" if version.version == key.current_version else "opens",
            version.created_at or "-",
            _number(version.operations),
            "-" if version.bytes is None else terminal.size(version.bytes),
        )
        for version in key.versions
    ]
    terminal.table(("VERSION", "STATE", "CREATED", "SEALED", "BYTES"), rows)


@click.command(
    "rotate",
    short_help="Make a new version.",
    epilog="Old versions go on decrypting. Move files with: kms rewrap-file, or a rewrap job over a folder.",
)
@key_argument
def rotate_command(key_id: str) -> None:
    """Make a new version of a key, which seals from now on."""
    with connect() as kms:
        made = kms.rotate(key_id)
    if session().as_json:
        show(made)
        return
    terminal.result(f"{made.key_id} now seals with version {made.key_version} ({made.backend})")


def _row(key: KeyOut) -> tuple[str, ...]:
    current = next((version for version in key.versions if version.version == key.current_version), None)
    used = None if current is None else current.operations
    spent = f" ({key.budget:.0%} of its budget)" if key.budget and key.budget >= 0.5 else ""  # noqa: PLR2004 -- half
    return (
        f"{key.id}{' *' if key.default else ''}",
        "+".join((key.backend, *key.others)),
        key.current_version or "does not answer",
        _age(current.created_at if current else None),
        _day(key.rotate_at),
        _number(used) + spent,
    )


def _age(created_at: str | None) -> str:
    if created_at is None:
        return "-"
    days = (datetime.now(UTC) - datetime.fromisoformat(created_at)).days
    return f"{days} d"


def _day(at: str | None) -> str:
    if at is None:
        return "-"
    due = datetime.fromisoformat(at)
    return "due" if due <= datetime.now(UTC) else due.date().isoformat()


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"
