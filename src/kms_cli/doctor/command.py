"""``kms doctor``: runs the checks and prints their findings, each with what to do about it."""

import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import click
import structlog

from kms_cli import terminal
from kms_cli.doctor import Finding, Level, exit_code, spool_bucket
from kms_cli.doctor.hosts import hosts
from kms_cli.doctor.machine import (
    age_files,
    audit_log,
    certificates,
    directories,
    memory,
    own_keys,
    private_file,
)
from kms_cli.doctor.peers import ports, queue
from kms_cli.local import installation
from kms_cli.session import Session, connect, is_given, printed_as_json, session, use_url
from kms_client import admin
from kms_client.settings import is_loopback
from kms_core import container, key_opening, keyring
from kms_core.documents.signed import Version
from kms_core.envelope.sealed_files import root_of
from kms_core.settings.lint import unaccepted, weaknesses
from kms_core.settings.load import check_exposure
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import Settings
from kms_protocol import small_files
from kms_protocol.errors import BackendUnavailable, ConfigurationError, KmsError, Unavailable

TOOLS: Final = ("age", "sops", "age-plugin-kms", "prometheus", "ssh-agent")


@click.command("doctor")
def doctor_command() -> int:
    """Check settings, keys, disk, audit log, certificates, Redis, ports, the service and its workers.

    Each line is ok, warn or FAIL, with what to do about it. Exit code 0 without failures, 78 if settings or
    files of this machine fail, 69 if only peers do not answer. Nothing is changed; in a bucket of the spool
    a probe object is written and deleted.

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


def _findings() -> Iterator[Finding]:
    given = session()
    if is_given("url") and not is_loopback(urlsplit(given.url).hostname):
        yield Finding("ok", "target", f"{given.url}, on another machine: this one is not checked")
        yield from _service(given, elsewhere=True)
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
        yield Finding("ok", "settings", f"{_source(file)}, environment {settings.environment}")
        check_exposure(settings)
    except ConfigurationError as exc:
        yield Finding("FAIL", "settings", exc.detail)
    else:
        yield from _machine(settings)
        with suppress(KmsError, OSError):
            own_id = container.marks(settings, makes=False).install_id()
    yield from _service(session(), elsewhere=False, own_id=own_id)


def _show(finding: Finding) -> None:
    shown = asdict(finding)
    del shown["away"]
    if printed_as_json(shown):
        return
    then = f": {finding.next}" if finding.next else ""
    terminal.shown(f"{finding.level:<4}  {finding.subject:<12}  {terminal.plain(finding.text)}{then}")


def _machine(settings: Settings) -> Iterator[Finding]:
    checks: Mapping[str, Iterable[Finding]] = {
        "weak": _weak(settings),
        "private key": age_files(settings) if "age" in settings.used_backends else (),
        "keys": _keys(settings),
        "own keys": own_keys(settings),
        "state": directories(settings),
        "spool": spool_bucket.check(settings),
        "audit": audit_log(settings),
        "certificate": certificates(settings),
        "redis": queue(settings),
        "hosts": hosts(settings),
        "ports": ports(settings, session().url),
    }
    for subject, check in checks.items():
        try:
            yield from check
        except OSError as exc:  # the files of another user
            yield Finding(
                "FAIL", subject, f"{exc.filename}: {exc.strerror}", "run as the user of the service"
            )
    yield memory()
    yield _tools()


def _source(file: Path | None) -> str:
    return f"read from {file}" if file else "defaults, no file"


def _weak(settings: Settings) -> Iterator[Finding]:
    """Yield the weaknesses of ``kms config lint``, except those of files, which have checks of their own."""
    found = unaccepted(settings)
    for each in weaknesses(settings):
        if each.setting in found and not each.of_file:
            yield Finding("warn", "weak", f"{each.setting}: {each.risk}", each.advice)


def _keys(settings: Settings) -> Iterator[Finding]:
    """Wrap and unwrap with each key that the settings name."""
    try:
        ring = keyring.build(settings, key_opening.of_process(settings))
        sealed = key_opening.sealed_files(settings)
        plain = key_opening.key_files(settings).keys() - sealed.keys()
        yield from _sealed_own(settings, sealed)
        yield from _documents(settings)
    except ConfigurationError as exc:
        yield Finding("FAIL", "keys", exc.detail)
        return
    for key in ring.keys.values():
        health = key.backend.health_check()
        how = f", sealed by {_root(sealed[key.key_id])}" if key.key_id in sealed else ""
        name = f"{key.key_id} ({key.backend.name}{how})"
        if health.healthy:
            yield Finding("ok", "self-test", f"{name} wraps and unwraps")
        else:
            text = f"{name} does not wrap and unwrap"
            is_away = key.backend.name != "age" or key.key_id not in plain
            yield Finding("FAIL", "self-test", text, health.detail, away=is_away)


def _sealed_own(settings: Settings, sealed: Mapping[str, Path]) -> Iterator[Finding]:
    """Open the sealed key files of the service itself."""
    opener = key_opening.of_process(settings)
    for name in key_opening.own_files(settings).keys() & sealed.keys():
        path = sealed[name]
        try:
            opener.open(name, small_files.read(path))
        except (KmsError, OSError) as exc:
            is_away = isinstance(exc, BackendUnavailable)
            yield Finding("FAIL", "own keys", f"{path} is sealed and does not open", str(exc), away=is_away)
        else:
            yield Finding("ok", "own keys", f"{path} is sealed by {_root(path)} and opens")


def _documents(settings: Settings) -> Iterator[Finding]:
    """Read the documents of Age keys, and compare them with the copies of this host."""
    for name, key in key_opening.documents(settings).items():
        try:
            found, own = key.document.verified(), Version()
            with suppress(Unavailable):
                own = key.copy.current()
            text = f"{name} is in {key.private}, generation {found.generation}, sealed by "
            text += _named(root_of(key.body_of(found.body).sealed))
        except (KmsError, OSError) as exc:
            away = isinstance(exc, Unavailable)
            yield Finding("FAIL", "key document", f"{key.private} of the key {name}", str(exc), away=away)
        else:
            if found.anchor < own.anchor:
                text = f"{key.private} is older than the copy of this host, generation {own.generation}"
                yield Finding("FAIL", "key document", text, f"put it back, or run kms keys adopt {name}")
            else:
                yield Finding("ok", "key document", text)


def _root(path: Path) -> str:
    return _named(root_of(small_files.read(path)))


def _named(root: str | None) -> str:
    return root or "kms.age.seal_identity_path"


def _tools() -> Finding:
    """Programs that some commands run and the service does not need."""
    found = [name for name in TOOLS if shutil.which(name)]
    missing = [name for name in TOOLS if name not in found]
    parts = (("found", found), ("missing", missing))
    return Finding(
        "ok", "tools", "; ".join(f"{label}: {', '.join(names)}" for label, names in parts if names)
    )


# -- the service at its address -----------------------------------------------------------------------

TIMEOUT_S: Final = 5.0
_DEGRADED: Final[dict[str, tuple[Level, str, str]]] = {
    "audit": (
        "FAIL",
        "its audit log cannot be written, so calls are refused",
        "free space on the disk of its log",
    ),
    "audit_chain": ("FAIL", "its audit log was changed", "kms audit verify on its machine"),
    "audit_anchors": (
        "FAIL",
        "its audit log lacks records that anchors name",
        "kms audit verify on its machine",
    ),
    "audit_anchors_away": ("warn", "its audit log is not compared with its anchors", "its log says why"),
    "audit_unread": ("warn", "it cannot read its audit log", "kms audit verify on its machine"),
    "key_documents": (
        "warn",
        "it cannot read a document with keys, and would not know a new version",
        "document.not_read in its log",
    ),
    "install": (
        "FAIL",
        "its Redis and its spool belong to different installs",
        "line install on its machine",
    ),
    "spool_not_shared": ("FAIL", "another host uses another spool", "kms doctor on each host (line hosts)"),
    "clock": ("warn", "clocks of its hosts differ", "use NTP on all hosts and on that of Redis"),
    "worker_processes": (
        "warn",
        "worker processes hang and cannot be ended",
        "mend the file system that worker.process_stuck names in the worker's log",
    ),
}


def _service(given: Session, *, elsewhere: bool, own_id: str | None = None) -> Iterator[Finding]:
    """Check the service. ``own_id`` is the install id of the settings that were checked."""
    if given.token_file is not None:
        yield _token(given.token_file)
        if elsewhere and given.allow_http and given.url.startswith("http://"):
            yield Finding("warn", "token", "it is sent unencrypted", "use an https:// address")
    try:
        yield from _health(given)
        yield from _status(given, own_id)
    except KmsError as exc:
        yield Finding("FAIL", "service", exc.detail, terminal.hint_of(exc), away=True)


def _token(path: Path) -> Finding:
    finding = private_file("token", path, "check --token-file", strict=False)
    return replace(finding, away=True)  # the service may run on another machine


def _health(given: Session) -> Iterator[Finding]:
    with connect(retries=0, timeout_s=TIMEOUT_S) as kms:
        health = kms.health()
    if health.status == "healthy":
        yield Finding("ok", "service", f"{given.url} answers, backend {health.backend} works")
    else:
        text = f"{given.url} answers, backend {health.backend} does not work"
        yield Finding("FAIL", "service", text, "its log says why", away=True)


def _status(given: Session, own_id: str | None) -> Iterator[Finding]:
    with connect(retries=0, timeout_s=TIMEOUT_S) as kms:
        status = kms.status()
    own = version("kms-service")
    if status.version != own:
        yield Finding("warn", "version", f"it is {status.version}, this command {own}", "install the same")
    if own_id and status.install and own_id != status.install:
        text = (
            f"{given.url} is of another install ({status.install}) than the state and spool above ({own_id})"
        )
        yield Finding("FAIL", "target", text, "name its --state-dir and --config, or another --url")
    for name in status.degraded:
        if name in _DEGRADED:
            level, text, then = _DEGRADED[name]
            yield Finding(level, "service", text, then, away=True)
    yield from _jobs(status)


def _jobs(status: admin.StatusOut) -> Iterator[Finding]:
    if status.jobs is None or "redis" in status.degraded:
        text = "the service reaches no Redis, so jobs and files wait"
        yield Finding("warn", "jobs", text, "start it, or kms up")
        return
    yield Finding("ok", "jobs", "are accepted")
    if status.workers:
        yield Finding("ok", "workers", f"{status.workers} running, {status.queue_depth} jobs waiting")
    else:
        yield Finding("warn", "workers", "none are running, so jobs wait", "start kms-worker, or kms up")
