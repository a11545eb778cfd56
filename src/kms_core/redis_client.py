"""Lines to Redis and to the broker from ``[kms.redis]``: what redis-py and Celery are told. Knows no job.

Where the URL asks for TLS, certificate and host name are checked, whatever a library's default is.
"""

import ssl
from typing import Final
from urllib.parse import quote, urlsplit

import redis
import redis.sentinel

from kms_core.settings.model import RedisSection
from kms_core.settings.redis_urls import AMQP, PASSWORDS, SENTINELS, Sentinels, is_tls, sentinels, split_url
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError
from kms_protocol.tls_client import STRICT

_TIMEOUT_S: Final = 5.0
_CHECK_EVERY_S: Final = 25
_STATE: Final = "kms.redis.url (or KMS_REDIS_URL)"
_BROKER: Final = "kms.redis.broker_url (or KMS_BROKER_URL)"
Options = dict[str, object]


def connect(section: RedisSection) -> redis.Redis:
    """A client that gives up in seconds, so that a lost Redis is noticed. Raises ConfigurationError."""
    url = _with_password(section, section.url)
    options: Options = {"socket_timeout": _TIMEOUT_S, "health_check_interval": _CHECK_EVERY_S}
    options |= _tls(section, url)
    if url.partition("://")[0] in SENTINELS:
        return _by_sentinels(sentinels(_STATE, url), options)
    try:
        return redis.Redis.from_url(url, **options)
    except ValueError as exc:  # its text may quote the URL
        raise ConfigurationError(
            f"{_STATE} is not a Redis URL: expected redis://host:6379/0, rediss:// or unix:///path?db=0"
        ) from exc


def celery_options(section: RedisSection, transport: Options) -> Options:
    """Celery's settings of the broker; ``transport`` are the transport options that hold for any.

    Raises ConfigurationError.
    """
    url = _with_password(section, section.broker_url)
    scheme = url.partition("://")[0]
    if scheme in SENTINELS:
        found = sentinels(_BROKER, url)
        tls = _tls(section, url)
        own = _own(found) | ({"ssl": True} | tls if tls else {})
        told = {"master_name": found.master, "sentinel_kwargs": own | {"socket_timeout": _TIMEOUT_S}}
        return _celery(_for_kombu(found), tls, transport | told)
    if scheme in AMQP:
        names = ("task_default_queue_type", "task_create_missing_queue_type")
        tls = _amqp_tls(section) if is_tls(url) else {}
        return _celery(url, tls, transport) | dict.fromkeys(names, section.broker_queue_type)
    return _celery(url, _tls(section, url), transport)


def _with_password(section: RedisSection, url: str) -> str:
    """``url`` with the password of ``password_file``, where its scheme has one. Raises ConfigurationError."""
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
    own = _own(found) | options
    login = {"username": found.username, "password": found.password}
    known = {name: value for name, value in login.items() if value}
    if "ssl_cert_reqs" in options:
        own["ssl"] = options["ssl"] = True
    watchers = redis.sentinel.Sentinel(  # type: ignore[no-untyped-call]  # untyped there
        found.hosts, sentinel_kwargs=own, **options, **known, db=found.database
    )
    client: redis.Redis = watchers.master_for(found.master)  # type: ignore[no-untyped-call]  # as above
    return client


def _own(found: Sentinels) -> Options:
    """How to enter the Sentinels themselves."""
    named: Options = {"username": found.own_username, "password": found.own_password}
    return {name: value for name, value in named.items() if value}


def _for_kombu(found: Sentinels) -> str:
    """In kombu's form: a URL for each Sentinel, with user and password of the servers in the first."""
    login = f"{quote(found.username, '')}:{quote(found.password, '')}@" if found.password else ""
    hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in found.hosts]
    return ";".join(
        f"sentinel://{'' if index else login}{host}/{found.database}" for index, host in enumerate(hosts)
    )


def _tls(section: RedisSection, url: str) -> Options:
    """As redis-py calls it; empty without TLS."""
    if not is_tls(url):
        return {}
    files = {
        "ssl_ca_certs": section.ca_file,
        "ssl_certfile": section.client_cert_file,
        "ssl_keyfile": section.client_key_file,
    }
    named = {name: str(path) for name, path in files.items() if path is not None}
    flags: Options = {
        "ssl_include_verify_flags": [ssl.VERIFY_X509_PARTIAL_CHAIN],
        "ssl_exclude_verify_flags": [STRICT],
    }
    return {"ssl_cert_reqs": "required", "ssl_check_hostname": True, **flags, **named}


def _amqp_tls(section: RedisSection) -> Options:
    """As py-amqp calls it. Without an authority of its own, the system's are trusted."""
    files = {
        "ca_certs": section.ca_file,
        "certfile": section.client_cert_file,
        "keyfile": section.client_key_file,
    }
    named = {name: str(path) for name, path in files.items() if path is not None}
    host = urlsplit(section.broker_url).hostname
    return {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": host, **named}
