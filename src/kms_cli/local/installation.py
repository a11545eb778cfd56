"""The service installed on this machine: its settings, its Redis, and the anchors of its audit log.

Its Redis is the server of the settings, or the embedded server of a running ``kms up``.
"""

import fcntl
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

import click
import msgspec

from kms_cli import terminal
from kms_cli.local import valkey
from kms_cli.session import DEFAULT_URL, is_given, session
from kms_core import secure_files
from kms_core.audit import segments
from kms_core.audit.sinks import FolderSink, RedisSink
from kms_core.audit.verification.scan import Note, VerificationReport
from kms_core.redis_client import connect
from kms_core.settings import files
from kms_core.settings.load import DEFAULT_REDIS_URL
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import RedisSection, Settings
from kms_core.settings.redis_urls import for_celery, is_shared
from kms_protocol.errors import AuditUnavailable, ConfigurationError


def reachable(bind: str) -> str:
    """Return the address for connections from this machine to a server bound to ``bind``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)  # noqa: S104  # not for binding


def url_of(settings: Settings) -> str:
    """Return the address of the service for this machine."""
    host = reachable(settings.kms.bind)
    scheme = "http" if settings.kms.server.tls_cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.kms.port}"


_NOTE: Final = "up.json"
_LONGEST_BYTES: Final = 64 * 1024
_SETTLED: Final = ("HOME", "XDG_STATE_HOME", "PROVISIONING_ENV", "KMS_BIND", "KMS_PORT")
_PATHS: Final = ("KMS_CONFIG", "KMS_STATE_DIR")
_UNTOLD: Final = ("KMS_REDIS_URL", "KMS_BROKER_URL", "COSMIAN_KMS_URL", "COSMIAN_API_KEY")  # may be secret


class Running(msgspec.Struct, frozen=True):
    """The note of a ``kms up`` that runs. It holds no secret.

    ``environ`` are variables with which a command reads the same settings, ``others`` the names of the
    further ones that it has.
    """

    started: float
    url: str
    state_dir: str
    environ: dict[str, str]
    others: list[str]


@contextmanager
def noted(settings: Settings, environ: Mapping[str, str]) -> Iterator[None]:
    """Keep a note of this ``kms up`` where its embedded server has its socket, locked while it runs."""
    folder = valkey.private_directory(valkey.runtime_dir(settings.state_dir, environ))
    told = {name: environ[name] for name in _SETTLED if environ.get(name)}
    told |= {name: str(Path(environ[name]).absolute()) for name in _PATHS if environ.get(name)}
    note = Running(
        time.time(),
        url_of(settings),
        str(settings.state_dir.absolute()),
        told,
        [name for name in _UNTOLD if environ.get(name)],
    )
    try:
        with secure_files.lock(folder / _NOTE) as handle:
            os.ftruncate(handle, 0)
            os.write(handle, msgspec.json.encode(note))
            yield
    finally:
        (folder / _NOTE).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def running(environ: Mapping[str, str]) -> list[Running]:
    """Return each ``kms up`` that runs and fits the global options, the likeliest first.

    It is of this user, and has this HOME or the named state directory. The likeliest is the one with the
    default port, else the newest.
    """
    mine = valkey.runtime_dir(Path("/"), environ)
    prefix = mine.name.rpartition("-")[0]
    folders = [*_folders(mine.parent, prefix)]
    if prefix != "kms":  # this command has no XDG_RUNTIME_DIR; a terminal of the user may have one
        folders += _folders(Path(f"/run/user/{os.geteuid()}"), "kms")
    notes = [note for folder in folders if (note := _read(folder)) and _fits(note, environ)]
    return sorted(notes, key=lambda note: (_port(note.url) != _port(DEFAULT_URL), -note.started))


def doubts(running: Sequence[Running]) -> Iterator[tuple[str, str]]:
    """Yield reasons why the settings of this command may not be those of ``kms up``, each with a remedy."""
    if len(running) > 1:
        others = " or ".join(f"--state-dir {each.state_dir}" for each in running[1:])
        yield f"kms up runs {len(running)} times, this is {running[0].state_dir}", f"for another: {others}"
    for each in running[:1]:
        if unset := [name for name in each.others if not os.environ.get(name)]:
            yield f"kms up runs with {', '.join(unset)}, this command without", "set the same here"


def _folders(parent: Path, prefix: str) -> Iterator[Path]:
    """The folders where notes may be. No link is followed: in /tmp anyone makes some."""
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(f"{prefix}-") and entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)


def _read(folder: Path) -> Running | None:
    """Return a note, if it is this user's, and locked by its ``kms up``."""
    if not valkey.is_private(folder, {os.geteuid()}):
        return None
    with suppress(OSError, msgspec.DecodeError), open(folder / _NOTE, "rb", opener=_own) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return msgspec.json.decode(file.read(_LONGEST_BYTES), type=Running)
    return None


def _own(path: str, flags: int) -> int:
    """Open a plain file of this user: the folder may be another one by now. Raises OSError."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(handle)
        raise PermissionError
    return handle


def _fits(note: Running, environ: Mapping[str, str]) -> bool:
    given = session()
    return (
        (
            given.state_dir.resolve() == Path(note.state_dir).resolve()
            if given.state_dir
            else note.environ.get("HOME") == environ.get("HOME")
        )
        and (given.config is None or str(given.config.absolute()) == note.environ.get("KMS_CONFIG"))
        and (not is_given("url") or _port(given.url) == _port(note.url))
        and environ.get("KMS_PORT") in {None, "", str(_port(note.url))}
    )


def _port(url: str) -> int | None:
    return urlsplit(url).port


def environ_of(found: Sequence[Running], environ: Mapping[str, str]) -> Mapping[str, str]:
    """Return the environment for reading the settings of the first one; ``environ`` if there is none."""
    if not found:
        return environ
    told = {name: found[0].environ.get(name, "") for name in (*_SETTLED, *_PATHS)}
    return {name: value for name, value in {**environ, **told}.items() if value or name not in told}


def redis_section(settings: Settings, environ: Mapping[str, str]) -> RedisSection:
    """Return ``[kms.redis]``, with the addresses of the embedded server if one runs and none is named."""
    section = settings.kms.redis
    url = None if is_named(section) else embedded_url(settings.state_dir, environ)
    if url is None:
        return section
    broker_url = for_celery(url) if is_shared(section) else section.broker_url
    return msgspec.structs.replace(section, url=url, broker_url=broker_url)


def is_named(section: RedisSection) -> bool:
    """Return whether the settings name this server or it is the embedded one: not the default address."""
    return section.url != DEFAULT_REDIS_URL


def embedded_url(state_dir: Path, environ: Mapping[str, str]) -> str | None:
    """Return the address of the embedded server, of this user or of the owner of the state directory.

    None if none runs.
    """
    try:
        owner = state_dir.stat().st_uid
    except OSError:
        return None
    mine = valkey.runtime_dir(state_dir, environ)
    tag = mine.name.rpartition("-")[2]
    theirs = (Path(f"/run/user/{owner}/kms-{tag}"), Path("/tmp") / f"kms-{owner}-{tag}")  # noqa: S108  # owner checked
    for folder in (mine, *theirs):
        socket_path = folder / "valkey.sock"
        if valkey.is_private(folder, {owner, os.geteuid()}) and socket_path.exists():
            return f"unix://{quote(str(socket_path))}?db=0"
    return None


REDIS: Final = "redis"
_REDIS: Final = "Redis"
_NO_SERVER: Final = "kms up does not run on this machine, and [kms.redis] url names no other server"


@dataclass(slots=True)
class AnchorLines:
    """Anchors by source, and the sources that could not be read, with the reason.

    ``unnamed`` is the source that no setting names: the embedded Redis of ``kms up``, which need not run.
    """

    lines: dict[str, list[bytes]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unnamed: str = ""

    def note_in(self, report: VerificationReport) -> None:
        """Add the sources that could not be compared; the unnamed one only as a note."""
        report.not_compared |= self.failed
        why = report.not_compared.pop(self.unnamed, None)
        if why:
            text = f"not compared with the anchors in {self.unnamed}, so an older copy would pass: {why}"
            report.notes.append(Note("not_compared", text))


def configured_anchors(settings: Settings) -> AnchorLines:
    """Read the anchors of all sources that the settings name."""
    found, section = AnchorLines(), settings.kms.audit
    if section.anchor_redis:
        found.unnamed = "" if is_named(settings.kms.redis) else _REDIS
        _from_redis(found, settings)
    if section.anchor_dir is not None:
        _from_folder(found, section.anchor_dir)
    return found


def named_anchors(settings: Settings, sources: Sequence[str]) -> AnchorLines:
    """Read the anchors of sources that the user names: files, directories, or ``redis``."""
    found = AnchorLines()
    for source in sources:
        if source == REDIS:
            _from_redis(found, settings)
        elif Path(source).is_dir():
            _from_folder(found, Path(source))
        else:
            try:
                found.lines[source] = list(segments.lines_of(Path(source)))
            except OSError as exc:
                found.failed[source] = f"it cannot be read ({exc.strerror})"
    return found


def _from_folder(found: AnchorLines, path: Path) -> None:
    """Read the anchors of a directory. Those that can be read are compared even if others cannot."""
    folder = FolderSink(path)
    try:
        found.lines[str(path)] = folder.lines()
    except AuditUnavailable as exc:
        found.failed[str(path)] = exc.detail
    if folder.unread:
        found.failed[str(path)] = folder.unread


def _from_redis(found: AnchorLines, settings: Settings) -> None:
    section = redis_section(settings, os.environ)
    try:
        found.lines[_REDIS] = RedisSink(connect(section)).lines()
    except (AuditUnavailable, ConfigurationError) as exc:
        found.failed[_REDIS] = exc.detail if is_named(section) else f"{exc.detail}; {_NO_SERVER}"


def settings() -> Settings:
    """Read the settings as the service would, with the global options. Raises ConfigurationError.

    Prints which settings files are skipped, and a warning if ``kms up`` runs with other settings.
    """
    loaded = load_settings(settings_file(os.environ), os.environ, overrides=overrides())
    others = [each.state_dir for each in running(os.environ)]
    if others and loaded.state_dir.resolve() not in {Path(each).resolve() for each in others}:
        text = f"this is about {loaded.state_dir}, and kms up runs with another: --state-dir {others[0]}"
        _say_once(f"warning: {text}")
    return loaded


def overrides() -> Mapping[str, object]:
    """The global options that take the place of settings, by their key below ``[kms]``."""
    state_dir = session().state_dir
    return {"state_dir": state_dir and str(state_dir)}


def settings_file(environ: Mapping[str, str]) -> Path | None:
    """Return the settings file of this command, and print once which others are skipped."""
    given = session()
    return files.for_command(given.config, environ, given.state_dir, _say_once)


def _say_once(text: str) -> None:
    """Print a message that this command has not printed yet."""
    said: set[str] = click.get_current_context().meta.setdefault("kms_cli said", set())
    if text not in said:
        said.add(text)
        terminal.say(text)
