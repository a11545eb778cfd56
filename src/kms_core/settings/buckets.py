"""What settings may not say of buckets: half a credential, a prefix that ends anywhere, HTTP without need."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from kms_core.settings.model import BucketSection, Settings
from kms_core.settings.validate_backends import check_address, is_loopback
from kms_protocol.errors import ConfigurationError


def check_buckets(settings: Settings) -> None:
    """Refuse an incomplete or unsafe section. Raises ConfigurationError, which names the key."""
    for name, section in settings.kms.jobs.buckets.items():
        where = f"kms.jobs.buckets.{name}"
        if (section.access_key_id is None) != (section.secret_key_file is None):
            raise ConfigurationError(
                f"{where}.access_key_id and {where}.secret_key_file belong together: set both, or neither "
                "for the credentials that AWS tools would find"
            )
        for setting, prefixes in (("read", section.read), ("write", section.write)):
            _check_prefixes(f"{where}.{setting}", prefixes)
        if section.endpoint is not None:
            check_address(f"{where}.endpoint", section.endpoint, in_prod=settings.is_prod)
            _check_http(f"{where}.allow_http", section, in_dev=settings.environment == "dev")


def bucket_files(settings: Settings) -> Iterator[tuple[str, Path, bool]]:
    """The files that jobs must not reach: setting, path, and whether all below it is private."""
    for name, section in settings.kms.jobs.buckets.items():
        if section.secret_key_file:
            yield f"kms.jobs.buckets.{name}.secret_key_file", section.secret_key_file, True


def _check_prefixes(where: str, prefixes: tuple[str, ...]) -> None:
    for prefix in prefixes:
        if prefix and (not prefix.endswith("/") or {"", ".", ".."} & set(prefix[:-1].split("/"))):
            raise ConfigurationError(
                f'{where}: a prefix ends in a slash and begins with none, as "incoming/"; "" is all of it'
            )


def _check_http(where: str, section: BucketSection, *, in_dev: bool) -> None:
    """Over ``http://`` others can read plaintext, if not credentials: only on purpose, and only near by."""
    url = urlsplit(section.endpoint or "")
    if url.scheme != "http":
        return
    if not section.allow_http:
        raise ConfigurationError(f"{where}: the endpoint is http://; use https://, or set this to true")
    if not in_dev and not is_loopback(url.hostname or ""):
        raise ConfigurationError(f"{where}: http:// is for loopback, and for dev; use https://")
