"""Options that several commands share; knows no client, so that offline commands start without one."""

import click
import msgspec

from kms_protocol.errors import InvalidContext
from kms_protocol.wire import PRIORITIES, ContextIn


def context_of(ctx: click.Context, parameter: click.Parameter, value: str | None) -> ContextIn:
    """``key=value,…`` as it is; a JSON object, where a value holds a comma, as a mapping."""
    del ctx, parameter
    if value is None or not value.startswith("{"):
        return value
    try:
        return msgspec.json.decode(value, type=dict[str, str])
    except msgspec.DecodeError as exc:
        raise InvalidContext("The context is not a JSON object of strings") from exc


context_option = click.option(
    "--context", callback=context_of, help="Encryption context, as env=prod,service=api, or a JSON object."
)
key_option = click.option("--key-id", help="Key to use instead of the default one.")
priority_option = click.option(
    "--priority", type=click.Choice(PRIORITIES), help="Before (high) or after (low) other jobs that wait."
)
callback_option = click.option("--callback", help="Endpoint of the service's settings to tell how it ends.")
force_option = click.option("--force", "-f", is_flag=True, help="Overwrite the output if it exists.")
