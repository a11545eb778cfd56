"""Connections to Redis, Redis Cluster and the broker: options of redis-py and Celery from ``[kms.redis]``.

For URLs with TLS, certificate and host name are verified, whatever the default of a library is.
"""

import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

import msgspec
import redis
import redis.sentinel
from redis.backoff import ConstantBackoff, NoBackoff
from redis.connection import SSLConnection
from redis.crc import key_slot
from redis.exceptions import MovedError
from redis.retry import Retry

from kms_core.secure_files import secret_text
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
from kms_protocol.errors import ConfigurationError
from kms_protocol.tls_client import STRICT

# A client of a Redis Cluster that keeps every key in one slot, and follows the node that holds it.
#
# A script of the jobs uses many keys, which a cluster allows within a slot only. So each key that begins
# with ``kms:`` is sent as ``{kms}:``: the hash tag decides its slot (Redis Cluster specification, "Hash
# tags"). A connection pool to one node then does: pipelines, transactions, scripts and WAIT work as on a
# server of its own. The other nodes stand by for a fail-over.

PREFIX: Final = "kms:"
TAGGED: Final = "{kms}:"
_SLOT: Final = key_slot(TAGGED.encode())
_NODE_S: Final = 2.0
_TOLD_S: Final = 1.0  # until all nodes know, at the latest
_PAUSE_S: Final = 0.1
_TRIES: Final = 5
_ONCE: Final = Retry(NoBackoff(), 0)
_KEYS_ONLY: Final = frozenset({"DEL", "EXISTS", "MGET", "SUNION", "TOUCH", "UNLINK", "WATCH"})
_SCRIPTS: Final = frozenset({"EVAL", "EVALSHA"})
Host = tuple[str, int]
Command = tuple[Any, ...]
_TIMEOUT_S: Final = 5.0
_CHECK_EVERY_S: Final = 25
_ASK_S: Final = 1.0
_ASKED: Final = frozenset({"redis", "rediss", *CLUSTERS})
_STATE: Final = "kms.redis.url (or KMS_REDIS_URL)"
_BROKER: Final = "kms.redis.broker_url (or KMS_BROKER_URL)"
Options = dict[str, object]


def tagged(command: Command) -> Command:
    """A command with the hash tag in its keys. Its values stay as they are."""
    name, first, last = str(command[0]).upper(), 1, 2
    if name in _KEYS_ONLY:
        last = len(command)
    elif name in _SCRIPTS:
        first, last = 3, 3 + int(command[2])
    keys = [
        TAGGED + part.removeprefix(PREFIX) if isinstance(part, str) and part.startswith(PREFIX) else part
        for part in command[first:last]
    ]
    return (*command[:first], *keys, *command[last:])


class SlotMoved(redis.ConnectionError):
    """Another node holds the slot now, and has to be asked: this one did nothing."""


class SlotConnection(redis.sentinel.SentinelManagedConnection):
    """A connection to the node that holds the slot; it is closed when the slot has moved."""

    def send_command(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 -- of redis-py
        super().send_command(*tagged(args), **kwargs)  # type: ignore[no-untyped-call]  # untyped there

    def pack_commands(self, commands: Sequence[Command]) -> list[bytes]:
        return super().pack_commands([tagged(one) for one in commands])  # type: ignore[no-untyped-call, no-any-return]  # as above

    def read_response(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- of redis-py
        """Read an answer. Any error closes the connection, which is not so where Sentinels manage it."""
        plain = super(redis.sentinel.SentinelManagedConnection, self)
        try:
            return plain.read_response(*args, **kwargs)  # type: ignore[attr-defined]  # of the class behind it
        except MovedError as exc:
            self.disconnect()  # type: ignore[no-untyped-call]  # as above
            self.host, self.port = exc.host or self.host, exc.port  # where the same command is tried again
            self.connection_pool.sentinel_manager.moved(self.host, self.port)
            raise SlotMoved("Another node of the cluster holds the keys now") from exc


class SlotConnectionTls(SlotConnection, SSLConnection):
    """A connection over TLS."""


class SlotHolder:
    """Finds the node that holds the slot, where Sentinels would find a master."""

    def __init__(self, hosts: Sequence[Host], options: Mapping[str, Any]) -> None:
        own = {**options, "socket_timeout": _NODE_S, "socket_connect_timeout": _NODE_S, "retry": _ONCE}
        self._told: tuple[Host, float] | None = None
        self._nodes = [(host, redis.Redis(host, port, **own)) for host, port in hosts]

    def moved(self, host: str, port: int) -> None:
        """Note what a node said that gave the slot away: it knows the new holder before others do."""
        self._told = (host, port), time.monotonic() + _TOLD_S

    def discover_master(self, _: str) -> Host:
        """The address of the node. Raises redis.ConnectionError if no node of the URL tells one."""
        if self._told and time.monotonic() < self._told[1]:
            return self._told[0]
        trouble: redis.RedisError | None = None
        for host, node in self._nodes:
            try:
                slots = node.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]  # untyped there
            except redis.RedisError as exc:
                trouble = exc
                continue
            for begin, end, master, *_replicas in slots:
                if begin <= _SLOT <= end:
                    named = (master[0] or b"").decode()  # empty: as the client knows it
                    return (host if named in {"", "?"} else named), int(master[1])
        raise redis.ConnectionError(f"No node tells which one holds slot {_SLOT}") from trouble


def cluster_client(hosts: Sequence[Host], options: Mapping[str, Any]) -> redis.Redis:
    """A client with these options of redis-py. Connects at the first command."""
    tls = "ssl_cert_reqs" in options
    pool = redis.sentinel.SentinelConnectionPool(  # type: ignore[no-untyped-call]  # untyped there
        "kms",
        SlotHolder(hosts, {**options, "ssl": True} if tls else options),
        connection_class=SlotConnectionTls if tls else SlotConnection,
        retry=Retry(ConstantBackoff(_PAUSE_S), _TRIES, (SlotMoved,)),
        **options,
    )
    return redis.Redis(connection_pool=pool)


def connect(section: RedisSection, timeout_s: float = _TIMEOUT_S) -> redis.Redis:
    """A Redis client, whose timeout grows with ``wait_ms``. Raises ConfigurationError."""
    url = _with_password(_STATE, section, section.url)
    options = _options(section, url, timeout_s)
    if url.partition("://")[0] in SENTINELS:
        return _by_sentinels(sentinels(_STATE, url), options)
    if url.partition("://")[0] in CLUSTERS:
        nodes = cluster_nodes(_STATE, url)
        return cluster_client(nodes.hosts, options | _login(nodes.username, nodes.password))
    try:
        return redis.Redis.from_url(url, **options)
    except ValueError as exc:  # its text may quote the URL
        raise ConfigurationError(
            f"{_STATE} is not a Redis URL: expected redis://host:6379/0, rediss:// or unix:///path?db=0"
        ) from exc


def connect_once(section: RedisSection, timeout_s: float = _TIMEOUT_S) -> redis.Redis:
    """A client as that of ``connect``, which sends each command once."""
    client = connect(section, timeout_s)
    client.set_retry(_ONCE)
    return client


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
    url = _with_password(_STATE, section, section.url)
    if url.partition("://")[0] in SENTINELS:
        found = sentinels(_STATE, url)
        login = _login(found.username, found.password)
    else:
        parts = split_url(_STATE, url)
        login = _login(unquote(parts.username or ""), unquote(parts.password or ""))
    options = _options(section, url) | login
    return redis.Redis(host, port, ssl="ssl_cert_reqs" in options, **options)  # type: ignore[arg-type]  # options by name


def _options(section: RedisSection, url: str, timeout_s: float = _TIMEOUT_S) -> Options:
    waits_s = section.wait_ms / 1000 if section.wait_replicas else 0.0
    options: Options = {"socket_timeout": timeout_s + waits_s, "health_check_interval": _CHECK_EVERY_S}
    return options | _tls(section, url)


def celery_options(section: RedisSection, transport: Options) -> Options:
    """Celery's settings of the broker; ``transport`` are the transport options of every broker.

    Raises ConfigurationError.
    """
    url = _with_password(_BROKER, section, section.broker_url)
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


def _with_password(where: str, section: RedisSection, url: str) -> str:
    """``url`` with the password of ``password_file``, if its scheme allows one.

    Raises ConfigurationError, which names ``where``, the setting of the URL.
    """
    file, parts = section.password_file, split_url(where, url)
    if file is None or parts.scheme not in PASSWORDS:
        return url
    password = secret_text(file, "kms.redis.password_file")
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
