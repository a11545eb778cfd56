"""Settings that are weaker than need be: one table for ``kms config lint``, doctor, start line and metric."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import structlog

from kms_core import proxies
from kms_core.secure_files import open_to_others
from kms_core.settings.backends import VaultSection
from kms_core.settings.model import KmsSection, Settings
from kms_core.settings.redis_urls import SENTINELS, is_tls, sentinels, split_url
from kms_core.settings.toml_reader import nearest
from kms_core.settings.validate_backends import is_loopback
from kms_protocol.errors import ConfigurationError

MOST_MESSAGES: Final = 2**32
"""Of one AES-GCM key with random nonces (NIST SP 800-38D section 8.3)."""
_WIDEST: Final = {4: 8, 6: 7}  # bits of 10.0.0.0/8 and of fc00::/7, the largest private networks
_MOST_PUBLIC: Final = {4: 2**24, 6: 2**120}  # addresses of a /8
_UNIX: Final = frozenset({"unix", "redis+socket"})
_log = structlog.get_logger(__name__)
Test = Callable[[Settings], bool]


@dataclass(frozen=True, slots=True)
class Weakness:
    """A row of the table: ``risk`` says what is at stake, ``advice`` what to write instead.

    ``setting`` is its dotted name, without the names of buckets and the like, so that there are few.
    """

    setting: str
    is_weak: Test
    risk: str
    advice: str
    of_file: bool = False  # the mode of a file, and not the setting itself


def weaknesses(settings: Settings) -> Iterator[Weakness]:
    """The rows of the table that hold for these settings. Values are never quoted."""
    return (each for each in TABLE if each.is_weak(settings))


def unaccepted(settings: Settings) -> frozenset[str]:
    """The weak settings that ``accept_weak`` does not name."""
    return frozenset(each.setting for each in weaknesses(settings)) - frozenset(settings.kms.accept_weak)


def check_accepted(settings: Settings) -> None:
    """Refuse a name in ``accept_weak`` that is not in the table. Raises ConfigurationError."""
    for name in settings.kms.accept_weak:
        if name not in SETTINGS:
            raise ConfigurationError(
                f"kms.accept_weak has a name that kms config lint does not tell{nearest(name, SETTINGS)}"
            )


def warn(settings: Settings) -> None:
    """Write a line to the log for each weak setting, and one line for all that are accepted."""
    weak, told = list(weaknesses(settings)), unaccepted(settings)
    for each in weak:
        if each.setting in told:
            _log.warning("setting.weak", setting=each.setting, risk=each.risk, advice=each.advice)
    if len(weak) > len(told):
        _log.info(
            "setting.weak_accepted", settings=[each.setting for each in weak if each.setting not in told]
        )


# -- tests -------------------------------------------------------------------------------------------


def _is_exposed(settings: Settings) -> bool:
    return not is_loopback(settings.kms.bind)


def _outside_dev(test: Test) -> Test:
    return lambda settings: settings.environment != "dev" and test(settings)


def _is_cleartext(url: str | None) -> bool:
    """Whether a URL is ``http://`` to another machine."""
    try:
        parts = urlsplit(url or "")
    except ValueError:  # of OpenTelemetry's variables, which are not checked: nothing is sent there
        return False
    return parts.scheme == "http" and not is_loopback(parts.hostname or "")


def _of(backend: str, test: Callable[[KmsSection], bool]) -> Test:
    """A test of a backend's section, where that backend is in use."""
    return lambda settings: backend in settings.used_backends and test(settings.kms)


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


def _leaves_host(url: str) -> bool:
    """Whether a server of ``[kms.redis]`` is on another machine."""
    parts = split_url("kms.redis.url", url)
    if parts.scheme in _UNIX:
        return False
    hosts = [host for host, _ in sentinels("", url).hosts] if parts.scheme in SENTINELS else [parts.hostname]
    return not all(is_loopback(host or "localhost") for host in hosts)


def _is_clear_queue(url: str) -> bool:
    return not is_tls(url) and _leaves_host(url)


def _is_open_redis(settings: Settings) -> bool:
    section = settings.kms.redis
    has_password = section.password_file or "@" in split_url("kms.redis.url", section.url).netloc
    return _leaves_host(section.url) and not has_password and section.client_cert_file is None


def _is_open_cosmian(kms: KmsSection) -> bool:
    section = kms.cosmian
    is_near = is_loopback(urlsplit(section.server_url or "").hostname or "")
    return not (is_near or section.api_key or section.api_key_file or section.client_cert_file)


def _has_clear_bucket(settings: Settings) -> bool:
    return any(_is_cleartext(bucket.endpoint) for bucket in settings.kms.jobs.buckets.values())


def _has_no_anchor(settings: Settings) -> bool:
    audit = settings.kms.audit
    return not audit.anchor_redis and audit.anchor_dir is None


def _readable(setting: str, paths: Callable[[KmsSection], Iterator[Path | None]]) -> Weakness:
    """The row of files with a secret that others than their owner may use."""
    return Weakness(
        setting,
        lambda settings: any(_is_open(path) for path in paths(settings.kms) if path is not None),
        "other users of this machine can read the secret in the file",
        "chmod 600 the file",
        of_file=True,
    )


def _is_open(path: Path) -> bool:
    try:
        return bool(open_to_others(path))
    except OSError:  # not there yet, or not for this user: others tell
        return False


def _vault(name: str, backend: str, section: Callable[[KmsSection], VaultSection]) -> tuple[Weakness, ...]:
    return (
        Weakness(
            f"{name}.address",
            _of(backend, lambda kms: _is_cleartext(section(kms).address)),
            "anybody on the way can read the token and file keys",
            "use https://",
        ),
        Weakness(
            f"{name}.tls_verify",
            _of(backend, lambda kms: not section(kms).tls_verify),
            "anybody on the way can read the token and file keys",
            "name a CA in ca_file",
        ),
        _readable(f"{name}.token_file", lambda kms: iter([section(kms).token_file])),
        _readable(f"{name}.client_key", lambda kms: iter([section(kms).client_key])),
    )


# -- the table ---------------------------------------------------------------------------------------

_SERVER: Final = (
    Weakness(
        "server.tls_cert",
        _has_no_tls,
        "credentials and plaintexts cross the network in clear",
        "set tls_cert and tls_key, or name the proxy that ends TLS in trusted_proxies",
    ),
    Weakness(
        "auth.mode",
        lambda settings: settings.kms.auth.mode == "none" and (_is_exposed(settings) or settings.is_prod),
        "whoever reaches the port may use every key, unless a proxy stands before it",
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
        "whoever reaches the ports reads names of keys and tenants, and how much they are used",
        'write metrics = "token"',
    ),
    Weakness(
        "server.trusted_proxies",
        _has_wide_proxies,
        "callers in these networks choose the address that limits and the audit trail see",
        "name the proxies only",
    ),
    _readable("server.tls_key", lambda kms: iter([kms.server.tls_key])),
    _readable("auth.tokens_path", lambda kms: iter([kms.auth.tokens_path])),
)
_PEERS: Final = (
    Weakness(
        "redis.url",
        lambda settings: _is_clear_queue(settings.kms.redis.url),
        "anybody on the way can read the password, and change jobs and counters",
        "use rediss:// or sentinels://",
    ),
    Weakness(
        "redis.broker_url",
        lambda settings: _is_clear_queue(settings.kms.redis.broker_url),
        "anybody on the way can read the password, and drop or add messages",
        "use rediss://, sentinels:// or amqps://",
    ),
    Weakness(
        "redis.password",
        _is_open_redis,
        "whoever reaches Redis can read and delete jobs",
        "give it a user and a password, or client certificates",
    ),
    _readable("redis.password_file", lambda kms: iter([kms.redis.password_file])),
    _readable("redis.client_key_file", lambda kms: iter([kms.redis.client_key_file])),
    Weakness(
        "cosmian.server_url",
        _of("cosmian", lambda kms: _is_cleartext(kms.cosmian.server_url)),
        "anybody on the way can read the API key and file keys",
        "use https://",
    ),
    Weakness(
        "cosmian.tls_verify",
        _of("cosmian", lambda kms: not kms.cosmian.tls_verify),
        "anybody on the way can read the API key",
        "name a CA in ca_file",
    ),
    Weakness(
        "cosmian.api_key",
        _of("cosmian", _is_open_cosmian),
        "whoever reaches the key server can use its keys",
        "have it ask for an API key or a client certificate",
    ),
    _readable("cosmian.api_key_file", lambda kms: iter([kms.cosmian.api_key_file])),
    _readable("cosmian.client_key_file", lambda kms: iter([kms.cosmian.client_key_file])),
    *_vault("transit", "transit", lambda kms: kms.transit),
    *_vault("vault_kv", "vault-kv", lambda kms: kms.vault_kv),
    Weakness(
        "jobs.buckets.endpoint",
        _has_clear_bucket,
        "anybody on the way can read plaintexts of jobs",
        "use https://",
    ),
    _readable(
        "jobs.buckets.secret_key_file",
        lambda kms: (bucket.secret_key_file for bucket in kms.jobs.buckets.values()),
    ),
    _readable(
        "jobs.endpoints.secret_file", lambda kms: (each.secret_file for each in kms.jobs.endpoints.values())
    ),
    Weakness(
        "traces.endpoint",
        lambda settings: settings.kms.traces.enabled and _is_cleartext(settings.kms.traces.endpoint),
        "anybody on the way can read which keys are used when, and headers with a credential",
        "use https://",
    ),
)
_KEYS: Final = (
    Weakness(
        "allow_age_in_prod",
        _outside_dev(lambda settings: "age" in settings.used_backends),
        "keys lie in files of this host, and whoever reads one opens all",
        "use a key server",
    ),
    Weakness(
        "require_context",
        _outside_dev(lambda settings: not settings.kms.require_context),
        "a ciphertext without context opens in any place it is copied to",
        "write require_context = true",
    ),
    Weakness(
        "age.accept_foreign",
        _outside_dev(lambda settings: settings.accept_foreign),
        "files that others made for the public key are taken for ours",
        "write accept_foreign = false",
    ),
    Weakness(
        "rotation.budget_messages",
        lambda settings: settings.kms.rotation.budget_messages > MOST_MESSAGES,
        "nonces of a key that seals more than 2^32 messages may repeat",
        "write at most 4294967296",
    ),
    _readable("age.private_key_path", lambda kms: iter([kms.age.private_key_path])),
    _readable("jobs.spool_identity_path", lambda kms: iter([kms.jobs.spool_identity_path])),
    _readable("jobs.intake_identity_path", lambda kms: iter([kms.jobs.intake_identity_path])),
)
_AUDIT: Final = (
    Weakness(
        "audit.durability",
        _outside_dev(lambda settings: settings.kms.audit.durability == "write"),
        "a power cut loses the records of the last seconds",
        'write durability = "fsync"',
    ),
    Weakness(
        "audit.anchor_redis",
        _outside_dev(_has_no_anchor),
        "an older copy of the audit trail in its place is not noticed",
        "write anchor_redis = true, or name a directory of another disk in anchor_dir",
    ),
    _readable("audit.key_path", lambda kms: iter([kms.audit.key_path])),
    _readable("audit.signing_key_path", lambda kms: iter([kms.audit.signing_key_path])),
)
TABLE: Final = (*_SERVER, *_PEERS, *_KEYS, *_AUDIT)
SETTINGS: Final = tuple(each.setting for each in TABLE)
