"""``kms audit``: reads the audit log of this machine and copies of others, without a service."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import click
import msgspec

from kms_cli import audited, terminal
from kms_cli.local import installation
from kms_cli.main import AUDIT_COMMANDS, LazyGroup
from kms_cli.options import FILE
from kms_cli.session import printed_as_json, session
from kms_core import audit
from kms_core.audit import copies, query
from kms_core.audit.copies import HostLog
from kms_core.audit.keys import Concealer, PublicKeys, pem, public_path
from kms_core.audit.query import EventFilter, RecordedOperation
from kms_core.audit.verification import receipt
from kms_core.audit.verification.receipt import BadReceipt, Receipt
from kms_core.envelope.binding import DEFAULT_TENANT
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import AuditUnavailable, ConfigurationError, InvalidRequest

FOLLOW_EVERY_S: Final = 0.5
_PAGE: Final = 1000
FOLDER: Final = click.Path(exists=True, file_okay=False, path_type=Path)
_MAX_RECEIPT_BYTES: Final = 256 * 1024 * 1024

audit_command = LazyGroup("audit", AUDIT_COMMANDS, "Verify and read the audit log of this machine.")
directories_argument = click.argument("folders", metavar="[DIR]...", type=FOLDER, nargs=-1)
directory_argument = click.argument("folder", metavar="[DIR]", type=FOLDER, required=False)
keys_option = click.option(
    "--public-key", type=FILE, help="Trusted keys [default: the .pub file beside the signing key]."
)


@click.command("tail")
@directories_argument
@click.option("-n", "--lines", type=click.IntRange(0, 100_000), default=20, show_default=True)
@click.option("-f", "--follow", is_flag=True, help="Follow new operations until Ctrl-C.")
@click.option("--host", help="The log of this host only, of several.")
@click.option("--operation", help="encrypt, decrypt, rotate, denied and so on.")
@click.option("--result", help='"ok", an error code, or "failed" for any error.')
@click.option("--principal")
@click.option("--tenant")
@click.option("--key-id")
@click.option("--request-id")
@click.option("--job-id")
@click.option("--context", help="Pairs that the context contains, as key=value,key=value.")
def tail_command(  # noqa: PLR0913 -- one for each option
    folders: Sequence[Path],
    lines: int,
    host: str | None,
    result: str | None,
    context: str | None,
    *,
    follow: bool,
    **equal: str | None,
) -> None:
    """Show the last operations in DIR, newest last.

    DIR defaults to the log of the settings, and the copies of other hosts that they name. Of several the
    operations are shown in one list, with their hosts.
    """
    logs = _logs(folders, host)
    tenant = equal.get("tenant") or "default"
    pairs = Context.parse(context)
    hidden = _concealer().conceal(tenant, pairs) if pairs else {}
    wanted = EventFilter(
        equal=tuple((name, value) for name, value in equal.items() if value is not None),
        result=result or "",
        context=tuple(hidden.items()),
    )
    beginning = query.now()
    unread: dict[str, str] = {}
    shown = query.newest(logs, wanted, lines, unread=unread)
    for name, why in unread.items():
        terminal.say(f"note: {name}: {why}")
    query_text = {**equal, "host": host, "result": result, "follow": "yes" if follow else ""}
    asked = {name: value or "" for name, value in query_text.items()}
    own = _record_read(asked, len(shown)) if any(is_own(each.folder) for each in logs) else ""
    for event in shown:
        _line(event)
    if follow:
        _follow(logs, replace(wanted, since=beginning), {own, *(event.id for event in shown)})


def _concealer() -> Concealer:
    settings = installation.settings()
    return Concealer.at(settings.kms.audit.key_path, open_sealed=partial(audited.open_sealed, settings))


@click.command("receipt")
@click.argument("audit_id", metavar="ID")
@directory_argument
def receipt_command(audit_id: str, folder: Path | None) -> None:
    """Write a receipt for the record ID (X-KMS-Audit-Id): its line, and the proof up to a signed checkpoint.

    A receipt reveals no other record. "kms audit check-receipt" checks it on any machine.
    """
    made = receipt.make(folder_of(folder), audit_id)
    if is_own(folder):
        _record_read({"receipt": made.id}, 1)
    terminal.result(msgspec.json.encode(made).decode())


@click.command("check-receipt")
@click.argument("file", type=FILE)
@keys_option
def check_receipt_command(file: Path, public_key: Path | None) -> None:
    """Check the receipt in FILE with the public key, and show its record. Nothing else is needed."""
    keys = keys_of(public_key)
    if keys is None:
        raise ConfigurationError(
            "There is no public key on this machine: name one with --public-key (see: kms audit key)"
        )
    try:
        if file.stat().st_size > _MAX_RECEIPT_BYTES:
            raise BadReceipt("The file is larger than any receipt")
        found = msgspec.json.decode(file.read_bytes(), type=Receipt)
    except wire.NOT_JSON:
        raise BadReceipt("The file is not a receipt") from None
    receipt.check(found, keys)
    terminal.result(found.line)
    terminal.say(f"the receipt is valid: record {found.id} precedes a checkpoint signed by a trusted key")


@click.command("key")
def key_command() -> None:
    """Print the public keys of the checkpoint signatures, in PEM. Keep a copy on another machine."""
    keys = keys_of(None)
    if keys is None:
        raise ConfigurationError("There is no key yet: the first start of the service creates it")
    if printed_as_json({"keys": {name: pem(raw) for name, raw in keys.keys.items()}}):
        return
    for name, raw in keys.keys.items():
        terminal.say(f"key {name}")
        terminal.result(pem(raw).rstrip())


# -- log, keys and anchors ---------------------------------------------------------------------------


def folder_of(given: Path | None) -> Path:
    """The directory of a log: by default that of the settings."""
    return given or installation.settings().kms.audit.path


def keys_of(given: Path | None) -> PublicKeys | None:
    """Return the trusted keys; None if this machine has none, and the keys in the log are used."""
    if given is not None:
        return PublicKeys.read(given)
    own = public_path(installation.settings().kms.audit.signing_key_path)
    return PublicKeys.read(own) if own.exists() else None


def logs_of(folders: Sequence[Path]) -> tuple[Sequence[HostLog], Mapping[str, str]]:
    """Return the logs in directories, by default those that the settings name, and why others are unread.

    Logs in directories have their names; or their paths, if names are the same.
    """
    if not folders:
        section = installation.settings().kms.audit
        return copies.found(section.path, section.copies)
    logs, names = [], [folder.absolute().name for folder in folders]
    for name, folder in zip(names, folders, strict=True):
        log = HostLog(name if names.count(name) == 1 else str(folder), folder.absolute())
        logs.append(replace(log, is_copy=log.keys_path.is_file()))
    return logs, {}


def _logs(folders: Sequence[Path], host: str | None) -> list[HostLog]:
    """The logs to read, of one host if that is given; reports copies that cannot be read."""
    logs, unread = logs_of(folders)
    if len(logs) == 1 and not host and not unread:
        return [HostLog("", logs[0].folder)]
    if host and host not in {*unread, *(each.host for each in logs)}:
        raise InvalidRequest(f"--host is one of {', '.join(sorted(each.host for each in logs if each.host))}")
    for name, why in unread.items():
        if host in {None, name}:
            terminal.say(f"note: {name}: {why}")
    return [each for each in logs if host in {None, each.host}]


def is_own(folder: Path | None) -> bool:
    """Return whether this is the log of the settings rather than a copy of a log."""
    return folder is None or folder.resolve() == installation.settings().kms.audit.path.resolve()


def _record_read(query_text: Mapping[str, str], count: int) -> str:
    """Record a read of the log of this machine. Return the id of the record; empty if none was written.

    Without write access the read goes on with a note, since any program
    could read the files.
    """
    settings = installation.settings()
    if not settings.kms.audit.signing_key_path.exists():
        return ""
    try:
        with audited.log_of(settings) as log:
            return audit.read(log, audited.operator(DEFAULT_TENANT), query_text, count)
    except (AuditUnavailable, ConfigurationError) as exc:
        terminal.say(f"note: this read is not recorded: {exc.detail}")
        return ""


# -- output ------------------------------------------------------------------------------------------


def _line(event: RecordedOperation) -> None:
    if session().as_json:
        terminal.result(msgspec.json.encode({"id": event.id, **query.fields(event)}).decode())
        return
    result = event.result or event.stage
    names = f"{event.key_id or '-'}  {event.principal or '-'}"
    host = f"{event.host:<12}  " if event.host else ""
    terminal.shown(f"{event.time}  {host}{event.operation:<17}  {result:<16}  {names}  {event.id}")


def _follow(logs: Sequence[HostLog], wanted: EventFilter, shown: set[str]) -> None:
    after = None
    while True:
        page = query.page(logs, wanted, after, _PAGE)
        for event in page.events:
            if event.id not in shown:
                _line(event)
        after = page.following
        if not page.more:
            sys.stdout.flush()
            time.sleep(FOLLOW_EVERY_S)
