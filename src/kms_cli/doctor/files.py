"""Key files, directories, room and certificates of this machine, as the settings name them."""

import math
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from kms_cli import terminal
from kms_cli.doctor.findings import Finding, Level
from kms_core.age.recipients import parse_recipient
from kms_core.auth import revocation
from kms_core.secure_files import open_to_others
from kms_core.settings.model import ServerSection, Settings
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError

LOW_DISK_BYTES: Final = 1024**3
NO_ROOM_BYTES: Final = 16 * 1024**2  # less than a few uploads of the size that goes without a job
RENEW_WITHIN: Final = timedelta(days=21)
_CRL_WITHIN: Final = timedelta(days=1)  # as the alert KmsClientCrlExpires
_CHECK: Final = "check path and mode"


def age_files(settings: Settings) -> Iterator[Finding]:
    age = settings.kms.age
    path = age.private_key_path
    yield private_file("private key", path, f"kms keygen -o {path}, or kms up", strict=settings.is_prod)
    yield _public_key(age.public_key_path, age.private_key_path)


def private_file(subject: str, path: Path, missing: str, *, strict: bool) -> Finding:
    """A file that its owner alone should read; ``strict``: else it is no warning but a failure.

    ``missing`` says what to do if it is not there.
    """
    try:
        mode = open_to_others(path)
    except OSError as exc:
        return Finding("FAIL", subject, f"{path}: {exc.strerror}", missing)
    if not os.access(path, os.R_OK):
        return Finding("FAIL", subject, f"{path} belongs to another user", "run as its owner")
    if mode:
        told = f"{path} can be read by others (mode {mode:04o})"
        return Finding("FAIL" if strict else "warn", subject, told, f"chmod 600 {path}")
    return Finding("ok", subject, str(path))


def _public_key(path: Path, private: Path) -> Finding:
    make = f"kms keygen -y {private} > {path}"
    try:
        text = small_files.text(path)
        parse_recipient(next(line for line in text.splitlines() if line.strip() and line[0] != "#").strip())
    except OSError as exc:
        return Finding("FAIL", "public key", f"{path}: {exc.strerror}", make)
    except (ValueError, StopIteration):
        return Finding("FAIL", "public key", f"{path} does not hold a recipient (age1…)", make)
    return Finding("ok", "public key", str(path))


def own_keys(settings: Settings) -> Iterator[Finding]:
    """What the service keeps for itself. All but the spool key make themselves, or are not needed."""
    kms = settings.kms
    path, in_dev = kms.jobs.spool_identity_path, settings.environment == "dev"
    if not path.exists() and (settings.state_dir.exists() or not in_dev):
        level: Level = "warn" if in_dev else "FAIL"
        yield Finding(
            level, "spool key", f"{path} is not there", f"kms keygen -o {path} (in dev kms up makes it)"
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
    if kms.auth.mode == "required" and not kms.auth.tokens_path.exists() and not kms.auth.issuers:
        yield Finding("warn", "tokens", "there are none, so nobody is let in by one", "kms token create")
    if private := [Path(finding.text).name for finding in found if finding.level == "ok"]:
        yield Finding("ok", "own keys", ", ".join(private))


# -- directories and room ----------------------------------------------------------------------------


def directories(settings: Settings) -> Iterator[Finding]:
    state, spool = settings.state_dir, settings.kms.jobs.spool_dir
    if not state.exists():
        yield Finding("ok", "state", f"{state} is not there yet, kms up makes it")
    else:
        yield _room("state", state, "")
    if spool.exists():
        most = terminal.size(settings.kms.jobs.spool_max_bytes)
        yield _room("spool", spool, f", it may take {most}")


def _room(subject: str, path: Path, more: str) -> Finding:
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return Finding(
            "warn", subject, f"{path} cannot be written by this user", "run as the user of the service"
        )
    free = shutil.disk_usage(path).free
    text = f"{path}, {terminal.size(free)} free{more}"
    if free < NO_ROOM_BYTES:
        return Finding("FAIL", subject, text, "make room: uploads and results are refused (spool_full)")
    if free < LOW_DISK_BYTES:
        return Finding("warn", subject, text, "make room: uploads and results are kept there")
    return Finding("ok", subject, text)


# -- certificates ------------------------------------------------------------------------------------


def certificates(settings: Settings) -> Iterator[Finding]:
    """The service's own, and those that it shows to others."""
    kms = settings.kms
    named = {
        "server.tls_cert": kms.server.tls_cert,
        "server.client_ca": kms.server.client_ca,
        "redis.client_cert_file": kms.redis.client_cert_file,
        "cosmian.client_cert_file": kms.cosmian.client_cert_file,
        "transit.client_cert": kms.transit.client_cert,
        "vault_kv.client_cert": kms.vault_kv.client_cert,
    }
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
        return Finding("FAIL", "certificate", f"{name}: {path} holds no certificate", "expected PEM")
    return _term("certificate", f"{name}: {path}", ends.timestamp(), RENEW_WITHIN)


def _term(subject: str, what: str, ends: float, renew_within: timedelta) -> Finding:
    """``ends`` is in epoch seconds, infinite for what has no end."""
    if math.isinf(ends):
        return Finding("ok", subject, f"{what}: valid without end")
    at, now = datetime.fromtimestamp(ends, UTC), datetime.now(UTC)
    day, renew = f"{at:%Y-%m-%d %H:%M} UTC", "renew it in place: it is read again without a restart"
    if at <= now:
        return Finding("FAIL", subject, f"{what} ended at {day}", renew)
    if at - now < renew_within:
        return Finding("warn", subject, f"{what} ends at {day}", renew)
    return Finding("ok", subject, f"{what}: valid until {day}")
