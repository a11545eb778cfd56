"""The settings of this machine as commands read them."""

import os
from collections.abc import Mapping
from pathlib import Path

from kms_cli import terminal
from kms_cli.session import session
from kms_core.settings.load import found_here
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import Settings


def settings() -> Settings:
    """Read the settings as the service here would, with the global options. Raises ConfigurationError.

    A file that was only found in the working directory is told on stderr.
    """
    given = session()
    tell_found(given.config, os.environ)
    overrides = {"state_dir": given.state_dir and str(given.state_dir)}
    return load_settings(given.config, os.environ, overrides=overrides)


def tell_found(config: Path | None, environ: Mapping[str, str]) -> None:
    """Tell on stderr which settings file is read, if nobody named it."""
    found = found_here(config, environ)
    if found is not None:
        terminal.say(f"settings: {terminal.plain(str(found.absolute()))}, found in the working directory")
