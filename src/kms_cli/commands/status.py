"""``kms status`` and ``kms health``: what the service says of itself."""

import click

from kms_cli import terminal
from kms_cli.remote_service import connect, show
from kms_cli.session import session
from kms_protocol.errors import EXIT_UNAVAILABLE
from kms_protocol.wire import StatusOut


@click.command("status", short_help="Show what the service does.")
def status_command() -> None:
    """Show backend, version, uptime, counts of operations and jobs, and what is degraded."""
    with connect() as kms:
        status = kms.status()
    if session().as_json:
        show(status)
        return
    counts = {f"- {name}": f"{by.ok} ok, {by.failed} failed" for name, by in status.operations.by.items()}
    terminal.record(
        {
            "backend": status.backend,
            "environment": status.environment,
            "version": status.version,
            "uptime": _duration(status.uptime_s),
            "operations": status.operations.total,
            **counts,
            **_jobs(status),
            "degraded": ", ".join(status.degraded) or "nothing",
        },
        as_json=False,
    )


@click.command("health", short_help="Ask whether the key backend works.")
def health_command() -> int:
    """Ask for a real wrap and unwrap by the key backend. Exit code 0 if that worked, else 69."""
    with connect() as kms:
        health = kms.health()
    if session().as_json:
        show(health)
    else:
        terminal.result(f"{health.status} ({health.backend}, {health.checked_at})")
    return 0 if health.status == "healthy" else EXIT_UNAVAILABLE


def _jobs(status: StatusOut) -> dict[str, object]:
    if status.jobs is None:
        return {"jobs": "unavailable"}
    counts = ", ".join(f"{count} {state}" for state, count in status.jobs.items() if count)
    return {"jobs": counts or "none", "queue": status.queue_depth, "workers": status.workers}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")]
    shown = [f"{count} {unit}" for count, unit in parts if count]
    return " ".join(shown[:2]) or "0 s"
