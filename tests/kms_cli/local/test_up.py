import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyrage
import pytest
import redis
from kombu.connection import Connection

from kms_cli.local import directories
from kms_cli.main import run
from kms_core.programs import supervisor
from kms_core.programs.liveness import is_alive
from kms_core.programs.supervisor import Child, Supervisor
from support.audit_logs import AuditFolder
from support.ports import free_port
from support.programs import tethered
from support.waiting import WAIT_S, RealTime, until

STAND_INS = Path(__file__).parents[2] / "support/up_children.py"


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@dataclass
class Up:
    """One ``kms up`` with stand-in children, in a session of its own like a job of a shell."""

    state: Path
    port: int
    faults: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.notes_path = self.state.parent / "notes"
        self.notes_path.touch()
        home = {"HOME": "/nonexistent", "PATH": os.environ["PATH"], "STAND_IN_NOTES": str(self.notes_path)}
        with (self.state.parent / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                tethered(sys.executable, STAND_INS, "up", self.state, self.port),
                env={**home, **self.faults},
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
                text=True,
            )

    @property
    def stderr(self) -> str:
        return (self.state.parent / "stderr").read_text()

    def ready_line(self) -> str:
        assert self.process.stdout
        line: str = self.process.stdout.readline()
        assert line, self.stderr
        return line

    def pid(self, name: str) -> int:
        path = self.state / "run" / f"{name}.pid"
        until(path.exists, f"a pid file of {name}")
        return int(path.read_text())

    def pids(self) -> list[int]:
        return [self.pid(name) for name in ("api", "worker", "valkey")]

    def notes(self, name: str, event: str) -> list[dict[str, object]]:
        notes = [json.loads(line) for line in self.notes_path.read_text().splitlines()]
        return [note for note in notes if note["name"] == name and note["event"] == event]

    def ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(WAIT_S)
            finally:
                self.process.kill()
        assert self.process.stdout
        self.process.stdout.close()


Start = Callable[..., Up]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def start(tmp_path: Path, port: int) -> Iterator[Start]:
    started: list[Up] = []

    def start_up(**faults: str) -> Up:
        started.append(Up(tmp_path / "state", port, faults))
        return started[-1]

    yield start_up
    for one in started:
        one.close()


def ready(start: Start, **faults: str) -> Up:
    service = start(**faults)
    service.ready_line()
    return service


def working(start: Start, **faults: str) -> Up:
    """One that is ready and whose worker is up."""
    service = ready(start, **faults)
    until(lambda: service.notes("worker", "start"), "the worker is up")
    return service


def test_the_ready_line_is_all_of_stdout_and_stderr_tells_of_pages_and_redis(
    start: Start, port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``kms config show`` tells the same addresses to others on this machine."""
    service = start()
    assert service.ready_line() == f"kms: ready http://127.0.0.1:{port} (state {service.state})\n"
    until(lambda: "stop with Ctrl-C" in service.stderr, "all is said")

    assert f"curl -s http://127.0.0.1:{port}/api/v1/kms/encrypt" in service.stderr
    assert f"kms: in a browser: http://127.0.0.1:{port}/ui, http://127.0.0.1:{port}/docs\n" in service.stderr
    found = re.search(r"for Celery: export KMS_REDIS_URL='(.+)' KMS_BROKER_URL='(.+)'", service.stderr)
    assert found
    with redis.Redis.from_url(found[1]) as client:
        assert client.ping()
    with Connection(found[2]) as broker:  # type: ignore[no-untyped-call]  # kombu ships no types
        broker.connect()
    monkeypatch.setenv("HOME", "/nonexistent")
    assert run(["config", "show", "--json", "--state-dir", str(service.state)]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = {each["setting"]: each["value"] for each in shown if each["from"] == "kms up, which runs"}
    assert told == {"port": port, "redis.url": found[1], "redis.broker_url": found[2]}
    service.ctrl_c()
    assert service.process.stdout
    assert service.process.stdout.read() == ""


def test_ctrl_c_stops_worker_and_api_together_and_then_valkey(start: Start) -> None:
    service = working(start)
    pids = service.pids()
    socket_dir = directories.runtime_dir(service.state, {})
    assert socket_dir.exists()

    service.ctrl_c()
    status = service.process.wait(WAIT_S)

    assert status == 0
    assert service.notes("worker", "SIGTERM")
    assert service.notes("api", "SIGTERM")
    assert not service.notes("api", "SIGINT")  # the terminal's signal reached the supervisor alone
    assert "bye bye" in (service.state / "log/valkey.log").read_text()
    assert not any(map(runs, pids))
    assert [path.name for path in (service.state / "run").iterdir()] == ["lock"]
    assert not socket_dir.exists()


@pytest.mark.parametrize("name", ["api", "worker", "valkey"])
def test_child_that_dies_is_started_again(start: Start, name: str) -> None:
    service = ready(start)
    first = service.pid(name)

    os.kill(first, signal.SIGKILL)

    until(lambda: service.pid(name) != first, f"another {name}")
    assert f"{name} ended with SIGKILL" in service.stderr
    until(lambda: is_alive("127.0.0.1", service.port), "the API is there")


def test_valkey_that_cannot_read_its_data_says_why(start: Start) -> None:
    service = ready(start)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(WAIT_S) == 0
    (data,) = (service.state / "valkey/appendonlydir").glob("*.incr.aof")
    data.write_bytes(b"not a command\r\n")

    again = start()

    until(lambda: "valkey ended with status 1: " in again.stderr, "it ends")
    why = rf"# Bad file format reading .*{data.name}.*, see {again.state}/log/valkey\.log;"
    assert re.search(why, again.stderr)


def test_what_a_dead_child_had_started_is_gone_before_the_next(start: Start) -> None:
    service = working(start, STAND_IN_WORKER="helped")
    (first,) = service.notes("worker", "start")

    os.kill(int(str(first["pid"])), signal.SIGKILL)

    until(lambda: len(service.notes("worker", "start")) == 2, "another worker")
    assert not runs(int(str(first["helper"])))


def test_child_that_keeps_dying_is_started_later_and_later(start: Start) -> None:
    service = start(STAND_IN_WORKER="7")

    until(lambda: len(service.notes("worker", "start")) >= 6, "six starts")

    ended = [line for line in service.stderr.splitlines() if "worker ended with status 7" in line]
    assert [line.split()[-2] for line in ended][:5] == ["0.05", "0.1", "0.2", "0.4", "0.4"]


@pytest.mark.parametrize("name", ["api", "worker"])
def test_wrong_configuration_of_a_child_stops_everything(start: Start, name: str) -> None:
    service = start(**{f"STAND_IN_{name.upper()}": "78"})

    status = service.process.wait(WAIT_S)

    assert status == 78
    assert f"{name}: leaving" in service.stderr
    assert f"kms: error: {name} refused its configuration" in service.stderr
    assert len(service.notes(name, "start")) == 1
    assert [path.name for path in (service.state / "run").iterdir()] == ["lock"]


def test_second_ctrl_c_kills(start: Start) -> None:
    service = working(start, STAND_IN_WORKER="stubborn")
    pids = service.pids()

    service.ctrl_c()
    until(lambda: service.notes("worker", "SIGTERM"), "the worker was asked")
    RealTime.sleep(0.4)
    service.ctrl_c()
    status = service.process.wait(WAIT_S)

    assert status == 1
    assert not any(map(runs, pids))


def test_child_that_does_not_stop_is_killed_after_its_grace(start: Start) -> None:
    service = working(start, STAND_IN_WORKER="stubborn")

    service.process.send_signal(signal.SIGTERM)
    until(lambda: service.notes("api", "SIGTERM"), "the API does not wait for the worker")
    assert runs(service.pid("worker"))
    status = service.process.wait(WAIT_S)

    assert status == 0
    assert "worker did not stop in 2 s; killing it" in service.stderr


def test_children_die_with_the_supervisor_and_the_state_is_free(start: Start) -> None:
    service = ready(start)
    pids = service.pids()

    service.process.kill()
    service.process.wait(WAIT_S)

    until(lambda: not any(map(runs, pids)), "all are gone")
    assert start().ready_line().startswith("kms: ready")


def test_second_up_on_one_state_is_refused(start: Start) -> None:
    first = ready(start)

    second = start()

    assert second.process.wait(WAIT_S) == 73
    holder = int((first.state / "run/lock").read_text())
    assert f"kms up already runs with {first.state} (process {holder}): stop it" in second.stderr
    assert os.getpgid(holder) == os.getpgid(first.process.pid)
    assert is_alive("127.0.0.1", first.port)


def test_named_redis_is_used_and_none_is_started(start: Start, redis_url: str) -> None:
    service = ready(start, KMS_REDIS_URL=redis_url)
    (api,) = service.notes("api", "start")

    assert isinstance(api["env"], dict)
    assert api["env"]["KMS_REDIS_URL"] == redis_url
    assert not (service.state / "valkey").exists()


def test_dev_keys_are_made_once_and_fit(start: Start) -> None:
    """A public key that is missing is written from the private one."""
    service = ready(start)
    service.close()
    private, public = service.state / "age/private_key.txt", service.state / "age/public_key.txt"
    made, recipient = private.read_text(), public.read_text()
    again = ready(start)
    again.close()
    recorded = [(line["operation"], line["stage"]) for line in AuditFolder(service.state).operations()]
    assert recorded == [("key.create", "intent"), ("key.create", "outcome")]
    public.unlink()

    start().ready_line()

    assert (private.read_text(), public.read_text()) == (made, recipient)
    created, shown, secret = made.splitlines()
    assert created.startswith("# created: 20")
    assert f"{shown}\n" == f"# public key: {recipient}"
    assert f"{pyrage.x25519.Identity.from_str(secret).to_public()}\n" == recipient
    modes = {path.stat().st_mode & 0o777 for path in (private, service.state / "spool.key")}
    assert modes == {0o600}


def test_prod_gets_no_keys(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "kms.toml"
    config.write_text(
        '[kms.auth]\nmode = "none"\n[kms.cosmian]\nserver_url = "https://127.0.0.1:1"\n'
        'api_key = "${COSMIAN_API_KEY}"\n'
    )
    service = ready(start, PROVISIONING_ENV="prod", KMS_CONFIG=str(config), COSMIAN_API_KEY="x")

    assert not (service.state / "age").exists()
    assert not (service.state / "spool.key").exists()


def test_state_is_for_the_user_alone(start: Start) -> None:
    service = ready(start)

    made = [service.state, *(path for path in service.state.rglob("*") if not path.is_symlink())]
    assert [path.name for path in made if path.stat().st_mode & 0o077] == ["audit-signing.pub"]


def test_a_child_runs_although_its_pid_and_messages_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk."""
    child = Supervisor(Child("api", ["/bin/sleep", "60"], lambda: True), tmp_path / "gone")
    with suppress(OSError), Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        supervisor.say("it does not fit")
        child.tick()

    assert (child.alive, child.was_ready) == (True, True)
    child.kill()
    assert not child.alive
