"""``kms config lint``: what the settings say, without starting anything."""

import click

from kms_cli import terminal
from kms_cli.local import machine_settings
from kms_cli.main import CONFIG_COMMANDS, LazyGroup
from kms_cli.session import session
from kms_core.settings.lint import Weakness, unaccepted, weaknesses
from kms_core.settings.load import check_exposure
from kms_protocol.errors import EXIT_OTHER

config_command = LazyGroup("config", CONFIG_COMMANDS, "Check settings.")


@click.command("lint", short_help="Check the settings.")
def lint_command() -> int:
    """Read the settings as the service would, and tell what is weaker than need be.

    What [kms] accept_weak names is shown as accepted, on stderr. Exit code 0 if nothing else is weak, 1 if
    something is, 78 if the service would not start.
    """
    given = session()
    loaded = machine_settings.settings()
    check_exposure(loaded)
    told = unaccepted(loaded)
    for weakness in weaknesses(loaded):
        _show(weakness, is_accepted=weakness.setting not in told, as_json=given.as_json)
    if not told:
        terminal.say(f"nothing is weaker than need be ({loaded.environment})")
    return EXIT_OTHER if told else 0


def _show(weakness: Weakness, *, is_accepted: bool, as_json: bool) -> None:
    shown = {"setting": weakness.setting, "risk": weakness.risk, "advice": weakness.advice}
    if as_json:
        terminal.record({**shown, "accepted": is_accepted}, as_json=True)
    elif is_accepted:
        terminal.say(f"accepted: {weakness.setting}: {weakness.risk}")
    else:
        terminal.result(f"{weakness.setting}: {weakness.risk}: {weakness.advice}")
