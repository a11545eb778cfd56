"""``kms messages``: what was sent to ``kms.submit``, refused and set aside, on the machine of the service."""

import os
from datetime import UTC, datetime

import click
import msgspec

from kms_cli import audited, terminal
from kms_cli.local import machine_settings, state_redis
from kms_cli.session import session
from kms_core.jobs.store import set_aside
from kms_core.jobs.store.set_aside import SetAside
from kms_core.observability import logs
from kms_core.redis_client import connect


@click.command("messages", short_help="List refused messages of kms.submit.")
@click.option("--purge", is_flag=True, help="Delete all that are kept, and record it in the audit trail.")
def messages_command(*, purge: bool) -> None:
    """List messages of kms.submit that were refused, or that a worker died of twice; the newest first.

    At most 100 are kept, for seven days, in the Redis that the settings name. --json shows their content too,
    where that is an age file of at most 64 KiB.
    """
    logs.configure("error", json=False)
    given = session()
    settings = machine_settings.settings()
    with connect(state_redis.section_of(settings, os.environ)) as client:
        if purge:
            with audited.effect(settings, "messages.purge", "kms.submit"):
                count = set_aside.purge(client)
            terminal.say(f"{count} deleted")
            return
        found = set_aside.entries(client)
    for entry in found:
        terminal.record(
            _shown(entry) if not given.as_json else msgspec.to_builtins(entry), as_json=given.as_json
        )
    if not found:
        terminal.say("no message is set aside")


def _shown(entry: SetAside) -> dict[str, object]:
    try:
        at = datetime.fromtimestamp(entry.at, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):  # which no worker wrote
        at = "unknown"
    return {
        "at": at,
        "reason": entry.reason,
        "task_id": entry.task_id,
        "size": entry.size,
        "digest": entry.digest,
    }
