"""``kms messages``: rejected messages of ``kms.submit``, on the machine of the service."""

import os

import click
import msgspec

from kms_cli import audited, terminal
from kms_cli.local import installation
from kms_cli.session import session
from kms_core.jobs.store import set_aside
from kms_core.jobs.store.set_aside import SetAside
from kms_core.observability import logs
from kms_core.redis_client import connect
from kms_protocol.units import time_text


@click.command("messages")
@click.option("--purge", is_flag=True, help="Delete all of them, and record it in the audit log.")
def messages_command(*, purge: bool) -> None:
    """List messages of kms.submit that were rejected, or that ended two workers, newest first.

    At most 100 are kept, for seven days, in the Redis of the settings. With --json their content is included,
    if it is an age file of at most 64 KiB.
    """
    logs.configure("error", json=False)
    given = session()
    settings = installation.settings()
    with connect(installation.redis_section(settings, os.environ)) as client:
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
        terminal.say("there are no rejected messages")


def _shown(entry: SetAside) -> dict[str, object]:
    try:
        at = time_text(entry.at)
    except (ValueError, OverflowError, OSError):  # of a value that no worker wrote
        at = "unknown"
    return {
        "at": at,
        "reason": entry.reason,
        "task_id": entry.task_id,
        "size": entry.size,
        "digest": entry.digest,
    }
