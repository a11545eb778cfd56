"""``kms config lint``: what the settings say, without starting anything."""

import os

import click

from kms_cli import words
from kms_cli.main import CONFIG_COMMANDS, LazyGroup
from kms_cli.session import session
from kms_core import settings
from kms_core.errors import EXIT_OTHER
from kms_core.settings_lint import weaknesses

config_command = LazyGroup("config", CONFIG_COMMANDS, "Check settings.")


@click.command("lint", short_help="Check the settings.")
def lint_command() -> int:
    """Read the settings as the service would, and tell what is weaker than need be.

    Exit code 0 if nothing is, 1 if something is, 78 if the service would not start.
    """
    given = session()
    overrides = {"state_dir": str(given.state_dir)} if given.state_dir else {}
    loaded = settings.load(given.config, os.environ, overrides=overrides)
    settings.check_exposure(loaded)
    found = list(weaknesses(loaded))
    for weakness in found:
        if given.as_json:
            words.record({"setting": weakness.setting, "advice": weakness.advice}, as_json=True)
        else:
            words.result(f"{weakness.setting}: {weakness.advice}")
    if not found:
        words.say(f"nothing is weaker than need be ({loaded.environment})")
    return EXIT_OTHER if found else 0
