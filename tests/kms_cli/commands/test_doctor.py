"""What ``kms doctor`` says of an install in which something is really broken, and with which exit code."""

import ast
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Final
from unittest.mock import MagicMock

import click
import msgspec
import pytest
import redis

from kms_cli.commands import doctor as doctor_command
from kms_cli.commands.doctor import MAX_VERIFIED_BYTES, Finding
from kms_cli.local import valkey
from kms_cli.session import META
from kms_core.settings.load import load
from kms_protocol.admin import StatusOut
from support.cli.doctor import DoctorReport, told_by
from support.credentials import Authority
from support.openapi_check import example_of
from support.ports import free_port, listens
from support.programs import running
from support.scripted_servers import scripted
from support.service import Service
from support.small_disk import small_disk
from support.waiting import WAIT_S, until

NO_REDIS: Final = "unix:///nonexistent/valkey.sock"
PROD: Final = 'allow_age_in_prod = true\nprod_backend = "age"\n[kms.auth]\nmode = "required"\n'
ROOT: Final = Path(__file__).parents[3]
NOBODY: Final = 65534


def command(install: Service, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return install.run_kms(*words, KMS_SERVICE_URL=install.url, **environ)


def doctor(install: Service, **environ: str) -> DoctorReport:
    return told_by(command(install, "doctor", "--json", **environ))


def configured(folder: Path, settings: str = "", redis: str = NO_REDIS) -> Service:
    """Keys and settings, and nothing that runs."""
    return Service(folder, settings, redis)


@pytest.fixture
def install(tmp_path: Path) -> Service:
    return configured(tmp_path)


# -- a service at work -------------------------------------------------------------------------------


def at_work(service: Service) -> tuple[int, int]:
    """Workers, and jobs that wait."""
    status = service.get("/status").json()
    return status["workers"], status["queue_depth"]


def test_of_a_service_at_work_nothing_fails(service: Service) -> None:
    service.encrypt(b"a record for the trail")
    until(lambda: at_work(service) == (1, 0), "the worker runs, and jobs of other tests have ended")
    told = doctor(service)

    assert told.failed == set()
    assert told.exit_code == 0
    assert "of them newer than the last checkpoint" in told.at("audit log", "ok")
    assert "Valkey" in told.at("redis", "ok")
    assert told.at("redis aof", "ok")
    assert told.at("clock", "ok")
    assert "1 workers, 0 jobs waiting, spool 0% full" in told.at("jobs", "ok")


def test_lines_for_people_say_what_lines_for_programs_say(service: Service) -> None:
    ran = command(service, "doctor")

    assert ran.returncode == 0
    assert re.search(r"^ok    self-test     default \(age\) wraps and unwraps$", ran.stdout, re.MULTILINE)


def test_a_service_without_workers_and_one_without_redis_say_so(
    no_worker: Service, no_redis: Service
) -> None:
    assert "start kms-worker" in str(doctor(no_worker).all("service", "warn"))
    told = doctor(no_redis)
    assert "Redis does not answer" in str(told.all("service", "warn"))
    assert "nothing answers at /nonexistent/valkey.sock" in told.at("redis", "FAIL")
    assert told.exit_code == 69


def test_a_service_that_is_not_there(install: Service) -> None:
    told = doctor(install)

    assert told.failed == {"redis", "service"}
    assert told.exit_code == 69
    assert "kms up" in told.at("service", "FAIL")


def test_a_trail_that_was_changed_under_a_service_fails_there_and_here(tmp_path: Path) -> None:
    with Service(tmp_path, redis=NO_REDIS) as running:
        running.start("api").encrypt(b"one")
        file = next((running.state / "audit").glob("*.jsonl"))
        file.write_bytes(file.read_bytes().replace(b'"operation":"encrypt"', b'"operation":"decrypt"'))
        until(lambda: "audit_chain" in running.get("/status").json()["degraded"], "it is noticed")
        told = doctor(running)

    assert "edited" in told.at("audit log", "FAIL")
    assert "its audit log was changed" in told.at("service", "FAIL")
    assert told.exit_code == 78


# -- settings and keys -------------------------------------------------------------------------------


TRANSIT: Final = '[kms.transit]\naddress = "http://127.0.0.1:9"\nkey_name = "k"\ntoken = "t"\ntimeout_s = 1.0'


@pytest.mark.parametrize(
    ("settings", "subject", "told", "code"),
    [
        ("prot = 1", "settings", 'did you mean "port"?', 78),
        (f'dev_backend = "transit"\n{TRANSIT}', "self-test", "does not wrap and unwrap", 69),
        ('[kms.redis]\nbroker_url = "amqp://127.0.0.1:9"', "broker", "nothing answers at 127.0.0.1:9", 69),
    ],
    ids=["wrong", "a backend that is away", "a broker that is away"],
)
def test_what_is_away_is_not_a_wrong_setting(
    install: Service, settings: str, subject: str, told: str, code: int
) -> None:
    install.config.write_text(f"[kms]\n{settings}\n")
    found = doctor(install)

    assert told in found.at(subject, "FAIL")
    assert found.exit_code == code


@pytest.mark.parametrize(
    ("environment", "level", "weak", "missing"),
    [
        ("dev", "warn", "audit.signing_key_path", "in dev the service makes it"),
        ("prod", "FAIL", "chmod 600", "kms keygen -o"),
    ],
)
def test_keys_of_the_service_that_others_may_read_or_that_are_not_there(
    tmp_path: Path, environment: str, level: str, weak: str, missing: str
) -> None:
    install = configured(tmp_path, PROD)
    recorded(install)
    (install.state / "audit-signing.key").chmod(0o644)
    (install.state / "spool.key").unlink()
    told = doctor(install, PROVISIONING_ENV=environment)

    assert weak in told.at("weak", level)
    assert missing in told.at("own keys", level)
    assert environment == "dev" or told.exit_code == 78


def test_a_key_server_that_is_silent_has_a_next_step(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        transit = f'[kms.transit]\naddress = "http://{where}"\ntoken = "t"\ntimeout_s = 1.0\n'
        keys = '[kms.keys.root]\nuri = "transit:root"\nuse = "seal"\n[kms.keys.pay]\nuri = "transit:pay"\n'
        told = doctor(configured(tmp_path, transit + keys))

    what = f"No answer from OpenBao or Vault at {where} within 1 s"
    then = "start or unseal it, or check kms.transit.address and the network"
    assert told.all("self-test", "FAIL") == [
        f"{name} (transit) does not wrap and unwrap: {what}: {then}" for name in ("pay", "root key 'root'")
    ]


def test_key_servers_are_asked_at_the_same_time(tmp_path: Path) -> None:
    """Else each one that is frozen delays the tests of the others by its whole timeout."""
    asked: set[str] = set()
    all_asked = Event()

    def answer(connection: socket.socket) -> None:
        head = connection.recv(65536).decode()
        asked.update(name for name in ("root", "pay") if f"/keys/{name} " in head)
        if len(asked) == 2:
            all_asked.set()
        all_asked.wait(WAIT_S)
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with scripted(answer) as server:
        transit = f'[kms.transit]\naddress = "{server.url}"\ntoken = "t"\ntimeout_s = 5.0\n'
        keys = '[kms.keys.root]\nuri = "transit:root"\nuse = "seal"\n[kms.keys.pay]\nuri = "transit:pay"\n'
        told = doctor(configured(tmp_path, transit + keys))

    failed = told.all("self-test", "FAIL")
    assert [text.partition(" (")[0] for text in failed] == ["pay", "root key 'root'"]
    assert "No answer" not in str(failed)


def test_a_token_file_that_is_not_there(install: Service) -> None:
    told = doctor(install, KMS_TOKEN_FILE="/nonexistent/my.token")

    assert "Cannot read the token file" in told.at("service", "FAIL")


# -- the trail ---------------------------------------------------------------------------------------


def recorded(install: Service) -> Path:
    """A trail of one file, closed."""
    create = ("token", "create", "--name", "a", "--scope", "*", "-o", str(install.logs / "a.token"))
    assert command(install, *create).returncode == 0
    return next((install.state / "audit").glob("*.jsonl"))


def test_a_closed_trail_is_verified_to_its_newest_checkpoint(install: Service) -> None:
    recorded(install).with_name("link.jsonl").symlink_to("nowhere")

    told = doctor(install).at("audit log", "warn")
    assert "lines are intact, 0 of them newer than the last checkpoint" in told
    assert "an older copy of it would not be noticed: Redis" in told


def test_a_trail_that_was_edited_or_cut(install: Service) -> None:
    file = recorded(install)
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"principal"', b'"princepal"'))
    told = doctor(install)
    assert "kms audit verify" in told.at("audit log", "FAIL")
    assert told.exit_code == 78

    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert "a chain has no end" in doctor(install).at("audit log", "warn")


def test_a_large_trail_is_left_to_its_own_command(install: Service) -> None:
    file = recorded(install)
    with (file.parent / "large.jsonl").open("wb") as large:
        large.truncate(MAX_VERIFIED_BYTES + 1)  # takes no room on the disk
    assert "`kms audit verify` checks it" in doctor(install).at("audit log", "ok")


def test_a_trail_that_takes_no_record(tmp_path: Path) -> None:
    install = configured(tmp_path, '[kms.audit]\npath = "/proc"\n')

    assert doctor(install).at("audit", "FAIL" if os.geteuid() == 0 else "warn")


# -- room and certificates ---------------------------------------------------------------------------


def test_a_spool_and_a_trail_without_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8 * 1024 * 1024) as disk:
        for name in ("spool", "audit"):
            (disk / name).mkdir()
        settings = f'[kms.jobs]\nspool_dir = "{disk}/spool"\n[kms.audit]\npath = "{disk}/audit"\n'
        told = doctor(configured(tmp_path, settings))

    assert "free space" in told.at("spool", "FAIL")
    assert "free space" in told.at("audit", "FAIL")
    assert told.exit_code == 78


def with_certificate(folder: Path, lasts: timedelta) -> Service:
    pair = Authority(folder).issue("tls", server=True, lasts=lasts)
    return configured(folder, f'[kms.server]\ntls_cert = "{pair.cert}"\ntls_key = "{pair.key}"\n')


@pytest.mark.parametrize(
    ("lasts", "level"),
    [(timedelta(minutes=-30), "FAIL"), (timedelta(days=5), "warn"), (timedelta(days=300), "ok")],
    ids=["expired", "soon", "fine"],
)
def test_a_certificate_has_an_end(tmp_path: Path, lasts: timedelta, level: str) -> None:
    assert "valid until" in doctor(with_certificate(tmp_path, lasts)).at("certificate", level)


def test_a_certificate_that_is_none_and_a_key_that_others_read(tmp_path: Path) -> None:
    install = with_certificate(tmp_path, timedelta(days=90))
    (tmp_path / "tls.crt").write_text("no certificate")
    (tmp_path / "tls.key").chmod(0o644)
    told = doctor(install)

    assert "contains no certificate" in told.at("certificate", "FAIL")
    assert "server.tls_key" in told.at("weak", "warn")


# -- Redis and ports ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server that forgets what it is told, and what it should keep."""
    folder, port = tmp_path_factory.mktemp("weak"), free_port()
    binary = valkey.find_binary(os.environ)
    weak = "--bind 127.0.0.1 --appendonly no --maxmemory 64mb --maxmemory-policy allkeys-lru"
    argv = [binary, "--port", port, "--dir", folder, "--save", "", *weak.split()]
    with running(argv, folder / "log", lambda: listens(port)):
        yield port


def test_a_redis_that_forgets(tmp_path: Path, weak: int) -> None:
    install = configured(tmp_path, "", f"redis://127.0.0.1:{weak}/0")
    told = doctor(install)

    assert "appendonly yes" in told.at("redis aof", "warn")
    assert "maxmemory-policy allkeys-lru" in told.at("redis memory", "FAIL")
    assert told.exit_code == 78
    with redis.Redis(port=weak) as admin:
        admin.config_set("appendonly", "yes")
        admin.config_set("maxmemory-policy", "noeviction")
        try:
            assert "everysec" in doctor(install).at("redis aof", "warn")
            admin.config_set("appendfsync", "always")
            assert doctor(install).at("redis aof", "ok")
        finally:
            admin.config_set("maxmemory-policy", "allkeys-lru")
            admin.config_set("appendonly", "no")


def test_a_redis_that_is_a_replica_or_lets_nobody_in(tmp_path: Path, weak: int) -> None:
    install = configured(tmp_path, "", f"redis://127.0.0.1:{weak}/0")
    with redis.Redis(port=weak) as admin:
        admin.replicaof("127.0.0.1", str(free_port()))
        assert "is a replica" in doctor(install).at("redis", "FAIL")
        admin.replicaof("NO", "ONE")
    wrong = configured(tmp_path / "wrong", "", f"redis://someone:hunter2@127.0.0.1:{weak}/0")
    told = doctor(wrong)

    assert "check user and password" in told.at("redis", "FAIL")
    assert "hunter2" not in str(told.lines)


def test_a_redis_that_refuses_this_machine_is_not_called_silent(tmp_path: Path) -> None:
    """As one without a password of its default user answers from afar: its protected mode."""

    def refuse(near: socket.socket) -> None:
        near.recv(65536)
        near.sendall(b"-DENIED Redis is running in protected mode. In this mode it tells much more.\r\n")

    with scripted(refuse) as server:
        told = doctor(configured(tmp_path, "", f"redis://{server.address}/0"))

    assert "answers with an error: DENIED Redis is running in protected mode" in told.at("redis", "FAIL")
    assert "protected-mode of the server" in told.at("redis", "FAIL")
    assert told.exit_code == 69


def test_a_clock_that_differs_from_that_of_redis(tmp_path: Path, weak: int) -> None:
    def hurry(near: socket.socket) -> None:
        """Pass on what the server says; the seconds of TIME are 300 more."""
        with socket.create_connection(("127.0.0.1", weak)) as far:
            while asked := near.recv(65536):
                far.sendall(asked)
                told = far.recv(65536)
                while told.count(b"\r\n") < 2 and told[:1] in b"$*":
                    told += far.recv(65536)
                later = re.sub(rb"(?<=^\*2\r\n\$10\r\n)\d+", lambda at: b"%d" % (int(at[0]) + 300), told)
                near.sendall(later)

    with scripted(hurry) as server:
        told = doctor(configured(tmp_path, "", f"redis://{server.address}/0"))

    assert re.match(r"the clock of Redis is \d{3} s ahead", told.at("clock", "FAIL"))


# -- what the service says of itself -----------------------------------------------------------------


ROOT_DOWN: Final = {"key_id": "root", "backend": "transit", "root": True, "since": "2027-01-31T12:00:00Z"}


@pytest.mark.parametrize(
    ("told", "level", "said"),
    [
        ({"degraded": ["spool"]}, "warn", "kms job release"),
        ({"degraded": ["install"]}, "FAIL", "another install uses"),
        ({"degraded": ["named_in_a_later_version"]}, "warn", "named_in_a_later_version is degraded"),
        (
            {"backends_down": [ROOT_DOWN]},
            "FAIL",
            "root key 'root' (transit) is down since 2027-01-31T12:00:00Z",
        ),
        (
            {"backends_down": [ROOT_DOWN | {"key_id": "pay", "root": False}]},
            "FAIL",
            "key pay (transit) is down since",
        ),
        ({"worker_versions": {"0.2.9": 1}}, "warn", "processes of it are 0.2.9, "),
        ({"api_versions": {"0.2.9": 1}}, "warn", "processes of it are 0.2.9, "),
    ],
)
def test_what_the_service_calls_degraded_is_a_line(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, object], level: str, said: str
) -> None:
    client = MagicMock()
    status = msgspec.convert(example_of(StatusOut) | told, StatusOut)
    client.__enter__.return_value.status.return_value = status
    monkeypatch.setattr(doctor_command, "connect", lambda **_: client)
    with click.Context(click.Command("kms")):
        found = list(doctor_command._service(None))  # noqa: SLF001 -- without the checks of this machine

    (line,) = [each for each in found if each.level != "ok"]
    assert (line.level, said in f"{line.text}: {line.next}") == (level, True)


def test_a_service_that_is_alive_and_gives_no_status_is_called_running() -> None:
    """As one whose Redis has just begun to hang: to start it would not help."""

    def answer(connection: socket.socket) -> None:
        if b"/livez" in connection.recv(65536):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n")

    with scripted(answer) as service, click.Context(click.Command("kms")) as ctx:
        ctx.meta[f"{META}url"] = service.url
        (line,) = doctor_command._service(None)  # noqa: SLF001 -- without the checks of this machine

    assert (line.level, line.away) == ("FAIL", True)
    assert line.text.startswith(f"{service.url} runs, but gives no status: ")
    assert "kms up" not in line.next


def test_a_redis_that_hangs_is_not_called_absent(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        told = doctor(configured(tmp_path, "", f"redis://127.0.0.1:{silent.getsockname()[1]}/0"))

    assert "does not answer in time" in told.at("redis", "FAIL")


# -- this machine, as a user who may not see all of it -----------------------------------------------


@pytest.fixture
def closed() -> Iterator[Path]:
    """A directory that may not be entered, and a user for whom modes of files count."""
    home = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR", "/tmp")))
    home.chmod(0o777)
    before = os.geteuid()
    os.seteuid(before or NOBODY)
    try:
        (home / "closed").mkdir(mode=0)
        yield home / "closed"
    finally:
        os.seteuid(before)
        (home / "closed").chmod(0o700)
        shutil.rmtree(home)


def findings(closed: Path, key: str, value: str) -> list[Finding]:
    section, _, name = f"kms.{key}".rpartition(".")
    config = closed.with_name("kms.toml")
    config.write_text(f'[{section}]\n{name} = "{value}"\n')
    with click.Context(click.Command("kms")):
        return list(doctor_command.findings(load(config, {"HOME": str(closed.parent)})))


def test_an_audit_log_below_a_directory_that_may_not_be_entered_ends_no_doctor(closed: Path) -> None:
    found = findings(closed, "audit.path", f"{closed}/audit")

    (told,) = [each for each in found if each.subject == "audit log"]
    assert (told.level, told.text) == ("FAIL", f"{closed}/audit: Permission denied")


@pytest.mark.parametrize("key", ["state_dir", "jobs.spool_dir", "audit.signing_key_path"])
def test_a_check_that_may_not_see_its_files_keeps_no_other_from_being_made(closed: Path, key: str) -> None:
    """Such as those of the state directory of the service, for another user."""
    found = findings(closed, key, f"{closed}/x")

    assert found[-1].subject == "redis"
    assert any(each.level == "FAIL" and "ermission denied" in each.text for each in found)


# -- the page ----------------------------------------------------------------------------------------


def subjects(path: Path) -> Iterator[str]:
    """What the lines of a module are about: the second argument of the calls that make them."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Call(func=ast.Name(id="Finding"), args=[_, ast.Constant(subject), *_]):
                yield str(subject)


def test_the_page_explains_every_line() -> None:
    told = {*subjects(ROOT / "src/kms_cli/commands/doctor.py"), "keys", "state", "spool", "audit"}
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8").partition("## By line")[2]
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)

    assert len(told) > 20
    assert {name for row in rows for name in re.findall("`(.*?)`", row)} == told
