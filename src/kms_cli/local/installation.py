"""The settings of the service on this machine, as a command reads them."""

import os
from collections.abc import Mapping
from pathlib import Path

import click

from kms_cli import terminal
from kms_cli.local.instances import running
from kms_cli.session import global_options
from kms_core.secure_files import in_shell
from kms_core.settings.files import for_command
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import Settings


def settings() -> Settings:
    """Read the settings as the service would, with the global options. Raises ConfigurationError.

    Prints which settings files are skipped, and a warning if ``kms up`` runs with other settings.
    """
    loaded = load_settings(settings_file(os.environ), os.environ, overrides=overrides())
    others = [each.state_dir for each in running(os.environ)]
    if others and os.path.realpath(loaded.state_dir) not in map(os.path.realpath, others):
        text = f"kms up runs with another: --state-dir {in_shell(others[0])}"
        _print_once(f"warning: this is about {loaded.state_dir}, and {text}")
    return loaded


def overrides() -> Mapping[str, object]:
    """The global options that take the place of settings, by their key below ``[kms]``."""
    state_dir = global_options().state_dir
    return {"state_dir": state_dir and str(state_dir)}


def settings_file(environ: Mapping[str, str]) -> Path | None:
    """Return the settings file of this command, and print once which others are skipped."""
    given = global_options()
    return for_command(given.config, environ, given.state_dir, _print_once)


def _print_once(text: str) -> None:
    """Print a message that this command has not printed yet."""
    printed: set[str] = click.get_current_context().meta.setdefault("kms_cli printed", set())
    if text not in printed:
        printed.add(text)
        terminal.say(text)
