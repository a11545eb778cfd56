"""``kms doctor``: what the troubleshooting page does by hand; each finding says what to do next."""

import logging
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import click
import structlog

from kms_cli import words
from kms_cli.remote import connect
from kms_cli.session import Session, session
from kms_client import ServiceUnreachable
from kms_client.settings import LOOPBACK
from kms_core import keyring
from kms_core import settings as settings_file
from kms_core.backends.age import parse_recipient
from kms_core.errors import EXIT_CONFIGURATION, EXIT_UNAVAILABLE, ConfigurationError, KmsError
from kms_core.settings import Settings

Level = Literal["ok", "warn", "FAIL"]

OTHERS: Final = 0o077
LOW_DISK_BYTES: Final = 1024**3
TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. ``next`` says what to do, where something is to be done."""

    level: Level
    subject: str
    text: str
    next: str = ""


@click.command("doctor", short_help="Check keys, settings and the service.")
def doctor_command() -> int:
    """Check settings, key files, a wrap and unwrap with every key, the service and what it needs.

    Exit code 0 if nothing fails, 78 if settings or keys are wrong here, 69 if only the service fails. Keys
    and settings are looked at only if the service is meant to run on this machine.
    """
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    given = session()
    here = [] if _is_elsewhere(given.url) else list(_here(given))
    there = list(_there(given))
    for finding in (*here, *there):
        _show(finding, as_json=given.as_json)
    if any(finding.level == "FAIL" for finding in here):
        return EXIT_CONFIGURATION
    return EXIT_UNAVAILABLE if any(finding.level == "FAIL" for finding in there) else 0


def _show(finding: Finding, *, as_json: bool) -> None:
    if as_json:
        words.record(asdict(finding), as_json=True)
        return
    then = f": {finding.next}" if finding.next else ""
    words.result(f"{finding.level:<4}  {finding.subject:<11}  {words.plain(finding.text)}{then}")


def _is_elsewhere(url: str) -> bool:
    return urlsplit(url).hostname not in LOOPBACK


# -- this machine ------------------------------------------------------------------------------------


def _here(given: Session) -> Iterator[Finding]:
    try:
        settings = settings_file.load(
            given.config, os.environ, overrides={"state_dir": given.state_dir and str(given.state_dir)}
        )
        file = settings_file.find(given.config, os.environ)
        yield Finding("ok", "settings", f"{_place(file)}, environment {settings.environment}")
        settings_file.check_exposure(settings)
    except ConfigurationError as exc:
        yield Finding("FAIL", "settings", exc.detail)
        return
    if "age" in settings.used_backends:
        yield from _age_files(settings)
    yield from _keys(settings)
    yield from _state_directory(settings.state_dir)


def _place(file: Path | None) -> str:
    return f"read from {file}" if file else "defaults, no file"


def _age_files(settings: Settings) -> Iterator[Finding]:
    age = settings.kms.age
    yield _private_file("private key", age.private_key_path, strict=settings.is_prod)
    yield _public_key(age.public_key_path, age.private_key_path)


def _private_file(subject: str, path: Path, *, strict: bool) -> Finding:
    try:
        found = path.stat()
    except OSError as exc:
        return Finding("FAIL", subject, f"{path}: {exc.strerror}", f"kms keygen -o {path}, or kms up")
    if not os.access(path, os.R_OK):
        return Finding("FAIL", subject, f"{path} belongs to another user", "run as its owner")
    if stat.S_IMODE(found.st_mode) & OTHERS:
        mode = f"{path} can be read by others (mode {stat.S_IMODE(found.st_mode):04o})"
        return Finding("FAIL" if strict else "warn", subject, mode, f"chmod 600 {path}")
    return Finding("ok", subject, str(path))


def _public_key(path: Path, private: Path) -> Finding:
    make = f"kms keygen -y {private} > {path}"
    try:
        text = path.read_text("utf-8")
        parse_recipient(next(line for line in text.splitlines() if line.strip() and line[0] != "#").strip())
    except OSError as exc:
        return Finding("FAIL", "public key", f"{path}: {exc.strerror}", make)
    except (ValueError, StopIteration):
        return Finding("FAIL", "public key", f"{path} does not hold a recipient (age1…)", make)
    return Finding("ok", "public key", str(path))


def _keys(settings: Settings) -> Iterator[Finding]:
    """A real wrap and unwrap with every key that settings name."""
    try:
        ring = keyring.build(settings)
    except KmsError as exc:
        yield Finding("FAIL", "keys", exc.detail)
        return
    for key in ring.keys.values():
        health = key.backend.health_check()
        name = f"{key.key_id} ({key.backend.name})"
        if health.healthy:
            yield Finding("ok", "self-test", f"{name} wraps and unwraps")
        else:
            yield Finding("FAIL", "self-test", f"{name} does not wrap and unwrap", health.detail)


def _state_directory(path: Path) -> Iterator[Finding]:
    if not path.exists():
        yield Finding("ok", "state", f"{path} is not there yet, kms up makes it")
        return
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        yield Finding("warn", "state", f"{path} cannot be written by this user")
        return
    free = shutil.disk_usage(path).free
    low = free < LOW_DISK_BYTES
    yield Finding(
        "warn" if low else "ok",
        "state",
        f"{path}, {words.size(free)} free",
        "make room: uploads and results are kept there" if low else "",
    )


# -- the service -------------------------------------------------------------------------------------


def _there(given: Session) -> Iterator[Finding]:
    if given.token_file is not None:
        yield _token(given.token_file)
        if _is_elsewhere(given.url) and given.url.startswith("http://"):
            yield Finding("warn", "token", "it travels in clear", "use an https:// address")
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (_health, _status)
    try:
        for check in checks:
            yield from check()
    except ServiceUnreachable as exc:
        yield Finding("FAIL", "service", exc.detail, exc.hint)
    except KmsError as exc:
        yield Finding("FAIL", "service", exc.detail, words.HINTS.get(exc.code, ""))


def _token(path: Path) -> Finding:
    finding = _private_file("token", path, strict=False)
    return (
        finding if finding.level != "FAIL" else Finding("FAIL", "token", finding.text, "check --token-file")
    )


def _health() -> Iterator[Finding]:
    with connect(retries=0, timeout_s=TIMEOUT_S) as kms:
        health = kms.health()
    if health.status == "healthy":
        yield Finding("ok", "service", f"{session().url} answers, backend {health.backend} works")
    else:
        yield Finding(
            "FAIL",
            "service",
            f"{session().url} answers, backend {health.backend} does not work",
            "its log says why",
        )


def _status() -> Iterator[Finding]:
    with connect(retries=0, timeout_s=TIMEOUT_S) as kms:
        status = kms.status()
    if status.jobs is None or "redis" in status.degraded:
        yield Finding("warn", "redis", "the service has none, so jobs and files wait", "start it, or kms up")
        return
    yield Finding("ok", "redis", "jobs are available")
    if status.workers:
        yield Finding("ok", "workers", f"{status.workers} at work, {status.queue_depth} jobs waiting")
    else:
        yield Finding("warn", "workers", "none, so jobs wait", "start kms-worker, or kms up")
