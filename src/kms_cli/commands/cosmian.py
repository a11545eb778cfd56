"""``kms cosmian init-key``: creates the keys of the service on a Cosmian KMS server."""

from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from kms_cli import terminal
from kms_protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from kms_core.settings.model import Settings


@click.command("init-key")
def init_key_command() -> None:
    """Create the Cosmian keys that the settings name, unless they exist."""
    from kms_cli import audited  # noqa: PLC0415 -- the rest of the service, which takes a second
    from kms_cli.local import installation  # noqa: PLC0415 -- as above
    from kms_core.backends.cosmian.backend import key_of  # noqa: PLC0415 -- as above
    from kms_core.backends.cosmian.settings import CosmianSection  # noqa: PLC0415 -- as above

    settings = installation.settings()
    section = settings.backend(CosmianSection)
    names = list(dict.fromkeys(_cosmian_keys(settings, section.default_key_id)))
    if not names:
        raise ConfigurationError(
            f"No key of the environment {settings.environment} uses Cosmian: set its backend under [kms], "
            "or write a key as cosmian:<name> under [kms.keys]"
        )
    for name in names:
        key = key_of(name, section, strict=settings.is_prod)
        with audited.effect(settings, "key.create", name), key.call():
            version, is_new = key.init()
        if not terminal.printed_as_json({"name": name, "version": version.version, "made": is_new}):
            done = f"created {name}" if is_new else f"{name} exists"
            terminal.shown(f"{done}, version {version.version}, on {key.server.where}")


def _cosmian_keys(settings: "Settings", default: str) -> Iterator[str]:
    """Yield the names of the keys that encrypt. A key that only decrypts must exist already."""
    kms = settings.kms
    if settings.active_backend == "cosmian" and kms.default_key_id not in kms.keys:
        yield default
    for _, uri in kms.key_uris:
        parts = urlsplit(uri)
        if parts.scheme == "cosmian" and parts.query != "seal=false":
            yield parts.path
