"""What every command shares: the global options. Knows no client and no settings.

Global options are taken before and after the name of a command; the later one wins.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

META: Final = "kms_cli."
DEFAULT_URL: Final = "http://localhost:8082"  # the client's; known here without loading it


@dataclass(frozen=True, slots=True)
class Session:
    """The global options of one run."""

    url: str = DEFAULT_URL
    token_file: Path | None = None
    config: Path | None = None
    state_dir: Path | None = None
    as_json: bool = False
    allow_http: bool = False


def session() -> Session:
    """The session of the command that runs."""
    meta = click.get_current_context().meta
    given = {key.removeprefix(META): value for key, value in meta.items() if key.startswith(META)}
    return Session(**given)


def options(*, after_command: bool) -> list[click.Option]:
    """Fresh copies of the global options; those after a command read no variables and are not in its help."""

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
        option("url", f"Address of the service [default: {DEFAULT_URL}].", envvar="KMS_SERVICE_URL"),
        option("token-file", "File that holds the bearer token.", envvar="KMS_TOKEN_FILE", type=path),
        option(
            "allow-http",
            "Let tokens, keys and plaintexts travel in clear to an http:// address.",
            envvar="KMS_ALLOW_HTTP",
            is_flag=True,
            default=None,
        ),
        option("config", "Settings file, for what runs on this machine.", envvar="KMS_CONFIG", type=path),
        option("state-dir", "Where the service here keeps its state.", envvar="KMS_STATE_DIR", type=path),
        option("as-json", "Results as JSON.", is_flag=True, default=None),
    ]


def _remember(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    if value is not None and parameter.name:
        ctx.meta[META + parameter.name] = value
