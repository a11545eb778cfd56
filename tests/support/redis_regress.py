"""Redis as it is after a fail-over: some seconds back in time."""

from dataclasses import dataclass
from typing import Any, Self

Client = Any
"""A ``redis.Redis``, whose annotations cover asynchronous clients too."""


@dataclass(frozen=True)
class Snapshot:
    """All keys of a database as they were: values by DUMP, expiry in ms since the epoch or 0."""

    client: Client
    keys: dict[bytes, tuple[bytes, int]]

    @classmethod
    def of(cls, client: Client) -> Self:
        names = list(client.scan_iter())
        found = {name: (client.dump(name), max(0, client.pexpiretime(name))) for name in names}
        return cls(client, {name: kept for name, kept in found.items() if kept[0]})  # others have expired

    def restore(self) -> None:
        """Bring these keys back, and no others."""
        pipeline = self.client.pipeline(transaction=True)
        for name in list(self.client.scan_iter()):
            pipeline.delete(name)
        for name, (value, expires_ms) in self.keys.items():
            pipeline.restore(name, expires_ms, value, replace=True, absttl=bool(expires_ms))
        pipeline.execute()
