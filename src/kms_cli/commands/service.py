"""``kms status``, ``kms health``, ``kms keys``: the state of the service and its keys."""

from collections.abc import Mapping
from datetime import UTC, datetime

import click

from kms_cli import terminal
from kms_cli.connection import complete_keys, connect
from kms_protocol.admin import KeyOut, SpoolOut, StatusOut
from kms_protocol.errors import EXIT_UNAVAILABLE
from kms_protocol.units import age_s, duration_text, parse_time, size_text

key_argument = click.argument("key_id", metavar="KEY", shell_complete=complete_keys)


@click.command("status")
def status_command() -> None:
    """Show backend, version, uptime, counts of operations and jobs, the spool, and degraded parts.

    The bytes of the spool are those of your tenant, with its quota, or of all for the scope metrics.
    """
    with connect() as kms:
        status = kms.status()
    if terminal.printed_as_json(status):
        return
    counts = {f"- {name}": f"{by.ok} ok, {by.failed} failed" for name, by in status.operations.by.items()}
    terminal.record(
        {
            "backend": status.backend,
            "environment": status.environment,
            "version": status.version,
            "uptime": duration_text(status.uptime_s),
            "operations": status.operations.total,
            **counts,
            **_jobs(status),
            "spool": _spool(status.spool) if status.spool else "unknown",
            "degraded": ", ".join(status.degraded) or "nothing",
            **{
                f"down: {each.key_id}": f"{each.backend}, since {each.since}" for each in status.backends_down
            },
        },
    )


@click.command("health")
def health_command() -> int:
    """Have the key backend wrap and unwrap a key. Exit code 0 if that works, else 69."""
    with connect() as kms:
        health = kms.health()
    if not terminal.printed_as_json(health):
        terminal.shown(f"{health.status} ({health.backend}, {health.checked_at})")
    return 0 if health.status == "healthy" else EXIT_UNAVAILABLE


def _spool(spool: SpoolOut) -> str:
    used = "" if spool.used_bytes is None else f", {size_text(spool.used_bytes)} used"
    return f"{spool.full:.0%} full{used}" + (
        f" of {size_text(spool.limit_bytes)}" if spool.limit_bytes else ""
    )


def _jobs(status: StatusOut) -> dict[str, object]:
    if status.jobs is None:
        return {"jobs": "unavailable"}
    counts = ", ".join(f"{count} {state}" for state, count in status.jobs.items() if count)
    workers, apis = status.worker_versions or {}, status.api_versions or {}
    return {
        "jobs": counts or "none",
        "queue": status.queue_depth,
        "workers": _versions(status.workers or 0, workers, status.version),
        **({"APIs": _versions(sum(apis.values()), apis, status.version)} if apis else {}),
    }


def _versions(count: int, versions: Mapping[str, int], own: str) -> str:
    """Return the number of processes, and if one has another version than ``own``, how many have each."""
    listed = ", ".join(f"{each} of {version}" for version, each in sorted(versions.items()))
    return f"{count}: {listed}" if versions.keys() - {own} else str(count)


# -- keys ---------------------------------------------------------------------------------------------


@click.command("list")
def list_command() -> None:
    """List the keys: backend, current version, its age, and when its rotation is due."""
    with connect() as kms:
        found = kms.keys()
    if terminal.printed_as_json(found):
        return
    terminal.table(
        ("KEY", "BACKEND", "VERSION", "AGE", "ROTATE", "ENCRYPTED"), [_row(key) for key in found.keys]
    )


@click.command("usage")
@key_argument
def usage_command(key_id: str) -> None:
    """Show the encryptions of each version of a key. Counts may lack the last seconds of a process."""
    with connect() as kms:
        key = kms.key(key_id)
    if terminal.printed_as_json(key):
        return
    if key.current_version is None:
        terminal.say("the backend does not answer: its versions are unknown")
    rows = [
        (
            version.version,
            "encrypts" if version.version == key.current_version else "decrypts",
            version.created_at or "-",
            _number(version.operations),
            "-" if version.bytes is None else size_text(version.bytes),
        )
        for version in key.versions
    ]
    terminal.table(("VERSION", "USE", "CREATED", "ENCRYPTED", "BYTES"), rows)


@click.command(
    "rotate",
    epilog="Old versions still decrypt. Update files with kms rewrap-file, or a rewrap job over a folder.",
)
@key_argument
def rotate_command(key_id: str) -> None:
    """Create a new version of a key. It encrypts from now on."""
    with connect() as kms:
        made = kms.rotate(key_id)
    if terminal.printed_as_json(made):
        return
    terminal.shown(f"{made.key_id} now encrypts with version {made.key_version} ({made.backend})")


def _row(key: KeyOut) -> tuple[str, ...]:
    current = next((version for version in key.versions if version.version == key.current_version), None)
    used = None if current is None else current.operations
    spent = f" ({key.budget:.0%} of its budget)" if key.budget and key.budget >= 0.5 else ""  # noqa: PLR2004 -- half
    return (
        f"{key.id}{' *' if key.default else ''}",
        "+".join((key.backend, *key.others)),
        key.current_version or "no answer",
        duration_text(age_s(current.created_at)) if current and current.created_at else "-",
        _day(key.rotate_at),
        _number(used) + spent,
    )


def _day(at: str | None) -> str:
    if at is None:
        return "-"
    due = parse_time(at)
    return "due" if due <= datetime.now(UTC) else due.date().isoformat()


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"
