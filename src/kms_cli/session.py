"""Global options of a run.

They are accepted before and after the name of a command; the later one wins.
"""

from pathlib import Path
from typing import Any, Final, NamedTuple

import click

META: Final = "kms_cli."
AS_JSON: Final = f"{META}as_json"
DEFAULT_URL: Final = "http://localhost:8082"  # the client's; known here without loading it
_ADDRESS: Final = f"Address of the service [default: that of kms up, else {DEFAULT_URL}]."


class GlobalOptions(NamedTuple):
    """The global options of a run."""

    url: str = DEFAULT_URL
    token_file: Path | None = None
    config: Path | None = None
    state_dir: Path | None = None
    as_json: bool = False
    allow_http: bool = False
    check_service: bool = False


def global_options() -> GlobalOptions:
    """Return the global options of the running command; none outside of one, as in the age plugin."""
    given = {key.removeprefix(META): value for key, value in _meta().items() if key.startswith(META)}
    return GlobalOptions(**given)


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
