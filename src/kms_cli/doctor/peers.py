"""Checks of Redis, broker and ports from this machine. Passwords are never shown."""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import urlsplit

import redis

from kms_cli.doctor import Finding, Level
from kms_cli.local import installation
from kms_cli.local.up import is_alive
from kms_core.jobs.model import ReplicaRules
from kms_core.jobs.store import replicas
from kms_core.jobs.store.redis_keys import PREFIX
from kms_core.redis_client import check_servers, connect
from kms_core.settings.model import RedisSection, Settings
from kms_core.settings.redis_urls import AMQP, is_tls, split_url
from kms_protocol.errors import ConfigurationError

NEAR_S: Final = 1.0
FAR_S: Final = 30.0  # the same tolerance as for JWTs
FULL: Final = 0.9
TIMEOUT_S: Final = 2.0
_PORTS: Final = {"amqp": 5672, "amqps": 5671}
_DURABLE: Final = "set appendonly yes and appendfsync always"
Info = Mapping[str, object]


def queue(settings: Settings) -> Iterator[Finding]:
    """Check the Redis of the jobs, and the broker if it is another server."""
    section = installation.redis_section(settings, os.environ)
    yield from _redis(section, named=installation.is_named(settings.kms.redis))
    if section.broker_url.partition("://")[0] in AMQP:
        yield _broker(section.broker_url)


def _redis(section: RedisSection, *, named: bool) -> Iterator[Finding]:
    where = _where(section.url)
    try:
        check_servers(section)
        with connect(section) as client:
            before = time.time()
            seconds, micros = client.time()
            ahead_s = seconds + micros / 1e6 - (before + time.time()) / 2
            yield _server(where, client.info("server"), client.info("replication"))
            yield from _cluster(client)
            yield from _durability(client.info("persistence"), _fsync(client))
            yield from _replicas(client, section)
            yield _memory(client.info("memory"))
            yield _clock(ahead_s)
            yield from _newer(int(client.zcard(f"{PREFIX}newer")))
    except ConfigurationError as exc:
        yield Finding("FAIL", "redis", exc.detail)
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError):
        yield Finding("FAIL", "redis", f"{where} rejects this user", "check user and password of [kms.redis]")
    except redis.ResponseError as exc:
        text = f"{where} answers with an error: {str(exc).partition('. ')[0]}"
        then = (
            "protected-mode no, where the users have passwords" if "DENIED" in text else "check its settings"
        )
        yield Finding("FAIL", "redis", text, then, away=True)
    except redis.RedisError:
        then = (
            "start it, or check [kms.redis] url"
            if named
            else "kms up starts one, or name one in KMS_REDIS_URL"
        )
        text = f"nothing answers at {where}, so jobs and files wait"
        yield Finding("FAIL" if named else "warn", "redis", text, then, away=True)


_OLDEST_REDIS: Final = 7  # scripts that declare themselves with ``#!lua``


def _where(url: str) -> str:
    parts = split_url("kms.redis.url", url)
    if parts.scheme == "unix":
        return parts.path
    return parts.netloc.rpartition("@")[2]


def _server(where: str, server: Info, replication: Info) -> Finding:
    version = server.get("valkey_version") or server.get("redis_version")
    name = "Valkey" if "valkey_version" in server else "Redis"
    if replication.get("role") != "master":
        return Finding(
            "FAIL",
            "redis",
            f"{where} is a replica, which accepts no jobs",
            "name the master, or use sentinel://",
        )
    if name == "Redis" and int(str(version).partition(".")[0]) < _OLDEST_REDIS:
        return Finding(
            "FAIL", "redis", f"{where} is Redis {version}", "jobs need Redis 7.0 or later, or Valkey"
        )
    return Finding("ok", "redis", f"{where}, {name} {version}")


def _cluster(client: redis.Redis) -> Iterator[Finding]:
    if not client.info("cluster").get("cluster_enabled"):
        return
    replicas = client.info("replication").get("connected_slaves")
    text = f"one node holds all keys of jobs, and {replicas} replicas follow it"
    yield (
        Finding("ok", "redis cluster", text)
        if replicas
        else Finding("warn", "redis cluster", text, "give it a replica: without one its loss stops all jobs")
    )


def _fsync(client: redis.Redis) -> str:
    """Return the setting appendfsync; empty if this user may not read it."""
    try:
        return str(client.config_get("appendfsync").get("appendfsync", ""))
    except redis.ResponseError:
        return ""


def _durability(found: Info, fsync: str) -> Iterator[Finding]:
    if not found.get("aof_enabled"):
        yield Finding("warn", "redis aof", "off: accepted jobs are lost if it stops", _DURABLE)
        return
    if found.get("aof_last_write_status") != "ok":
        yield Finding("FAIL", "redis aof", "it cannot write its file", "free space on its disk", away=True)
        return
    if fsync not in {"", "always"}:
        yield Finding("warn", "redis aof", f"appendfsync {fsync}: the last jobs may be lost", _DURABLE)
        return
    yield Finding("ok", "redis aof", f"on, appendfsync {fsync}" if fsync else "on")


def _replicas(client: redis.Redis, section: RedisSection) -> Iterator[Finding]:
    """Return whether replicas acknowledge a write as [kms.redis] wants it."""
    rules = ReplicaRules(section.wait_replicas, section.wait_ms)
    following = client.info("replication").get("connected_slaves", 0)
    if not rules.replicas:
        if following:
            text = f"{following} follow, and none is waited for: a fail-over may lose the last jobs"
            yield Finding(
                "warn", "redis replicas", text, "set [kms.redis] wait_replicas (docs/durability.md)"
            )
        return
    try:
        replicas.check(section)
    except ConfigurationError as exc:
        yield Finding("FAIL", "redis replicas", exc.detail)
        return
    if replicas.ReplicaWait(client, rules).confirm():
        yield Finding("ok", "redis replicas", f"{rules.replicas} of {following} acknowledge writes")
        return
    text = f"{following} follow, and fewer than {rules.replicas} acknowledge a write in {rules.wait_ms} ms"
    advice = "bring replicas back; until then jobs answer 503 durability_unconfirmed"
    yield Finding("FAIL", "redis replicas", text, advice, away=True)


def _memory(found: Info) -> Finding:
    policy, most = str(found.get("maxmemory_policy")), int(str(found.get("maxmemory") or 0))
    used = int(str(found.get("used_memory") or 0))
    if policy != "noeviction":
        text = f"maxmemory-policy {policy}: when it is full it drops jobs"
        return Finding("FAIL" if most else "warn", "redis memory", text, "set maxmemory-policy noeviction")
    if most and used > FULL * most:
        text = f"{used / most:.0%} of maxmemory is used, jobs are refused when it is full"
        return Finding("warn", "redis memory", text, "raise maxmemory, or let results expire sooner")
    return Finding("ok", "redis memory", "noeviction")


def _clock(ahead_s: float) -> Finding:
    if abs(ahead_s) <= NEAR_S:
        return Finding("ok", "clock", "agrees with the clock of Redis")
    text = f"the clock of Redis is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}"
    level: Level = "FAIL" if abs(ahead_s) > FAR_S else "warn"
    then = "use NTP on both: jobs depend on the clock of Redis, tokens and not_after on this one"
    return Finding(level, "clock", text, then, away=True)


def _newer(count: int) -> Iterator[Finding]:
    if count:
        text = f"{count} jobs were submitted by a newer version, and wait for a worker of that version"
        yield Finding("warn", "jobs", text, "update the workers, or start one of that version")


def _broker(url: str) -> Finding:
    parts = urlsplit(url)
    host, port = parts.hostname or "localhost", parts.port or _PORTS[parts.scheme]
    try:
        socket.create_connection((host, port), TIMEOUT_S).close()
    except OSError:
        text = f"nothing answers at {host}:{port}, so workers are not notified of jobs"
        return Finding("FAIL", "broker", text, "start it, or check [kms.redis] broker_url", away=True)
    return Finding("ok", "broker", f"{host}:{port} answers{', over TLS' if is_tls(url) else ''}")


# -- ports -------------------------------------------------------------------------------------------


def ports(settings: Settings, url: str) -> Iterator[Finding]:
    """Check the ports of the API, the metrics of the worker and the Vault API: free, or used by them."""
    bind, tls = settings.kms.bind, settings.kms.server.tls_cert is not None
    port = urlsplit(url).port or settings.kms.port
    uses = {port: ("the API", tls), port + 1: ("the worker", False)}
    if settings.kms.facade.enabled and settings.kms.facade.port is not None:
        uses[settings.kms.facade.port] = ("the Vault API", tls)
    free, taken = [], []
    for number, (use, secure) in uses.items():
        if _is_free(bind, number):
            free.append(f"{number} for {use}")
        elif use == "the Vault API" or is_alive(installation.reachable(bind), number, tls=secure):
            taken.append(f"{number} by {use}")
        else:
            text = f"{number}, for {use}, is used by another program, or cannot be bound at {bind}"
            yield Finding(
                "FAIL",
                "ports",
                text,
                "find the holder: ss -ltnp; or choose another port with KMS_PORT",
                away=True,
            )
    if free:
        yield Finding("ok", "ports", f"free: {', '.join(free)}")
    if taken:
        yield Finding("ok", "ports", f"in use: {', '.join(taken)}")


def _is_free(bind: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
        except OSError:
            return False
    return True
