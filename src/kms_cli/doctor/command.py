"""``kms doctor``: runs the checks and prints each finding with its remedy."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from typing import Final
from urllib.parse import urlsplit

import click
import structlog

from kms_cli import terminal
from kms_cli.doctor import machine
from kms_cli.doctor.machine import Finding, Level
from kms_cli.local import installation
from kms_cli.session import connect, is_given, printed_as_json, session, use_url
from kms_client.settings import is_loopback
from kms_core import container
from kms_core.settings.load import load as load_settings
from kms_core.settings.validation import check_exposure
from kms_protocol.errors import EXIT_CONFIGURATION, EXIT_UNAVAILABLE, ConfigurationError, KmsError

TIMEOUT_S: Final = 5.0
_VERIFY: Final = "kms audit verify on its machine"
_FREE: Final = "raise maxmemory of Redis, or let results expire sooner"
_SPOOL: Final = "release fetched results (kms job release), or raise [kms.jobs] spool_max_bytes"
_DOCUMENT: Final = (
    "document.not_read in its log says why; if it was put back: kms keys adopt, kms token adopt"
)
_DEGRADED: Final[dict[str, tuple[Level, str, str]]] = {
    "backend": ("FAIL", "its default key does not wrap and unwrap", "its log says why"),
    "keys": ("FAIL", "a sealed key is not open", "key.not_opened in its log says why"),
    "key_documents": ("warn", "a document with keys is not read, or is older than before", _DOCUMENT),
    "tokens": ("warn", "the document of tokens is not read, or is older than before", _DOCUMENT),
    "client_crl": ("warn", "the revocation list is expired or not read again", "replace the file"),
    "audit": ("FAIL", "its audit log cannot be written, so calls are refused", "free space on its disk"),
    "audit_chain": ("FAIL", "its audit log was changed", _VERIFY),
    "audit_anchors": ("FAIL", "its audit log lacks records that anchors name", _VERIFY),
    "audit_anchors_away": ("warn", "its audit log is not compared with its anchors", "its log says why"),
    "audit_unread": ("warn", "it cannot read its audit log", _VERIFY),
    "redis": ("warn", "it reaches no Redis, so jobs and files wait", "start it, or kms up"),
    "redis_full": ("FAIL", "Redis is full, so no job is accepted", _FREE),
    "redis_read_only": ("FAIL", "Redis takes no writes, so no job runs", "kms doctor on its machine"),
    "spool": ("warn", "the spool is nearly full, or its bucket does not answer", _SPOOL),
    "spool_not_shared": ("FAIL", "another host uses another spool", "kms doctor on each host (line hosts)"),
    "install": ("FAIL", "its Redis and its spool are of different installs", "line install on its machine"),
    "clock": ("warn", "clocks of its hosts differ", "use NTP on all hosts and on that of Redis"),
    "workers": ("warn", "no worker runs, so jobs wait", "start kms-worker, or kms up"),
    "worker_processes": ("warn", "worker processes hang", "worker.process_stuck in its log says where"),
}


@click.command("doctor")
def doctor_command() -> int:
    """Check settings, keys, disk, audit log, certificates, Redis, other hosts, and the service.

    Each line is ok, warn or FAIL, with a remedy. Exit code 0 without failures, 78 if settings or files of
    this machine fail, 69 if only peers do not answer. Nothing is changed; in a bucket of the spool a probe
    object is written and deleted.

    The first line says which service is checked: the one that --url, --state-dir, --config or their
    variables name, else the kms up of this user that runs, else that of the settings. With --url of another
    machine this one is not checked.
    """
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    found = []
    for finding in _findings():
        _show(finding)
        found.append(finding)
    return exit_code(found)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 without failures, 78 if settings or files of this machine fail, 69 if only peers fail."""
    failed = [finding for finding in findings if finding.level == "FAIL"]
    if any(not finding.away for finding in failed):
        return EXIT_CONFIGURATION
    return EXIT_UNAVAILABLE if failed else 0


def _show(finding: Finding) -> None:
    shown = asdict(finding)
    del shown["away"]
    if printed_as_json(shown):
        return
    then = f": {finding.next}" if finding.next else ""
    terminal.shown(f"{finding.level:<4}  {finding.subject:<12}  {terminal.plain(finding.text)}{then}")


def _findings() -> Iterator[Finding]:
    url = session().url
    if is_given("url") and not is_loopback(urlsplit(url).hostname):
        yield Finding("ok", "target", f"{url}, on another machine: this one is not checked")
        yield from _service(None)
        return
    running = installation.running(os.environ)
    environ, own_id = installation.environ_of(running, os.environ), None
    try:
        file = installation.settings_file(environ)
        settings = load_settings(file, environ, overrides=installation.overrides())
        if not is_given("url"):
            use_url(installation.url_of(settings))
        how = "kms up runs it" if running else "kms up does not run it"
        yield Finding("ok", "target", f"{session().url}, state {settings.state_dir.absolute()}: {how}")
        for text, advice in installation.doubts(running):
            yield Finding("warn", "target", text, advice)
        source = f"read from {file}" if file else "defaults, no file"
        yield Finding("ok", "settings", f"{source}, environment {settings.environment}")
        check_exposure(settings)
    except ConfigurationError as exc:
        yield Finding("FAIL", "settings", exc.detail)
    else:
        yield from machine.findings(settings)
        with suppress(KmsError, OSError):
            own_id = container.marks(settings, makes=False).install_id()
    yield from _service(own_id)


def _service(own_id: str | None) -> Iterator[Finding]:
    """Ask the service how it is. ``own_id`` is the install id of the settings that were checked."""
    url = session().url
    try:
        with connect(retries=0, timeout_s=TIMEOUT_S) as kms:
            status = kms.status()
    except KmsError as exc:
        yield Finding("FAIL", "service", exc.detail, terminal.hint_of(exc), away=True)
        return
    yield Finding("ok", "service", f"{url} answers")
    own = version("kms-service")
    if status.version != own:
        yield Finding("warn", "version", f"it is {status.version}, this command {own}", "install the same")
    if own_id and status.install and own_id != status.install:
        text = f"{url} is of another install ({status.install}) than the state and spool above ({own_id})"
        yield Finding("FAIL", "target", text, "name its --state-dir and --config, or another --url")
    for name in status.degraded:
        level, text, then = _DEGRADED.get(name, ("warn", f"it says that {name} is degraded", "kms status"))
        yield Finding(level, "service", text, then, away=True)
    if status.jobs is not None:
        room = f", spool {status.spool.full:.0%} full" if status.spool else ""
        yield Finding("ok", "jobs", f"{status.workers} workers, {status.queue_depth} jobs waiting{room}")
