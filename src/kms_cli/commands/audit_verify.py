"""``kms audit verify``: checks the log of this machine, copies, and the logs of several hosts."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import click

from kms_cli import audited, options, terminal
from kms_cli.commands import audit as reading
from kms_cli.local import installation
from kms_cli.local.installation import AnchorLines
from kms_cli.session import meter, printed_as_json
from kms_core import audit
from kms_core.audit import chain, copies
from kms_core.audit.keys import PublicKeys
from kms_core.audit.verification.anchors import ACKNOWLEDGED, CUT, MISSING_CHAIN, effect_of
from kms_core.audit.verification.scan import ChainReport, Note, VerificationReport
from kms_core.audit.verification.verify import verify
from kms_core.envelope.binding import DEFAULT_TENANT
from kms_protocol.errors import (
    EXIT_BAD_DATA,
    EXIT_OTHER,
    EXIT_UNAVAILABLE,
    ConfigurationError,
    InvalidRequest,
    JobsUnavailable,
    Unavailable,
)
from kms_protocol.units import duration_text, size_text, time_or_none

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
    "the log lacks records that its anchors name: keep it as it is, and restore the newer copy. If there is "
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
@reading.directories_argument
@reading.keys_option
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
    logs, unread = reading.logs_of(folders)
    if len(folders) > 1 or (not folders and installation.settings().kms.audit.copies):
        hosts = [_checked(log, public_key, found, late) for log in logs]
        hosts += [_Host(name, why=why) for name, why in unread.items()]
        if folders or no_anchors:
            return _show_hosts(hosts, {})
        missing = set(_known_hosts()) - {each.name for each in hosts}
        return _show_hosts([*hosts, *map(_Host, sorted(missing))], _unknown_keys(hosts, found))
    log = logs[0]
    keys = reading.keys_of(public_key or (log.keys_path if log.is_copy else None))
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
    report = _verified(
        reading.folder_of(None),
        reading.keys_of(None),
        installation.configured_anchors(installation.settings()),
    )
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
    with audited.log_of(installation.settings()) as log:
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


def _checked(log: copies.HostLog, trusted: Path | None, found: AnchorLines, late: timedelta) -> _Host:
    """Verify the log of one host. ``trusted``: a file of keys in place of that beside the copy."""
    path = trusted or (log.keys_path if log.is_copy else None)
    why = copies.trouble(log.folder) if log.is_copy else ""
    if path and not path.exists():
        why = f"{path.name} is missing: it takes what `kms audit key` prints on that host"
    if why:
        return _Host(log.host, why=why)
    try:
        keys = reading.keys_of(path)
        report = _verified(log.folder, keys, found, late if log.is_copy else None)
    except OSError as exc:
        return _Host(log.host, why=f"it cannot be read ({exc.strerror})")
    except ConfigurationError as exc:
        return _Host(log.host, why=exc.detail)
    is_empty, why = not report.chains and not (report.late_since if log.is_copy else report.problems), ""
    if is_empty and not log.is_copy:
        why = f"there is no audit log in {log.folder}"
        if reading.is_own(log.folder):  # the first operation makes it; anchors name one that was there
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
    if printed_as_json({"verdict": worst, "hosts": shapes, "unknown_keys": dict(unknown)}):
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
    for key, time in unknown.items():
        terminal.say(
            f"note: anchors up to {time[:19]} are signed by the key {key}, which no host here has: "
            "a copy is missing, or a key in HOST.pub, or the anchors are forged"
        )
    terminal.result(f"{worst}: {len(hosts)} hosts")
    return _EXITS[worst]


# -- one log -------------------------------------------------------------------------------------------


def _anchors(folders: Sequence[Path], sources: Sequence[str]) -> AnchorLines:
    if sources:
        return installation.named_anchors(installation.settings(), sources)
    if all(map(reading.is_own, folders)):
        return installation.configured_anchors(installation.settings())
    terminal.say("note: DIR is not the log of the settings: name its anchors with --anchors to compare them")
    return AnchorLines()


def _verified(
    where: Path,
    keys: PublicKeys | None,
    found: AnchorLines,
    max_late: timedelta | None = None,
) -> VerificationReport:
    with meter() as line:
        report = verify(
            where,
            keys,
            found.lines,
            progress=lambda done, total: line.show("verifying", done, total),
            max_late=max_late,
        )
    found.note_in(report)
    return report


def _show(report: VerificationReport) -> None:
    if printed_as_json({"verdict": report.verdict, **asdict(report)}):
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
        place = " ".join(part for part in (problem.file or problem.chain, _number(problem.seq)) if part)
        terminal.shown(f"{host}{problem.code}: {place}: {problem.text}")
    for place, why in report.not_compared.items():
        terminal.shown(f"{host}not compared with the anchors in {place}: {why}")
    if not host and any(problem.anchor for problem in report.problems):
        terminal.say(_OLDER)
    for note in report.notes:
        terminal.say(f"note: {host}{note.chain} {_number(note.seq)}: {note.text}")


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


def _number(seq: int) -> str:
    return f"line {seq}" if seq >= 0 else ""
