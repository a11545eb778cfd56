"""The global options of a run, and the client of the service that they describe.

Global options are accepted before and after the name of a command; the later one wins. The client is imported
by the first ``connect``: commands that need no service start without it.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from kms_cli import terminal

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from kms_client import Client
    from kms_protocol.wire import Answer

META: Final = "kms_cli."
AS_JSON: Final = f"{META}as_json"
DEFAULT_URL: Final = "http://localhost:8082"  # the client's; known here without loading it
_ADDRESS: Final = f"Address of the service [default: that of kms up, else {DEFAULT_URL}]."


class Session(NamedTuple):
    """The global options of a run."""

    url: str = DEFAULT_URL
    token_file: Path | None = None
    config: Path | None = None
    state_dir: Path | None = None
    as_json: bool = False
    allow_http: bool = False
    check_service: bool = False


def session() -> Session:
    """Return the global options of the running command; none outside of one, as in the age plugin."""
    given = {key.removeprefix(META): value for key, value in _meta().items() if key.startswith(META)}
    return Session(**given)


def _meta() -> dict[str, Any]:
    ctx = click.get_current_context(silent=True)
    return ctx.meta if ctx else {}


def is_completion() -> bool:
    """Return whether a shell asks for completions, which prints nothing else."""
    ctx = click.get_current_context(silent=True)
    return bool(ctx and ctx.resilient_parsing)


def is_given(option: str) -> bool:
    """Return whether a global option was given, or set by its variable."""
    return META + option in _meta()


def use_url(url: str) -> None:
    """Use this address, which no option names, for the rest of the command. Its service is checked first."""
    _meta().update({META + "url": url, META + "check_service": True})


def service_url() -> str:
    """Return the address that an option names, else ``instances.address``. Raises ConfigurationError."""
    if not is_given("url"):
        from kms_cli.local import instances  # noqa: PLC0415 -- not needed where an address is named

        use_url(instances.address(os.environ))
    return session().url


def connect(*, retries: int = 2, timeout_s: float = 30.0) -> "Client":
    """Return a client of the service. Raises ConfigurationError on a wrong or unencrypted address.

    An address that no option names is asked first whether it answers as this service.
    """
    from kms_client import Client  # noqa: PLC0415 -- see above

    url, given = service_url(), session()
    return Client(
        url,
        token_file=given.token_file,
        allow_http=given.allow_http,
        check_service=given.check_service,
        retries=retries,
        timeout_s=timeout_s,
    )


# -- completion in a shell ---------------------------------------------------------------------------

COMPLETION_S: Final = 1.0


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
    parameter: click.Parameter,
    incomplete: str,
) -> "list[CompletionItem[str]]":
    """Return what a service lists and begins so; nothing without one that answers soon."""
    del parameter
    with suppress(Exception), ctx.scope(cleanup=False), connect(retries=0, timeout_s=COMPLETION_S) as kms:
        return completions(listed(kms), incomplete)
    return []


complete_keys: Final = partial(_offered, lambda kms: [(key.id, key.backend) for key in kms.keys().keys])
complete_jobs: Final = partial(
    _offered, lambda kms: [(job.job_id, f"{job.kind} {job.state}") for job in kms.jobs().jobs]
)


# -- output ------------------------------------------------------------------------------------------


def meter(*, on_stdout: bool = False) -> terminal.Meter:
    """Return a progress line; hidden with --json, and where results go to the terminal as well."""
    return terminal.Meter(hidden=session().as_json or (on_stdout and sys.stdout.isatty()))


def printed_as_json(answer: "Answer | Mapping[str, object]") -> bool:
    """Print an answer as one line of JSON if --json is given. Return whether it was printed."""
    if not session().as_json:
        return False
    if isinstance(answer, Mapping):
        terminal.record(answer, as_json=True)
    else:
        from kms_protocol import wire  # noqa: PLC0415 -- see above

        terminal.in_json(wire.encode(answer).decode())
    return True


def options(*, after_command: bool) -> list[click.Option]:
    """Return new global options; those after a command read no variables and are hidden in its help."""

    def option(name: str, help_: str, **more: Any) -> click.Option:  # noqa: ANN401  # click's own parameters
        if after_command:
            more["envvar"] = None
        return click.Option(
            [f"--{name.removeprefix('as-')}", name.replace("-", "_")],
            help=help_,
            hidden=after_command,
            expose_value=False,
            callback=_remember,
            show_envvar=True,
            **more,
        )

    path = click.Path(path_type=Path)
    return [
        option("url", _ADDRESS, envvar="KMS_SERVICE_URL"),
        option("token-file", "File that holds the bearer token.", envvar="KMS_TOKEN_FILE", type=path),
        option(
            "allow-http",
            "Allow tokens, keys and plaintexts to be sent unencrypted to an http:// address.",
            envvar="KMS_ALLOW_HTTP",
            is_flag=True,
            default=None,
        ),
        option("config", "Settings file of the service on this machine.", envvar="KMS_CONFIG", type=path),
        option(
            "state-dir", "State directory of the service on this machine.", envvar="KMS_STATE_DIR", type=path
        ),
        option("as-json", "Print results and errors as JSON.", is_flag=True, default=None, is_eager=True),
    ]


def _remember(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    if value is not None and parameter.name:
        ctx.meta[META + parameter.name] = value
