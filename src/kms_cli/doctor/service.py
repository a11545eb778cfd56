"""The service at its address, here or elsewhere: what it says of itself to whoever may ask."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

from kms_cli import terminal
from kms_cli.doctor.files import private_file
from kms_cli.doctor.findings import Finding, Level
from kms_cli.remote_service import connect
from kms_cli.session import Session
from kms_client import ServiceUnreachable, wire
from kms_protocol.errors import KmsError

TIMEOUT_S: Final = 5.0
_DEGRADED: Final[dict[str, tuple[Level, str, str]]] = {
    "audit": (
        "FAIL",
        "its audit trail takes no record, so calls are refused",
        "make room on the disk of its trail",
    ),
    "audit_chain": ("FAIL", "somebody changed its audit trail", "kms audit verify on its machine"),
    "audit_anchors": ("FAIL", "its audit trail lacks what anchors name", "kms audit verify on its machine"),
    "audit_anchors_away": ("warn", "its audit trail is not compared with its anchors", "its log says why"),
    "audit_unread": ("warn", "it cannot read its audit trail back", "kms audit verify on its machine"),
}


def there(given: Session, *, elsewhere: bool) -> Iterator[Finding]:
    if given.token_file is not None:
        yield _token(given.token_file)
        if elsewhere and given.allow_http and given.url.startswith("http://"):
            yield Finding("warn", "token", "it travels in clear", "use an https:// address")
    checks: tuple[Callable[[Session], Iterator[Finding]], ...] = (_health, _status)
    try:
        for check in checks:
            yield from check(given)
    except ServiceUnreachable as exc:
        yield Finding("FAIL", "service", exc.detail, exc.hint, away=True)
    except KmsError as exc:
        yield Finding("FAIL", "service", exc.detail, terminal.HINTS.get(exc.code, ""), away=True)


def _token(path: Path) -> Finding:
    finding = private_file("token", path, "check --token-file", strict=False)
    return replace(finding, away=True)  # of a service that may be elsewhere


def _health(given: Session) -> Iterator[Finding]:
    with connect(retries=0, timeout_s=TIMEOUT_S) as kms:
        health = kms.health()
    if health.status == "healthy":
        yield Finding("ok", "service", f"{given.url} answers, backend {health.backend} works")
    else:
        text = f"{given.url} answers, backend {health.backend} does not work"
        yield Finding("FAIL", "service", text, "its log says why", away=True)


def _status(given: Session) -> Iterator[Finding]:
    del given
    with connect(retries=0, timeout_s=TIMEOUT_S) as kms:
        status = kms.status()
    own = version("kms-service")
    if status.version != own:
        yield Finding("warn", "version", f"it is {status.version}, this command {own}", "install the same")
    for name in status.degraded:
        if name in _DEGRADED:
            level, text, then = _DEGRADED[name]
            yield Finding(level, "service", text, then, away=True)
    yield from _jobs(status)


def _jobs(status: wire.StatusOut) -> Iterator[Finding]:
    if status.jobs is None or "redis" in status.degraded:
        text = "the service finds no Redis, so jobs and files wait"
        yield Finding("warn", "jobs", text, "start it, or kms up")
        return
    yield Finding("ok", "jobs", "are taken")
    if status.workers:
        yield Finding("ok", "workers", f"{status.workers} at work, {status.queue_depth} jobs waiting")
    else:
        yield Finding("warn", "workers", "none, so jobs wait", "start kms-worker, or kms up")
