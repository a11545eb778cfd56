"""URLs of ``[kms.redis]``: their checks, and the parts of those with several hosts. Opens no connection.

``sentinel://user:password@host:26379,host:26379/0?master=NAME`` asks Sentinels for the master's address;
``sentinels://`` is the same over TLS, as ``rediss://`` is to ``redis://``. User and password are those of the
Redis servers; those of the Sentinels are the options ``sentinel_username`` and ``sentinel_password``.

``redis+cluster://user:password@host:6379,host:6379`` names nodes of a Redis Cluster, ``rediss+cluster://``
over TLS. A cluster holds the jobs; it cannot be the broker.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kms_core.sections import check_pair
from kms_core.settings.model import RedisSection, Settings
from kms_protocol.addresses import is_loopback
from kms_protocol.errors import ConfigurationError

STATE: Final = ("redis", "rediss", "unix", "sentinel", "sentinels", "redis+cluster", "rediss+cluster")
BROKER: Final = ("redis", "rediss", "redis+socket", "sentinel", "sentinels", "amqp", "amqps")
TLS: Final = frozenset({"rediss", "sentinels", "rediss+cluster", "amqps"})
AMQP: Final = frozenset({"amqp", "amqps"})
SENTINELS: Final = frozenset({"sentinel", "sentinels"})
CLUSTERS: Final = frozenset({"redis+cluster", "rediss+cluster"})
PASSWORDS: Final = frozenset({"redis", "rediss", *SENTINELS, *CLUSTERS})
"""Schemes whose password may be in ``password_file``."""
NO_CLUSTER_BROKER: Final = (
    "a Redis Cluster cannot be the broker, since Celery uses none: name another Redis or RabbitMQ in "
    "kms.redis.broker_url (or KMS_BROKER_URL)"
)
_SENTINEL_PORT: Final = 26379
_SENTINEL_FORM: Final = "sentinel://host:26379,host:26379/0?master=mymaster"
_CLUSTER_FORM: Final = "redis+cluster://host:6379,host:6379"
_NODE_PORT: Final = 6379
_OPTIONS: Final = frozenset({"master", "sentinel_username", "sentinel_password"})


@dataclass(frozen=True, slots=True)
class ClusterNodes:
    """The parts of a cluster URL. Empty credentials mean none."""

    hosts: tuple[tuple[str, int], ...]
    username: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Sentinels:
    """The parts of a Sentinel URL; ``own_*`` are credentials for the Sentinels. Empty means none."""

    hosts: tuple[tuple[str, int], ...]
    master: str
    database: int
    username: str = ""
    password: str = field(default="", repr=False)
    own_username: str = ""
    own_password: str = field(default="", repr=False)


def for_celery(url: str) -> str:
    """A Redis URL in Celery's form, which names unix sockets differently from redis-py."""
    if not url.startswith("unix://"):
        return url
    return url.replace("unix://", "redis+socket://", 1).replace("?db=", "?virtual_host=", 1)


def is_shared(section: RedisSection) -> bool:
    """Return whether the broker is the Redis that holds the jobs, with the same credentials."""
    return section.broker_url == for_celery(section.url)


def check_redis(settings: Settings) -> None:
    """Refuse unknown URL schemes, and TLS files without TLS. Raises ConfigurationError, without the URL."""
    section = settings.kms.redis
    if ";" in section.broker_url:  # Celery takes a list of brokers; checks here see the first
        raise ConfigurationError("kms.redis.broker_url: one URL belongs there; in a password, ; is %3B")
    for where, url, schemes in (
        ("kms.redis.url", section.url, STATE),
        ("kms.redis.broker_url", section.broker_url, BROKER),
    ):
        parts = split_url(where, url)
        _check_scheme(where, url, parts.scheme, schemes)
        if section.password_file and parts.scheme in PASSWORDS and parts.password:
            raise ConfigurationError(
                f"{where}: the password is in kms.redis.password_file, or here, and not both"
            )
        if any(name.startswith("ssl_") for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
            raise ConfigurationError(
                f"{where}: no ssl_* options belong there; name the authority in kms.redis.ca_file"
            )
    _check_files(section)


def _check_scheme(where: str, url: str, scheme: str, schemes: Collection[str]) -> None:
    if scheme in CLUSTERS - set(schemes):
        raise ConfigurationError(f"{where}: {NO_CLUSTER_BROKER}")
    if scheme not in schemes:
        raise ConfigurationError(f"{where}: expected one of {', '.join(f'{one}://' for one in schemes)}")
    if scheme in SENTINELS:
        sentinels(where, url)
    if scheme in CLUSTERS:
        cluster_nodes(where, url)


def is_tls(url: str) -> bool:
    """Return whether the scheme of a URL means TLS."""
    return url.partition("://")[0] in TLS


def leaves_host(url: str) -> bool:
    """Return whether a server of ``[kms.redis]`` is on another machine."""
    parts = split_url("kms.redis.url", url)
    if parts.scheme in SENTINELS | CLUSTERS:
        found = sentinels("", url) if parts.scheme in SENTINELS else cluster_nodes("", url)
        return not all(is_loopback(host) for host, _ in found.hosts)
    return not is_loopback(parts.hostname or "localhost")  # without a host for the path of a socket


def sentinels(where: str, url: str) -> Sentinels:
    """Parse a ``sentinel://`` URL. Raises ConfigurationError, which names ``where`` and never the URL."""
    parts = split_url(where, url)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    options = dict(pairs)
    if options.keys() - _OPTIONS or len(options) < len(pairs):
        raise ConfigurationError(f"{where}: a Sentinel URL has the options {', '.join(sorted(_OPTIONS))}")
    if not options.get("master"):
        raise ConfigurationError(f"{where}: a Sentinel URL names its master: …/0?master=mymaster")
    database = parts.path.strip("/") or "0"
    if not (database.isascii() and database.isdigit()):
        raise ConfigurationError(f"{where}: the path of a Sentinel URL is the number of a database: /0")
    hosts, username, password = _servers(where, parts.netloc, _SENTINEL_FORM, _SENTINEL_PORT)
    own = options.get("sentinel_username", ""), options.get("sentinel_password", "")
    return Sentinels(hosts, options["master"], int(database), username, password, *own)


def cluster_nodes(where: str, url: str) -> ClusterNodes:
    """Parse a ``redis+cluster://`` URL. Raises ConfigurationError, which names ``where``, never the URL."""
    parts = split_url(where, url)
    if parts.path.strip("/") not in {"", "0"} or parts.query:
        raise ConfigurationError(f"{where}: a Redis Cluster has only database 0, and its URL no options")
    return ClusterNodes(*_servers(where, parts.netloc, _CLUSTER_FORM, _NODE_PORT))


def _servers(where: str, netloc: str, form: str, port: int) -> tuple[tuple[tuple[str, int], ...], str, str]:
    """The hosts, the user and the password of a URL with several hosts; ``port`` is that of hosts without."""
    login, _, hosts = netloc.rpartition("@")
    username, _, password = login.partition(":")
    found = []
    for host in hosts.split(","):
        parts = split_url(where, f"//{host}")
        if not parts.hostname:
            raise ConfigurationError(f"{where}: expected {form}")
        found.append((parts.hostname, _port(where, parts) or port))
    return tuple(found), unquote(username), unquote(password)


def split_url(where: str, url: str) -> SplitResult:
    """Split a URL of ``[kms.redis]``. Raises ConfigurationError, which names ``where`` and never the URL.

    Several hosts are cut out first, since ``urlsplit`` of patched Pythons, such as that of Debian
    12, refuses an IPv6 address after another host.
    """
    scheme, separator, rest = url.partition("://")
    several = scheme.lower() in SENTINELS | CLUSTERS
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
            f"kms.redis.{named[0]} is for TLS, and neither URL uses it: write rediss://, sentinels:// or amqps://"
        )
    check_pair("kms.redis", section, "client_cert_file", "client_key_file")
