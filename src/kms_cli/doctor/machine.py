"""Checks of this machine: memory, key files, directories, disk space, certificates, audit log."""

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from kms_cli.doctor import Finding, Level
from kms_cli.local import installation
from kms_core import secure_memory
from kms_core.age.recipients import parse_recipient
from kms_core.audit.keys import PublicKeys, public_path
from kms_core.audit.verification.scan import ChainProblem, VerificationReport
from kms_core.audit.verification.verify import verify
from kms_core.audit_setup import build_monitor
from kms_core.auth import revocation
from kms_core.backends import table_of
from kms_core.backends.age_settings import AgeSection
from kms_core.jobs.storage.spool import SpoolUse
from kms_core.jobs.storage.spool_folder import size_of
from kms_core.redis_client import connect
from kms_core.secure_files import open_to_others
from kms_core.settings.model import ServerSection, Settings
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError, KmsError
from kms_protocol.units import size_text

_SWAPS: Final = Path("/proc/swaps")


def memory(swaps: Path = _SWAPS) -> Finding:
    """Check whether keys may be swapped out, with the limits of this command. ``swaps`` is /proc/swaps."""
    dumps = "core files and debuggers are blocked"
    if secure_memory.may_lock():
        return Finding("ok", "memory", f"{dumps}, and memory is locked")
    if not _has_swap(swaps):
        return Finding("ok", "memory", f"{dumps}; memory is not locked, and there is no swap")
    text = f"{dumps}; memory is not locked, and this machine has swap"
    return Finding("warn", "memory", text, secure_memory.ADVICE["limit"])


def _has_swap(swaps: Path) -> bool:
    """Return whether there is swap, or that is unknown."""
    try:
        return len(swaps.read_text().splitlines()) > 1
    except OSError:
        return True


NEARLY_FULL: Final = 0.8
LOW_DISK_BYTES: Final = 1024**3
NO_ROOM_BYTES: Final = 16 * 1024**2  # less than a few of the largest uploads
RENEW_WITHIN: Final = timedelta(days=21)
_CRL_WITHIN: Final = timedelta(days=1)  # the same as for the alert KmsClientCrlExpires
_CHECK: Final = "check path and mode"


def age_files(settings: Settings) -> Iterator[Finding]:
    """Check the key files of the age backend."""
    age = settings.backend(AgeSection)
    path = age.private_key_path
    yield private_file("private key", path, f"kms keygen -o {path}, or kms up", strict=settings.is_prod)
    yield _public_key(age.public_key_path, age.private_key_path)


def private_file(subject: str, path: Path, missing: str, *, strict: bool) -> Finding:
    """Check that only its owner can read a file. ``strict``: otherwise it fails instead of warning.

    ``missing`` is what to do if there is no file.
    """
    try:
        mode = open_to_others(path)
    except OSError as exc:
        return Finding("FAIL", subject, f"{path}: {exc.strerror}", missing)
    if not os.access(path, os.R_OK):
        return Finding("FAIL", subject, f"{path} belongs to another user", "run as its owner")
    if mode:
        text = f"{path} can be read by others (mode {mode:04o})"
        return Finding("FAIL" if strict else "warn", subject, text, f"chmod 600 {path}")
    return Finding("ok", subject, str(path))


def _public_key(path: Path, private: Path) -> Finding:
    make = f"kms keygen -y {private} > {path}"
    try:
        text = small_files.text(path)
        parse_recipient(next(line for line in text.splitlines() if line.strip() and line[0] != "#").strip())
    except OSError as exc:
        return Finding("FAIL", "public key", f"{path}: {exc.strerror}", make)
    except (ValueError, StopIteration):
        return Finding("FAIL", "public key", f"{path} does not contain a recipient (age1…)", make)
    return Finding("ok", "public key", str(path))


def own_keys(settings: Settings) -> Iterator[Finding]:
    """Check the internal keys of the service. All except the spool key are created when needed."""
    kms = settings.kms
    path, in_dev = kms.jobs.spool_identity_path, settings.environment == "dev"
    if not path.exists() and (settings.state_dir.exists() or not in_dev):
        level: Level = "warn" if in_dev else "FAIL"
        yield Finding(
            level, "spool key", f"{path} does not exist", f"kms keygen -o {path} (in dev kms up creates it)"
        )
    paths = (
        path,
        kms.jobs.intake_identity_path,
        kms.audit.key_path,
        kms.audit.signing_key_path,
        kms.auth.tokens_path,
    )
    found = [
        private_file("own keys", path, _CHECK, strict=settings.is_prod) for path in paths if path.exists()
    ]
    yield from (finding for finding in found if finding.level != "ok")
    has_file = kms.auth.tokens is not None or kms.auth.tokens_path.exists()
    if kms.auth.mode == "required" and not has_file and not kms.auth.issuers:
        yield Finding("warn", "tokens", "there are none, so nobody is let in by one", "kms token create")
    if private := [Path(finding.text).name for finding in found if finding.level == "ok"]:
        yield Finding("ok", "own keys", ", ".join(private))


# -- directories and room ----------------------------------------------------------------------------


def directories(settings: Settings) -> Iterator[Finding]:
    """Check the state directory and the spool."""
    state, spool = settings.state_dir, settings.kms.jobs.spool_dir
    if not state.exists():
        yield Finding("ok", "state", f"{state} does not exist yet, kms up creates it")
    else:
        yield _room("state", state, "")
    if spool.exists() and settings.kms.jobs.spool_bucket is None:
        yield _spool(spool, settings.kms.jobs.spool_max_bytes)


def _spool(path: Path, most_bytes: int) -> Finding:
    found = _room("spool", path, f", of which it may use {size_text(most_bytes)}")
    if found.level != "ok":
        return found
    used = size_of(path)
    use = SpoolUse(used, min(most_bytes, used + shutil.disk_usage(path).free))
    text = f"{path} is {use.ratio:.0%} full: {size_text(used)} of {size_text(use.limit_bytes)}"
    if use.ratio < NEARLY_FULL:
        return Finding("ok", "spool", text)
    then = (
        "release fetched results (kms job release), lower [kms.jobs] result_ttl_s, give tenants a "
        "spool_bytes, or raise spool_max_bytes: full, it refuses uploads and results (spool_full)"
    )
    return Finding("FAIL" if use.ratio >= 1.0 else "warn", "spool", text, then)


def _room(subject: str, path: Path, more: str) -> Finding:
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return Finding(
            "warn", subject, f"{path} cannot be written by this user", "run as the user of the service"
        )
    free = shutil.disk_usage(path).free
    text = f"{path}, {size_text(free)} free{more}"
    if free < NO_ROOM_BYTES:
        return Finding("FAIL", subject, text, "free space: uploads and results are refused (spool_full)")
    if free < LOW_DISK_BYTES:
        return Finding("warn", subject, text, "free space: uploads and results are kept there")
    return Finding("ok", subject, text)


# -- certificates ------------------------------------------------------------------------------------


def certificates(settings: Settings) -> Iterator[Finding]:
    """Check the certificates of the service, as a server and as a client."""
    kms = settings.kms
    named = {
        "server.tls_cert": kms.server.tls_cert,
        "server.client_ca": kms.server.client_ca,
        "redis.client_cert_file": kms.redis.client_cert_file,
    }
    for scheme, section in settings.backends.items():
        if section.CERTIFICATE:
            named[f"{table_of(scheme)}.{section.CERTIFICATE}"] = getattr(section, section.CERTIFICATE)
    for name, path in named.items():
        if path is not None:
            yield _certificate(f"kms.{name}", path)
    yield from _client_crl(kms.server)
    if kms.server.tls_key is not None:
        key = private_file("tls key", kms.server.tls_key, _CHECK, strict=settings.is_prod)
        if key.level != "ok":
            yield key


def _client_crl(server: ServerSection) -> Iterator[Finding]:
    if server.client_crl is None:
        return
    try:
        lists = revocation.load(server)
    except ConfigurationError as exc:
        yield Finding("FAIL", "client crl", exc.detail, _CHECK)
        return
    if lists is not None:
        yield _term("client crl", f"kms.server.client_crl: {server.client_crl}", lists.ends, _CRL_WITHIN)


def _certificate(name: str, path: Path) -> Finding:
    try:
        ends = min(one.not_valid_after_utc for one in x509.load_pem_x509_certificates(small_files.read(path)))
    except OSError as exc:
        return Finding("FAIL", "certificate", f"{name}: {path}: {exc.strerror}", _CHECK)
    except ValueError:
        return Finding("FAIL", "certificate", f"{name}: {path} contains no certificate", "expected PEM")
    return _term("certificate", f"{name}: {path}", ends.timestamp(), RENEW_WITHIN)


def _term(subject: str, what: str, ends: float, renew_within: timedelta) -> Finding:
    """Check an expiry. ``ends`` is in epoch seconds, or infinite."""
    if math.isinf(ends):
        return Finding("ok", subject, f"{what}: valid without expiry")
    at, now = datetime.fromtimestamp(ends, UTC), datetime.now(UTC)
    day, renew = f"{at:%Y-%m-%d %H:%M} UTC", "replace the file: it is read again without a restart"
    if at <= now:
        return Finding("FAIL", subject, f"{what} expired at {day}", renew)
    if at - now < renew_within:
        return Finding("warn", subject, f"{what} expires at {day}", renew)
    return Finding("ok", subject, f"{what}: valid until {day}")


# -- the audit log ------------------------------------------------------------------------------------

MAX_VERIFIED_BYTES: Final = (
    256 * 1024**2
)  # takes some seconds; of a larger log only the ends of its files are read
_RECORD_BYTES: Final = 4096
_YOUNG: Final = (
    "nothing was compared yet: the log has no signed line. The first is due {} s after the first record"
)
_KEEP: Final = "kms audit verify; keep the files as they are"


def audit_log(settings: Settings) -> Iterator[Finding]:
    """Check the audit log of this machine."""
    folder = settings.kms.audit.path
    try:
        if is_new := not folder.exists():
            yield Finding("ok", "audit", f"{folder} does not exist yet, the first record creates it")
        else:
            yield _writable(folder)
        if not is_new or public_path(settings.kms.audit.signing_key_path).exists():
            yield from _verified(settings)
    except (OSError, KmsError) as exc:
        why = exc.detail if isinstance(exc, KmsError) else exc.strerror
        yield Finding("FAIL", "audit", f"{folder} cannot be read: {why}", "run as the user of the service")


def _writable(folder: Path) -> Finding:
    """Write an unnamed file of the size of a record, which is removed when it is closed."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_RECORD_BYTES))
    except OSError as exc:
        full = exc.errno in {errno.ENOSPC, errno.EDQUOT}
        then = (
            "free space: without a record no call is answered" if full else "run as the user of the service"
        )
        level: Level = "FAIL" if full or os.geteuid() == 0 else "warn"
        return Finding(level, "audit", f"{folder} cannot be written: {exc.strerror}", then)
    return Finding("ok", "audit", f"{folder} can be written")


def _verified(settings: Settings) -> Iterator[Finding]:
    section = settings.kms.audit
    size_bytes = sum(path.stat().st_size for path in section.path.glob("*.jsonl*"))
    if size_bytes > MAX_VERIFIED_BYTES:
        yield from _ends_verified(settings)
        return
    own, found = public_path(section.signing_key_path), installation.configured_anchors(settings)
    report = verify(
        section.path,
        PublicKeys.read(own) if own.exists() else None,
        found.lines,
    )
    found.note_in(report)
    yield _chain(report)
    noted = next((note.text for note in report.notes if note.code == installation.NOT_COMPARED), "")
    if found.lines and all(each.signed_seq < 0 for each in report.chains):
        noted = noted or _YOUNG.format(section.checkpoint_s)
    yield _compared(report.problems, report.not_compared, [*found.lines], noted)


def _chain(report: VerificationReport) -> Finding:
    problems = [each for each in report.problems if not each.anchor]
    if problems:
        first, others = problems[0], len(problems) - 1
        more = f", and {others} more" if others else ""
        text = f"{first.code} in {first.file or first.chain}: {first.text}{more}"
        return Finding("FAIL", "audit chain", text, _KEEP)
    unsigned = sum(each.last_seq - each.signed_seq for each in report.chains)
    text = f"{report.lines} lines are intact, {unsigned} of them newer than the last checkpoint"
    if report.has_open_end:
        ended = f"{text}; a chain has no end: its process was killed, or its end was removed"
        return Finding("warn", "audit chain", ended, "the next start of the service records it")
    return Finding("ok", "audit chain", text)


def _compared(
    problems: Sequence[ChainProblem], not_compared: Mapping[str, str], sources: Sequence[str], noted: str = ""
) -> Finding:
    """Compare the log with its anchors: an older copy of a log is intact as well."""
    proven = [each for each in problems if each.anchor]
    if proven:
        more = f", and {len(proven) - 1} more" if len(proven) > 1 else ""
        text = f"{proven[0].code} in {proven[0].chain}: {proven[0].text}{more}"
        return Finding("FAIL", "audit anchors", text, _KEEP)
    if not_compared:
        why = "; ".join(f"{place}: {reason}" for place, reason in not_compared.items())
        text = f"an older copy of the log would not be noticed: {why}"
        return Finding("warn", "audit anchors", text, "kms audit verify, once they can be read")
    if noted:
        return Finding("ok", "audit anchors", noted)
    if not sources:
        text = "there are none, so an older copy of the log would not be noticed"
        return Finding("warn", "audit anchors", text, "set [kms.audit] anchor_dir, on another host")
    return Finding("ok", "audit anchors", f"the log has the records that those in {', '.join(sources)} name")


def _ends_verified(settings: Settings) -> Iterator[Finding]:
    watch = build_monitor(settings, connect(installation.redis_section(settings, os.environ)))
    watch.round()
    found = watch.condition
    if found.problems:
        text = f"{found.problems[0].code}: {found.problems[0].text}"
        yield Finding("FAIL", "audit chain", text, _KEEP)
    elif found.unread:
        yield Finding("FAIL", "audit chain", found.unread, "run as the user of the service")
    else:
        yield Finding(
            "ok", "audit chain", "the end of each file is intact; to check all of it: kms audit verify"
        )
    yield _compared(found.anchors, found.not_compared, watch.sinks)
