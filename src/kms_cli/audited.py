"""What a command changes on this machine goes on record, in the audit trail that the settings name.

A command is a process of its own, so it has a chain of its own, ``cli-…``, which ends with it.
"""

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kms_cli.local import state_redis
from kms_core import audit
from kms_core.audit import AuditLog
from kms_core.audit_setup import build
from kms_core.auth.policy import Principal
from kms_core.envelope.binding import DEFAULT_TENANT
from kms_core.observability import logs
from kms_core.redis_client import connect
from kms_core.settings.model import Settings
from kms_protocol.errors import ConfigurationError

ROLE: Final = "cli"


@contextmanager
def effect(settings: Settings, operation: str, what: str, tenant: str = DEFAULT_TENANT) -> Iterator[None]:
    """An intent before a change and its outcome after it; ``what`` is changed, and never a secret.

    Raises AuditUnavailable, before the change if its intent cannot be written; ConfigurationError.
    """
    with log_of(settings) as log, audit.effect(log, operator(tenant), operation, unique(what)):
        yield


@contextmanager
def log_of(settings: Settings) -> Iterator[AuditLog]:
    """The chain of this command: begun by its first record, closed at the end. Raises ConfigurationError."""
    logs.configure("error", json=False)  # stdout is for results, and a second place may be away
    trail, keeper = build(settings, ROLE, _second_place(settings), stdout=False)
    keeper.start()
    try:
        yield trail
    finally:
        keeper.stop()


def unique(what: str) -> str:
    """The name of one effect on ``what``."""
    return f"{what}-{os.urandom(4).hex()}"


def _second_place(settings: Settings) -> redis.Redis | None:
    """Redis, told once, since nobody waits for one that is away; None if its password is the service's alone.

    The chains of the service then bear witness of this one.
    """
    try:
        client = connect(state_redis.section_of(settings, os.environ))
    except ConfigurationError:
        return None
    client.set_retry(Retry(NoBackoff(), 0))
    return client


def operator(tenant: str) -> Principal:
    """The user of this machine who runs the command, as the kernel knows him."""
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    return Principal(name, tenant, f"uid:{uid}")
