"""``kms cosmian``: prepares a Cosmian KMS server for the service."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import click

from kms_cli import audited, terminal
from kms_cli.local import installation
from kms_cli.main import COSMIAN_COMMANDS, LazyGroup
from kms_cli.session import printed_as_json
from kms_core.backends.cosmian.backend import key_of
from kms_core.backends.cosmian.settings import CosmianSection
from kms_core.settings.model import Settings
from kms_protocol.errors import ConfigurationError

cosmian_command = LazyGroup(
    "cosmian", COSMIAN_COMMANDS, "Create the keys of the service on a Cosmian KMS server."
)


@click.command("init-key")
def init_key_command() -> None:
    """Create the Cosmian keys that the settings name, unless they exist."""
    settings = installation.settings()
    names = list(dict.fromkeys(_names(settings)))
    if not names:
        raise ConfigurationError(
            f"No key of the environment {settings.environment} uses Cosmian: set its backend under [kms], "
            "or write a key as cosmian:<name> under [kms.keys]"
        )
    for name in names:
        _init(name, settings)


def _init(name: str, settings: Settings) -> None:
    key = key_of(name, settings.backend(CosmianSection), strict=settings.is_prod)
    with audited.effect(settings, "key.create", name), key.call():
        version, is_new = key.init()
    if not printed_as_json({"name": name, "version": version.version, "made": is_new}):
        done = f"created {name}" if is_new else f"{name} exists"
        terminal.result(f"{done}, version {version.version}, on {key.server.where}")


def _names(settings: Settings) -> Iterator[str]:
    """Yield the names of the keys that encrypt. A key that only decrypts must exist already."""
    kms = settings.kms
    if settings.active_backend == "cosmian" and kms.default_key_id not in kms.keys:
        yield settings.backend(CosmianSection).default_key_id
    for _, uri in kms.key_uris:
        parts = urlsplit(uri)
        if parts.scheme == "cosmian" and parts.query != "seal=false":
            yield parts.path
