"""``kms audit``: verify, tail, receipt and so on. Reads files of this machine; asks no service."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import click
import msgspec

from kms_cli import audited, terminal
from kms_cli.local import anchors, machine_settings
from kms_cli.main import AUDIT_COMMANDS, LazyGroup
from kms_cli.progress import Meter
from kms_cli.session import session
from kms_core import audit
from kms_core.audit import query
from kms_core.audit.keys import Concealer, PublicKeys, pem, public_path
from kms_core.audit.query import EventFilter, RecordedOperation
from kms_core.audit.verification import receipt
from kms_core.audit.verification.anchors import ACKNOWLEDGED, CUT, MISSING_CHAIN, effect_of
from kms_core.audit.verification.receipt import BadReceipt, Receipt
from kms_core.audit.verification.report import ChainReport, VerificationReport
from kms_core.audit.verification.verify import verify
from kms_core.envelope.binding import DEFAULT_TENANT
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import (
    EXIT_BAD_DATA,
    EXIT_OTHER,
    EXIT_UNAVAILABLE,
    AuditUnavailable,
    ConfigurationError,
    InvalidRequest,
    Unavailable,
)

FOLLOW_EVERY_S: Final = 0.5
_PAGE: Final = 1000
_EXITS: Final = {
    "intact": 0,
    "open end": EXIT_OTHER,
    "not compared": EXIT_UNAVAILABLE,
    "damaged": EXIT_BAD_DATA,
}
_OLDER: Final = (
    "the log lacks what its anchors name: keep it as it is, and put the newer copy back. If there is none, "
    "put the loss on record: kms audit acknowledge-loss (docs/audit.md)"
)
_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER: Final = click.Path(exists=True, file_okay=False, path_type=Path)
_MOST_RECEIPT_BYTES: Final = 256 * 1024 * 1024

audit_command = LazyGroup("audit", AUDIT_COMMANDS, "Verify and read the audit trail of this machine.")
folder_argument = click.argument("folder", metavar="[DIR]", type=_FOLDER, required=False)
keys_option = click.option(
    "--public-key", type=_FILE, help="Keys to trust [default: the .pub file beside the settings' key]."
)


@click.command("verify", short_help="Verify the trail.")
@folder_argument
@keys_option
@click.option(
    "--anchors",
    "places",
    multiple=True,
    metavar="PLACE",
    help='File or directory of anchors, or "redis" [default: all of the settings, for their own log].',
)
@click.option("--no-anchors", is_flag=True, help="Compare with no anchors: an older copy looks intact.")
@click.option("--processes", type=click.IntRange(1, 64), help="At most so many [default: one a processor].")
def verify_command(
    folder: Path | None,
    public_key: Path | None,
    places: Sequence[str],
    processes: int | None,
    *,
    no_anchors: bool,
) -> int:
    """Check every line in DIR: order, gaps, edits, cut ends, missing files, signatures, anchors.

    DIR is by default where the settings put the trail. Exit code 0 if all holds, 1 if nothing contradicts but
    a chain has no end ("cut or crashed") and nobody has seen it, 65 if something is damaged or missing, 69 if
    anchors could not be read.
    """
    found = anchors.Read() if no_anchors else _anchors(folder, places)
    report = _verified(_folder(folder), _keys(public_key), found, processes)
    if not report.chains and not report.problems:
        terminal.say(f"there is no audit trail in {_folder(folder)}")
        return EXIT_BAD_DATA
    _show(report)
    return _EXITS[report.verdict]


@click.command("acknowledge-loss", short_help="Put a loss on record.")
@click.argument("chains", metavar="[CHAIN]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All chains that lack lines.")
def acknowledge_loss_command(chains: Sequence[str], *, every: bool) -> int:
    """Put on record that the lines of CHAIN which anchors name are lost for good, after a restored backup.

    Without CHAIN, show what is missing. Stop the service before the backup is restored. The record names the
    user and the first and last line that are lost, and "kms audit verify" shows the loss as a note from then
    on. If more lines are lost later, that is a loss of its own. Lines that were written anew are not
    acknowledged.
    """
    report = _verified(_folder(None), _keys(None), anchors.configured(machine_settings.settings()), None)
    if report.not_compared:
        raise Unavailable(f"Anchors cannot be read, so what is lost is not known: {_reasons(report)}")
    found = [each for each in report.problems if each.code in {CUT, MISSING_CHAIN} and each.anchor]
    lost = {
        each.chain: each for each in sorted(found, key=lambda each: each.anchor_seq)
    }  # the last lost line
    unknown = set(chains) - lost.keys()
    if unknown:
        raise InvalidRequest(
            f"No anchor says that lines of {len(unknown)} of these chains are missing: "
            "without CHAIN the command shows those that are"
        )
    chosen = [each for name, each in lost.items() if every or name in chains]
    if not chosen:
        for each in lost.values():
            terminal.result(f"{each.chain}: {each.text}")
        terminal.say("name the chains, or --all" if lost else "the log has every line that its anchors name")
        return EXIT_OTHER if lost else 0
    with audited.log_of(machine_settings.settings()) as log:
        for each in chosen:
            first = each.seq if each.code == CUT else 0
            what = audited.unique(effect_of(each.chain, first, each.anchor_seq))
            with audit.effect(log, audited.operator(DEFAULT_TENANT), ACKNOWLEDGED, what):
                terminal.result(f"on record as lost: {each.chain}: {each.text}")
    return 0


@click.command("tail", short_help="Show what was recorded.")
@folder_argument
@click.option("-n", "--lines", type=click.IntRange(0, 100_000), default=20, show_default=True)
@click.option("-f", "--follow", is_flag=True, help="Go on, until Ctrl-C.")
@click.option("--operation", help="encrypt, decrypt, rotate, denied and so on.")
@click.option("--result", help='"ok", "failed" for all others, or an error code.')
@click.option("--principal")
@click.option("--tenant")
@click.option("--key-id")
@click.option("--request-id")
@click.option("--job-id")
@click.option("--context", help="Pairs that the context holds, as key=value,key=value.")
def tail_command(
    folder: Path | None,
    lines: int,
    result: str | None,
    context: str | None,
    *,
    follow: bool,
    **equal: str | None,
) -> None:
    """Show the last operations in DIR, newest last; with --json as records."""
    where = _folder(folder)
    tenant = equal.get("tenant") or "default"
    pairs = Context.parse(context)
    hidden = (
        Concealer.at(machine_settings.settings().kms.audit.key_path).conceal(tenant, pairs) if pairs else {}
    )
    wanted = EventFilter(
        equal=tuple((name, value) for name, value in equal.items() if value is not None),
        result=result or "",
        context=tuple(hidden.items()),
    )
    beginning = query.now()
    shown = query.newest(where, wanted, lines)
    asked = {**equal, "result": result, "follow": "yes" if follow else ""}
    own = _record_read(folder, {name: value or "" for name, value in asked.items()}, len(shown))
    for event in shown:
        _line(event)
    if follow:
        _follow(where, replace(wanted, since=beginning), {own, *(event.id for event in shown)})


@click.command("receipt", short_help="Prove one record.")
@click.argument("audit_id", metavar="ID")
@folder_argument
def receipt_command(audit_id: str, folder: Path | None) -> None:
    """Write a receipt for the record ID (X-KMS-Audit-Id): its line, and the proof up to a signed checkpoint.

    It shows no other record, and "kms audit check-receipt" checks it anywhere.
    """
    made = receipt.make(_folder(folder), audit_id)
    _record_read(folder, {"receipt": made.id}, 1)
    terminal.result(msgspec.json.encode(made).decode())


@click.command("check-receipt", short_help="Check a receipt.")
@click.argument("file", type=_FILE)
@keys_option
def check_receipt_command(file: Path, public_key: Path | None) -> None:
    """Check the receipt in FILE against the public key, and show its record. Needs nothing else."""
    keys = _keys(public_key)
    if keys is None:
        raise ConfigurationError(
            "There is no public key here: name one with --public-key (see: kms audit key)"
        )
    try:
        if file.stat().st_size > _MOST_RECEIPT_BYTES:
            raise BadReceipt("The file is too large for a receipt")
        found = msgspec.json.decode(file.read_bytes(), type=Receipt)
    except wire.NOT_JSON:
        raise BadReceipt("The file is no receipt") from None
    receipt.check(found, keys)
    terminal.result(found.line)
    terminal.say(f"the receipt holds: {found.id} stands before a checkpoint signed by a key that you trust")


@click.command("key", short_help="Print the public key.")
def key_command() -> None:
    """Print the public keys that checkpoints here are signed with, in PEM. Keep them in another place."""
    keys = _keys(None)
    if keys is None:
        raise ConfigurationError("There is no key yet: it is made when the service first starts")
    if session().as_json:
        terminal.record({"keys": {name: pem(raw) for name, raw in keys.keys.items()}}, as_json=True)
        return
    for name, raw in keys.keys.items():
        terminal.say(f"key {name}")
        terminal.result(pem(raw).rstrip())


# -- where things are --------------------------------------------------------------------------------


def _folder(given: Path | None) -> Path:
    return given or machine_settings.settings().kms.audit.path


def _keys(given: Path | None) -> PublicKeys | None:
    """The keys to trust; None if there are none here, and then the trail's own are taken."""
    if given is not None:
        return PublicKeys.read(given)
    own = public_path(machine_settings.settings().kms.audit.signing_key_path)
    return PublicKeys.read(own) if own.exists() else None


def _is_own(folder: Path | None) -> bool:
    """Whether this is the log of the settings, and no copy of some log."""
    return folder is None or folder.resolve() == machine_settings.settings().kms.audit.path.resolve()


def _anchors(folder: Path | None, places: Sequence[str]) -> anchors.Read:
    if places:
        return anchors.named(machine_settings.settings(), places)
    if _is_own(folder):
        return anchors.configured(machine_settings.settings())
    terminal.say("note: DIR is not the log of the settings: name its anchors with --anchors to compare them")
    return anchors.Read()


def _verified(
    where: Path, keys: PublicKeys | None, found: anchors.Read, processes: int | None
) -> VerificationReport:
    with Meter() as meter:
        report = verify(
            where,
            keys,
            found.lines,
            processes=processes or os.cpu_count() or 1,
            progress=lambda done, total: meter.show("verifying", done, total),
        )
    found.note_in(report)
    return report


def _record_read(folder: Path | None, asked: Mapping[str, str], count: int) -> str:
    """Put a read of the log of this machine on record; the id, if it was. A copy has no log to write to.

    Who may read the files and not write there reads them with any program: it is said, and goes on.
    """
    settings = machine_settings.settings()
    if not _is_own(folder) or not settings.kms.audit.signing_key_path.exists():
        return ""
    try:
        with audited.log_of(settings) as log:
            return audit.read(log, audited.operator(DEFAULT_TENANT), asked, count)
    except (AuditUnavailable, ConfigurationError) as exc:
        terminal.say(f"note: this read is not on record: {exc.detail}")
        return ""


# -- words -------------------------------------------------------------------------------------------


def _show(report: VerificationReport) -> None:
    if session().as_json:
        terminal.record({"verdict": report.verdict, **asdict(report)}, as_json=True)
        return
    terminal.table(
        ("CHAIN", "LINES", "FILES", "FROM", "TO", "END", "SIGNED"), [_row(each) for each in report.chains]
    )
    for problem in report.problems:
        place = " ".join(part for part in (problem.file or problem.chain, _number(problem.seq)) if part)
        terminal.result(f"{problem.code}: {place}: {problem.text}")
    for place, why in report.not_compared.items():
        terminal.result(f"not compared with the anchors in {place}: {why}")
    if any(problem.anchor for problem in report.problems):
        terminal.say(_OLDER)
    for note in report.notes:
        terminal.say(f"note: {note.chain} {_number(note.seq)}: {note.text}")
    if not report.trusted:
        terminal.say("note: signed by keys that only the trail itself names: trust comes with --public-key")
    speed = f"{report.lines:,} lines, {terminal.size(report.size_bytes)} in {report.seconds:.1f} s"
    count = len(report.chains)
    terminal.result(f"{report.verdict}: {count} chain{'s' * (count != 1)}, {speed}")


def _reasons(report: VerificationReport) -> str:
    return "; ".join(f"{place}: {why}" for place, why in report.not_compared.items())


def _row(each: ChainReport) -> tuple[str, ...]:
    signed = (
        "all"
        if each.signed_seq == each.last_seq
        else f"to {each.signed_seq}"
        if each.signed_seq >= 0
        else "none"
    )
    return (
        each.chain,
        f"{each.lines:,}",
        str(each.files),
        each.first_time[:19],
        each.last_time[:19],
        each.state,
        signed,
    )


def _number(seq: int) -> str:
    return f"line {seq}" if seq >= 0 else ""


def _line(event: RecordedOperation) -> None:
    if session().as_json:
        terminal.result(msgspec.json.encode({"id": event.id, **query.fields(event)}).decode())
        return
    result = event.result or event.stage
    who = event.principal or "-"
    terminal.result(
        f"{event.time}  {event.operation:<17}  {result:<16}  {event.key_id or '-'}  {who}  {event.id}"
    )


def _follow(folder: Path, wanted: EventFilter, shown: set[str]) -> None:
    after = None
    while True:
        page = query.page(folder, wanted, after, _PAGE)
        for event in page.events:
            if event.id not in shown:
                _line(event)
        after = page.following
        if not page.more:
            sys.stdout.flush()
            time.sleep(FOLLOW_EVERY_S)
