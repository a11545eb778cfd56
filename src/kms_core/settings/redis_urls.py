"""Addresses of ``[kms.redis]``: which URLs may stand there, and what one of Sentinel says; connects nowhere.

``sentinel://user:password@host:26379,host:26379/0?master=NAME`` asks Sentinels where the master is;
``sentinels://`` is the same over TLS, as ``rediss://`` is to ``redis://``. User and password are those of the
servers; what the Sentinels want themselves stands in ``sentinel_username`` and ``sentinel_password``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from kms_core.settings.model import RedisSection, Settings
from kms_protocol.errors import ConfigurationError

STATE: Final = ("redis", "rediss", "unix", "sentinel", "sentinels")
BROKER: Final = ("redis", "rediss", "redis+socket", "sentinel", "sentinels", "amqp", "amqps")
TLS: Final = frozenset({"rediss", "sentinels", "amqps"})
AMQP: Final = frozenset({"amqp", "amqps"})
SENTINELS: Final = frozenset({"sentinel", "sentinels"})
PASSWORDS: Final = frozenset({"redis", "rediss", *SENTINELS})
"""Schemes whose user's password may be in ``password_file``."""
_SENTINEL_PORT: Final = 26379
_OPTIONS: Final = frozenset({"master", "sentinel_username", "sentinel_password"})


@dataclass(frozen=True, slots=True)
class Sentinels:
    """Who knows the master, its name there, and how to enter. Empty strings mean none."""

    hosts: tuple[tuple[str, int], ...]
    master: str
    database: int
    username: str = ""
    password: str = field(default="", repr=False)
    own_username: str = ""
    own_password: str = field(default="", repr=False)


def for_celery(url: str) -> str:
    """A Redis URL as Celery wants it, whose name for a unix socket is another than redis-py's."""
    if not url.startswith("unix://"):
        return url
    return url.replace("unix://", "redis+socket://", 1).replace("?db=", "?virtual_host=", 1)


def is_shared(section: RedisSection) -> bool:
    """Whether the broker is the Redis that holds the jobs, and is entered in the same way."""
    return section.broker_url == for_celery(section.url)


def check_redis(settings: Settings) -> None:
    """URLs of a known kind, TLS files only where there is TLS. Raises ConfigurationError, without the URL."""
    section = settings.kms.redis
    if ";" in section.broker_url:  # Celery takes a list of brokers; checks here see the first
        raise ConfigurationError("kms.redis.broker_url: one URL belongs there; in a password, ; is %3B")
    for where, url, schemes in (
        ("kms.redis.url", section.url, STATE),
        ("kms.redis.broker_url", section.broker_url, BROKER),
    ):
        parts = split_url(where, url)
        if parts.scheme not in schemes:
            known = ", ".join(f"{scheme}://" for scheme in schemes)
            raise ConfigurationError(f"{where}: expected one of {known}")
        if parts.scheme in SENTINELS:
            sentinels(where, url)
        if section.password_file and parts.scheme in PASSWORDS and parts.password:
            raise ConfigurationError(
                f"{where}: the password is in kms.redis.password_file, or here, and not both"
            )
        if any(name.startswith("ssl_") for name in parse_qs(parts.query, keep_blank_values=True)):
            raise ConfigurationError(
                f"{where}: no ssl_* options belong there; name the authority in kms.redis.ca_file"
            )
    _check_files(section)


def is_tls(url: str) -> bool:
    return url.partition("://")[0] in TLS


def sentinels(where: str, url: str) -> Sentinels:
    """What a ``sentinel://`` URL says. Raises ConfigurationError, which names ``where`` and never the URL."""
    parts = split_url(where, url)
    login, _, hosts = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    options = parse_qs(parts.query, keep_blank_values=True)
    if options.keys() - _OPTIONS or any(len(values) > 1 for values in options.values()):
        raise ConfigurationError(f"{where}: a Sentinel URL has the options {', '.join(sorted(_OPTIONS))}")
    if not options.get("master", [""])[0]:
        raise ConfigurationError(f"{where}: a Sentinel URL names its master: …/0?master=mymaster")
    database = parts.path.strip("/") or "0"
    if not (database.isascii() and database.isdigit()):
        raise ConfigurationError(f"{where}: the path of a Sentinel URL is the number of a database: /0")
    return Sentinels(
        hosts=tuple(_hosts(where, hosts)),
        master=options["master"][0],
        database=int(database),
        username=unquote(username),
        password=unquote(password),
        own_username=options.get("sentinel_username", [""])[0],
        own_password=options.get("sentinel_password", [""])[0],
    )


def _hosts(where: str, text: str) -> Iterator[tuple[str, int]]:
    for host in text.split(","):
        parts = split_url(where, f"//{host}")
        if not parts.hostname:
            raise ConfigurationError(f"{where}: expected sentinel://host:26379,host:26379/0?master=mymaster")
        yield parts.hostname, _port(where, parts) or _SENTINEL_PORT


def split_url(where: str, url: str) -> SplitResult:
    """Split a URL of ``[kms.redis]``. Raises ConfigurationError, which names ``where`` and never the URL.

    ``urlsplit`` of patched Pythons, as Debian 12's, refuses an IPv6 address after another host: the hosts of
    Sentinels are kept from it.
    """
    scheme, separator, rest = url.partition("://")
    several = scheme.lower() in SENTINELS
    hosts = re.split(r"[/?#]", rest, maxsplit=1)[0] if several else ""
    try:
        parts = urlsplit(f"{scheme}{separator}{rest.removeprefix(hosts)}")
    except ValueError:  # its text quotes the URL
        raise ConfigurationError(f"{where} is not a URL") from None
    return parts._replace(netloc=hosts) if several else parts


def _port(where: str, parts: SplitResult) -> int | None:
    try:
        return parts.port
    except ValueError:
        raise ConfigurationError(f"{where}: a port is a number up to 65535") from None


def _check_files(section: RedisSection) -> None:
    named = [
        name
        for name in ("ca_file", "client_cert_file", "client_key_file")
        if getattr(section, name) is not None
    ]
    if named and not (is_tls(section.url) or is_tls(section.broker_url)):
        raise ConfigurationError(
            f"kms.redis.{named[0]} is for TLS, and neither URL asks for it: write rediss://, sentinels:// or amqps://"
        )
    if (section.client_cert_file is None) != (section.client_key_file is None):
        raise ConfigurationError(
            "kms.redis.client_cert_file and kms.redis.client_key_file belong together: set both"
        )
