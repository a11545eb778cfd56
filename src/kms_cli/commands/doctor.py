"""``kms doctor``: checks this machine and asks the service, and prints each finding with its remedy."""

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import click
import redis
from cryptography import x509
from msgspec.structs import replace

from kms_cli import terminal
from kms_cli.connection import connect
from kms_cli.local import anchors, installation, instances
from kms_cli.local.up import url_of, without_status
from kms_cli.local.valkey import is_named, redis_section
from kms_cli.session import global_options, is_given, use_url
from kms_core import container, key_opening, keyring, redis_client
from kms_core.audit.keys import PublicKeys, public_path
from kms_core.audit.verification.verify import verify
from kms_core.backends import NATIVE, Backend, table_of
from kms_core.envelope.sealed_files import root_of
from kms_core.http_client import Unreachable
from kms_core.jobs.hosts.install import CLOCK_BOUND_S, YOUNG_S, Facts, differences, mismatch
from kms_core.jobs.hosts.notes import Host, HostNote, HostNotes
from kms_core.jobs.storage import spool_bucket
from kms_core.jobs.store import replicas
from kms_core.jobs.store.keys import PREFIX
from kms_core.observability import logs
from kms_core.observability.degraded import DEGRADED, DegradedPart
from kms_core.s3.bucket import If, StoreRefused
from kms_core.secure_files import in_shell
from kms_core.settings.lint import unaccepted, weaknesses
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import RedisSection, Settings
from kms_core.settings.redis_urls import AMQP, CLUSTERS, split_url
from kms_core.settings.validation import check_exposure
from kms_protocol import __version__, small_files
from kms_protocol.addresses import is_loopback
from kms_protocol.errors import (
    EXIT_CONFIGURATION,
    EXIT_UNAVAILABLE,
    BackendUnavailable,
    ConfigurationError,
    KmsError,
)
from kms_protocol.units import size_text

# Checks of this machine and of its peers, before the service is asked: what a start of it would meet.
# They read and change nothing, except a probe object in a bucket of the spool.

Level = Literal["ok", "warn", "FAIL"]
LOW_DISK_BYTES: Final = 1024**3
NO_ROOM_BYTES: Final = 16 * 1024**2  # less than a few of the largest uploads
RENEW_WITHIN: Final = timedelta(days=21)
MAX_VERIFIED_BYTES: Final = 256 * 1024**2  # takes some seconds
_OLDEST_REDIS: Final = 7  # scripts that declare themselves with ``#!lua``
_NEAR_S: Final = 1.0
_FAR_S: Final = 30.0  # the same tolerance as for JWTs
_TIMEOUT_S: Final = 2.0
_AMQP_PORTS: Final = {"amqp": 5672, "amqps": 5671}
_AS_OWNER: Final = "run as the user of the service"
_HOSTS: Final = "see docs/hosts.md"
TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``next`` is what to do about it.

    ``away``: a failure of a peer that does not answer, rather than of settings or files of this machine.
    """

    level: Level
    subject: str
    text: str
    next: str = ""
    away: bool = False


def findings(settings: Settings) -> Iterator[Finding]:
    """Run each check of this machine. What one of them cannot read keeps no other from being made."""
    for subject, check in _CHECKS.items():
        try:
            yield from check(settings)
        except KmsError as exc:
            is_away = not isinstance(exc, ConfigurationError)
            yield Finding("FAIL", subject, exc.detail or exc.summary, away=is_away)
        except OSError as exc:  # the files of another user
            yield Finding("FAIL", subject, f"{exc.filename}: {exc.strerror}", _AS_OWNER)


def _weak(settings: Settings) -> Iterator[Finding]:
    """Yield what ``kms config lint`` reports. In prod the service refuses secret files open to others."""
    found = unaccepted(settings)
    for each in weaknesses(settings):
        if each.setting in found:
            level: Level = "FAIL" if each.of_file and settings.is_prod else "warn"
            yield Finding(level, "weak", f"{each.setting}: {each.risk}", each.advice)


# -- keys ----------------------------------------------------------------------------------------------


def _own_keys(settings: Settings) -> Iterator[Finding]:
    """Open the sealed key files of the service itself. All except the spool key are made when needed."""
    own, sealed = key_opening.own_files(settings), key_opening.sealed_files(settings)
    path = own[key_opening.SPOOL]
    if not path.exists():
        level: Level = "warn" if settings.environment == "dev" else "FAIL"
        make = f"kms keygen -o {in_shell(path)} (in dev the service makes it)"
        yield Finding(level, "own keys", f"{path} does not exist", make)
    opener = key_opening.of_process(settings)
    for name in own.keys() & sealed.keys():
        text = f"{sealed[name]} is sealed by {_root(sealed[name])}"
        try:
            opener.open(name, small_files.read(sealed[name]))
        except Unreachable as exc:
            text += f" and does not open: {exc.detail}"
            yield Finding("FAIL", "own keys", text, "see the self-test of that root key", away=True)
        except KmsError as exc:
            is_away = isinstance(exc, BackendUnavailable)
            yield Finding("FAIL", "own keys", f"{text} and does not open", exc.detail, away=is_away)
        else:
            yield Finding("ok", "own keys", f"{text} and opens")


def _keys(settings: Settings) -> Iterator[Finding]:
    """Wrap and unwrap with each backend of each key, then of each root. All are asked at once."""
    ring = keyring.build(settings, key_opening.of_process(settings))
    sealed, places = key_opening.sealed_files(settings), key_opening.key_locations(settings)
    tests: list[Callable[[], Finding]] = []
    for key in ring.keys.values():
        how = f", sealed by {_root(sealed[key.key_id])}" if key.key_id in sealed else ""
        if isinstance(place := places.get(key.key_id), str):
            how = f", in {place}"
        tests += [partial(_self_test, each, key.key_id, how) for each in key.backends]
    try:
        for root in keyring.roots(settings).values():
            name = f"root key '{root.key_id}'"
            tests += [partial(_self_test, each, name, is_root=True) for each in root.backends]
    finally:  # a root that cannot be opened leaves out no test of a key
        yield from (test.result() for test in keyring.ask_all(tests))


def _self_test(backend: Backend, name: str, how: str = "", *, is_root: bool = False) -> Finding:
    """Test one backend of the key ``name``. ``how``: where the files of the key are."""
    health, away = backend.health_check(), backend.name != NATIVE or bool(how) or is_root
    does = "wraps and unwraps" if health.healthy else "does not wrap and unwrap"
    text, then = f"{name} ({backend.name}{how}) {does}", health.detail
    if backend.server and not health.answered:
        start = "start or unseal" if "Vault" in backend.server.product else "start"
        text += f": {health.detail}"
        then = f"{start} it, or check {backend.server.setting} and the network"
    return Finding("ok" if health.healthy else "FAIL", "self-test", text, then, away=away)


def _root(path: Path) -> str:
    return root_of(small_files.read(path)) or "kms.age.seal_identity_path"


# -- folders, certificates, audit log ------------------------------------------------------------------


def _room(settings: Settings) -> Iterator[Finding]:
    """Check that state directory, spool and audit log can be written, and how much room they have."""
    folders = {"state": settings.state_dir, "audit": settings.kms.audit.path}
    if settings.kms.jobs.spool_bucket is None:
        folders["spool"] = settings.kms.jobs.spool_dir
    for name, path in folders.items():
        if not path.exists():
            yield Finding("ok", name, f"{path} does not exist yet, the service makes it")
        elif not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            yield Finding("warn", name, f"{path} cannot be written by this user", _AS_OWNER)
        else:
            free = shutil.disk_usage(path).free
            level: Level = "FAIL" if free < NO_ROOM_BYTES else "warn" if free < LOW_DISK_BYTES else "ok"
            full = "free space: without it uploads, results and, for the audit log, all calls are refused"
            yield Finding(level, name, f"{path}, {size_text(free)} free", "" if level == "ok" else full)


def _certificates(settings: Settings) -> Iterator[Finding]:
    """Check the expiry of the certificates of the service, as a server and as a client."""
    kms = settings.kms
    named = {
        "server.tls_cert": kms.server.tls_cert,
        "server.client_ca": kms.server.client_ca,
        "redis.client_cert_file": kms.redis.client_cert_file,
    }
    for scheme, section in settings.backends.items():
        if section.CERTIFICATE:
            named[f"{table_of(scheme)}.{section.CERTIFICATE}"] = getattr(section, section.CERTIFICATE)
    for name, path in named.items():
        if path is not None:
            yield _certificate(f"kms.{name}: {path}", path)


def _certificate(what: str, path: Path) -> Finding:
    try:
        ends = min(one.not_valid_after_utc for one in x509.load_pem_x509_certificates(small_files.read(path)))
    except (OSError, ValueError):
        return Finding("FAIL", "certificate", f"{what} contains no certificate", "expected PEM")
    left = ends - datetime.now(UTC)
    level: Level = "FAIL" if left <= timedelta() else "warn" if left < RENEW_WITHIN else "ok"
    text = f"{what}, valid until {ends:%Y-%m-%d %H:%M} UTC"
    renew = "replace the file: that of the server is read again without a restart"
    return Finding(level, "certificate", text, "" if level == "ok" else renew)


def _audit_log(settings: Settings) -> Iterator[Finding]:
    """Verify the log as ``kms audit verify``, unless that takes long."""
    section, own = settings.kms.audit, public_path(settings.kms.audit.signing_key_path)
    if not section.path.exists() and not own.exists():
        return
    files = filter(Path.is_file, section.path.glob("*.jsonl*"))  # no link that leads nowhere
    size_bytes = sum(path.stat().st_size for path in files)
    if size_bytes > MAX_VERIFIED_BYTES:
        text = f"it has {size_text(size_bytes)}: `kms audit verify` checks it, and the service its ends"
        yield Finding("ok", "audit log", text)
        return
    found = anchors.configured_anchors(settings)
    report = verify(section.path, PublicKeys.read(own) if own.exists() else None, found.lines)
    found.note_in(report)
    if report.problems:
        first, others = report.problems[0], len(report.problems) - 1
        text = f"{first.code} in {first.file or first.chain}: {first.text}"
        text += f", and {others} more" if others else ""
        yield Finding("FAIL", "audit log", text, "kms audit verify; keep the files as they are")
        return
    unsigned = sum(each.last_seq - each.signed_seq for each in report.chains)
    text = f"{report.lines} lines are intact, {unsigned} of them newer than the last checkpoint"
    if report.has_open_end:
        text += "; a chain has no end: its process was killed, or its end was removed"
    if report.not_compared:
        why = "; ".join(f"{place}: {reason}" for place, reason in report.not_compared.items())
        text += f"; an older copy of it would not be noticed: {why}"
    elif found.lines and any(each.signed_seq >= 0 for each in report.chains):
        text += f"; it has all lines that the anchors in {', '.join(found.lines)} name"
    else:
        text += "; nothing was compared with anchors yet"
    is_intact = report.verdict == "intact"
    yield Finding("ok" if is_intact else "warn", "audit log", text, "" if is_intact else "kms audit verify")


# -- Redis, broker and other hosts ---------------------------------------------------------------------


def _queue(settings: Settings) -> Iterator[Finding]:
    """Check the Redis of the jobs, the notes of hosts there, and a broker that is another server."""
    section = redis_section(settings, os.environ)
    try:
        redis_client.check_servers(section)
        replicas.verify_replicas(section)
        with redis_client.connect(section) as client:
            yield from _redis(client, section)
            yield from _hosts(settings, HostNotes(client))
    except (redis.AuthenticationError, redis.ResponseError) as exc:
        text = f"{_where(section.url)} answers with an error: {str(exc).partition('. ')[0]}"
        then = "check user and password of [kms.redis], and protected-mode of the server"
        yield Finding("FAIL", "redis", text, then, away=isinstance(exc, redis.ResponseError))
    except redis.TimeoutError:
        text = f"{_where(section.url)} does not answer in time, so jobs and files wait"
        yield Finding("FAIL", "redis", text, "it hangs, or is overloaded: see its log", away=True)
    except redis.RedisError:
        text = f"nothing answers at {_where(section.url)}, so jobs and files wait"
        then = "check [kms.redis] url, or start it; kms up starts one where none is named"
        yield Finding("FAIL" if is_named(settings.kms.redis) else "warn", "redis", text, then, away=True)
    if section.broker_url.partition("://")[0] in AMQP:
        yield _broker(section.broker_url)


def _where(url: str) -> str:
    """Return the address in a URL of Redis, without user and password."""
    parts = split_url("kms.redis.url", url)
    return parts.path if parts.scheme == "unix" else parts.netloc.rpartition("@")[2]


def _redis(client: redis.Redis, section: RedisSection) -> Iterator[Finding]:
    """Check the server: its role and version, what it forgets, its replicas and its clock."""
    before = time.time()
    seconds, micros = client.time()
    ahead_s = seconds + micros / 1e6 - (before + time.time()) / 2
    found = client.info()
    name = "Valkey" if "valkey_version" in found else "Redis"
    version = str(found.get("valkey_version") or found.get("redis_version"))
    text, then = f"{_where(section.url)}, {name} {version}", ""
    if found.get("role") != "master":
        then = "it is a replica, which accepts no jobs: name the master, or use sentinel://"
    elif name == "Redis" and int(version.partition(".")[0]) < _OLDEST_REDIS:
        then = "jobs need Redis 7.0 or later, or Valkey"
    yield Finding("FAIL" if then else "ok", "redis", text, then)
    fsync = _fsync(client) if found.get("aof_enabled") else "no file"
    if fsync in {"", "always"}:
        yield Finding("ok", "redis aof", "it keeps a file of all writes")
    else:
        text = f"appendonly: {fsync}, so the last accepted jobs may be lost"
        yield Finding("warn", "redis aof", text, "set appendonly yes and appendfsync always")
    if (policy := found.get("maxmemory_policy")) != "noeviction":
        text = f"maxmemory-policy {policy}: when it is full it drops jobs"
        level: Level = "FAIL" if found.get("maxmemory") else "warn"
        yield Finding(level, "redis memory", text, "set maxmemory-policy noeviction")
    yield _replicas(int(found.get("connected_slaves", 0)), section)
    yield _clock(ahead_s)
    if count := int(client.zcard(f"{PREFIX}newer")):
        text = f"{count} jobs were submitted by a newer version, and wait for a worker of that version"
        yield Finding("warn", "jobs", text, "update the workers, or start one of that version")


def _fsync(client: redis.Redis) -> str:
    """Return the setting appendfsync; empty if this user may not read it."""
    with suppress(redis.ResponseError):
        return str(client.config_get("appendfsync").get("appendfsync", ""))
    return ""


def _replicas(following: int, section: RedisSection) -> Finding:
    text = f"{following} follow, [kms.redis] wait_replicas is {section.wait_replicas}"
    if following < section.wait_replicas:
        then = "bring replicas back; until then jobs answer 503 durability_unconfirmed"
        return Finding("FAIL", "redis replicas", text, then, away=True)
    if following and not section.wait_replicas and section.url.partition("://")[0] not in CLUSTERS:
        then = "a fail-over may lose the last jobs: set wait_replicas (docs/durability.md)"
        return Finding("warn", "redis replicas", text, then)
    if not following and section.url.partition("://")[0] in CLUSTERS:
        then = "one node holds all keys of jobs: give it a replica, without one its loss stops all jobs"
        return Finding("warn", "redis replicas", text, then)
    return Finding("ok", "redis replicas", text)


def _clock(ahead_s: float) -> Finding:
    if abs(ahead_s) <= _NEAR_S:
        return Finding("ok", "clock", "agrees with the clock of Redis")
    text = f"the clock of Redis is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}"
    level: Level = "FAIL" if abs(ahead_s) > _FAR_S else "warn"
    then = "use NTP on both: jobs depend on the clock of Redis, tokens and not_after on this one"
    return Finding(level, "clock", text, then, away=True)


def _broker(url: str) -> Finding:
    parts = urlsplit(url)
    host, port = parts.hostname or "localhost", parts.port or _AMQP_PORTS[parts.scheme]
    try:
        socket.create_connection((host, port), _TIMEOUT_S).close()
    except OSError:
        text = f"nothing answers at {host}:{port}, so workers are not notified of jobs"
        return Finding("FAIL", "broker", text, "start it, or check [kms.redis] broker_url", away=True)
    return Finding("ok", "broker", f"{host}:{port} answers")


def _hosts(settings: Settings, notes: HostNotes) -> Iterator[Finding]:
    """Compare the install id of the spool and of Redis, and each live host with this one."""
    marks = container.marks(settings, makes=False)
    here = Host.here(settings.state_dir, settings.kms.jobs.spool_dir)
    own_id = marks.install_id()
    yield _install(own_id, notes.install_id())
    with suppress(KmsError, OSError):  # a host that never served has no mark to compare with
        if own_id and (found := marks.users(here.id, YOUNG_S, {*notes.known(), here.id})):
            text = f"hosts that this Redis does not know use this spool: {', '.join(sorted(found.values()))}"
            yield Finding("FAIL", "install", text, _HOSTS)
    others = [each for each in notes.live(notes.now()[0]).values() if each.id != here.id and each.serving]
    if not others:
        yield Finding("ok", "hosts", "no other host of this install is seen")
        return
    own = Facts({}, {})
    with suppress(ConfigurationError, BackendUnavailable):  # other checks report it
        own = container.facts(settings)
    for note in others:
        yield _host(own, note, None if own_id is None else marks.lacks_host(note.id))


def _install(own_id: str | None, stored: str | None) -> Finding:
    """Compare the id in the spool, None if it cannot be read, with that in Redis."""
    if wrong := mismatch(own_id, stored):
        return Finding("FAIL", "install", wrong)
    if own_id is None:
        return Finding("warn", "install", "the spool cannot be read, so it is not compared")
    if stored and not own_id:
        return Finding("warn", "install", f"the spool has no id, Redis has {stored}", _HOSTS)
    same = f"{stored}, the same in the spool and in Redis"
    return Finding("ok", "install", same if stored else "no id in Redis yet: the next start writes it")


def _host(own: Facts, note: HostNote, lacks_mark: bool | None) -> Finding:
    """Compare this host with another one. ``lacks_mark`` is None while the spool cannot be read."""
    found = differences(own, note)
    if abs(note.clock_s) > CLOCK_BOUND_S:
        found.append(f"its clock is {note.clock_s:+.0f} s off the clock of Redis")
    if lacks_mark:
        found.append("it uses another spool: its mark is not in this one")
    if found:
        level: Level = "FAIL" if lacks_mark else "warn"
        return Finding(level, "hosts", f"{note.name} differs: {'; '.join(found)}", _HOSTS)
    places, spool = note.key_places, "" if lacks_mark is None else "spool, "
    separate = sorted(name for name, place in own.key_places.items() if places.get(name, place) != place)
    files = f"; key files of its own: {', '.join(separate)}" if separate else ""
    return Finding("ok", "hosts", f"{note.name} shares {spool}Redis, keys, tokens and settings{files}")


# -- the bucket of the spool ---------------------------------------------------------------------------


def _bucket(settings: Settings) -> Iterator[Finding]:
    """Write, read, list and delete a probe object; report versioning, object lock and rules of the bucket."""
    section = settings.kms.jobs.spool_bucket
    if section is None:
        return
    store = spool_bucket.build(settings, section)
    with closing(store.bucket.line):
        yield _probe(store, section.url)
        with store.errors():
            versioning = store.bucket.setting("versioning") or ""
            locked = store.bucket.setting("object-lock") or ""
            rules = store.bucket.setting("lifecycle") or ""
    if "<Status>Enabled<" in versioning and "NoncurrentVersionExpiration" not in rules:
        text = "versioning is on: deleted uploads and results stay as older versions, and take room"
        then = "turn it off, or add a lifecycle rule NoncurrentVersionExpiration of 1 day"
        yield Finding("warn", "spool bucket", text, then)
    if "<ObjectLockEnabled>Enabled<" in locked:
        text = "object lock is on: what is deleted or released may stay until its retention ends"
        then = "use a bucket without object lock for the spool"
        yield Finding("warn", "spool bucket", text, then)
    if "AbortIncompleteMultipartUpload" not in rules:
        text = "no rule of the bucket aborts uploads that a killed process left; workers do so after a day"
        then = "add a lifecycle rule AbortIncompleteMultipartUpload of 2 days"
        yield Finding("warn", "spool bucket", text, then)


def _probe(store: spool_bucket.SpoolBucket, url: str) -> Finding:
    folder, name, content = "probe", os.urandom(16).hex(), os.urandom(16)
    key = f"{store.prefix}{folder}/{name}"
    store.put(folder, name, content, durable=True)
    honours = False
    with suppress(StoreRefused):
        honours = not store.bucket.put(key, content, If(absent=True), "probe")
    same = store.get(folder, name, len(content)).data == content and name in store.names(folder)
    store.remove(folder, name)
    if not same:
        then = "check [kms.jobs.spool_bucket]"
        return Finding("FAIL", "spool bucket", f"{url} does not give back or list what was written", then)
    if not honours:
        text = f"{url} ignores If-None-Match: a write does not notice another one of the same name"
        return Finding("warn", "spool bucket", text, "docs/hosts.md says what that costs")
    return Finding("ok", "spool bucket", f"{url} can be written, read and listed")


_CHECKS: Final[Mapping[str, Callable[[Settings], Iterator[Finding]]]] = {
    "weak": _weak,
    "own keys": _own_keys,
    "keys": _keys,
    "state": _room,
    "spool bucket": _bucket,
    "audit log": _audit_log,
    "certificate": _certificates,
    "redis": _queue,
}

_CALLER: Final = Finding("ok", "target", "nothing of a service is found here, so it is only asked")


@click.command("doctor")
def doctor_command() -> int:
    """Check settings, keys, disk, audit log, certificates, Redis, other hosts, and the service.

    Each line is ok, warn or FAIL, with a remedy. Exit code 0 without failures, 78 if settings or files of
    this machine fail, 69 if only peers do not answer. Nothing is changed; in a bucket of the spool a probe
    object is written and deleted.

    The first line says which service is checked: the one that --url, --state-dir, --config or their
    variables name, else the kms up of this user that runs, else that of the settings. With --url of another
    machine this one is not checked.
    """
    logs.configure("off", json=False)  # each finding says what a log would
    found = []
    for finding in _findings():
        _show(finding)
        found.append(finding)
    return exit_code(found)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 without failures, 78 if settings or files of this machine fail, 69 if only peers fail."""
    failed = [finding for finding in findings if finding.level == "FAIL"]
    if any(not finding.away for finding in failed):
        return EXIT_CONFIGURATION
    return EXIT_UNAVAILABLE if failed else 0


def _show(finding: Finding) -> None:
    shown = {name: value for name, value in asdict(finding).items() if name != "away"}
    if terminal.printed_as_json(shown):
        return
    then = f": {finding.next}" if finding.next else ""
    terminal.row((finding.level, finding.subject, f"{terminal.plain(finding.text)}{then}"), (4, 12, 0))


def _findings() -> Iterator[Finding]:
    url = global_options().url
    if is_given("url") and not is_loopback(urlsplit(url).hostname):
        yield Finding("ok", "target", f"{url}, on another machine: this one is not checked")
        yield from _service(None)
        return
    running = instances.running(os.environ)
    environ, own_id = instances.environ_of(running, os.environ), None
    try:
        file = installation.settings_file(environ)
        settings = load_settings(file, environ, overrides=installation.overrides())
        if section := settings.kms.jobs.spool_bucket:  # each request is tried four times
            section = replace(section, timeout_s=min(section.timeout_s, TIMEOUT_S))
            jobs = replace(settings.kms.jobs, spool_bucket=section)
            settings = replace(settings, kms=replace(settings.kms, jobs=jobs))
        if not is_given("url"):
            use_url(url_of(settings))
        how = "kms up runs it" if running else "kms up does not run it"
        yield Finding("ok", "target", f"{global_options().url}, state {settings.state_dir.absolute()}: {how}")
        for text, advice in instances.doubts(running):
            yield Finding("warn", "target", text, advice)
        source = f"read from {file}" if file else "defaults, no file"
        yield Finding("ok", "settings", f"{source}, environment {settings.environment}")
        check_exposure(settings)
    except ConfigurationError as exc:
        yield Finding("FAIL", "settings", exc.detail)
    else:
        yield from findings(settings) if _has_service(settings, file) else [_CALLER]
        with suppress(KmsError, OSError):
            own_id = container.marks(settings, makes=False).install_id()
    yield from _service(own_id)


def _has_service(settings: Settings, file: Path | None) -> bool:
    """Return whether settings, state or keys of a service are here. Without them it is a caller's machine."""
    named = {"": settings.state_dir, **key_opening.key_locations(settings), **key_opening.own_files(settings)}
    return bool(file) or settings.is_prod or any(os.access(each, os.F_OK) for each in named.values())


def _service(own_id: str | None) -> Iterator[Finding]:
    """Ask the service how it is. ``own_id`` is the install id of the settings that were checked."""
    url = global_options().url
    try:
        with connect(retries=0, timeout_s=2 * TIMEOUT_S) as kms:  # it may wait for a backend itself
            status = kms.status()
    except KmsError as exc:
        yield Finding("FAIL", "service", *without_status(url, exc), away=True)
        return
    yield Finding("ok", "service", f"{url} answers")
    versions = {status.version, *(status.api_versions or ()), *(status.worker_versions or ())}
    if versions != {__version__}:
        text = f"processes of it are {', '.join(sorted(versions))}, this command is {__version__}"
        yield Finding("warn", "version", text, "install the same: kms status counts them")
    if own_id and status.install and own_id != status.install:
        text = f"{url} is of another install ({status.install}) than the state and spool above ({own_id})"
        yield Finding("FAIL", "target", text, "name its --state-dir and --config, or another --url")
    for name in status.degraded:
        unknown = DegradedPart("warn", "", f"it says that {name} is degraded", "kms status")
        part = DEGRADED.get(name, unknown)
        yield Finding(part.level, "service", part.text, part.then, away=True)
    for each in status.backends_down:
        name = f"root key '{each.key_id}'" if each.root else f"key {each.key_id}"
        text = f"{name} ({each.backend}) is down since {each.since}"
        yield Finding("FAIL", "service", text, "backend.down in its log says why", away=True)
    if status.jobs is not None:
        room = f", spool {status.spool.full:.0%} full" if status.spool else ""
        yield Finding("ok", "jobs", f"{status.workers} workers, {status.queue_depth} jobs waiting{room}")
