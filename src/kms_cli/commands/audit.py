"""``kms audit``: reads the audit log of this machine and copies of others, without a service."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final

import click
import msgspec

from kms_cli import audited, options, terminal
from kms_cli.local import anchors, installation
from kms_cli.local.anchors import AnchorLines
from kms_cli.options import FILE
from kms_cli.session import global_options
from kms_core import audit
from kms_core.audit import chain, query
from kms_core.audit.hosts import HostLog, copy_trouble, host_logs
from kms_core.audit.keys import Concealer, PublicKeys, pem, public_path
from kms_core.audit.query import EventFilter, RecordedOperation
from kms_core.audit.verification import receipt
from kms_core.audit.verification.anchors import ACKNOWLEDGED, CUT, MISSING_CHAIN, effect_of
from kms_core.audit.verification.receipt import BadReceipt, Receipt
from kms_core.audit.verification.scan import ChainReport, Note, VerificationReport
from kms_core.audit.verification.verify import verify
from kms_core.envelope.binding import DEFAULT_TENANT
from kms_protocol import small_files, wire
from kms_protocol.context import Context
from kms_protocol.errors import (
    EXIT_BAD_DATA,
    EXIT_OTHER,
    EXIT_UNAVAILABLE,
    AuditUnavailable,
    ConfigurationError,
    InvalidRequest,
    JobsUnavailable,
    Unavailable,
)
from kms_protocol.units import duration_text, size_text, time_or_none

FOLLOW_EVERY_S: Final = 0.5
_PAGE: Final = 1000
FOLDER: Final = click.Path(exists=True, file_okay=False, path_type=Path)
_MAX_RECEIPT_BYTES: Final = 256 * 1024 * 1024

directories_argument = click.argument("folders", metavar="[DIR]...", type=FOLDER, nargs=-1)
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
@click.option("--file-id", help="The id of a file, as `kms inspect` shows it.")
@click.option("--new-file-id", help="The id of a file that a reseal made.")
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
    beginning = chain.text_of(datetime.now(UTC))
    unread: dict[str, str] = {}
    shown = query.newest(logs, wanted, lines, unread=unread)
    for name, why in unread.items():
        terminal.say(f"note: {name}: {why}")
    query_text = {**equal, "host": host, "result": result, "follow": "yes" if follow else ""}
    asked = {name: value or "" for name, value in query_text.items()}
    own = _record_read(asked, len(shown)) if any(is_own(each.folder) for each in logs) else ""
    for event in shown:
        _line(event)
    if not shown and lines:
        terminal.say(f"found no operation in {', '.join(str(each.folder) for each in logs)}")
    if follow:
        _follow(logs, replace(wanted, since=beginning), {own, *(event.id for event in shown)})


def _concealer() -> Concealer:
    settings = installation.settings()
    return Concealer.at(settings.kms.audit.key_path, open_sealed=partial(audited.open_sealed, settings))


@click.command("receipt")
@click.argument("audit_id", metavar="ID")
@click.argument("folder", metavar="[DIR]", type=FOLDER, required=False)
def receipt_command(audit_id: str, folder: Path | None) -> None:
    """Write a receipt for the record ID (X-KMS-Audit-Id): its line, and the proof up to a signed checkpoint.

    A receipt reveals no other record. "kms audit check-receipt" checks it on any machine.
    """
    made = receipt.make(folder or installation.settings().kms.audit.path, audit_id)
    if is_own(folder):
        _record_read({"receipt": made.id}, 1)
    terminal.in_json(msgspec.json.encode(made).decode())


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
        found = msgspec.json.decode(small_files.read(file, _MAX_RECEIPT_BYTES), type=Receipt)
    except wire.NOT_JSON:
        raise BadReceipt("The file is not a receipt") from None
    receipt.check(found, keys)
    terminal.in_json(found.line)
    terminal.say(f"the receipt is valid: record {found.id} precedes a checkpoint signed by a trusted key")


@click.command("key")
def key_command() -> None:
    """Print the public keys of the checkpoint signatures, in PEM. Keep a copy on another machine."""
    keys = keys_of(None)
    if keys is None:
        raise ConfigurationError("There is no key yet: the first start of the service creates it")
    if terminal.printed_as_json({"keys": {name: pem(raw) for name, raw in keys.keys.items()}}):
        return
    for name, raw in keys.keys.items():
        terminal.say(f"key {name}")
        terminal.result(pem(raw).rstrip())


# -- log, keys and anchors ---------------------------------------------------------------------------


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
        return host_logs(section.path, section.copies)
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
    if global_options().as_json:
        terminal.in_json(msgspec.json.encode({"id": event.id, **query.fields(event)}).decode())
        return
    host = (event.host,) if event.host else ()
    names = event.operation, event.result or event.stage, event.key_id or "-", event.principal or "-"
    files = tuple(name for name in (event.file_id, event.new_file_id) if name)
    widths = (0, *(12 for _ in host), 17, 16, 0, 0, 0, *(0 for _ in files))
    terminal.row((event.time, *host, *names, event.id, *files), widths)


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


_MISSING: Final = "missing"
_NOT_READ: Final = "not read"
_EXITS: Final = {
    "intact": 0,
    "open end": EXIT_OTHER,
    _MISSING: EXIT_OTHER,
    "late": EXIT_OTHER,
    "not compared": EXIT_UNAVAILABLE,
    _NOT_READ: EXIT_UNAVAILABLE,
    "damaged": EXIT_BAD_DATA,
}
"""The exit code of each verdict, the worst last."""
_OLDER: Final = (
    "the log lacks records that its anchors name: keep it is, and restore the newer copy. If there is "
    "none, record the loss: kms audit acknowledge-loss (docs/audit.md)"
)


@dataclass(frozen=True, slots=True)
class _Host:
    """A host, the report of its log and the keys for that; or the reason ``why`` there is no report."""

    name: str
    report: VerificationReport | None = None
    why: str = ""
    keys: PublicKeys | None = None

    @property
    def verdict(self) -> str:
        return self.report.verdict if self.report else _NOT_READ if self.why else _MISSING

    @property
    def last_time(self) -> str:
        """Return the time of the newest line; empty without any."""
        return max((each.last_time for each in self.report.chains), default="") if self.report else ""

    @property
    def late(self) -> str:
        """The age of the first line that the copy lacks; empty if it lacks none."""
        since = time_or_none(self.report.late_since) if self.report else None
        return duration_text(max(0.0, (datetime.now(UTC) - since).total_seconds())) if since else ""

    @property
    def row(self) -> tuple[str, ...]:
        chains, lines = ("", "")
        if self.report:
            chains, lines = str(len(self.report.chains)), f"{self.report.lines:,}"
        return self.name, self.verdict, chains, lines, self.last_time[:19], self.late


@click.command("verify")
@directories_argument
@keys_option
@click.option(
    "--anchors",
    "sources",
    multiple=True,
    metavar="SOURCE",
    help='File or directory of anchors, or "redis" [default: all that the settings name, for their log].',
)
@click.option("--no-anchors", is_flag=True, help="Compare no anchors: an older copy of the log passes.")
@click.option(
    "--max-late",
    metavar="TIME",
    default="15m",
    show_default=True,
    help="The copy of a host's log may be so much older than its anchors.",
)
def verify_command(
    folders: Sequence[Path],
    public_key: Path | None,
    sources: Sequence[str],
    max_late: str,
    *,
    no_anchors: bool,
) -> int:
    """Check every line in DIR: order, gaps, edits, cut ends, missing files, signatures, anchors.

    DIR defaults to the log of the settings, and the copies of other hosts that they name. Several are checked
    one by one, and shown by host. DIR with a file DIR.pub beside it is the copy of a host that goes on
    writing: its keys are in that file, and it may lack the newest lines.

    Exit code 0 if all checks pass, 1 if they pass but a chain has no end ("cut or crashed") that a later
    record confirms, or a copy is late or missing, 65 if something is damaged or missing, 69 if anchors or a
    copy cannot be read.
    """
    late = options.duration("--max-late", max_late)
    found = AnchorLines() if no_anchors else _anchors(folders, sources)
    logs, unread = logs_of(folders)
    if len(folders) > 1 or (not folders and installation.settings().kms.audit.copies):
        hosts = [_checked(log, public_key, found, late) for log in logs]
        hosts += [_Host(name, why=why) for name, why in unread.items()]
        if folders or no_anchors:
            return _show_hosts(hosts, {})
        missing = set(_known_hosts()) - {each.name for each in hosts}
        return _show_hosts([*hosts, *map(_Host, sorted(missing))], _unknown_keys(hosts, found))
    log = logs[0]
    keys = keys_of(public_key or (log.keys_path if log.is_copy else None))
    report = _verified(log.folder, keys, found, late if log.is_copy else None)
    if not report.chains and not report.problems:
        terminal.say(f"there is no audit log in {folders[0] if folders else log.folder}")
        return EXIT_BAD_DATA
    _show(report)
    return _EXITS[report.verdict]


@click.command("acknowledge-loss")
@click.argument("chains", metavar="[CHAIN]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All chains with missing lines.")
def acknowledge_loss_command(chains: Sequence[str], *, every: bool) -> int:
    """Record that lines of CHAIN that anchors name are permanently lost, after restoring a backup.

    Without CHAIN, show the missing lines. Stop the service before restoring the backup. The record names the
    user and the first and last lost line; "kms audit verify" then shows the loss as a note. A later loss
    needs a record of its own. Lines that were replaced by others cannot be acknowledged.
    """
    settings = installation.settings()
    report = _verified(settings.kms.audit.path, keys_of(None), anchors.configured_anchors(settings))
    if report.not_compared:
        why = "; ".join(f"{place}: {reason}" for place, reason in report.not_compared.items())
        raise Unavailable(f"Anchors cannot be read, so the loss is unknown: {why}")
    found = [each for each in report.problems if each.code in {CUT, MISSING_CHAIN} and each.anchor]
    lost = {each.chain: each for each in sorted(found, key=lambda each: each.anchor_seq)}  # the last line
    unknown = set(chains) - lost.keys()
    if unknown:
        raise InvalidRequest(
            f"No anchor names missing lines in {len(unknown)} of these chains: "
            "run the command without CHAIN to list the chains with missing lines"
        )
    chosen = [each for name, each in lost.items() if every or name in chains]
    if not chosen:
        for each in lost.values():
            terminal.shown(f"{each.chain}: {each.text}")
        terminal.say("name the chains, or --all" if lost else "the log has every line that its anchors name")
        return EXIT_OTHER if lost else 0
    with audited.log_of(settings) as log:
        for each in chosen:
            first = each.seq if each.code == CUT else 0
            what = audit.effect_name(effect_of(each.chain, first, each.anchor_seq))
            with audit.effect(log, audited.operator(DEFAULT_TENANT), ACKNOWLEDGED, what):
                terminal.shown(f"recorded as lost: {each.chain}: {each.text}")
    return 0


# -- several hosts -------------------------------------------------------------------------------------


def _known_hosts() -> Sequence[str]:
    """The hosts that Redis knows; none if it cannot be asked."""
    from kms_core.jobs.hosts.notes import HostNotes  # noqa: PLC0415 -- only for the logs of several hosts

    client = audited.redis_of(installation.settings())
    with suppress(JobsUnavailable):
        return sorted(set(HostNotes(client).known().values())) if client else ()
    return ()


def _checked(log: HostLog, trusted: Path | None, found: AnchorLines, late: timedelta) -> _Host:
    """Verify the log of one host. ``trusted``: a file of keys in place of that beside the copy."""
    path = trusted or (log.keys_path if log.is_copy else None)
    why = copy_trouble(log.folder) if log.is_copy else ""
    if path and not path.exists():
        why = f"{path.name} is missing: it takes what `kms audit key` prints on that host"
    if why:
        return _Host(log.host, why=why)
    try:
        keys = keys_of(path)
        report = _verified(log.folder, keys, found, late if log.is_copy else None)
    except OSError as exc:
        return _Host(log.host, why=f"it cannot be read ({exc.strerror})")
    except ConfigurationError as exc:
        return _Host(log.host, why=exc.detail)
    is_empty, why = not report.chains and not (report.late_since if log.is_copy else report.problems), ""
    if is_empty and not log.is_copy:
        why = f"there is no audit log in {log.folder}"
        if is_own(log.folder):  # the first operation makes it; anchors name one that was there
            report.notes.append(Note("no_log", f"{why} yet"))
            is_empty, why = False, ""
    return _Host(log.host, None if is_empty else report, why, keys)


def _unknown_keys(hosts: Sequence[_Host], found: AnchorLines) -> dict[str, str]:
    """The keys of anchors that none of these hosts has, each with the time of its newest anchor."""
    known = {key for each in hosts if each.keys for key in each.keys.keys}
    newest: dict[str, str] = {}
    for raw in (raw for lines in found.lines.values() for raw in lines):
        anchor = chain.read(raw)
        if anchor is not None and anchor.kind in chain.SIGNED and anchor.key not in known:
            newest[anchor.key] = max(newest.get(anchor.key, ""), anchor.time)
    return newest


def _show_hosts(hosts: Sequence[_Host], unknown: Mapping[str, str]) -> int:
    """Show the hosts, and why the verdict of one is not ``intact``. Return the exit code of the worst."""
    worst = max((each.verdict for each in hosts), key=list(_EXITS).index)
    shapes = [
        {"host": each.name, "verdict": each.verdict, "why": each.why}
        | (asdict(each.report) | {"last_time": each.last_time} if each.report else {})
        for each in hosts
    ]
    if terminal.printed_as_json({"verdict": worst, "hosts": shapes, "unknown_keys": dict(unknown)}):
        return _EXITS[worst]
    terminal.table(
        ("HOST", "VERDICT", "CHAINS", "LINES", "LAST RECORD", "LATE"), [each.row for each in hosts]
    )
    for each in hosts:
        if each.why:
            terminal.shown(f"{each.name}: {each.why}")
        elif each.report is None:
            terminal.shown(f"{each.name}: Redis knows this host, and there is no copy of its log here")
        elif each.verdict != "intact" or not each.report.chains:
            _show_findings(each.report, f"{each.name}: ")
        if each.late:
            terminal.say(f"note: {each.name}: the copy lacks lines that were signed {each.late} ago or later")
    for key, latest in unknown.items():
        terminal.say(
            f"note: anchors up to {latest[:19]} are signed by the key {key}, which no host here has: "
            "a copy is missing, or a key in HOST.pub, or the anchors are forged"
        )
    terminal.result(f"{worst}: {len(hosts)} hosts")
    return _EXITS[worst]


# -- one log -------------------------------------------------------------------------------------------


def _anchors(folders: Sequence[Path], sources: Sequence[str]) -> AnchorLines:
    if sources:
        return anchors.named_anchors(installation.settings(), sources)
    if all(map(is_own, folders)):
        return anchors.configured_anchors(installation.settings())
    terminal.say("note: DIR is not the log of the settings: name its anchors with --anchors to compare them")
    return AnchorLines()


def _verified(
    where: Path,
    keys: PublicKeys | None,
    found: AnchorLines,
    max_late: timedelta | None = None,
) -> VerificationReport:
    with terminal.Meter() as line:
        progress = partial(line.show, "verifying")
        report = verify(where, keys, found.lines, progress=progress, max_late=max_late)
    found.note_in(report)
    return report


def _show(report: VerificationReport) -> None:
    if terminal.printed_as_json({"verdict": report.verdict, **asdict(report)}):
        return
    terminal.table(
        ("CHAIN", "LINES", "FILES", "FROM", "TO", "END", "SIGNED"), [_row(each) for each in report.chains]
    )
    _show_findings(report)
    if not report.trusted:
        terminal.say(
            "note: the signing keys are taken from the log itself: name trusted ones with --public-key"
        )
    speed = f"{report.lines:,} lines, {size_text(report.size_bytes)} in {report.seconds:.1f} s"
    count = len(report.chains)
    terminal.result(f"{report.verdict}: {count} chain{'s' * (count != 1)}, {speed}")


def _show_findings(report: VerificationReport, host: str = "") -> None:
    """Show problems and notes; ``host`` begins each line."""
    for problem in report.problems:
        place = _place(problem.file or problem.chain, problem.seq)
        terminal.shown(f"{host}{problem.code}: {place}{problem.text}")
    for place, why in report.not_compared.items():
        terminal.shown(f"{host}not compared with the anchors in {place}: {why}")
    if not host and any(problem.anchor for problem in report.problems):
        terminal.say(_OLDER)
    for note in report.notes:
        terminal.say(f"note: {host}{_place(note.chain, note.seq)}{note.text}")


def _row(each: ChainReport) -> tuple[str, ...]:
    signed = "none" if each.signed_seq < 0 else f"to {each.signed_seq}"
    return (
        each.chain,
        f"{each.lines:,}",
        str(each.files),
        each.first_time[:19],
        each.last_time[:19],
        each.state,
        "all" if each.signed_seq == each.last_seq else signed,
    )


def _place(chain: str, seq: int) -> str:
    return (f"{chain} line {seq}: " if seq >= 0 else f"{chain}: ") if chain else ""
