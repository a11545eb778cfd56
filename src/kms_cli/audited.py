"""Audit records of commands that change something on this machine, in the log that the settings name.

A command writes a chain of its own, ``cli-…``, which is closed when the command ends.
"""

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import redis

from kms_cli.local.valkey import redis_section
from kms_core import audit
from kms_core.audit.log import AuditLog
from kms_core.audit.maintenance import build_audit
from kms_core.auth.policy import Principal
from kms_core.envelope.binding import DEFAULT_TENANT
from kms_core.observability import logs
from kms_core.redis_client import connect_once
from kms_core.settings.model import Settings
from kms_protocol.errors import ConfigurationError

ROLE: Final = "cli"


def open_sealed(settings: Settings, name: str, sealed: bytes) -> bytes:
    """Open a sealed audit key. Raises BackendUnavailable, ConfigurationError."""
    from kms_core import key_opening  # noqa: PLC0415 -- imports all backends, which a plain key does not need

    return key_opening.of_process(settings).open(name, sealed)


@contextmanager
def effect(settings: Settings, operation: str, what: str, tenant: str = DEFAULT_TENANT) -> Iterator[None]:
    """Record the intent before a change and its outcome after it. ``what`` names the target, never a secret.

    Any exception is an outcome, Ctrl-C too: no other process finishes the work of a command. Raises
    AuditUnavailable (before the change if the intent cannot be written) and ConfigurationError.
    """
    name = audit.effect_name(what)
    with log_of(settings) as log, audit.effect(log, operator(tenant), operation, name, BaseException):
        yield


@contextmanager
def log_of(settings: Settings) -> Iterator[AuditLog]:
    """Open the chain of this command, begun by its first record. Raises ConfigurationError."""
    logs.configure("error", json=False)  # stdout is for results, and Redis may be away
    log, maintenance = build_audit(settings, ROLE, redis_of(settings), partial(open_sealed, settings))
    maintenance.start()
    try:
        yield log
    finally:
        maintenance.stop()


def redis_of(settings: Settings) -> redis.Redis | None:
    """Return the Redis of the service, without retries; None if only the service can read its password.

    Without it, this chain is anchored only by the chains of the service.
    """
    try:
        return connect_once(redis_section(settings, os.environ))
    except ConfigurationError:
        return None


def operator(tenant: str) -> Principal:
    """Return the user that runs the command, by the name of its uid."""
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    return Principal(name, tenant, f"uid:{uid}")
