"""Waits until a write is on the disks of Redis and of its replicas (WAITAOF, Redis 7.2, Valkey).

Redis acknowledges writes that a fail-over may lose. Where ``[kms.redis] wait_replicas`` is set, the
scripts that accept a job, record a commit and end a job are followed by WAITAOF on their connection: it
answers with the number of servers whose append-only file has all that the connection wrote before. In
MULTI and in Lua it does not wait, so all are commands of a plain pipeline.

A replica that is asked before its file is synced answers once more a second later (Redis 7.2 to Valkey
9.1). So WAIT comes first: when it ends, the replica has the write, and WAITAOF asks it for the file.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import redis
import structlog

from kms_core.jobs.store.keys import PREFIX
from kms_core.observability import metrics
from kms_core.redis_client import connect, connect_to
from kms_core.settings.model import RedisSection
from kms_core.settings.redis_urls import CLUSTERS
from kms_protocol.errors import ConfigurationError

_WAITED: Final = f"{PREFIX}waited"
_TRIAL_MS: Final = 3000
_NO_COMMAND: Final = (
    "[kms.redis] wait_replicas needs a server with the command WAITAOF (Redis 7.2 or Valkey), appendonly "
    "yes, and a user who may call it: this one answers {!r}. Change the server or write wait_replicas = 0"
)
_NO_FILE: Final = (
    "[kms.redis] wait_replicas: the replica {} keeps no append-only file: set appendonly yes there, or "
    "write wait_replicas = 0"
)
_LIES: Final = (
    "[kms.redis] wait_replicas: Redis says that {} replicas have a write, and that {} follow it: name the "
    "server itself in [kms.redis] url and no proxy that answers for it, or write wait_replicas = 0"
)
_NO_CLUSTER: Final = (
    "[kms.redis] wait_replicas: a Redis Cluster cannot be waited for: use Sentinel, or write 0"
)
Call = tuple[Any, Sequence[Any], Sequence[Any]]
"""A script of redis-py, its keys and its arguments."""
_log = structlog.get_logger(__name__)


class ReplicaWait:
    """Runs scripts, and reports whether what they wrote was acknowledged. Does not wait for 0 replicas."""

    def __init__(self, client: redis.Redis, section: RedisSection) -> None:
        self._redis = client
        self._section = section

    def run(
        self,
        script: Any,  # noqa: ANN401 -- redis-py has no public type
        keys: Sequence[Any],
        args: Sequence[Any],
        *,
        waits: bool = True,
    ) -> tuple[list[bytes], bool]:
        """The answer of a script, and whether its writes were acknowledged. Raises redis.RedisError.

        Of a script that wrote nothing the second part means nothing: then ask ``confirm``.
        """
        if not waits or not self._section.wait_replicas:
            return script(keys, args), True
        (answer,), confirmed = self.run_together((script, keys, args))
        if isinstance(answer, Exception):
            raise answer
        return answer, confirmed

    def run_together(self, *calls: Call) -> tuple[list[list[bytes] | Exception], bool]:
        """The answers of scripts that are sent together, and whether their writes were acknowledged.

        Redis syncs its file once for all. An error is returned in place of an answer: the others were run.
        """
        *answers, waited = self._followed(*map(_command, calls))
        for at, call in enumerate(calls):
            if isinstance(answers[at], redis.exceptions.NoScriptError):
                call[0].sha = self._redis.script_load(call[0].script)
                answers[at], waited = self._followed(_command(call))
        return answers, self._is_acknowledged(waited)

    def confirm(self) -> bool:
        """Return whether all that Redis held a moment ago was acknowledged. Raises redis.RedisError.

        WAITAOF asks for the writes of its own connection, so something is written first: what came before
        that is acknowledged with it.
        """
        if not self._section.wait_replicas:
            return True
        answer, waited = self._followed(("SET", _WAITED, 1))
        if isinstance(answer, Exception):
            raise answer
        return self._is_acknowledged(waited)

    def _followed(self, *commands: tuple[Any, ...]) -> list[Any]:
        """The answers of the commands, and of WAITAOF; 0 instead of that where nothing is waited for."""
        replicas, wait_ms = self._section.wait_replicas, self._section.wait_ms
        if not replicas:
            return [*_pipelined(self._redis, *commands), 0]
        first_ms = max(1, wait_ms // 4)  # if it is over, the second wait goes on
        wait = ("WAIT", replicas, first_ms), ("WAITAOF", 1, replicas, max(1, wait_ms - first_ms))
        *answers, _, waited = _pipelined(self._redis, *commands, *wait)
        return [*answers, waited]

    def _is_acknowledged(self, waited: object) -> bool:
        if not self._section.wait_replicas:
            return True
        local, replicas = _numbers(waited)
        if local and replicas >= self._section.wait_replicas:
            return True
        _log.warning("redis.unconfirmed", replicas=replicas, wanted=self._section.wait_replicas)
        metrics.REDIS_UNCONFIRMED.inc()
        return False


def verify_replicas(section: RedisSection) -> None:
    """Raise ConfigurationError if this Redis can never acknowledge a write as ``section`` wants it.

    A Redis or a replica that is away is no reason: it may come back. Raises redis.RedisError.
    """
    if not section.wait_replicas:
        return
    if section.url.partition("://")[0] in CLUSTERS:
        raise ConfigurationError(_NO_CLUSTER)
    with connect(section) as client:
        check_answers(client, section.wait_replicas)
        for host, port in _following(client):
            with suppress(redis.RedisError), connect_to(section, host, port) as replica:
                if not replica.info("persistence").get("aof_enabled", 1):
                    raise ConfigurationError(_NO_FILE.format(f"{host}:{port}"))


def check_answers(client: redis.Redis, wanted: int) -> None:
    """Raise ConfigurationError for a server without WAITAOF or its file, or that counts too many replicas."""
    before = len(_following(client))
    written, own, waited = _pipelined(
        client, ("SET", _WAITED, 1), ("WAITAOF", 1, 0, _TRIAL_MS), ("WAITAOF", 1, wanted, 1)
    )
    if isinstance(written, Exception):
        raise written
    if not _numbers(own)[0]:
        raise ConfigurationError(_NO_COMMAND.format(str(own)))
    following = max(before, len(_following(client)))
    if _numbers(waited)[1] > following:
        raise ConfigurationError(_LIES.format(_numbers(waited)[1], following))


def _following(client: redis.Redis) -> list[tuple[str, int]]:
    """Host and port of each replica, as the server knows them."""
    found = client.info("replication")
    rows = [found.get(f"slave{number}", {}) for number in range(int(found.get("connected_slaves", 0)))]
    return [(str(row.get("ip", "")), int(row.get("port", 0))) for row in rows]


def _pipelined(client: redis.Redis, *commands: tuple[Any, ...]) -> list[Any]:
    """Answers or errors of commands that are sent together on one connection."""
    pipe: Any = client.pipeline(transaction=False)
    for command in commands:
        pipe.execute_command(*command)
    return list(pipe.execute(raise_on_error=False))


def _command(call: Call) -> tuple[Any, ...]:
    script, keys, args = call
    return ("EVALSHA", script.sha, len(keys), *keys, *args)


def _numbers(waited: object) -> tuple[int, int]:
    """Local files and replicas of an answer of WAITAOF; zeros for any other answer."""
    if isinstance(waited, list) and len(waited) == 2 and all(type(each) is int for each in waited):  # noqa: PLR2004
        return waited[0], waited[1]
    return 0, 0
