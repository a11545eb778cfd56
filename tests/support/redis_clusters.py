"""A Redis Cluster of the machine's ``redis-server``: masters on 127.0.0.1, and one replica."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis
from redis.crc import key_slot

from support.ports import free_port, listens
from support.programs import program, running
from support.waiting import until

SLOTS: Final = 16384
SLOT: Final = key_slot(b"{kms}")
_NODE_TIMEOUT_MS: Final = 1000


@dataclass(frozen=True)
class Node:
    """One node, with the port of its bus."""

    port: int
    bus: int
    process: subprocess.Popen[bytes]

    @property
    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=5)

    def ask(self, *words: object) -> Any:  # noqa: ANN401 -- each command has its own answer
        return self.client.execute_command(*words)  # type: ignore[no-untyped-call]  # untyped there

    @property
    def id(self) -> str:
        return str(self.ask("CLUSTER MYID").decode())

    @property
    def cluster_state(self) -> str:
        """The state of the cluster, as this node sees it."""
        found = self.ask("CLUSTER INFO")
        return str(found["cluster_state"] if isinstance(found, dict) else found)


@dataclass(frozen=True)
class Cluster:
    """Masters in order of their slots, and the replica of the one that holds the keys of jobs."""

    masters: list[Node]
    replica: Node | None

    @property
    def holder(self) -> Node:
        return self.masters[SLOT * len(self.masters) // SLOTS]

    @property
    def url(self) -> str:
        """It names the first two nodes only: the others are found by them."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.masters[:2])


@contextmanager
def cluster(folder: Path, masters: int, *, replica: bool = False) -> Iterator[Cluster]:
    """A cluster that has formed."""
    with ExitStack() as stack:
        nodes = [stack.enter_context(_node(folder / f"node-{n}")) for n in range(masters + replica)]
        made = Cluster(nodes[:masters], nodes[masters] if replica else None)
        for number, node in enumerate(made.masters):
            first, last = (at * SLOTS // masters for at in (number, number + 1))
            node.ask("CLUSTER ADDSLOTSRANGE", first, last - 1)
        for number, node in enumerate(nodes):
            node.ask("CLUSTER SET-CONFIG-EPOCH", number + 1)
            if number:
                nodes[0].ask("CLUSTER MEET", "127.0.0.1", node.port, node.bus)
        until(lambda: all(node.cluster_state == "ok" for node in nodes), "the cluster has formed")
        if made.replica:
            until(lambda: _follows(made), "the replica follows")
        yield made


def _follows(made: Cluster) -> bool:
    assert made.replica
    try:
        made.replica.ask("CLUSTER REPLICATE", made.holder.id)
    except redis.ResponseError:  # it has not heard of that node yet
        return False
    return bool(made.holder.client.info("replication")["connected_slaves"] == 1)


@contextmanager
def standalone(folder: Path) -> Iterator[Node]:
    """A server that is no part of a cluster."""
    with _node(folder, enabled="no") as node:
        yield node


@contextmanager
def _node(folder: Path, enabled: str = "yes") -> Iterator[Node]:
    folder.mkdir(parents=True)
    port, bus = free_port(), free_port()
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": ""}
    options |= {"cluster-enabled": enabled, "cluster-port": bus, "cluster-node-timeout": _NODE_TIMEOUT_MS}
    options |= {"appendonly": "yes", "appendfsync": "always"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with running([program("redis-server"), *words], folder / "log", lambda: listens(port)) as process:
        yield Node(port, bus, process)
