"""Parameters that several commands share; knows no client, so that offline commands start without one."""

from typing import Final

import click
import msgspec

from kms_core.errors import InvalidContext
from kms_core.wire import ContextIn


class ContextType(click.ParamType):
    """``key=value,…``, or a JSON object where a value holds a comma."""

    name = "context"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> ContextIn:
        del param, ctx
        if not value.startswith("{"):
            return value
        try:
            return msgspec.json.decode(value, type=dict[str, str])
        except msgspec.DecodeError as exc:
            raise InvalidContext("The context is not a JSON object of strings") from exc


CONTEXT: Final = ContextType()
context_option = click.option(
    "--context", type=CONTEXT, help="Encryption context, as env=prod,service=api, or a JSON object."
)
key_option = click.option("--key-id", help="Key to use instead of the default one.")
force_option = click.option("--force", "-f", is_flag=True, help="Overwrite the output if it exists.")
