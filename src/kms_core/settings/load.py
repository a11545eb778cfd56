"""Finds, reads and checks the settings file.

Flags take precedence over environment variables, those over the file, and the file over defaults.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Final

from kms_core import secure_files
from kms_core.backends import SCHEMES, table_of
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
HERE: Final = Path("provisioning/config/kms.toml")
"""In the working directory of a server."""
MACHINE: Final = Path("/etc/kms-service/kms.toml")
_NOTE: Final = Path("run/config")  # in the state directory
_LONGEST_PATH_BYTES: Final = 4096
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS: Final = 40  # as Linux: path_resolution(7)


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
    given = {key for key, value in overrides.items() if value is not None}
    variables = {key: value.names for key, value in _from_variables(environ).items()}

    def origin(names: Sequence[str]) -> str:
        found, key = document.get("kms"), ".".join(names)
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        if key in given:
            return f"--{key.replace('_', '-')}"
        return variables.get(key) or (str(file) if found is not None else "default")

    return origin


def named(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """``path``, else the settings file that ``KMS_CONFIG`` names."""
    return path or (Path(environ["KMS_CONFIG"]) if environ.get("KMS_CONFIG") else None)


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


# Finds the settings file that ``--config`` and ``KMS_CONFIG`` do not name.
#
# Servers (``kms-service``, ``kms-worker``, ``kms up``) look in their working directory, and note in the
# state directory which file they read. Commands read the file of that note: they may run in a foreign
# repository, and ignore the settings there.


def for_server(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The settings file of a server: the named one, else HERE (absolute), else MACHINE, else None.

    ``path`` is the flag ``--config``. Raises ConfigurationError if others could have written the file HERE,
    or if there are both: a repository must not replace the settings of the machine.
    """
    if file := named(path, environ):
        return file
    if not _is_found(HERE):
        return MACHINE if _is_file(MACHINE) else None
    if _is_file(MACHINE):
        raise ConfigurationError(
            f"Both {HERE} and {MACHINE} exist: name the one to read: --config FILE, or KMS_CONFIG=FILE"
        )
    return HERE.absolute()


def for_command(
    path: Path | None, environ: Mapping[str, str], state_dir: Path | None, say: Callable[[str], object]
) -> Path | None:
    """The settings file of a command: the named one, else that of the note, else MACHINE, else None.

    ``path`` and ``state_dir`` are the flags ``--config`` and ``--state-dir``. ``say`` gets a line for each
    file that is skipped. Raises ConfigurationError if the file of the note is gone and no MACHINE exists.
    """
    if file := named(path, environ):
        return file
    note, has_machine = _note_path(environ, state_dir), _is_file(MACHINE)
    noted = _read(note, say) if note else None
    file = noted if noted and _is_file(noted) else MACHINE if has_machine else None
    if noted and not file:
        raise ConfigurationError(
            f"{noted}, which the service read last, is gone: name another by --config, or remove {note}"
        )
    if noted and has_machine and noted != MACHINE:
        other = f"{MACHINE} is not read" if file == noted else f"{noted} is gone"
        say(f"settings: {file}; {other}: the service read {noted} last")
    if _is_file(HERE) and (file is None or file.resolve() != HERE.resolve()):
        told = f"{HERE.absolute()} is not read: if you trust it, name it by --config"
        say(f"settings: {file or 'defaults'}; {told}")
    return file


# -- the note ----------------------------------------------------------------------------------------


def write_note(file: Path | None, environ: Mapping[str, str]) -> None:
    """Note for commands which settings file a server reads; without one, or for a pipe, remove the note.

    A directory that cannot be written to changes nothing: commands then need ``--config``.
    """
    path = _note_path(environ, None)
    if path is None:
        return
    with suppress(OSError):
        if file is None or not _is_file(file):
            path.unlink(missing_ok=True)
        else:
            secure_files.make_folders(path.parent)
            secure_files.write(path, os.fsencode(f"{file.absolute()}\n"))


def _note_path(environ: Mapping[str, str], state_dir: Path | None) -> Path | None:
    """The path of the note; None if no state directory is known.

    It is in the state directory that a command finds without settings, not in one that they name.
    """
    given = str(state_dir or environ.get("KMS_STATE_DIR", ""))
    try:
        reader = SectionReader(environ.get("HOME"))
        state: Path = reader.value(Path, given, "kms.state_dir") if given else default_state_dir(environ)
    except ConfigurationError:  # ``load`` says so, unless the settings name one
        return None
    return state / _NOTE


def _read(note: Path, say: Callable[[str], object]) -> Path | None:
    """The path in a note of this user or root that others cannot change."""
    try:
        fd = os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as file:  # noqa: PTH123 -- a descriptor, not a path
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or _is_foreign(found) or found.st_mode & _OTHERS_WRITE:
            say(f"{note} is not read: another user could have written it; name the settings by --config")
            return None
        path = Path(os.fsdecode(file.read(_LONGEST_PATH_BYTES).removesuffix(b"\n")))
    return path if path.is_absolute() else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a directory that this user may not search
        return False


# -- who could have written it -----------------------------------------------------------------------


def _is_found(file: Path) -> bool:
    """Return whether a file exists, and refuse one that other users could have written.

    Each folder on its absolute path and the file must belong to this process's user or to root, and must not
    be writable for others; so must the targets of symbolic links and the folders on their paths. A folder
    with the sticky bit, such as ``/tmp``, may be writable: entries of other users in it are refused.
    Raises ConfigurationError, which says how to trust the file.
    """
    try:
        entries = list(_path_entries(file.absolute()))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as exc:
        raise ConfigurationError(f"Cannot read {file}: {exc.strerror}; check the path and its mode") from exc
    for path, found in entries:
        _check(path, found, file.absolute())
    return True


def _path_entries(file: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Each folder, link and file on the absolute path to ``file``."""
    at, rest, links = Path(), list(reversed(file.parts)), 0
    while rest:
        step = at / rest.pop()
        found = step.lstat()
        yield step, found
        if not stat.S_ISLNK(found.st_mode):
            at = step
            continue
        links += 1
        if links > _MOST_LINKS:
            raise ConfigurationError(f"{file} is a circle of symbolic links")
        rest += reversed(step.readlink().parts)  # a link to an absolute path starts again: at / "/" is "/"


def _check(path: Path, found: os.stat_result, file: Path) -> None:
    name = secure_files.in_shell(file)
    trust = f"if you trust it, name it: --config {name}, or KMS_CONFIG={name}"
    if _is_foreign(found):
        raise ConfigurationError(
            f"{file} is not read: {path} belongs to another user (uid {found.st_uid}); {trust}"
        )
    is_sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & _OTHERS_WRITE and not is_sticky and not stat.S_ISLNK(found.st_mode):
        raise ConfigurationError(
            f"{file} is not read: others can write to {path} (mode {stat.S_IMODE(found.st_mode):04o}); "
            f"chmod go-w {secure_files.in_shell(path)}, or, {trust}"
        )


def _is_foreign(found: os.stat_result) -> bool:
    return found.st_uid not in {0, os.geteuid()}
