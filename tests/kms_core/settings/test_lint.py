"""What is told to be weaker than need be, and that all who tell it know the same names."""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import pytest

from kms_core.backends import SCHEMES, table_of
from kms_core.settings.lint import SETTINGS, unaccepted, weaknesses
from kms_core.settings.model import KmsSection
from support.settings_files import HOME, read, refusal

PROD = """
[kms]
environment = "prod"
prod_backend = "age"
allow_age_in_prod = true
require_context = true
[kms.auth]
mode = "required"
[kms.audit]
durability = "fsync"
"""
OFF_LOOPBACK = 'bind = "0.0.0.0"\n'
ASKS = '[kms.auth]\nmode = "required"\n'
VAULT = 'dev_backend = "transit"\n[kms.transit]\nkey_name = "k"\ntoken = "t"\n'
KV = 'dev_backend = "vault-kv"\n[kms.vault_kv]\npath = "k"\ntoken = "t"\n'
COSMIAN = 'dev_backend = "cosmian"\n[kms.cosmian]\napi_key = "k"\n'
BUCKET = "[kms.jobs.buckets.mine]\nallow_http = true\n"
SPOOL = '[kms.jobs.spool_bucket]\nurl = "s3://mine/spool"\nallow_http = true\n'


def told(tmp_path: Path, text: str) -> set[str]:
    return {weakness.setting for weakness in weaknesses(read(tmp_path, text))}


def test_names_are_unique() -> None:
    """The metric has one value for each."""
    assert len(set(SETTINGS)) == len(SETTINGS)


def test_the_defaults_of_dev_are_no_weakness(tmp_path: Path) -> None:
    assert told(tmp_path, "[kms]") == set()


def test_what_is_weak_in_prod_is_weak_in_every_environment_but_dev(tmp_path: Path) -> None:
    live = (
        PROD.replace('environment = "prod"', 'environment = "live"')
        + '[kms.environments.live]\nbackend = "age"\n'
    )

    assert told(tmp_path, live.replace('durability = "fsync"', "")) >= {
        "allow_age_in_prod",
        "audit.durability",
    }


def test_age_in_prod_is_told_although_it_is_allowed(tmp_path: Path) -> None:
    assert told(tmp_path, PROD) == {"allow_age_in_prod"}


@pytest.mark.parametrize(
    ("line", "other", "setting"),
    [
        ("require_context = true", "require_context = false", "require_context"),
        ('durability = "fsync"', 'durability = "write"', "audit.durability"),
        ('durability = "fsync"', 'durability = "fsync"\nanchor_redis = false', "audit.anchor_redis"),
        ('mode = "required"', 'mode = "none"', "auth.mode"),
        ("[kms.auth]", "[kms.age]\naccept_foreign = true\n[kms.auth]", "age.accept_foreign"),
    ],
)
def test_each_weakness_of_prod_is_told(tmp_path: Path, line: str, other: str, setting: str) -> None:
    assert told(tmp_path, PROD.replace(line, other)) == {"allow_age_in_prod", setting}


def test_a_directory_of_anchors_is_enough(tmp_path: Path) -> None:
    anchored = f'durability = "fsync"\nanchor_redis = false\nanchor_dir = "{tmp_path}/anchors"'

    assert told(tmp_path, PROD.replace('durability = "fsync"', anchored)) == {"allow_age_in_prod"}


WIDE = {  # too many addresses for trusted proxies
    "a /7": ["8.0.0.0/7"],
    "a public /8": ["8.0.0.0/8"],
    "a /7 in two": ["0.0.0.0/8", "1.0.0.0/8"],
    "half of all, in networks that do not join": [f"{each}.0.0.0/8" for each in range(1, 256, 2)],
    "a /8 in 128": [f"{each}.0.0.0/15" for each in range(11, 140)],
    "of IPv6": ["2000::/3"],
    "of IPv6, in two": ["2000::/9", "2100::/9"],
}
WEAK_ANYWHERE = {
    "no TLS": (OFF_LOOPBACK + ASKS, {"server.tls_cert"}),
    "no authentication": (OFF_LOOPBACK + '[kms.auth]\nmode = "none"', {"server.tls_cert", "auth.mode"}),
    "any host": ('[kms.server]\nallowed_hosts = ["*"]', {"server.allowed_hosts"}),
    "open metrics": (
        OFF_LOOPBACK + ASKS + '[kms.server]\nmetrics = "open"',
        {"server.tls_cert", "server.metrics"},
    ),
    **{
        name: (f"[kms.server]\ntrusted_proxies = {networks}", {"server.trusted_proxies"})
        for name, networks in WIDE.items()
    },
    "Redis": ('[kms.redis]\nurl = "redis://u:p@redis/0"', {"redis.url", "redis.broker_url"}),
    "Redis without password": ('[kms.redis]\nurl = "rediss://redis/0"', {"redis.password"}),
    "Sentinels": (
        '[kms.redis]\nurl = "sentinel://u:p@127.0.0.1,10.0.0.1/0?master=m"',
        {"redis.url", "redis.broker_url"},
    ),
    "a cluster": (
        '[kms.redis]\nurl = "redis+cluster://u:p@127.0.0.1,10.0.0.1"\nbroker_url = "redis://127.0.0.1/0"',
        {"redis.url"},
    ),
    "RabbitMQ": ('[kms.redis]\nbroker_url = "amqp://u:p@rabbit"', {"redis.broker_url"}),
    "a name that only begins like loopback": (
        '[kms.redis]\nbroker_url = "amqp://u:p@127.0.0.1.x.test"',
        {"redis.broker_url"},
    ),
    "Cosmian": (COSMIAN + 'server_url = "http://k"', {"cosmian.server_url"}),
    "Cosmian unverified": (COSMIAN + 'server_url = "https://k"\ntls_verify = false', {"cosmian.tls_verify"}),
    "Cosmian without a key": (
        COSMIAN.replace('api_key = "k"', "") + 'server_url = "https://k"',
        {"cosmian.api_key"},
    ),
    "OpenBao": (VAULT + 'address = "http://10.0.0.1:8200"', {"transit.address"}),
    "OpenBao unverified": (VAULT + 'address = "https://k"\ntls_verify = false', {"transit.tls_verify"}),
    "KV": (KV + 'address = "http://k"', {"vault_kv.address"}),
    "KV unverified": (KV + 'address = "https://k"\ntls_verify = false', {"vault_kv.tls_verify"}),
    "bucket": (BUCKET + 'endpoint = "http://minio:9000"', {"jobs.buckets.endpoint"}),
    "bucket of the spool": (SPOOL + 'endpoint = "http://minio:9000"', {"jobs.spool_bucket.endpoint"}),
    "a spool that is not synced": ('[kms.jobs]\ndurability = "write"', {"jobs.durability"}),
    "inputs that go at once": ("[kms.jobs]\ninput_grace_s = 0", {"jobs.input_grace_s"}),
    "traces": ('[kms.traces]\nenabled = true\nendpoint = "http://otel:4318/v1/traces"', {"traces.endpoint"}),
}


@pytest.mark.parametrize(("text", "settings"), WEAK_ANYWHERE.values(), ids=WEAK_ANYWHERE)
def test_each_weakness_is_told_in_dev_too(tmp_path: Path, text: str, settings: set[str]) -> None:
    assert told(tmp_path, f"[kms]\n{text}") == settings


OTEL = "OTEL_EXPORTER_OTLP_ENDPOINT"
OTEL_TRACES = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


@pytest.mark.parametrize(
    ("environ", "is_weak"),
    [
        ({OTEL: "http://otel:4318"}, True),
        ({OTEL_TRACES: "HTTP://otel:4318/v1/traces"}, True),
        ({OTEL: "https://otel", OTEL_TRACES: "http://otel/v1/traces"}, True),
        ({OTEL: "http://otel", OTEL_TRACES: "https://otel/v1/traces"}, False),
        ({OTEL: "http://otel", OTEL_TRACES: ""}, True),
        ({OTEL: "http://127.0.0.1:4318/"}, False),
        ({OTEL: "http://[otel"}, False),
        ({}, False),
    ],
)
def test_traces_in_clear_by_a_variable_are_told(
    tmp_path: Path, environ: dict[str, str], *, is_weak: bool
) -> None:
    found = read(tmp_path, "[kms.traces]\nenabled = true", HOME | environ)

    assert {each.setting for each in weaknesses(found)} == ({"traces.endpoint"} if is_weak else set())


def test_the_endpoint_of_a_variable_is_as_opentelemetry_takes_it(tmp_path: Path) -> None:
    base = read(tmp_path, "[kms]", HOME | {OTEL: "http://otel:4318/base/"})
    whole = read(tmp_path, "[kms]", HOME | {OTEL: "http://otel", OTEL_TRACES: "http://otel/t"})
    text, environ = '[kms.traces]\nendpoint = "http://mine/t"', HOME | {OTEL_TRACES: "http://otel/t"}
    of_file = read(tmp_path, text, environ)

    assert base.kms.traces.endpoint == "http://otel:4318/base/v1/traces"
    assert whole.kms.traces.endpoint == "http://otel/t"
    assert of_file.kms.traces.endpoint == "http://mine/t"


STRONG = {
    "private networks": """[kms.server]
trusted_proxies = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "fc00::/7"]""",
    "networks of a provider": """[kms.server]
trusted_proxies = ["104.16.0.0/13", "172.64.0.0/13", "2400:cb00::/32"]""",
    "TLS": OFF_LOOPBACK + ASKS + '[kms.server]\ntls_cert = "c"\ntls_key = "k"',
    "a proxy ends TLS": OFF_LOOPBACK + ASKS + '[kms.server]\ntrusted_proxies = ["10.0.0.0/8", "fd00::/8"]',
    "loopback": 'bind = "::1"\n[kms.server]\nmetrics = "open"\nallowed_hosts = ["kms"]',
    "Redis by TLS": '[kms.redis]\nurl = "rediss://u:p@redis/0"',
    "Redis by certificate": (
        '[kms.redis]\nurl = "rediss://redis/0"\nclient_cert_file = "c"\nclient_key_file = "k"'
    ),
    "Redis by socket": '[kms.redis]\nurl = "unix:///run/redis.sock?db=0"',
    "Redis near by": '[kms.redis]\nurl = "redis://127.0.0.2/0"\nbroker_url = "amqp://localhost"',
    "a cluster near by": (
        '[kms.redis]\nurl = "redis+cluster://127.0.0.1,[::1]:6379"\nbroker_url = "redis://127.0.0.1/0"'
    ),
    "Sentinels near by": '[kms.redis]\nurl = "sentinel://127.0.0.1,[::1]:26379/0?master=m"',
    "Cosmian near by": COSMIAN.replace('api_key = "k"', "") + 'server_url = "http://localhost:9998"',
    "OpenBao near by": VAULT + 'address = "http://127.0.0.1:8200"',
    "not in use": VAULT.replace("dev_", "prod_") + 'address = "http://k"\ntls_verify = false',
    "traces off": '[kms.traces]\nendpoint = "http://otel:4318/v1/traces"',
    "bucket near by": BUCKET + 'endpoint = "http://127.0.0.1:9000"',
}


@pytest.mark.parametrize("text", STRONG.values(), ids=STRONG)
def test_what_is_strong_is_not_told(tmp_path: Path, text: str) -> None:
    assert told(tmp_path, f"[kms]\n{text}") == set()


FILES = {
    "server.tls_key": '[kms.server]\ntls_cert = "{}"\ntls_key = "{}"',
    "auth.tokens_path": '[kms.auth]\ntokens_path = "{}"',
    "auth.issuers.review_token_file": (
        ASKS + '[kms.auth.issuers.i]\nissuer = "i"\naudience = "a"\nreview_url = "https://k"\n'
        'review_token_file = "{}"'
    ),
    "redis.password_file": '[kms.redis]\npassword_file = "{}"',
    "redis.client_key_file": (
        '[kms.redis]\nurl = "rediss://localhost"\nclient_cert_file = "{}"\nclient_key_file = "{}"'
    ),
    "age.seal_identity_path": '[kms.age]\nseal_identity_path = "{}"',
    "cosmian.api_key_file": '[kms.cosmian]\napi_key_file = "{}"',
    "cosmian.client_key_file": '[kms.cosmian]\nclient_key_file = "{}"',
    "transit.token_file": '[kms.transit]\ntoken_file = "{}"',
    "transit.client_key": '[kms.transit]\nclient_key = "{}"',
    "vault_kv.token_file": '[kms.vault_kv]\ntoken_file = "{}"',
    "vault_kv.client_key": '[kms.vault_kv]\nclient_key = "{}"',
    "jobs.buckets.secret_key_file": '[kms.jobs.buckets.mine]\naccess_key_id = "i"\nsecret_key_file = "{}"',
    "jobs.spool_bucket.secret_key_file": SPOOL + 'access_key_id = "i"\nsecret_key_file = "{}"',
    "jobs.endpoints.secret_file": '[kms.jobs.endpoints.e]\nurl = "https://e"\nsecret_file = "{}"',
    "jobs.endpoints.previous_secret_file": (
        '[kms.jobs.endpoints.e]\nurl = "https://e"\nsecret_file = "/s"\nprevious_secret_file = "{}"'
    ),
    "age.private_key_path": '[kms.age]\nprivate_key_path = "{}"',
    "jobs.spool_identity_path": '[kms.jobs]\nspool_identity_path = "{}"',
    "jobs.intake_identity_path": '[kms.jobs]\nintake_identity_path = "{}"',
    "audit.key_path": '[kms.audit]\nkey_path = "{}"',
    "audit.signing_key_path": '[kms.audit]\nsigning_key_path = "{}"',
}


@pytest.mark.parametrize(("setting", "text"), FILES.items(), ids=FILES)
def test_a_secret_that_others_can_read_is_told(tmp_path: Path, setting: str, text: str) -> None:
    secret = tmp_path / "secret"
    secret.touch(0o600)
    written = text.replace("{}", str(secret))

    assert told(tmp_path, written) == set()

    secret.chmod(0o644)
    assert told(tmp_path, written) == {setting}


@pytest.mark.parametrize(("setting", "text"), FILES.items(), ids=FILES)
def test_jobs_do_not_reach_a_secret(tmp_path: Path, setting: str, text: str) -> None:
    root = tmp_path / "in"
    section, _, name = setting.rpartition(".")
    refused = refusal(tmp_path, text.replace("{}", str(root / "secret")), HOME, **{"jobs.roots": [root]})

    assert re.search(rf"kms\.jobs\.roots\[0\] overlaps kms\.{section}.*\.{name}:", refused)


def test_every_row_has_a_case() -> None:
    cases = {name for _, names in WEAK_ANYWHERE.values() for name in names} | FILES.keys()
    in_prod = {"allow_age_in_prod", "require_context", "age.accept_foreign"}
    audit = {"audit.durability", "audit.anchor_redis"}

    assert cases | in_prod | audit == set(SETTINGS)


# -- accepted ----------------------------------------------------------------------------------------


def test_an_accepted_weakness_is_not_counted(tmp_path: Path) -> None:
    found = read(tmp_path, PROD.replace("[kms]", '[kms]\naccept_weak = ["allow_age_in_prod"]'))

    assert unaccepted(found) == set()
    assert [weakness.setting for weakness in weaknesses(found)] == ["allow_age_in_prod"]


def test_only_what_is_told_can_be_accepted(tmp_path: Path) -> None:
    refused = refusal(tmp_path, '[kms]\naccept_weak = ["server.tls_crt"]')

    assert re.search(r'accept_weak has a name .*"server\.tls_cert"', refused)


# -- all settings ------------------------------------------------------------------------------------

NO_VALUE_WEAKENS = {  # why no value of these settings is told
    "names and bounds": """
        accept_weak redis.wait_ms redis.wait_replicas
        age.public_key_path age.sealed_only age.data_keys cosmian.default_key_id cosmian.protocol
        cosmian.ca_file cosmian.client_cert_file cosmian.timeout_s transit.mount transit.key_name
        vault_kv.mount vault_kv.path vault_kv.kv_version vault_kv.cache_s auth.failures_per_minute
        auth.max_stale_s tenants.*.keys
        tenants.*.requests_per_s tenants.*.burst tenants.*.open_jobs tenants.*.spool_bytes
        server.processes server.client_ca server.client_crl server.client_cert server.uploads
        jobs.concurrency jobs.open_jobs jobs.tenant_leases jobs.tenant_spool_bytes jobs.reserved_processes
        jobs.source_max_bytes jobs.fanout_files jobs.queues
        jobs.buckets.*.timeout_s audit.path audit.keep_days
        audit.checkpoint_lines
    """,
    "told by another row": """
        environment dev_backend prod_backend environments.*.backend keys default_key_id bind port
        state_dir log.level log.format facade.enabled server.docs
        jobs.buckets.*.path_style jobs.buckets.*.allow_http jobs.buckets.*.ca_file
        audit.checkpoint_s audit.anchor_dir audit.copies rotation.every_days
        traces.enabled
    """,
    "a credential of its own; a literal is refused in prod": """
        transit.token transit.namespace transit.ca_file transit.client_cert transit.timeout_s
        vault_kv.token vault_kv.namespace vault_kv.ca_file vault_kv.client_cert vault_kv.timeout_s
    """,
    "http:// is refused off loopback": """
        awskms.key_id awskms.region awskms.profile awskms.endpoint_url awskms.ca_file
        awskms.timeout_s auth.issuers.*.issuer auth.issuers.*.audience auth.issuers.*.jwks_url
        auth.issuers.*.jwks_file auth.issuers.*.review_url jobs.endpoints.*.url jobs.endpoints.*.tenants
        jobs.endpoints.*.allow_private
    """,
    "certificates are verified in any case": """
        redis.broker_queue_type redis.ca_file redis.client_cert_file jobs.endpoints.*.events
        jobs.endpoints.*.ca_file jobs.endpoints.*.kms_headers
    """,
    "rights and identities": """
        auth.issuers.*.ca_file auth.issuers.*.algorithms auth.issuers.*.leeway_s
        auth.issuers.*.principal_claim auth.issuers.*.tenant auth.issuers.*.tenant_claim
        auth.issuers.*.tenants auth.issuers.*.scopes auth.issuers.*.scopes_claim
        auth.issuers.*.grants.*.when auth.issuers.*.grants.*.scopes auth.issuers.*.job_grace_s
        auth.certificates.*.subject auth.certificates.*.tenant auth.certificates.*.scopes
        auth.logins.*.method auth.logins.*.issuer auth.logins.*.ttl_s
        jobs.buckets.*.region jobs.buckets.*.access_key_id jobs.buckets.*.read jobs.buckets.*.write
    """,
    "what is unsafe is refused": """
        jobs.roots jobs.spool_dir jobs.spool_max_bytes jobs.inline_bytes jobs.result_ttl_s jobs.attempts
        jobs.spool_bucket.url jobs.spool_bucket.region jobs.spool_bucket.access_key_id
        jobs.spool_bucket.path_style jobs.spool_bucket.allow_http jobs.spool_bucket.ca_file
        jobs.spool_bucket.timeout_s jobs.spool_bucket.buffer_bytes jobs.lease_s jobs.stall_s
        jobs.stop_s jobs.resource_leases auth.tokens server.codec_origins
    """,
}


def leaves(kind: Any, where: str) -> Iterator[str]:  # noqa: ANN401 -- kinds are run-time types
    """The dotted names of all settings."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for item in msgspec.structs.fields(kind):
            yield from leaves(item.type, f"{where}.{item.encode_name}".removeprefix("."))
    elif get_origin(kind) is dict and _is_section(get_args(kind)[1]):
        yield from leaves(get_args(kind)[1], f"{where}.*")
    elif section := next(filter(_is_section, get_args(kind)), None):  # one that may be missing
        yield from leaves(section, where)
    else:
        yield where


def _is_section(kind: Any) -> bool:  # noqa: ANN401 -- as above
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def test_every_setting_is_in_the_table_or_weakens_nothing() -> None:
    """A new setting must be decided: a row of the table, or a reason above."""
    decided = {name for names in NO_VALUE_WEAKENS.values() for name in names.split()}
    backends = (leaves(shape, table_of(scheme)) for scheme, shape in SCHEMES.items())
    names = {*leaves(KmsSection, ""), *chain.from_iterable(backends)}
    known = {name.replace(".*", "") for name in names}

    assert {name for name in names if name.replace(".*", "") not in SETTINGS} == decided
    assert set(SETTINGS) - known == {"redis.password"}, "of redis.url"
