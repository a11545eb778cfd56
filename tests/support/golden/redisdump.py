"""Keys of Redis as JSON and back, by type and not as RDB, whose format depends on the server."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from support.golden.manifest import Json, b64, unb64

PREFIX: Final = "kms:*"
Client = Any
"""A ``redis.Redis``, whose annotations cover asynchronous clients too."""


def dumped(client: Client) -> Json:
    """All keys of the service, with their expiry in ms since the epoch where they have one."""
    found: Json = {}
    for raw in sorted(client.scan_iter(match=PREFIX)):
        name = raw.decode()
        kind = client.type(name).decode()
        found[name] = {"type": kind, "value": _READERS[kind](client, name)}
        expires: int = client.pexpiretime(name)
        if expires > 0:
            found[name]["expires_ms"] = expires
    return found


def loaded(client: Client, dump: Mapping[str, Any]) -> None:
    """Write the keys of a dump into an empty database."""
    for name, held in dump.items():
        _WRITERS[held["type"]](client, name, held["value"])
        if "expires_ms" in held:
            client.pexpireat(name, held["expires_ms"])


def _score(value: float) -> str:
    return repr(value) if math.isfinite(value) else str(value)


_READERS: Final[Mapping[str, Callable[[Client, str], Any]]] = {
    "string": lambda client, name: b64(client.get(name)),
    "hash": lambda client, name: {
        field.decode(): b64(value) for field, value in sorted(client.hgetall(name).items())
    },
    "list": lambda client, name: [b64(one) for one in client.lrange(name, 0, -1)],
    "set": lambda client, name: [b64(one) for one in sorted(client.smembers(name))],
    "zset": lambda client, name: [
        [b64(one), _score(score)] for one, score in client.zrange(name, 0, -1, withscores=True)
    ],
    "stream": lambda client, name: [
        [entry.decode(), {field.decode(): b64(value) for field, value in fields.items()}]
        for entry, fields in client.xrange(name)
    ],
}
_WRITERS: Final[Mapping[str, Callable[[Client, str, Any], object]]] = {
    "string": lambda client, name, value: client.set(name, unb64(value)),
    "hash": lambda client, name, value: client.hset(
        name, mapping={field: unb64(text) for field, text in value.items()}
    ),
    "list": lambda client, name, value: client.rpush(name, *map(unb64, value)),
    "set": lambda client, name, value: client.sadd(name, *map(unb64, value)),
    "zset": lambda client, name, value: client.zadd(name, {unb64(one): float(score) for one, score in value}),
    "stream": lambda client, name, value: [
        client.xadd(name, {field: unb64(text) for field, text in fields.items()}, id=entry)
        for entry, fields in value
    ],
}
