"""Rules for settings files that were found below the working directory.

A file that the user names (``--config``, ``KMS_CONFIG``) is trusted. One that is only found below the working
directory may be part of a foreign repository. It is read only if no user except this one and root can change
it, and it cannot send the user's environment variables or credentials to an address.
"""

import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

from kms_core.backends import SCHEMES, table_of
from kms_core.sections import DestinationRule, is_loopback
from kms_core.settings.model import Settings
from kms_core.settings.toml_reader import Tree
from kms_protocol.errors import ConfigurationError

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS: Final = 40  # as Linux: path_resolution(7)
_SENT: Final = (
    "kms.bind",  # a name there is looked up
    *(f"kms.{table_of(scheme)}." for scheme, shape in SCHEMES.items() if shape.DESTINATION),
    "kms.redis.",
    "kms.keys",
    "kms.default_key_id",
    "kms.auth.issuers.",
    "kms.auth.tokens",
    "kms.jobs.endpoints.",
    "kms.jobs.buckets.",
    "kms.jobs.spool_bucket.",
    "kms.traces.",
)
"""Settings that are addresses, or are sent to one: names of keys and mounts, tokens, headers."""
_OF_ANY_VARIABLE: Final = ("kms.environment", "kms.port", "kms.log.")
"""Settings that do not disclose the value of a variable."""
_DIRECTORIES: Final = re.compile(r"HOME|XDG_[A-Z_]+")
_ONLY_NAMED: Final = (
    "accept_weak",
    "state_dir",
    "auth.mode",
    "auth.tokens_path",
    "auth.tokens",
    "auth.issuers",
    "auth.certificates",
    "auth.logins",
    "server.client_ca",
    "server.allowed_hosts",
    "server.codec_origins",
    "server.trusted_proxies",
    "server.metrics",
    "server.tls_cert",
    "server.tls_key",
    "jobs.roots",
    "jobs.buckets",
    "jobs.spool_dir",
    "jobs.spool_bucket",
    "jobs.spool_identity_path",
    "jobs.intake_identity_path",
    "age.seal_identity_path",
    "audit.path",
    "audit.key_path",
    "audit.signing_key_path",
    "audit.keep_days",
    "audit.checkpoint_s",
    "audit.checkpoint_lines",
    "audit.anchor_redis",
    "audit.anchor_dir",
    "audit.copies",
)
"""Settings that decide who may call, and which files are read, written and deleted."""
_SERVERS: Final = ("redis.url", "redis.broker_url", "traces.endpoint")
_HARMLESS: Final[Mapping[str, object]] = {"auth.mode": "required", "audit.anchor_redis": True}
"""Allowed values of these keys in a found file; the other keys must be empty."""


_RULES: Final[Mapping[str, tuple[DestinationRule, ...]]] = {
    **{table_of(scheme): (shape.DESTINATION,) for scheme, shape in SCHEMES.items() if shape.DESTINATION},
    "redis": (
        DestinationRule(("ca_file",), ("password_file", "client_key_file")),
        DestinationRule(("ca_file",), (), ("KMS_REDIS_URL", "KMS_BROKER_URL")),
    ),
    "endpoints": (DestinationRule(("url", "ca_file"), ("secret_file",)),),
    "traces": (
        DestinationRule(
            ("endpoint",), (), ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")
        ),
    ),
}


def is_sent(where: str) -> bool:
    """True if the value of the setting ``where`` (``kms.redis.url``) is an address, or is sent to one."""
    return where.startswith(_SENT)


def may_expand(where: str, names: Collection[str]) -> bool:
    """Return whether a found file may use these variables in the setting ``where``.

    Their values could be sent to an address, or become the name of a file that others see.
    """
    if where.startswith(_OF_ANY_VARIABLE):
        return True
    return not is_sent(where) and all(map(_DIRECTORIES.fullmatch, names))


def how_to_trust(file: Path) -> str:
    """Advice for the user who trusts a file."""
    return f"if you trust it, name it: --config {file.absolute()}, or KMS_CONFIG={file.absolute()}"


# -- the file ----------------------------------------------------------------------------------------


def check_file(file: Path) -> None:
    """Refuse a file below the working directory that other users could have written.

    The working directory, each folder on the path and the file must belong to this process's user or to root,
    and must not be writable for others; so must the targets of symbolic links and the folders on their paths.
    A folder with the sticky bit, such as ``/tmp``, may be writable: entries of other users in it are refused.
    Raises ConfigurationError, which says how to trust the file.
    """
    try:
        for path, found in _path_entries(file):
            _check(path, found, file)
    except OSError as exc:
        raise ConfigurationError(f"Cannot read {file}: {exc.strerror}; check the path and its mode") from exc


def _path_entries(file: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The working directory, and each folder, link and file on the path to ``file``."""
    yield Path.cwd(), Path().stat()
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
    if found.st_uid not in {0, os.geteuid()}:
        raise ConfigurationError(
            f"{file} is not read: {path} belongs to another user (uid {found.st_uid}); {how_to_trust(file)}"
        )
    is_link, is_sticky = stat.S_ISLNK(found.st_mode), _is_sticky_folder(found.st_mode)
    if found.st_mode & _OTHERS_WRITE and not is_link and not is_sticky:
        raise ConfigurationError(
            f"{file} is not read: others can write to {path} (mode {stat.S_IMODE(found.st_mode):04o}); "
            f"chmod go-w {path}, or, {how_to_trust(file)}"
        )


def _is_sticky_folder(mode: int) -> bool:
    """Return whether only the owners of an entry and of the folder, and root, may replace the entry."""
    return stat.S_ISDIR(mode) and bool(mode & stat.S_ISVTX)


# -- what it says ------------------------------------------------------------------------------------


def check_restricted_keys(document: Tree, given: Collection[str], file: Path) -> None:
    """Refuse a found file that decides who may call, or which files jobs use.

    Its author could otherwise run jobs with the user's rights. ``document`` and ``given`` are as in
    ``check_destinations``. Raises ConfigurationError.
    """
    for key in (*_ONLY_NAMED, *_SERVERS):
        value = _value(document, key)
        is_harmless = value in (None, _HARMLESS[key]) if key in _HARMLESS else not value
        if is_harmless or key in given or (key in _SERVERS and _is_on_this_machine(str(value))):
            continue
        raise ConfigurationError(
            f"kms.{key} is not taken from a file that was only found in the working directory: "
            f"{how_to_trust(file)}"
        )


def _value(document: Tree, key: str) -> object:
    section, _, name = key.rpartition(".")
    return (_table(document, section) if section else document).get(name)


def _is_on_this_machine(url: str) -> bool:
    """Return whether a server is reached by TCP on loopback; a unix socket could be in the repository."""
    parts = urlsplit(url)
    schemes = {"redis", "rediss", "amqp", "amqps", "http", "https"}
    return parts.scheme in schemes and is_loopback(parts.hostname or "")


def check_destinations(
    document: Tree, settings: Settings, environ: Mapping[str, str], given: Collection[str], file: Path
) -> None:
    """Refuse a section of a found file that decides where a credential outside the file is sent.

    It may not select a credential of the user either, since variables could decide where that is sent.
    ``document`` is ``[kms]`` of the file. ``given`` are the keys that flags and variables replace
    (``cosmian.server_url``). Only backends in use are checked. Raises ConfigurationError.
    """
    trusted = f"and the file was only found in the working directory: {how_to_trust(file)}"
    for where, kind, section in _sections(document, settings):
        own = {
            key: value for key, value in section.items() if f"{where.removeprefix('kms.')}.{key}" not in given
        }
        for rule in _RULES[kind]:
            deciding = next((key for key in rule.deciding if own.get(key, True) is not True), None)
            credential = _credential(rule, own, environ)
            if deciding and credential:
                raise ConfigurationError(f"{where}.{deciding} decides who receives {credential}, {trusted}")
            chosen = next((key for key in rule.credentials if key in own), None)
            if chosen:
                raise ConfigurationError(f"{where}.{chosen} chooses a credential of this user, {trusted}")
    for key_id, uri in settings.kms.key_uris:
        if "profile" in parse_qs(urlsplit(uri).query):
            raise ConfigurationError(
                f"kms.keys.{key_id} chooses a credential of this user by its profile, {trusted}"
            )


def _credential(rule: DestinationRule, own: Tree, environ: Mapping[str, str]) -> str:
    in_files = (f"the credential of {key}" for key in rule.credentials if key in own)
    in_environment = (name for name in rule.variables if environ.get(name))
    return next(in_files, None) or next(in_environment, None) or rule.always


def _sections(document: Tree, settings: Settings) -> Iterator[tuple[str, str, Tree]]:
    """Name, kind and content of each section of the file that describes a connection."""
    for scheme, shape in SCHEMES.items():
        if shape.DESTINATION and scheme in settings.used_backends:
            name = table_of(scheme)
            yield f"kms.{name}", name, _table(document, name)
    yield "kms.redis", "redis", _table(document, "redis")
    endpoints = _table(_table(document, "jobs"), "endpoints")
    for name in endpoints:
        yield f"kms.jobs.endpoints.{name}", "endpoints", _table(endpoints, name)
    if settings.kms.traces.enabled:
        yield "kms.traces", "traces", _table(document, "traces")


def _table(tree: Tree, name: str) -> Tree:
    found = tree.get(name, {})
    return found if isinstance(found, dict) else {}
