"""``kms cosmian``: what has to be done on a Cosmian KMS server before the service can start."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import click

from kms_cli import audited, terminal
from kms_cli.local import machine_settings
from kms_cli.main import COSMIAN_COMMANDS, LazyGroup
from kms_cli.session import session
from kms_core.backends.cosmian.backend import key_of
from kms_core.settings.model import Settings
from kms_protocol.errors import ConfigurationError

cosmian_command = LazyGroup(
    "cosmian", COSMIAN_COMMANDS, "Make the keys of the service on a Cosmian KMS server."
)


@click.command("init-key", short_help="Make the keys that settings name.")
def init_key_command() -> None:
    """Make the Cosmian keys that settings name, where they are not there yet."""
    settings = machine_settings.settings()
    names = list(dict.fromkeys(_names(settings)))
    if not names:
        raise ConfigurationError(
            f"No key of the environment {settings.environment} is on Cosmian: set its backend under [kms], "
            "or write a key as cosmian:<name> under [kms.keys]"
        )
    for name in names:
        _init(name, settings)


def _init(name: str, settings: Settings) -> None:
    key = key_of(name, settings)
    with audited.effect(settings, "key.create", name), key.call():
        version, is_new = key.init()
    if session().as_json:
        terminal.record({"name": name, "version": version.version, "made": is_new}, as_json=True)
    elif is_new:
        terminal.result(f"made {name}, version {version.version}, on {key.server.where}")
    else:
        terminal.result(f"{name} is there already, version {version.version}, on {key.server.where}")


def _names(settings: Settings) -> Iterator[str]:
    """Of the keys that seal: one that only opens old files is there, or gone."""
    kms = settings.kms
    if settings.active_backend == "cosmian" and kms.default_key_id not in kms.keys:
        yield kms.cosmian.default_key_id
    for _, uri in kms.key_uris:
        parts = urlsplit(uri)
        if parts.scheme == "cosmian" and parts.query != "seal=false":
            yield parts.path
