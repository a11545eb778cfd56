"""Connections to Redis and to the broker: options of redis-py and Celery from ``[kms.redis]``.

For URLs with TLS, certificate and host name are verified, whatever the default of a library is.
"""

import ssl
from typing import Final
from urllib.parse import quote, unquote, urlsplit

import msgspec
import redis
import redis.sentinel

from kms_core import redis_cluster
from kms_core.settings.model import RedisSection
from kms_core.settings.redis_urls import (
    AMQP,
    CLUSTERS,
    NO_CLUSTER_BROKER,
    PASSWORDS,
    SENTINELS,
    Sentinels,
    cluster_nodes,
    is_tls,
    sentinels,
    split_url,
)
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError
from kms_protocol.tls_client import STRICT

_TIMEOUT_S: Final = 5.0
_CHECK_EVERY_S: Final = 25
_ASK_S: Final = 1.0
_ASKED: Final = frozenset({"redis", "rediss", *CLUSTERS})
_STATE: Final = "kms.redis.url (or KMS_REDIS_URL)"
_BROKER: Final = "kms.redis.broker_url (or KMS_BROKER_URL)"
Options = dict[str, object]


def connect(section: RedisSection, timeout_s: float = _TIMEOUT_S) -> redis.Redis:
    """A Redis client, whose timeout grows with ``wait_ms``. Raises ConfigurationError."""
    url = _with_password(section, section.url)
    options = _options(section, url, timeout_s)
    if url.partition("://")[0] in SENTINELS:
        return _by_sentinels(sentinels(_STATE, url), options)
    if url.partition("://")[0] in CLUSTERS:
        nodes = cluster_nodes(_STATE, url)
        return redis_cluster.client(nodes.hosts, options | _login(nodes.username, nodes.password))
    try:
        return redis.Redis.from_url(url, **options)
    except ValueError as exc:  # its text may quote the URL
        raise ConfigurationError(
            f"{_STATE} is not a Redis URL: expected redis://host:6379/0, rediss:// or unix:///path?db=0"
        ) from exc


def check_servers(section: RedisSection) -> None:
    """Raise ConfigurationError where a server is a Redis Cluster and must not be one, or the reverse.

    A server that does not answer within a second is left to later.
    """
    for where, url, as_broker in ((_STATE, section.url, False), (_BROKER, section.broker_url, True)):
        scheme = url.partition("://")[0]
        if scheme not in _ASKED:
            continue
        is_cluster = _is_cluster(msgspec.structs.replace(section, url=_first_node(url)))
        if is_cluster and as_broker:
            raise ConfigurationError(f"{where}: {NO_CLUSTER_BROKER}")
        if is_cluster is (scheme not in CLUSTERS):
            kind, form = ("a", "redis+cluster://host:6379") if is_cluster else ("no", "redis://host:6379/0")
            raise ConfigurationError(f"{where}: {kind} node of a Redis Cluster answers: write {form}")


def _is_cluster(section: RedisSection) -> bool | None:
    """Return whether a server is a node of a cluster; None if it does not tell."""
    try:
        with connect(section, timeout_s=_ASK_S) as client:
            return bool(client.info("cluster").get("cluster_enabled"))
    except redis.RedisError:
        return None


def _first_node(url: str) -> str:
    """The URL of the first node of a cluster as if it were a server of its own."""
    scheme, _, rest = url.partition("+cluster://")
    login, at, hosts = rest.split("/")[0].rpartition("@")
    return f"{scheme}://{login}{at}{hosts.partition(',')[0]}/0" if rest else url


def connect_to(section: RedisSection, host: str, port: int) -> redis.Redis:
    """A client of another server of the same group, a replica. Raises ConfigurationError."""
    url = _with_password(section, section.url)
    if url.partition("://")[0] in SENTINELS:
        found = sentinels(_STATE, url)
        user, password = found.username or None, found.password or None
    else:
        parts = split_url("kms.redis.url", url)
        user, password = unquote(parts.username or "") or None, unquote(parts.password or "") or None
    options = _options(section, url)
    is_secure = "ssl_cert_reqs" in options
    return redis.Redis(host, port, username=user, password=password, ssl=is_secure, **options)  # type: ignore[arg-type]  # options by name


def _options(section: RedisSection, url: str, timeout_s: float = _TIMEOUT_S) -> Options:
    waits_s = section.wait_ms / 1000 if section.wait_replicas else 0.0
    options: Options = {"socket_timeout": timeout_s + waits_s, "health_check_interval": _CHECK_EVERY_S}
    return options | _tls(section, url)


def celery_options(section: RedisSection, transport: Options) -> Options:
    """Celery's settings of the broker; ``transport`` are the transport options of every broker.

    Raises ConfigurationError.
    """
    url = _with_password(section, section.broker_url)
    scheme = url.partition("://")[0]
    if scheme in SENTINELS:
        found = sentinels(_BROKER, url)
        tls = _tls(section, url)
        own = _login(found.own_username, found.own_password) | ({"ssl": True} | tls if tls else {})
        named = {"master_name": found.master, "sentinel_kwargs": own | {"socket_timeout": _TIMEOUT_S}}
        return _celery(_for_kombu(found), tls, transport | named)
    if scheme in AMQP:
        names = ("task_default_queue_type", "task_create_missing_queue_type")
        tls = _amqp_tls(section) if is_tls(url) else {}
        return _celery(url, tls, transport) | dict.fromkeys(names, section.broker_queue_type)
    return _celery(url, _tls(section, url), transport)


def _with_password(section: RedisSection, url: str) -> str:
    """``url`` with the password of ``password_file``, if its scheme allows one. Raises ConfigurationError."""
    file, parts = section.password_file, split_url("kms.redis.url", url)
    if file is None or parts.scheme not in PASSWORDS:
        return url
    try:
        password = small_files.text(file).strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"kms.redis.password_file: cannot read {file}; check path and mode") from exc
    if not password:
        raise ConfigurationError(f"kms.redis.password_file: {file} is empty")
    user, _, hosts = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user.rstrip(':')}:{quote(password, '')}@{hosts}").geturl()


def _celery(url: str, tls: Options, transport: Options) -> Options:
    found: Options = {"broker_url": url, "broker_transport_options": transport}
    return found | ({"broker_use_ssl": tls} if tls else {})


def _by_sentinels(found: Sentinels, options: Options) -> redis.Redis:
    own = _login(found.own_username, found.own_password) | options
    known = _login(found.username, found.password)
    if "ssl_cert_reqs" in options:
        own["ssl"] = options["ssl"] = True
    watchers = redis.sentinel.Sentinel(  # type: ignore[no-untyped-call]  # untyped there
        found.hosts, sentinel_kwargs=own, **options, **known, db=found.database
    )
    client: redis.Redis = watchers.master_for(found.master)  # type: ignore[no-untyped-call]  # as above
    return client


def _login(username: str, password: str) -> Options:
    named: Options = {"username": username, "password": password}
    return {name: value for name, value in named.items() if value}


def _for_kombu(found: Sentinels) -> str:
    """A Sentinel URL in kombu's form: one URL for each Sentinel, the first with the servers' credentials."""
    login = f"{quote(found.username, '')}:{quote(found.password, '')}@" if found.password else ""
    hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in found.hosts]
    return ";".join(
        f"sentinel://{'' if index else login}{host}/{found.database}" for index, host in enumerate(hosts)
    )


def _tls(section: RedisSection, url: str) -> Options:
    """TLS options of redis-py; empty without TLS."""
    if not is_tls(url):
        return {}
    flags: Options = {
        "ssl_include_verify_flags": [ssl.VERIFY_X509_PARTIAL_CHAIN],
        "ssl_exclude_verify_flags": [STRICT],
    }
    files = _tls_files(section, "ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
    return {"ssl_cert_reqs": "required", "ssl_check_hostname": True, **flags, **files}


def _amqp_tls(section: RedisSection) -> Options:
    """TLS options of py-amqp. Without ``ca_file``, the system's authorities are trusted."""
    files = _tls_files(section, "ca_certs", "certfile", "keyfile")
    host = urlsplit(section.broker_url).hostname
    return {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": host, **files}


def _tls_files(section: RedisSection, *names: str) -> Options:
    """The paths of authorities, certificate and key that are set, as options of these names."""
    paths = (section.ca_file, section.client_cert_file, section.client_key_file)
    return {name: str(path) for name, path in zip(names, paths, strict=True) if path is not None}
