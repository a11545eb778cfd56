"""Settings: found, read once, checked and frozen. Knows no process; the environment is handed in.

A flag wins over the environment, the environment over the file, the file over the default.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from kms_core.settings.buckets import check_buckets
from kms_core.settings.lint import check_accepted
from kms_core.settings.model import KmsSection, Settings
from kms_core.settings.redis_urls import check_redis, for_celery
from kms_core.settings.toml_reader import (
    FromEnvironment,
    SectionReader,
    Tree,
    Variables,
    expand,
    nearest,
    read_toml,
    table,
    take_unset,
)
from kms_core.settings.trust import check_destinations, check_file, check_places, how_to_trust, may_expand
from kms_core.settings.validate_auth import check_auth
from kms_core.settings.validate_backends import SECTIONS, check_vaults
from kms_core.settings.validation import (
    check_audit,
    check_awskms,
    check_backends,
    check_endpoints,
    check_environment,
    check_exposure,
    check_facade,
    check_keys,
    check_roots,
    check_server,
    check_variables,
)
from kms_protocol.errors import ConfigurationError

__all__ = ["Settings", "check_exposure", "check_names", "default_state_dir", "find", "found_here", "load"]

SEARCHED: Final = (Path("provisioning/config/kms.toml"), Path("/etc/kms-service/kms.toml"))
DEFAULT_REDIS_URL: Final = "redis://127.0.0.1:6379/0"
SEED_AGE_DIR: Final = "~/.config/provisioning/age"
ALIASES: Final = {"development": "dev", "production": "prod"}
VARIABLES: Final = {  # where two name one key, the later one wins
    "PROVISIONING_ENV": "environment",
    "COSMIAN_KMS_URL": "cosmian.server_url",
    "COSMIAN_API_KEY": "cosmian.api_key",
    "RUST_LOG": "log.level",
    "KMS_LOG": "log.level",
    "KMS_BIND": "bind",
    "KMS_PORT": "port",
    "KMS_STATE_DIR": "state_dir",
    "KMS_REDIS_URL": "redis.url",
    "KMS_BROKER_URL": "redis.broker_url",
}
ELSEWHERE: Final = frozenset(  # read by find, the client
    {"KMS_CONFIG", "KMS_SERVICE_URL", "KMS_TOKEN_FILE", "KMS_ALLOW_HTTP"}
)

# Kubernetes announces every Service of a namespace in variables: one named "kms" makes KMS_PORT=tcp://….
_URL: Final = r"(?:tcp|udp|sctp)://.+"
_LINK: Final = re.compile(
    rf"KMS_(?:\w+_)?(?:SERVICE_HOST=[0-9A-Fa-f.:]+"
    rf"|SERVICE_PORT(?:_\w+)?=(?:\d+|{_URL})"
    rf"|PORT={_URL}"
    rf"|PORT_\d+_\w+=(?:\d+|tcp|udp|sctp|[0-9A-Fa-f.:]+|{_URL}))"
)


_CHECKS: Final = (
    check_awskms,
    check_redis,
    check_endpoints,
    check_facade,
    check_server,
    check_audit,
    check_auth,
    check_buckets,
    check_roots,
    check_accepted,
)


def load(
    path: Path | None, environ: Mapping[str, str], *, overrides: Mapping[str, object] = MappingProxyType({})
) -> Settings:
    """Read the settings.

    ``path`` is the ``--config`` flag. ``overrides`` are the other flags, by their key below ``[kms]``
    (``port``, ``redis.url``); None means not given. No file is needed. One that nobody named and that is
    found below the working directory is bound by the rules of ``settings_trust``.

    Raises ConfigurationError, which names the key and what to do, never the value.
    """
    check_names(environ)
    file, found = find(path, environ), found_here(path, environ)
    given = {key: value for key, value in overrides.items() if value is not None}
    if found is not None:
        check_file(found)
    try:
        return _settings(read_toml(file) if file else {}, environ, given, found)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{exc.detail} [read from {file}]" if file else exc.detail) from exc


def find(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file to read: ``path``, else ``KMS_CONFIG``, else the first of ``SEARCHED`` that is there."""
    if path is not None:
        return path
    if named := environ.get("KMS_CONFIG"):
        return Path(named)
    return next((known for known in SEARCHED if known.is_file()), None)


def found_here(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file to read if it was only found below the working directory, and nobody named it."""
    file = find(path, environ)
    is_named = path is not None or bool(environ.get("KMS_CONFIG"))
    return None if is_named or file is None or file.is_absolute() else file


def check_names(environ: Mapping[str, str]) -> None:
    """Refuse a ``KMS_*`` variable that nothing reads, unless Kubernetes made it (a service link)."""
    known = {name for name in (*VARIABLES, *ELSEWHERE) if name.startswith("KMS_")}
    for name, value in environ.items():
        if name.startswith("KMS_") and name not in known and not _is_link(name, value):
            raise ConfigurationError(
                f"The environment variable {name} is not known{nearest(name, known) or '; unset it'}"
            )


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """``$XDG_STATE_HOME/kms-service``, else ``~/.local/state/kms-service``."""
    xdg = environ.get("XDG_STATE_HOME", "")
    if xdg.startswith("/"):  # relative ones are ignored (XDG Base Directory Specification)
        return Path(xdg, "kms-service")
    if not environ.get("HOME"):
        raise ConfigurationError("Neither HOME nor XDG_STATE_HOME is set: name a directory in KMS_STATE_DIR")
    return Path(environ["HOME"], ".local/state/kms-service")


def _is_link(name: str, value: str) -> bool:
    return _LINK.fullmatch(f"{name}={value}") is not None


def _settings(
    document: Tree, environ: Mapping[str, str], given: Mapping[str, object], found: Path | None
) -> Settings:
    for name in document.keys() - {"kms"}:
        raise ConfigurationError(f"[{name}] is not a setting: everything is below [kms]")
    reader = SectionReader(environ.get("HOME"))
    variables = Variables(environ) if found is None else Variables(environ, _refusal(found))
    kms = table({"kms": expand(document.get("kms", {}), variables, "kms")}, "kms", "")
    if found is not None:
        check_places(table(document, "kms", ""), given.keys() | _from_variables(environ).keys(), found)
    _lay_over(kms, _from_variables(environ))
    _lay_over(kms, given)
    own_sections = {"age": "age", "cosmian": "cosmian", "awskms": "awskms", **SECTIONS}
    unset = {backend: take_unset(table(kms, name, "kms.")) for backend, name in own_sections.items()}
    literals = {name for name in SECTIONS.values() if isinstance(table(kms, name, "kms.").get("token"), str)}
    if isinstance(table(kms, "cosmian", "kms.").get("api_key"), str):
        literals.add("cosmian")
    _fill_in(kms, reader, environ)
    settings = Settings(kms=reader.section(KmsSection, kms, "kms"))
    check_environment(settings)
    check_variables(settings, unset)
    check_keys(settings)
    check_backends(settings, literals)
    check_vaults(settings, literals)
    for check in _CHECKS:
        check(settings)
    if found is not None:
        replaced = given.keys() | _from_variables(environ).keys()
        check_destinations(table(document, "kms", ""), settings, environ, replaced, found)
    return settings


def _refusal(found: Path) -> Callable[[str, Sequence[str]], str]:
    """Why a setting of a file that was merely found may not use these variables; empty where it may."""
    reason = (
        "and addresses, what is sent to them, and names of files take nothing from the environment in a file "
        f"that was only found in the working directory: {how_to_trust(found)}"
    )
    return lambda where, names: "" if may_expand(where, names) else reason


def _from_variables(environ: Mapping[str, str]) -> dict[str, object]:
    return {
        key: FromEnvironment(value, name)
        for name, key in VARIABLES.items()
        if (value := environ.get(name)) and not _is_link(name, value)
    }


def _lay_over(kms: Tree, values: Mapping[str, object]) -> None:
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        target = table(kms, section, "kms.") if section else kms
        target[name] = value


def _fill_in(kms: Tree, reader: SectionReader, environ: Mapping[str, str]) -> None:
    """Put in the defaults that depend on the environment's name, the state directory or another key."""
    named: str = reader.value(str, kms.get("environment", "dev"), "kms.environment")
    kms["environment"] = environment = ALIASES.get(named.strip().lower(), named.strip().lower())
    kms.setdefault("require_context", environment == "prod")
    explicit = "state_dir" in kms
    state: Path = (
        reader.value(Path, kms["state_dir"], "kms.state_dir") if explicit else default_state_dir(environ)
    )
    kms["state_dir"] = state
    _fill_age(table(kms, "age", "kms."), f"{state}/age" if explicit else SEED_AGE_DIR, environment)
    _fill_redis(table(kms, "redis", "kms."), reader)
    jobs = table(kms, "jobs", "kms.")
    jobs.setdefault("spool_dir", state / "spool")
    jobs.setdefault("roots", [state.absolute() / "files"] if environment == "dev" else [])
    jobs.setdefault("spool_identity_path", state / "spool.key")
    jobs.setdefault("intake_identity_path", state / "intake.key")
    audit = table(kms, "audit", "kms.")
    audit.setdefault("path", state / "audit")
    audit.setdefault("key_path", state / "audit.key")
    audit.setdefault("signing_key_path", state / "audit-signing.key")
    table(kms, "auth", "kms.").setdefault("tokens_path", state / "tokens.json")
    table(kms, "server", "kms.").setdefault("docs", environment != "prod")
    table(kms, "traces", "kms.").setdefault("endpoint", _traces_endpoint(environ))
    table(kms, "facade", "kms.").setdefault("enabled", environment == "dev")


def _traces_endpoint(environ: Mapping[str, str]) -> str | None:
    """Where OpenTelemetry's own variables send traces.

    https://opentelemetry.io/docs/specs/otel/protocol/exporter/#endpoint-urls-for-otlphttp
    """
    base = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    return (
        environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        or (base and f"{base.rstrip('/')}/v1/traces")
        or None
    )


def _fill_age(age: Tree, directory: str, environment: str) -> None:
    age.setdefault("public_key_path", f"{directory}/public_key.txt")
    age.setdefault("private_key_path", f"{directory}/private_key.txt")
    age.setdefault("accept_foreign", environment == "dev")


def _fill_redis(redis: Tree, reader: SectionReader) -> None:
    """The default broker is the same server."""
    url: str = reader.value(str, redis.setdefault("url", DEFAULT_REDIS_URL), "kms.redis.url")
    redis.setdefault("broker_url", for_celery(url))
