"""Reads the settings: of a file, of variables of the environment and of flags.

Flags take precedence over environment variables, those over the file, and the file over defaults.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from kms_core.backends import SCHEMES, table_of
from kms_core.settings.files import default_state_dir, named
from kms_core.settings.lint import check_accepted
from kms_core.settings.model import KmsSection, Settings
from kms_core.settings.redis_urls import for_celery
from kms_core.settings.toml_reader import (
    FromEnvironment,
    SectionReader,
    Tree,
    Unset,
    expand,
    nearest,
    read_toml,
    table,
)
from kms_core.settings.validation import check, check_environment
from kms_protocol.errors import ConfigurationError

DEFAULT_REDIS_URL: Final = "redis://127.0.0.1:6379/0"
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
ELSEWHERE: Final = frozenset(  # read by named, the client
    {"KMS_CONFIG", "KMS_SERVICE_URL", "KMS_TOKEN_FILE", "KMS_ALLOW_HTTP"}
)

# Kubernetes sets variables for each Service of a namespace: one named "kms" gives KMS_PORT=tcp://….
_URL: Final = r"(?:tcp|udp|sctp)://.+"
_LINK: Final = re.compile(
    rf"KMS_(?:\w+_)?(?:SERVICE_HOST=[0-9A-Fa-f.:]+"
    rf"|SERVICE_PORT(?:_\w+)?=(?:\d+|{_URL})"
    rf"|PORT={_URL}"
    rf"|PORT_\d+_\w+=(?:\d+|tcp|udp|sctp|[0-9A-Fa-f.:]+|{_URL}))"
)


def load(
    path: Path | None, environ: Mapping[str, str], *, overrides: Mapping[str, object] = MappingProxyType({})
) -> Settings:
    """Read the settings.

    ``path`` is the settings file, else ``KMS_CONFIG`` names it; without either there is none. ``overrides``
    are flags, by their key below ``[kms]`` (``port``, ``redis.url``); None means not given.

    Raises ConfigurationError, which names the key and the remedy, never the value.
    """
    check_names(environ)
    file = named(path, environ)
    given = {key: value for key, value in overrides.items() if value is not None}
    document = read_toml(file) if file else {}
    try:
        return _settings(document, environ, given)
    except RecursionError:  # dotted keys nest without end
        raise ConfigurationError(f"{file}: tables are nested too deep") from None
    except ConfigurationError as exc:
        raise ConfigurationError(f"{exc.detail} [read from {file}]" if file else exc.detail) from exc


def origins(
    path: Path | None, environ: Mapping[str, str], *, overrides: Mapping[str, object] = MappingProxyType({})
) -> Callable[[Sequence[str]], str]:
    """A function that says where ``load`` took a key below ``[kms]`` from: a flag, a variable or the file.

    It takes the names of the tables and of the key, which may contain dots, and answers ``default`` for a key
    that none of them has. Raises ConfigurationError.
    """
    file = named(path, environ)
    document = read_toml(file) if file else {}
    variables = {key: value.names for key, value in _from_variables(environ).items()}

    def origin(names: Sequence[str]) -> str:
        found, key = document.get("kms"), ".".join(names)
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        if overrides.get(key) is not None:
            return f"--{key.replace('_', '-')}"
        return variables.get(key) or (str(file) if found is not None else "default")

    return origin


def check_names(environ: Mapping[str, str]) -> None:
    """Refuse a ``KMS_*`` variable that nothing reads, unless Kubernetes made it (a service link)."""
    known = {name for name in (*VARIABLES, *ELSEWHERE) if name.startswith("KMS_")}
    for name, value in environ.items():
        if name.startswith("KMS_") and name not in known and not _is_link(name, value):
            raise ConfigurationError(
                f"The environment variable {name} is not known{nearest(name, known) or '; unset it'}"
            )


def _is_link(name: str, value: str) -> bool:
    return _LINK.fullmatch(f"{name}={value}") is not None


def _settings(document: Tree, environ: Mapping[str, str], given: Mapping[str, object]) -> Settings:
    for name in document.keys() - {"kms"}:
        raise ConfigurationError(f"[{name}] is not a setting: everything is below [kms]")
    reader = SectionReader(environ.get("HOME"))
    kms = table({"kms": expand(document.get("kms", {}), environ, "kms")}, "kms", "")
    _lay_over(kms, _from_variables(environ))
    _lay_over(kms, given)
    tables = {scheme: table(kms, table_of(scheme), "kms.") for scheme in SCHEMES}
    literals = {
        scheme for scheme, each in tables.items() if isinstance(each.get(SCHEMES[scheme].CREDENTIAL), str)
    }
    explicit = "state_dir" in kms
    _fill_in(kms, reader, environ)
    section = reader.section(KmsSection, kms, "kms", elsewhere=[table_of(scheme) for scheme in SCHEMES])
    check_environment(section)
    used = Settings(kms=section, backends={}).used_backends
    backends = {}
    for scheme, shape in SCHEMES.items():
        each = tables[scheme]
        if scheme not in used:  # variables may then be unset
            each = {key: value for key, value in each.items() if not isinstance(value, Unset)}
        shape.fill_in(each, section.state_dir if explicit else None, section.environment)
        backends[scheme] = reader.section(shape, each, f"kms.{table_of(scheme)}")
    settings = Settings(kms=section, backends=backends)
    check(settings, literals)
    check_accepted(settings)
    return settings


def _from_variables(environ: Mapping[str, str]) -> dict[str, FromEnvironment]:
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
    """Set the defaults that depend on the environment, the state directory or another key."""
    named: str = reader.value(str, kms.get("environment", "dev"), "kms.environment")
    kms["environment"] = environment = ALIASES.get(named.strip().lower(), named.strip().lower())
    kms.setdefault("require_context", environment == "prod")
    given = kms.get("state_dir")
    state: Path = default_state_dir(environ) if given is None else reader.value(Path, given, "kms.state_dir")
    kms["state_dir"] = state
    redis = table(kms, "redis", "kms.")
    url: str = reader.value(str, redis.setdefault("url", DEFAULT_REDIS_URL), "kms.redis.url")
    defaults: dict[str, Tree] = {
        "redis": {"broker_url": for_celery(url)},
        "jobs": {
            "roots": [state.absolute() / "files"] if environment == "dev" else [],
            "spool_dir": state / "spool",
            "spool_identity_path": state / "spool.key",
            "intake_identity_path": state / "intake.key",
        },
        "audit": {
            "path": state / "audit",
            "key_path": state / "audit.key",
            "signing_key_path": state / "audit-signing.key",
        },
        "auth": {"tokens_path": state / "tokens.json"},
        "server": {"docs": environment != "prod"},
        "traces": {"endpoint": _traces_endpoint(environ)},
        "facade": {"enabled": environment == "dev"},
    }
    for name, values in defaults.items():
        kms[name] = values | table(kms, name, "kms.")


def _traces_endpoint(environ: Mapping[str, str]) -> str | None:
    """The address of OpenTelemetry's own variables for traces.

    https://opentelemetry.io/docs/specs/otel/protocol/exporter/#endpoint-urls-for-otlphttp
    """
    base = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    return (
        environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        or (base and f"{base.rstrip('/')}/v1/traces")
        or None
    )
