"""Connections to the service that the global options name, and completions that it lists.

The client is imported by the first ``connect``: commands that need no service start without it.
"""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import click

from kms_cli import terminal
from kms_cli.session import global_options, is_given, use_url
from kms_protocol.errors import KmsError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from kms_client import Client

COMPLETION_S: Final = 1.0


def service_url() -> str:
    """Return the address that an option names, else ``instances.address``. Raises ConfigurationError."""
    if not is_given("url"):
        from kms_cli.local import instances  # noqa: PLC0415 -- not needed where an address is named

        use_url(instances.address(os.environ))
    return global_options().url


def connect(*, retries: int = 2, timeout_s: float = 30.0) -> "Client":
    """Return a client of the service. Raises ConfigurationError on a wrong or unencrypted address.

    An address that no option names is asked first whether it answers as this service.
    """
    from kms_cli.waiting_transport import WaitingTransport  # noqa: PLC0415 -- see above
    from kms_client.settings import ClientSettings  # noqa: PLC0415 -- as above
    from kms_client.sync import Client  # noqa: PLC0415 -- as above

    url, given = service_url(), global_options()
    settings = ClientSettings(
        url,
        token_file=given.token_file,
        allow_http=given.allow_http,
        check_service=given.check_service,
        retries=retries,
        timeout_s=timeout_s,
        on_retry=_report_retry if sys.stderr.isatty() and not given.as_json else None,
    )
    return Client.over(settings, WaitingTransport(settings))


def _report_retry(error: KmsError, wait_s: float, left: int | None) -> None:
    """Print why a call is made again, when, and how many attempts are left; nothing for waits below 1 s."""
    if wait_s >= 1:
        more = "" if left is None else f" (attempts left: {left})"
        terminal.say(f"{terminal.plain(error.summary)}: next try in {wait_s:.0f} s{more}")


def completions(pairs: Iterable[tuple[str, str]], incomplete: str) -> "list[CompletionItem[str]]":
    """Return the values that begin so, of pairs of a value and its help, for a shell."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415 -- only shells ask

    return [
        CompletionItem(terminal.printable(value), help=terminal.printable(text))
        for value, text in pairs
        if value.startswith(incomplete)
    ]


def _offered(
    listed: "Callable[[Client], list[tuple[str, str]]]",
    ctx: click.Context,
    _parameter: click.Parameter,
    incomplete: str,
) -> "list[CompletionItem[str]]":
    """Return what a service lists and begins so; nothing without one that answers soon."""
    with suppress(Exception), ctx.scope(cleanup=False), connect(retries=0, timeout_s=COMPLETION_S) as kms:
        return completions(listed(kms), incomplete)
    return []


complete_keys: Final = partial(_offered, lambda kms: [(key.id, key.backend) for key in kms.keys().keys])
complete_jobs: Final = partial(
    _offered, lambda kms: [(job.job_id, f"{job.kind} {job.state}") for job in kms.jobs().jobs]
)
