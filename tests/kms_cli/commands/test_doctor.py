"""What ``kms doctor`` says of an install in which something is really broken, and with which exit code."""

import ast
import json
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from unittest.mock import MagicMock

import click
import msgspec
import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from kms_cli.commands import doctor as doctor_command
from kms_cli.commands.doctor import MAX_VERIFIED_BYTES
from kms_cli.local import installation
from kms_core.programs import tether
from kms_protocol.admin import StatusOut
from support.cli.fixtures import BIN
from support.ports import free_port
from support.service import Service
from support.small_disk import small_disk
from support.waiting import until

NO_REDIS: Final = "unix:///nonexistent/valkey.sock"
PROD: Final = 'allow_age_in_prod = true\nprod_backend = "age"\n[kms.auth]\nmode = "required"\n'
ROOT: Final = Path(__file__).parents[3]
TIMEOUT_S: Final = 60


@dataclass(frozen=True)
class Told:
    """The lines of one run, and its exit code."""

    lines: list[dict[str, str]]
    exit_code: int

    def at(self, subject: str, level: str) -> str:
        """Text and next step of the one line about a subject with this level."""
        found = [line for line in self.lines if (line["subject"], line["level"]) == (subject, level)]
        assert len(found) == 1, self.lines
        return f"{found[0]['text']}: {found[0]['next']}"

    def all(self, subject: str, level: str) -> str:
        """Texts and next steps of all lines about a subject with this level."""
        found = [line for line in self.lines if (line["subject"], line["level"]) == (subject, level)]
        return "\n".join(f"{line['text']}: {line['next']}" for line in found)

    @property
    def failed(self) -> set[str]:
        return {line["subject"] for line in self.lines if line["level"] == "FAIL"}


def command(install: Service, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    given = install.environ | {"KMS_SERVICE_URL": install.url, **environ}
    return subprocess.run(
        [BIN / "kms", *arguments],
        env=given,
        cwd=install.logs,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def doctor(install: Service, **environ: str) -> Told:
    ran = command(install, "doctor", "--json", **environ)
    assert not ran.stderr
    return Told([json.loads(line) for line in ran.stdout.splitlines()], ran.returncode)


@pytest.fixture
def install(tmp_path: Path) -> Service:
    """Keys and settings, and nothing that runs."""
    return Service(tmp_path, redis=NO_REDIS)


def configured(folder: Path, settings: str, redis: str = NO_REDIS) -> Service:
    return Service(folder, settings, redis)


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


def test_a_service_without_workers_and_one_without_redis_say_so(idle: Service, strict: Service) -> None:
    assert "start kms-worker" in doctor(idle).all("service", "warn")
    told = doctor(strict)
    assert "reaches no Redis" in told.all("service", "warn")
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


def test_settings_that_are_wrong_end_it_with_the_way_to_mend_them(tmp_path: Path, install: Service) -> None:
    install.config.write_text("[kms]\nprot = 1\n")
    told = doctor(install)

    assert 'did you mean "port"?' in told.at("settings", "FAIL")
    assert told.exit_code == 78
    assert tmp_path / "kms.toml" == install.config


def test_keys_of_the_service_that_others_may_read(tmp_path: Path) -> None:
    install, name = configured(tmp_path, PROD), "audit-signing.key"
    made = command(install, "token", "create", "--name", "a", "--scope", "*", "-o", "a.token")
    assert made.returncode == 0, made.stderr
    (install.state / name).chmod(0o644)

    assert "audit.signing_key_path" in doctor(install).at("weak", "warn")
    told = doctor(install, PROVISIONING_ENV="prod")
    assert "chmod 600" in told.at("weak", "FAIL")
    assert told.exit_code == 78


def test_a_spool_key_that_is_not_there(tmp_path: Path) -> None:
    install = configured(tmp_path, PROD)
    (install.state / "spool.key").unlink()

    assert "kms up creates it" in doctor(install).at("own keys", "warn")
    assert "kms keygen -o" in doctor(install, PROVISIONING_ENV="prod").at("own keys", "FAIL")


def test_a_token_file_that_is_not_there(install: Service, tmp_path: Path) -> None:
    told = doctor(install, KMS_TOKEN_FILE=str(tmp_path / "my.token"))

    assert "Cannot read the token file" in told.at("service", "FAIL")


def test_a_backend_that_is_away_is_not_a_wrong_setting(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    section = f'[kms.transit]\naddress = "{address}"\nkey_name = "k"\ntoken = "t"\ntimeout_s = 1.0\n'
    install = configured(tmp_path, f'dev_backend = "transit"\n{section}')
    told = doctor(install)

    assert "does not wrap and unwrap" in told.at("self-test", "FAIL")
    assert told.exit_code == 69


# -- the trail ---------------------------------------------------------------------------------------


def recorded(install: Service) -> Path:
    """A trail of one file, closed."""
    assert command(install, "token", "create", "--name", "a", "--scope", "*", "-o", "a.token").returncode == 0
    return next((install.state / "audit").glob("*.jsonl"))


def test_a_closed_trail_is_verified_to_its_newest_checkpoint(install: Service) -> None:
    recorded(install)

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
        spool, audit = disk / "spool", disk / "audit"
        settings = f'[kms.jobs]\nspool_dir = "{spool}"\n[kms.audit]\npath = "{audit}"\n'
        install = configured(tmp_path, settings)
        spool.mkdir()
        audit.mkdir()
        told = doctor(install)

    assert "free space" in told.at("spool", "FAIL")
    assert "free space" in told.at("audit", "FAIL")
    assert told.exit_code == 78


@pytest.mark.parametrize(
    ("days", "level"), [(-1, "FAIL"), (5, "warn"), (300, "ok")], ids=["expired", "soon", "fine"]
)
def test_a_certificate_has_an_end(tmp_path: Path, days: int, level: str) -> None:
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    certificate(cert, key, datetime.now(UTC) + timedelta(days=days))
    install = configured(tmp_path, f'[kms.server]\ntls_cert = "{cert}"\ntls_key = "{key}"\n')

    assert "valid until" in doctor(install).at("certificate", level)


def test_a_certificate_that_is_none_and_a_key_that_others_read(tmp_path: Path) -> None:
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    certificate(cert, key, datetime.now(UTC) + timedelta(days=90))
    cert.write_text("no certificate")
    key.chmod(0o644)
    told = doctor(configured(tmp_path, f'[kms.server]\ntls_cert = "{cert}"\ntls_key = "{key}"\n'))

    assert "contains no certificate" in told.at("certificate", "FAIL")
    assert "server.tls_key" in told.at("weak", "warn")


def certificate(cert: Path, key: Path, ends: datetime) -> None:
    """For ``localhost``, signed by itself, valid since 30 days."""
    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = (
        x509.CertificateBuilder(name, name, secret.public_key(), x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=30))
        .not_valid_after(ends)
        .sign(secret, hashes.SHA256())
    )
    cert.write_bytes(made.public_bytes(Encoding.PEM))
    key.touch(0o600)
    key.write_bytes(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


# -- Redis and ports ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server that forgets what it is told, and what it should keep."""
    folder, port = tmp_path_factory.mktemp("weak"), free_port()
    options = {"port": str(port), "bind": "127.0.0.1", "dir": str(folder), "save": "", "appendonly": "no"}
    options |= {"maxmemory": "64mb", "maxmemory-policy": "allkeys-lru"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    with ExitStack() as stack, (folder / "log").open("wb") as log:
        process = tether.spawn([str(installation.find_binary(os.environ)), *words], env={}, output=log)
        stack.callback(process.wait)
        stack.callback(process.kill)
        until(lambda: answers(port), "the server is up")
        yield port


def answers(port: int) -> bool:
    with redis.Redis(port=port) as client, suppress(redis.RedisError):
        return bool(client.ping())
    return False


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
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        threading.Thread(target=refusing, args=(listener,), daemon=True).start()
        told = doctor(configured(tmp_path, "", f"redis://127.0.0.1:{listener.getsockname()[1]}/0"))

    assert "answers with an error: DENIED Redis is running in protected mode" in told.at("redis", "FAIL")
    assert "protected-mode of the server" in told.at("redis", "FAIL")
    assert told.exit_code == 69


def refusing(listener: socket.socket) -> None:
    with suppress(OSError):
        while True:
            near, _ = listener.accept()
            with near:
                near.recv(65536)
                near.sendall(
                    b"-DENIED Redis is running in protected mode. In this mode it tells much more.\r\n"
                )


def test_a_clock_that_differs_from_that_of_redis(tmp_path: Path, weak: int) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        threading.Thread(target=hurried, args=(listener, weak), daemon=True).start()
        told = doctor(configured(tmp_path, "", f"redis://127.0.0.1:{listener.getsockname()[1]}/0"))

    assert re.match(r"the clock of Redis is \d{3} s ahead", told.at("clock", "FAIL"))


def hurried(listener: socket.socket, port: int) -> None:
    """Between clients and the server: the seconds of TIME are 300 more."""
    with suppress(OSError):
        while True:
            near, _ = listener.accept()
            threading.Thread(target=_hurried, args=(near, port), daemon=True).start()


def _hurried(near: socket.socket, port: int) -> None:
    with suppress(OSError), near, socket.create_connection(("127.0.0.1", port)) as far:
        while asked := near.recv(65536):
            far.sendall(asked)
            told = far.recv(65536)
            while told.count(b"\r\n") < 2 and told[:1] in b"$*":
                told += far.recv(65536)
            near.sendall(
                re.sub(rb"(?<=^\*2\r\n\$10\r\n)\d+", lambda found: b"%d" % (int(found[0]) + 300), told)
            )


def test_a_broker_that_is_away(tmp_path: Path) -> None:
    port = free_port()
    install = configured(tmp_path, f'[kms.redis]\nbroker_url = "amqp://127.0.0.1:{port}"\n')

    assert f"nothing answers at 127.0.0.1:{port}" in doctor(install).at("broker", "FAIL")


# -- what the service says of itself -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "level", "said"),
    [
        ("spool", "warn", "kms job release"),
        ("install", "FAIL", "another install uses"),
        ("named_in_a_later_version", "warn", "named_in_a_later_version is degraded"),
    ],
)
def test_what_the_service_calls_degraded_is_a_line(
    monkeypatch: pytest.MonkeyPatch, name: str, level: str, said: str
) -> None:
    client = MagicMock()
    status = msgspec.convert(StatusOut.EXAMPLE | {"degraded": [name]}, StatusOut)
    client.__enter__.return_value.status.return_value = status
    monkeypatch.setattr(doctor_command, "connect", lambda **_: client)
    with click.Context(click.Command("kms")):
        found = list(doctor_command._service(None))  # noqa: SLF001 -- without the checks of this machine

    (line,) = [each for each in found if each.subject == "service" and each.level != "ok"]
    assert (line.level, said in f"{line.text}: {line.next}") == (level, True)


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
