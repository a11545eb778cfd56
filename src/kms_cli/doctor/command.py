"""``kms doctor``: what the troubleshooting page does by hand; each finding says what to do next."""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import click
import structlog

from kms_cli import terminal
from kms_cli.doctor.audit import trail
from kms_cli.doctor.files import age_files, certificates, directories, own_keys
from kms_cli.doctor.findings import Finding, exit_code
from kms_cli.doctor.memory import memory
from kms_cli.doctor.peers import ports, queue
from kms_cli.doctor.service import there
from kms_cli.session import Session, session
from kms_client.settings import is_loopback
from kms_core import keyring
from kms_core.settings.lint import unaccepted, weaknesses
from kms_core.settings.load import check_exposure
from kms_core.settings.load import find as find_settings
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import Settings
from kms_protocol.errors import ConfigurationError

TOOLS: Final = {
    "age": "stock age",
    "sops": "SOPS",
    "age-plugin-kms": "age and sops by the plugin",
    "prometheus": "kms up --monitoring",
    "ssh-agent": "kms ssh add",
}


@click.command("doctor", short_help="Check keys, settings and the service.")
def doctor_command() -> int:
    """Check settings, keys, disk, audit trail, certificates, Redis, ports, the service and its workers.

    Each line is ok, warn or FAIL, and says what to do next. Exit code 0 if nothing fails, 78 if settings or
    files of this machine are wrong, 69 if only something that should answer does not. Nothing is changed.

    This machine is looked at only if the service is meant to run on it (--url).
    """
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    given = session()
    elsewhere = not is_loopback(urlsplit(given.url).hostname)
    found = []
    for finding in (*(() if elsewhere else _here(given)), *there(given, elsewhere=elsewhere)):
        _show(finding, as_json=given.as_json)
        found.append(finding)
    return exit_code(found)


def _show(finding: Finding, *, as_json: bool) -> None:
    if as_json:
        shown = asdict(finding)
        del shown["away"]
        terminal.record(shown, as_json=True)
        return
    then = f": {finding.next}" if finding.next else ""
    terminal.result(f"{finding.level:<4}  {finding.subject:<12}  {terminal.plain(finding.text)}{then}")


def _here(given: Session) -> Iterator[Finding]:
    try:
        settings = load_settings(
            given.config, os.environ, overrides={"state_dir": given.state_dir and str(given.state_dir)}
        )
        file = find_settings(given.config, os.environ)
        yield Finding("ok", "settings", f"{_place(file)}, environment {settings.environment}")
        check_exposure(settings)
    except ConfigurationError as exc:
        yield Finding("FAIL", "settings", exc.detail)
        return
    yield from _weak(settings)
    if "age" in settings.used_backends:
        yield from age_files(settings)
    yield from _keys(settings)
    yield from own_keys(settings)
    yield from directories(settings)
    yield from trail(settings)
    yield from certificates(settings)
    yield from queue(settings)
    yield from ports(settings, given.url)
    yield memory()
    yield _tools()


def _place(file: Path | None) -> str:
    return f"read from {file}" if file else "defaults, no file"


def _weak(settings: Settings) -> Iterator[Finding]:
    """What ``kms config lint`` tells, but what files say of themselves below."""
    told = unaccepted(settings)
    for each in weaknesses(settings):
        if each.setting in told and not each.of_file:
            yield Finding("warn", "weak", f"{each.setting}: {each.risk}", each.advice)


def _keys(settings: Settings) -> Iterator[Finding]:
    """A real wrap and unwrap with every key that settings name."""
    try:
        ring = keyring.build(settings)
    except ConfigurationError as exc:
        yield Finding("FAIL", "keys", exc.detail)
        return
    for key in ring.keys.values():
        health = key.backend.health_check()
        name = f"{key.key_id} ({key.backend.name})"
        if health.healthy:
            yield Finding("ok", "self-test", f"{name} wraps and unwraps")
        else:
            text = f"{name} does not wrap and unwrap"
            yield Finding("FAIL", "self-test", text, health.detail, away=key.backend.name != "age")


def _tools() -> Finding:
    """Programs of others that some commands need; none is needed to run."""
    missing = [f"{name} ({use})" for name, use in TOOLS.items() if not shutil.which(name)]
    there_are = [name for name in TOOLS if shutil.which(name)]
    text = ", ".join(there_are) or "none of those that are optional"
    return Finding("ok", "tools", text, f"not here: {', '.join(missing)}" if missing else "")
