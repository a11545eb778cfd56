"""A client of a Redis Cluster that keeps every key in one slot, and follows the node that holds it.

A script of the jobs uses many keys, which a cluster allows within a slot only. So each key that begins with
``kms:`` is sent as ``{kms}:``: the hash tag decides its slot (Redis Cluster specification, "Hash tags"). A
connection pool to one node then does: pipelines, transactions, scripts and WAIT work as on a server of its
own. The other nodes stand by for a fail-over.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import redis
import redis.sentinel
from redis.backoff import ConstantBackoff, NoBackoff
from redis.connection import SSLConnection
from redis.crc import key_slot
from redis.exceptions import MovedError
from redis.retry import Retry

PREFIX: Final = "kms:"
TAGGED: Final = "{kms}:"
_SLOT: Final = key_slot(TAGGED.encode())
_ASK_S: Final = 2.0
_TOLD_S: Final = 1.0  # until all nodes know, at the latest
_PAUSE_S: Final = 0.1
_TRIES: Final = 5
_ONCE: Final = Retry(NoBackoff(), 0)
_KEYS_ONLY: Final = frozenset({"DEL", "EXISTS", "MGET", "SUNION", "TOUCH", "UNLINK", "WATCH"})
_SCRIPTS: Final = frozenset({"EVAL", "EVALSHA"})
Host = tuple[str, int]
Command = tuple[Any, ...]


def tagged(command: Command) -> Command:
    """A command with the hash tag in its keys. Its values stay as they are."""
    name, first, last = str(command[0]).upper(), 1, 2
    if name in _KEYS_ONLY:
        last = len(command)
    elif name in _SCRIPTS:
        first, last = 3, 3 + int(command[2])
    keys = [
        TAGGED + part.removeprefix(PREFIX) if isinstance(part, str) and part.startswith(PREFIX) else part
        for part in command[first:last]
    ]
    return (*command[:first], *keys, *command[last:])


class SlotMoved(redis.ConnectionError):
    """Another node holds the slot now, and has to be asked: this one did nothing."""


class SlotConnection(redis.sentinel.SentinelManagedConnection):
    """A connection to the node that holds the slot; it is closed when the slot has moved."""

    def send_command(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 -- of redis-py
        super().send_command(*tagged(args), **kwargs)  # type: ignore[no-untyped-call]  # untyped there

    def pack_commands(self, commands: Sequence[Command]) -> list[bytes]:
        return super().pack_commands([tagged(one) for one in commands])  # type: ignore[no-untyped-call, no-any-return]  # as above

    def read_response(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- of redis-py
        """Read an answer. Any error closes the connection, which is not so where Sentinels manage it."""
        plain = super(redis.sentinel.SentinelManagedConnection, self)
        try:
            return plain.read_response(*args, **kwargs)  # type: ignore[attr-defined]  # of the class behind it
        except MovedError as exc:
            self.disconnect()  # type: ignore[no-untyped-call]  # as above
            self.host, self.port = exc.host or self.host, exc.port  # where the same command is tried again
            self.connection_pool.sentinel_manager.moved(self.host, self.port)
            raise SlotMoved("Another node of the cluster holds the keys now") from exc


class SlotConnectionTls(SlotConnection, SSLConnection):
    """A connection over TLS."""


class SlotHolder:
    """Finds the node that holds the slot, where Sentinels would find a master."""

    def __init__(self, hosts: Sequence[Host], options: Mapping[str, Any]) -> None:
        own = {**options, "socket_timeout": _ASK_S, "socket_connect_timeout": _ASK_S, "retry": _ONCE}
        self._told: tuple[Host, float] | None = None
        self._nodes = [(host, redis.Redis(host, port, **own)) for host, port in hosts]

    def moved(self, host: str, port: int) -> None:
        """Note what a node said that gave the slot away: it knows the new holder before others do."""
        self._told = (host, port), time.monotonic() + _TOLD_S

    def discover_master(self, _: str) -> Host:
        """The address of the node. Raises redis.ConnectionError if no node of the URL tells one."""
        if self._told and time.monotonic() < self._told[1]:
            return self._told[0]
        trouble: redis.RedisError | None = None
        for host, node in self._nodes:
            try:
                slots = node.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]  # untyped there
            except redis.RedisError as exc:
                trouble = exc
                continue
            for begin, end, master, *_replicas in slots:
                if begin <= _SLOT <= end:
                    named = (master[0] or b"").decode()  # empty: as the client knows it
                    return (host if named in {"", "?"} else named), int(master[1])
        raise redis.ConnectionError(f"No node tells which one holds slot {_SLOT}") from trouble


def client(hosts: Sequence[Host], options: Mapping[str, Any]) -> redis.Redis:
    """A client with these options of redis-py. Connects at the first command."""
    tls = "ssl_cert_reqs" in options
    pool = redis.sentinel.SentinelConnectionPool(  # type: ignore[no-untyped-call]  # untyped there
        "kms",
        SlotHolder(hosts, {**options, "ssl": True} if tls else options),
        connection_class=SlotConnectionTls if tls else SlotConnection,
        retry=Retry(ConstantBackoff(_PAUSE_S), _TRIES, (SlotMoved,)),
        **options,
    )
    return redis.Redis(connection_pool=pool)
