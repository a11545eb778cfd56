"""``kms job submit``: a job over files or objects that the service itself reads and writes."""

from typing import Final, Unpack, get_args
from urllib.parse import quote

import click

from kms_cli import terminal
from kms_cli.commands.files import followed, require_success
from kms_cli.commands.jobs import show_job
from kms_cli.options import callback_option, context_of, context_option, key_option, priority_option
from kms_cli.progress import Meter
from kms_cli.remote_service import connect, show
from kms_cli.session import session
from kms_client.requests import JobOptions
from kms_protocol.wire import ContextIn, JobIn, JobKind

KINDS: Final = get_args(JobKind)


@click.command("submit", short_help="Hand in a job over files.")
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("source")
@click.argument("target", required=False)
@click.option("--overwrite", is_flag=True, help="Replace what is there; without TARGET the source.")
@click.option("--new-context", callback=context_of, help="Context to bind instead of --context.")
@click.option("--dry-run", is_flag=True, help="Of many files: count what would change, touch nothing.")
@click.option("--rate", type=click.FloatRange(0, 10_000, min_open=True), help="Of many: files a second.")
@click.option("--ttl", type=click.IntRange(60, 30 * 24 * 3600), help="Seconds the job may take and be kept.")
@click.option("--wait", is_flag=True, help="Wait for its end. Ctrl-C then cancels the job.")
@context_option
@key_option
@priority_option
@callback_option
def submit_command(
    kind: JobKind,
    source: str,
    target: str | None,
    context: ContextIn,
    key_id: str | None,
    **more: Unpack["Given"],
) -> None:
    """Hand in a job that reads SOURCE and writes TARGET where the service runs.

    Both are file:///path or s3://bucket/key, or an absolute path there. A SOURCE with * in it names many
    files, and TARGET is then a directory, ending in a slash. Quote it: the * is not for your shell.
    """
    job = JobIn(
        kind=kind,
        source=_url(source),
        target=None if target is None else _url(target),
        overwrite=more["overwrite"] or None,
        key_id=key_id,
        context=context,
        new_context=more["new_context"],
        ttl_s=more["ttl"],
        dry_run=more["dry_run"] or None,
        rate_per_s=more["rate"],
        priority=more.get("priority"),
        callback=more.get("callback"),
    )
    with connect() as kms:
        accepted = kms.submit(job)
        if more["wait"]:
            with Meter() as meter:
                found = followed(kms, accepted.job_id, meter)
            show_job(found)
            require_success(found)
        elif session().as_json:
            show(accepted)
        else:
            terminal.result(accepted.job_id)


class Given(JobOptions):
    """The options that only this command has."""

    overwrite: bool
    new_context: ContextIn
    dry_run: bool
    rate: float | None
    ttl: int | None
    wait: bool


def _url(text: str) -> str:
    """A path as a URL, its stars left to be wildcards."""
    return f"file://{quote(text, safe='/*')}" if text.startswith("/") else text
