"""``kms job``: list, show, wait, cancel, result, dead, retry. ``submit`` is a module of its own."""

import sys
from pathlib import Path
from typing import Final, get_args

import click

from kms_cli import terminal
from kms_cli.atomic_file import placed
from kms_cli.commands.files import output_option, require_success
from kms_cli.main import JOB_COMMANDS, LazyGroup
from kms_cli.options import force_option
from kms_cli.progress import Meter
from kms_cli.remote_service import connect, show
from kms_cli.session import session
from kms_protocol.wire import JobList, JobOut, JobState, Report

STATES: Final = get_args(JobState)

job_command = LazyGroup("job", JOB_COMMANDS, "List, show, follow and cancel jobs.")
id_argument = click.argument("job_id", metavar="ID")


@click.command("list", short_help="List jobs.")
@click.option("--state", type=click.Choice(STATES), help="Only jobs in this state.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
def list_command(state: JobState | None, limit: int) -> None:
    """List jobs, newest first."""
    with connect() as kms:
        page = kms.jobs(state=state, limit=limit)
    _rows(page, "no jobs")
    if page.next and not session().as_json:
        terminal.say(f"there are more: raise --limit, now {limit}")


@click.command("dead", short_help="List dead letters.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
def dead_command(limit: int) -> None:
    """List jobs that used up their attempts, newest first."""
    with connect() as kms:
        _rows(kms.dead(limit=limit), "no dead letters")


@click.command("retry", short_help="Revive a dead letter.")
@id_argument
def retry_command(job_id: str) -> None:
    """Give a job that ended with attempts_exhausted or record_refused all its attempts again."""
    with connect() as kms:
        show_job(kms.retry(job_id))


def _rows(page: JobList, none: str) -> None:
    if session().as_json:
        show(page)
        return
    for job in page.jobs:
        terminal.result(
            f"{job.job_id}  {job.kind:<7}  {job.state:<10}  {job.created_at}  {_progress(job)}".rstrip()
        )
    if not page.jobs:
        terminal.say(none)


@click.command("show", short_help="Show a job.")
@id_argument
def show_command(job_id: str) -> None:
    """Show one job as it stands."""
    with connect() as kms:
        show_job(kms.job(job_id))


@click.command("wait", short_help="Wait for a job.")
@id_argument
@click.option("--timeout", type=click.FloatRange(min=0), help="Seconds to wait at most.")
def wait_command(job_id: str, timeout: float | None) -> None:
    """Wait until the job has ended, show it, and fail as it failed. Ctrl-C ends the waiting, not the job."""
    with connect() as kms, Meter() as meter:
        job = kms.wait(
            job_id,
            timeout_s=timeout,
            progress=lambda job: meter.show(job.state, job.progress.bytes_done, job.progress.bytes),
        )
    show_job(job)
    require_success(job)


@click.command("cancel", short_help="Cancel a job.")
@id_argument
def cancel_command(job_id: str) -> None:
    """Ask for the end of a job: at once if it waits, at its next item or slab if it runs."""
    with connect() as kms:
        show_job(kms.cancel(job_id))


@click.command("result", short_help="Fetch a result.")
@id_argument
@output_option
@force_option
def result_command(job_id: str, output: Path | None, *, force: bool) -> None:
    """Write the result to stdout or --output: the bytes of a file, or one line of JSON for each item."""
    with connect() as kms, Meter() as meter:
        if output is None:
            kms.download(job_id, sys.stdout.buffer)
            sys.stdout.buffer.flush()
            return
        with placed(output, overwrite=force) as target:
            kms.download(job_id, target, progress=lambda done, total: meter.show("receiving", done, total))


def show_job(job: JobOut) -> None:
    """A job, for people or for programs."""
    if session().as_json:
        show(job)
        return
    failed = {"error": job.error.code} if job.error else {}
    terminal.record(
        {
            "job": job.job_id,
            "kind": job.kind,
            "state": job.state,
            **failed,
            "progress": _progress(job) or "nothing yet",
            **_report(job),
            "attempt": job.attempt,
            "created": job.created_at,
            "expires": job.expires_at,
        },
        as_json=False,
    )


def _report(job: JobOut) -> dict[str, str]:
    """What a campaign has come to."""
    found = job.report
    if not isinstance(found, Report):
        return {}
    verb = "would change" if found.dry_run else "changed"
    left = (f"{one.left} of {one.found} on {one.key_id}/{one.key_version}" for one in found.older)
    return {
        verb.replace(" ", "_"): str(found.changed),
        "newest": str(found.newest),
        "foreign": str(found.foreign),
        "failed": str(found.failed),
        "left": ", ".join(left) or "none on older versions",
    }


def _progress(job: JobOut) -> str:
    progress = job.progress
    parts = []
    if progress.items:
        parts.append(f"{progress.items_done} of {progress.items} items")
    if progress.items_failed:
        parts.append(f"{progress.items_failed} refused")
    if progress.bytes:
        parts.append(f"{terminal.size(progress.bytes_done)} of {terminal.size(progress.bytes)}")
    return ", ".join(parts)
