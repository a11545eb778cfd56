"""A RabbitMQ server of the tests' own, by the PATH: on 127.0.0.1, with its own name, ports and folder."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest
from kombu.connection import Connection

from kms_core.jobs.spec import QUEUES
from kms_core.programs import tether
from support.ports import free_port, listens
from support.programs import program
from support.service import Service
from support.waiting import until, until_up

_SERVER: Final = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # the one on the PATH changes the user


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Its URL. It ends with the block, or with this process."""
    folder.mkdir(mode=0o700, parents=True)
    port, names, distribution = (free_port() for _ in range(3))
    (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{port}\n")
    (folder / "enabled_plugins").write_text("[].\n")
    environ = {
        "HOME": str(folder),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/usr/lib/rabbitmq/bin",
        "LANG": "C.UTF-8",
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(names),
        "RABBITMQ_NODENAME": f"kms-{port}@localhost",
        "RABBITMQ_DIST_PORT": str(distribution),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1",
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_CONF_ENV_FILE": "/nonexistent",
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "logs"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the server, which tether can end
    }
    url = f"amqp://guest:guest@127.0.0.1:{port}//"
    with ExitStack() as stack:
        output = stack.enter_context((folder / "output").open("wb"))
        mapper = [program("epmd"), "-port", str(names), "-address", "127.0.0.1"]
        stack.callback(_end, tether.spawn(mapper, env=environ, output=output))
        until(lambda: listens(names), "epmd listens")  # else the server starts one that stays
        process = tether.spawn([_path()], env=environ, output=output)
        stack.callback(_end, process)
        until_up(process, lambda: _answers(url), (folder / "output").read_text)
        yield url


def _path() -> str:
    program("rabbitmq-server")
    return str(_SERVER)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The program and what it started: Erlang has helpers."""
    os.killpg(process.pid, 9)
    process.wait()


def _answers(url: str) -> bool:
    try:
        with Connection(url, connect_timeout=5) as connection:  # type: ignore[no-untyped-call]  # untyped there
            connection.connect()
    except OSError:
        return False
    return True


class OnRabbit(Service):
    """An install whose broker is RabbitMQ; state stays in Redis."""

    def __init__(self, folder: Path, broker: str, settings: str = "") -> None:
        self.broker = broker
        super().__init__(folder, settings)

    @property
    def environ(self) -> dict[str, str]:
        return super().environ | {"KMS_BROKER_URL": self.broker}


@pytest.fixture(scope="session")
def rabbit_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("rabbit") / "server") as url:
        yield url


@pytest.fixture
def rabbit(rabbit_server: str) -> str:
    """The URL of a server for the session, without the queues of the service."""
    with Connection(rabbit_server) as connection:  # type: ignore[no-untyped-call]  # untyped there
        for queue in (*QUEUES, "kms.submit"):
            connection.default_channel.queue_delete(queue)
    return rabbit_server
