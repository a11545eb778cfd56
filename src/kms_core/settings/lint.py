"""Weak settings: one table for ``kms config lint``, ``kms doctor``, the log at start and the metric."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from kms_core import proxies
from kms_core.backends import SCHEMES, table_of
from kms_core.backends.age_settings import AgeSection
from kms_core.sections import WeakValue, is_cleartext
from kms_core.secure_files import open_to_others
from kms_core.settings.model import Settings, StoreSection
from kms_core.settings.redis_urls import is_tls, leaves_host, split_url
from kms_core.settings.toml_reader import nearest
from kms_core.settings.validation import SECRETS, paths
from kms_protocol.addresses import is_loopback
from kms_protocol.errors import ConfigurationError

_WIDEST: Final = {4: 8, 6: 7}  # bits of 10.0.0.0/8 and of fc00::/7, the largest private networks
_MOST_PUBLIC: Final = {4: 2**24, 6: 2**120}  # addresses of a /8
_log = structlog.get_logger(__name__)
Test = Callable[[Settings], bool]


@dataclass(frozen=True, slots=True)
class Weakness:
    """A row of the table: a test, its risk, and what to write instead.

    ``setting`` is the dotted name of the setting, without the names of buckets and similar entries.
    """

    setting: str
    is_weak: Test
    risk: str
    advice: str
    of_file: bool = False  # about the mode of a file, not the setting itself


def weaknesses(settings: Settings) -> Iterator[Weakness]:
    """The rows of the table that apply to these settings. They contain no values."""
    return (each for each in TABLE if each.is_weak(settings))


def unaccepted(settings: Settings) -> frozenset[str]:
    """The weak settings that ``accept_weak`` does not name."""
    return frozenset(each.setting for each in weaknesses(settings)) - frozenset(settings.kms.accept_weak)


def check_accepted(settings: Settings) -> None:
    """Refuse names in ``accept_weak`` that are not in the table. Raises ConfigurationError."""
    for name in settings.kms.accept_weak:
        if name not in SETTINGS:
            raise ConfigurationError(
                f"kms.accept_weak has a name that kms config lint does not report{nearest(name, SETTINGS)}"
            )


def warn(settings: Settings) -> None:
    """Log one line for each weak setting that is not accepted, and one line for all accepted ones."""
    weak, reported = list(weaknesses(settings)), unaccepted(settings)
    for each in weak:
        if each.setting in reported:
            _log.warning("setting.weak", setting=each.setting, risk=each.risk, advice=each.advice)
    if len(weak) > len(reported):
        _log.info(
            "setting.weak_accepted", settings=[each.setting for each in weak if each.setting not in reported]
        )


# -- tests -------------------------------------------------------------------------------------------


def _is_exposed(settings: Settings) -> bool:
    return not is_loopback(settings.kms.bind)


def _outside_dev(test: Test) -> Test:
    return lambda settings: settings.environment != "dev" and test(settings)


def _has_no_tls(settings: Settings) -> bool:
    server = settings.kms.server
    return _is_exposed(settings) and server.tls_cert is None and not server.trusted_proxies


def _has_wide_proxies(settings: Settings) -> bool:
    networks = proxies.collapsed(settings.kms.server.trusted_proxies)
    public = dict.fromkeys(_MOST_PUBLIC, 0)
    for network in networks:
        public[network.version] += 0 if network.is_private else network.num_addresses
    return any(network.prefixlen < _WIDEST[network.version] for network in networks) or any(
        public[version] >= most for version, most in _MOST_PUBLIC.items()
    )


def _is_clear_queue(url: str) -> bool:
    return not is_tls(url) and leaves_host(url)


def _is_open_redis(settings: Settings) -> bool:
    section = settings.kms.redis
    has_password = section.password_file or "@" in split_url("kms.redis.url", section.url).netloc
    return leaves_host(section.url) and not has_password and section.client_cert_file is None


def _has_no_anchor(settings: Settings) -> bool:
    audit = settings.kms.audit
    return not audit.anchor_redis and audit.anchor_dir is None


def _has_plain_keys(settings: Settings) -> bool:
    return "age" in settings.used_backends and not settings.backend(AgeSection).sealed_only


def _readable(setting: str) -> Weakness:
    """The row for a secret file that users other than its owner may read or write."""
    return Weakness(
        setting,
        lambda settings: any(_is_open(path) for _, path in paths(settings, setting)),
        "other users of this machine can read the secret in the file",
        "chmod 600 the file",
        of_file=True,
    )


def _is_open(path: Path) -> bool:
    try:
        return bool(open_to_others(path))
    except OSError:  # not there yet, or not readable: reported where the file is used
        return False


def _of_backend(scheme: str, value: WeakValue) -> Weakness:
    """The row for a weak value of a backend in use."""
    return Weakness(
        f"{table_of(scheme)}.{value.key}",
        lambda settings: scheme in settings.used_backends and value.is_weak(settings.backends[scheme]),
        value.risk,
        value.advice,
    )


# -- the table ---------------------------------------------------------------------------------------

TABLE: Final = (
    Weakness(
        "server.tls_cert",
        _has_no_tls,
        "credentials and plaintexts cross the network in clear",
        "set tls_cert and tls_key, or name the proxy that ends TLS in trusted_proxies",
    ),
    Weakness(
        "auth.mode",
        lambda settings: settings.kms.auth.mode == "none" and (_is_exposed(settings) or settings.is_prod),
        "every client that reaches the port may use every key, unless a proxy authenticates it",
        'write mode = "required"',
    ),
    Weakness(
        "server.allowed_hosts",
        lambda settings: "*" in settings.kms.server.allowed_hosts,
        "neither Host nor Origin is checked, so that web pages can call the service (DNS rebinding)",
        "name the hosts",
    ),
    Weakness(
        "server.metrics",
        lambda settings: settings.kms.server.metrics == "open" and _is_exposed(settings),
        "every client that reaches the ports can read names of keys and tenants, and their usage",
        'write metrics = "token"',
    ),
    Weakness(
        "server.trusted_proxies",
        _has_wide_proxies,
        "callers in these networks choose the address that limits and the audit log use",
        "name the proxies only",
    ),
    Weakness(
        "redis.url",
        lambda settings: _is_clear_queue(settings.kms.redis.url),
        "the network can read the password, and change jobs and counters",
        "use rediss://, sentinels:// or rediss+cluster://",
    ),
    Weakness(
        "redis.broker_url",
        lambda settings: _is_clear_queue(settings.kms.redis.broker_url),
        "the network can read the password, and drop or add messages",
        "use rediss://, sentinels:// or amqps://",
    ),
    Weakness(
        "redis.password",
        _is_open_redis,
        "every client that reaches Redis can read and delete jobs",
        "give it a user and a password, or client certificates",
    ),
    *(_of_backend(scheme, value) for scheme, shape in SCHEMES.items() for value in shape.WEAK_VALUES),
    Weakness(
        "jobs.buckets.endpoint",
        lambda settings: any(is_cleartext(each.endpoint) for each in settings.kms.jobs.buckets.values()),
        "the network can read plaintexts of jobs",
        "use https://",
    ),
    Weakness(
        "jobs.spool_bucket.endpoint",
        lambda settings: is_cleartext((settings.kms.jobs.spool_bucket or StoreSection()).endpoint),
        "the network can read and change sealed uploads and results",
        "use https://",
    ),
    Weakness(
        "traces.endpoint",
        lambda settings: settings.kms.traces.enabled and is_cleartext(settings.kms.traces.endpoint),
        "the network can read which keys are used when, and headers with a credential",
        "use https://",
    ),
    Weakness(
        "jobs.durability",
        lambda settings: settings.kms.jobs.durability == "write",
        "a power cut loses uploads and results of jobs that were acknowledged",
        'write durability = "fsync"',
    ),
    Weakness(
        "jobs.input_grace_s",
        lambda settings: settings.kms.jobs.input_grace_s == 0,
        "a fail-over of Redis turns bulk jobs that succeeded into failed ones: their items are gone",
        "write input_grace_s = 60, or more than a replica may lag",
    ),
    Weakness(
        "allow_age_in_prod",
        _outside_dev(_has_plain_keys),
        "keys are files of this host: a reader of one can decrypt all its data",
        "seal them (docs/backends.md) and write sealed_only = true under [kms.age], or use a key server",
    ),
    Weakness(
        "require_context",
        _outside_dev(lambda settings: not settings.kms.require_context),
        "a ciphertext without context can be copied anywhere and still decrypts",
        "write require_context = true",
    ),
    Weakness(
        "age.accept_foreign",
        _outside_dev(lambda settings: settings.backend(AgeSection).accept_foreign),
        "files that others encrypted to the public key are accepted as ours",
        "write accept_foreign = false",
    ),
    Weakness(
        "audit.durability",
        _outside_dev(lambda settings: settings.kms.audit.durability == "write"),
        "a power cut loses the records of the last seconds",
        'write durability = "fsync"',
    ),
    Weakness(
        "audit.anchor_redis",
        _outside_dev(_has_no_anchor),
        "an older copy of the audit log in its place is not noticed",
        "write anchor_redis = true, or name a directory of another disk in anchor_dir",
    ),
    *map(_readable, SECRETS),
)
SETTINGS: Final = tuple(each.setting for each in TABLE)
