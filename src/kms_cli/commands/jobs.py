"""``kms job``: submit, list, show, wait, cancel, result, dead, retry."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args
from urllib.parse import quote

import click
from msgspec import UNSET, UnsetType

from kms_cli import terminal
from kms_cli.commands.files import followed, require_success
from kms_cli.connection import complete_jobs, connect
from kms_cli.options import (
    callback_option,
    context_of,
    context_option,
    deadline_options,
    force_option,
    is_stdout,
    key_option,
    label_option,
    metadata_option,
    output_option,
    priority_option,
    writing,
)
from kms_cli.session import global_options
from kms_client import Client
from kms_protocol.errors import ItemsFailed
from kms_protocol.units import age_s, duration_text, size_text
from kms_protocol.wire import (
    ENDED,
    GroupIn,
    JobError,
    JobIn,
    JobKind,
    JobList,
    JobOut,
    JobState,
    Release,
    Report,
)

id_argument = click.argument("job_id", metavar="ID", shell_complete=complete_jobs)
WAIT_S: Final = 30


@click.command("list")
@click.option("--state", type=click.Choice(get_args(JobState)), help="Only jobs in this state.")
@label_option
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
def list_command(state: JobState | None, labels: dict[str, str] | None, limit: int) -> None:
    """List jobs, newest first: id, kind, age, state, and how far it is or why it failed.

    With --label those that have all these labels. --json lists all that "kms job show" does.
    """
    with connect() as kms:
        page = kms.jobs(state=state, labels=labels, limit=limit)
    _rows(page, "no jobs")
    if page.next and not global_options().as_json:
        terminal.say(f"there are more jobs: raise --limit (now {limit})")


@click.command("dead")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
def dead_command(limit: int) -> None:
    """List dead letters, newest first: jobs that ended with attempts_exhausted or record_refused."""
    with connect() as kms:
        _rows(kms.dead(limit=limit), "no dead letters")


@click.command("retry")
@id_argument
def retry_command(job_id: str) -> None:
    """Retry a job that failed with attempts_exhausted or record_refused; it gets all its attempts again."""
    with connect() as kms:
        show_job(kms.retry(job_id))


def _rows(page: JobList, if_empty: str) -> None:
    if terminal.printed_as_json(page):
        return
    if not page.jobs:
        terminal.say(if_empty)
        return
    rows = [(job.job_id, job.kind, _age(job.created_at), f"{job.state} {_brief(job)}") for job in page.jobs]
    terminal.table(("JOB", "KIND", "AGE", "STATE"), rows)


def _age(created_at: str) -> str:
    count, unit = duration_text(max(0.0, age_s(created_at))).split()
    return count + unit[0]


def _brief(job: JobOut) -> str:
    """Return the size of a job, how much of it is done while it runs, or why it failed."""
    progress = job.progress
    total, done = progress.bytes, progress.bytes_done
    if progress.items > 1:
        total, done = progress.items, progress.items_done
    if job.error and job.error.code not in {job.state, ItemsFailed.code}:
        return job.error.code
    if progress.items_failed:
        return f"{progress.items_failed:,} of {progress.items:,}"
    if job.state in {"running", "committing"} and total:
        return f"{done / total:.0%}"
    return f"{total:,} items" if progress.items > 1 else size_text(total)


@click.command("show")
@id_argument
def show_command(job_id: str) -> None:
    """Show the current state of a job."""
    with connect() as kms:
        show_job(kms.job(job_id))


@click.command("wait")
@id_argument
@click.option("--timeout", type=click.FloatRange(min=0), help="Maximum number of seconds to wait.")
def wait_command(job_id: str, timeout: float | None) -> None:
    """Wait until the job ends, show it, and fail if it failed. Ctrl-C ends the wait, not the job."""
    with connect() as kms:
        _show_end(kms, job_id, timeout)


def _show_end(kms: Client, job_id: str, timeout_s: float | None = None) -> None:
    """Wait until a job ends and show it. Raises the error of a job that does not succeed."""
    with terminal.Meter() as line:
        line.show("waiting", 0, None)
        job = followed(kms, job_id, line, timeout_s)
    show_job(job)
    require_success(job)


@click.command("cancel")
@id_argument
def cancel_command(job_id: str) -> None:
    """Cancel a job: immediately if it is queued, at its next item or block if it runs."""
    with connect() as kms:
        show_job(kms.cancel(job_id))


@click.command("group")
@click.argument("name", metavar="GROUP")
@click.option("--wait", is_flag=True, help="Wait until all jobs of the group have ended.")
def group_command(name: str, *, wait: bool) -> None:
    """Show how many jobs of a group are in which state; with --wait once all have ended."""
    with connect() as kms, terminal.Meter() as line:
        found = kms.group(name)
        while wait and not found.ended:
            ended = sum(count for state, count in found.states.items() if state in ENDED)
            line.show("waiting", ended, found.jobs, "jobs")
            found = kms.group(name, wait_s=WAIT_S)
    if terminal.printed_as_json(found):
        return
    terminal.record(
        {
            "group": found.name,
            "jobs": f"{found.submitted} of {found.jobs} submitted",
            **found.states,
            "ended": "yes" if found.ended else "no",
            **({"first failed": ", ".join(found.failed)} if found.failed else {}),
        }
    )


@click.command("release")
@id_argument
def release_command(job_id: str) -> None:
    """Delete the result of an ended job now, which frees its room in the spool."""
    with connect() as kms:
        show_job(kms.release(job_id))


@click.command("result")
@id_argument
@output_option
@force_option
@click.option("--release", is_flag=True, help="Delete the result from the service once it is written.")
def result_command(job_id: str, output: Path | None, *, force: bool, release: bool) -> None:
    """Write the result to stdout or --output: the bytes of a file, or a line of JSON for each item."""
    with connect() as kms, terminal.Meter(on_stdout=is_stdout(output)) as line:
        with writing(output, overwrite=force) as target:
            kms.download(job_id, target, progress=partial(line.show, "receiving"))
        if release:  # the file is in place
            kms.release(job_id)


def show_job(job: JobOut) -> None:
    """Print a job as named values, or as JSON with --json."""
    if terminal.printed_as_json(job):
        return
    waiting = job.state not in ENDED
    shown = {
        "job": job.job_id,
        "kind": job.kind,
        "state": job.state,
        **_error(job.error),
        "progress": _progress(job) or "none",
        **_report(job),
        "attempt": job.attempt,
        "priority": job.priority if job.priority != "normal" else None,
        "key": job.key_id,
        "submitter": job.submitter,
        "labels": _pairs(job.labels),
        "metadata": _pairs(job.metadata),
        "group": job.group,
        "cancelling": "yes, a worker may still be at work" if job.cancelling is True else None,
        "waits_for": f"a worker with the feature {job.waits_for}" if job.waits_for else None,
        "not_before": job.not_before,
        "start_by": job.start_by if waiting else None,
        "run_by": job.run_by if waiting else None,
        "created": job.created_at,
        "started": job.started_at if job.attempt else None,
        "ended": job.ended_at,
        "released": job.released_at,
        "expires": job.expires_at,
    }
    terminal.record({name: value for name, value in shown.items() if value not in {None, "", UNSET}})


def _error(error: JobError | None) -> dict[str, object]:
    """Return why a job failed, the first items that did, and what to do."""
    if not error:
        return {}
    return {
        "error": f"{error.code}: {terminal.plain(error.detail)}" if error.detail else error.code,
        "first failed": ", ".join(f"{item.index}: {item.code}" for item in error.items or ()),
        "hint": error.hint,
    }


def _pairs(named: Mapping[str, str] | UnsetType) -> str:
    return ", ".join(f"{name}={value}" for name, value in (named or {}).items())


def _report(job: JobOut) -> dict[str, object]:
    """Return the counts of a job over many files that rewraps or reseals."""
    found = job.report
    if not isinstance(found, Report):
        return {}
    left = (f"{one.left} of {one.found} on {one.key_id}/{one.key_version}" for one in found.older)
    return {
        "would change" if found.dry_run else "changed": found.changed,
        "newest": found.newest,
        "foreign": found.foreign,
        "failed": found.failed,
        "left": ", ".join(left) or "none on older versions",
    }


def _progress(job: JobOut) -> str:
    progress = job.progress
    parts = []
    if progress.items:
        parts.append(f"{progress.items_done} of {progress.items} items")
    if progress.items_failed:
        parts.append(f"{progress.items_failed} failed")
    if progress.bytes:
        parts.append(f"{size_text(progress.bytes_done)} of {size_text(progress.bytes)}")
    return ", ".join(parts)


def group_in(_ctx: click.Context, parameter: click.Parameter, value: str | None) -> GroupIn | None:
    """Return the group of an option ``NAME=3``; None without one."""
    if value is None:
        return None
    name, _, count = value.rpartition("=")
    if not name or not count.isdecimal():
        raise click.BadParameter(f'"{value}" is not NAME=3', param=parameter)
    return GroupIn(name=name, jobs=int(count))


@click.command("submit")
@click.argument("kind", type=click.Choice(get_args(JobKind)))
@click.argument("source")
@click.argument("target", required=False)
@click.option(
    "--overwrite", is_flag=True, default=None, help="Replace existing files; without TARGET the source."
)
@click.option("--new-context", callback=context_of, help="Context to bind instead of --context.")
@click.option("--dry-run", is_flag=True, default=None, help="Many files: count the changes, write nothing.")
@click.option(
    "--ttl",
    "ttl_s",
    type=click.IntRange(60, 30 * 24 * 3600),
    help="Seconds until the job and its result expire, in place of the deadlines.",
)
@click.option("--wait", is_flag=True, help="Wait until the job ends; Ctrl-C ends the wait only.")
@context_option
@key_option
@priority_option
@callback_option
@label_option
@metadata_option
@click.option(
    "--release", type=click.Choice(get_args(Release)), help="Delete the result once it was fetched."
)
@deadline_options
@click.option("--group", callback=group_in, help="Group and the number of its jobs, as NAME=3.")
def submit_command(
    kind: JobKind,
    source: str,
    target: str | None,
    *,
    wait: bool,
    **options: Any,  # noqa: ANN401 -- fields of JobIn
) -> None:
    """Submit a job that reads SOURCE and writes TARGET on the host of the service.

    Both are file:///path, s3://bucket/key, or an absolute path on that host. A SOURCE with * names many
    files; TARGET is then a directory, with a slash at its end. Quote the * to protect it from your shell.
    """
    job = JobIn(kind=kind, source=_url(source), target=target and _url(target), **options)
    with connect() as kms:
        accepted = kms.submit(job)
        if wait:
            _show_end(kms, accepted.job_id)
        elif not terminal.printed_as_json(accepted):
            terminal.shown(accepted.job_id)


def _url(text: str) -> str:
    """Return an absolute path as a file URL, with its wildcards unquoted; a URL as it is."""
    return f"file://{quote(text, safe='/*')}" if text.startswith("/") else text
