"""What ``kms doctor`` says of an install in which something is really broken, and with which exit code."""

import ast
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from kms_cli.doctor.machine import MAX_VERIFIED_BYTES
from kms_cli.local import valkey
from kms_core.programs import tether
from support import without_mlock
from support.cli.fixtures import BIN
from support.credentials import Authority
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


def test_of_a_service_at_work_nothing_fails(service: Service) -> None:
    service.encrypt(b"a record for the trail")
    told = doctor(service)

    assert told.failed == set()
    assert told.exit_code == 0
    assert "of them newer than the last checkpoint" in told.at("audit chain", "ok")
    assert "Valkey" in told.at("redis", "ok")
    assert told.at("redis aof", "ok").startswith("on")
    assert told.at("redis memory", "ok").startswith("noeviction")
    assert told.at("clock", "ok")
    assert f"in use: {service.port} by the API, {service.port + 1} by the worker" in told.at("ports", "ok")
    assert told.at("own keys", "ok").startswith("spool.key, intake.key, audit.key, audit-signing.key")
    assert "1 running" in told.at("workers", "ok")


def test_lines_for_people_say_what_lines_for_programs_say(service: Service) -> None:
    ran = command(service, "doctor")

    assert ran.returncode == 0
    assert re.search(r"^ok    self-test     default \(age\) wraps and unwraps$", ran.stdout, re.MULTILINE)


def test_a_service_without_workers_and_one_without_redis_say_so(idle: Service, strict: Service) -> None:
    assert "start kms-worker" in doctor(idle).at("workers", "warn")
    told = doctor(strict)
    assert "reaches no Redis" in told.at("jobs", "warn")
    assert "nothing answers at /nonexistent/valkey.sock" in told.at("redis", "FAIL")
    assert told.exit_code == 69


def test_a_service_that_is_not_there_and_an_idle_port(install: Service) -> None:
    told = doctor(install)

    assert told.failed == {"redis", "service"}
    assert told.exit_code == 69
    assert "kms up" in told.at("service", "FAIL")
    assert f"free: {install.port} for the API, {install.port + 1} for the worker" in told.at("ports", "ok")


def test_a_trail_that_was_changed_under_a_service_fails_there_and_here(tmp_path: Path) -> None:
    with Service(tmp_path, redis=NO_REDIS) as running:
        running.start("api").encrypt(b"one")
        file = next((running.state / "audit").glob("*.jsonl"))
        file.write_bytes(file.read_bytes().replace(b'"operation":"encrypt"', b'"operation":"decrypt"'))
        until(lambda: "audit_chain" in running.get("/status").json()["degraded"], "it is noticed")
        told = doctor(running)

    assert "edited" in told.at("audit chain", "FAIL")
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

    assert f"chmod 600 {install.state / name}" in doctor(install).at("own keys", "warn")
    told = doctor(install, PROVISIONING_ENV="prod")
    assert f"{name} can be read by others (mode 0644)" in told.at("own keys", "FAIL")
    assert told.exit_code == 78


def test_a_spool_key_that_is_not_there(tmp_path: Path) -> None:
    install = configured(tmp_path, PROD)
    (install.state / "spool.key").unlink()

    assert "kms up creates it" in doctor(install).at("spool key", "warn")
    assert "kms keygen -o" in doctor(install, PROVISIONING_ENV="prod").at("spool key", "FAIL")


def test_no_token_where_one_is_asked_for(tmp_path: Path) -> None:
    install = configured(tmp_path, '[kms.auth]\nmode = "required"\n')

    assert "kms token create" in doctor(install).at("tokens", "warn")


def test_a_token_file_that_others_may_read_or_that_is_not_there(install: Service, tmp_path: Path) -> None:
    file = tmp_path / "my.token"
    assert "check --token-file" in doctor(install, KMS_TOKEN_FILE=str(file)).at("token", "FAIL")
    file.write_text("kms_aaaaaaaaaa_b")
    file.chmod(0o640)

    assert f"chmod 600 {file}" in doctor(install, KMS_TOKEN_FILE=str(file)).at("token", "warn")


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

    assert "lines are intact, 0 of them newer than the last checkpoint" in doctor(install).at(
        "audit chain", "ok"
    )


def test_a_trail_that_was_edited_or_cut(install: Service) -> None:
    file = recorded(install)
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"principal"', b'"princepal"'))
    told = doctor(install)
    assert "kms audit verify" in told.at("audit chain", "FAIL")
    assert told.exit_code == 78

    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert "a chain has no end" in doctor(install).at("audit chain", "warn")


def test_of_a_large_trail_the_ends_are_read(install: Service) -> None:
    file = recorded(install)
    with (file.parent / "large.jsonl").open("wb") as large:
        large.truncate(MAX_VERIFIED_BYTES + 1)  # takes no room on the disk
    assert "all of it: kms audit verify" in doctor(install).at("audit chain", "ok")

    file.write_bytes(file.read_bytes().replace(b'"principal"', b'"princepal"'))
    assert "edited" in doctor(install).at("audit chain", "FAIL")


def test_a_trail_that_takes_no_record(tmp_path: Path) -> None:
    install = configured(tmp_path, '[kms.audit]\npath = "/proc"\n')

    assert "cannot be written" in doctor(install).at("audit", "FAIL" if os.geteuid() == 0 else "warn")


# -- room and certificates ---------------------------------------------------------------------------


def test_a_spool_that_is_nearly_full(tmp_path: Path) -> None:
    install = Service(tmp_path, "[kms.jobs]\nspool_max_bytes = 1_000_000\n")
    install.spool.mkdir(mode=0o700)
    (install.spool / "blob").write_bytes(bytes(790_000))
    assert "is 79% full" in doctor(install).at("spool", "ok")
    (install.spool / "blob").write_bytes(bytes(920_000))
    assert "is 92% full" in doctor(install).at("spool", "warn")
    (install.spool / "blob").write_bytes(bytes(1_000_000))

    assert "kms job release" in doctor(install).at("spool", "FAIL")


def test_a_spool_and_a_trail_without_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8 * 1024 * 1024) as disk:
        spool, audit = disk / "spool", disk / "audit"
        settings = f'[kms.jobs]\nspool_dir = "{spool}"\n[kms.audit]\npath = "{audit}"\n'
        install = configured(tmp_path, settings)
        spool.mkdir()
        audit.mkdir()
        told = doctor(install)
        assert "free space" in told.at("spool", "FAIL")
        assert told.at("audit", "ok")

        with suppress(OSError), (disk / "full").open("wb") as file:
            while True:
                file.write(bytes(64 * 1024))
        assert "free space" in doctor(install).at("audit", "FAIL")


@pytest.mark.parametrize(
    ("days", "level", "said"),
    [(-1, "FAIL", "expired at"), (5, "warn", "expires at"), (300, "ok", "valid until")],
    ids=["expired", "soon", "fine"],
)
def test_a_certificate_has_an_end(tmp_path: Path, days: int, level: str, said: str) -> None:
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    certificate(cert, key, datetime.now(UTC) + timedelta(days=days))
    install = configured(tmp_path, f'[kms.server]\ntls_cert = "{cert}"\ntls_key = "{key}"\n')

    assert said in doctor(install).at("certificate", level)


def test_a_certificate_that_is_none_and_a_key_that_others_read(tmp_path: Path) -> None:
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    certificate(cert, key, datetime.now(UTC) + timedelta(days=90))
    cert.write_text("no certificate")
    key.chmod(0o644)
    told = doctor(configured(tmp_path, f'[kms.server]\ntls_cert = "{cert}"\ntls_key = "{key}"\n'))

    assert "contains no certificate" in told.at("certificate", "FAIL")
    assert f"chmod 600 {key}" in told.at("tls key", "warn")


@pytest.mark.parametrize(
    ("hours", "level", "said"),
    [
        (-1, "FAIL", "clients.crl expired at"),
        (5, "warn", "clients.crl expires at"),
        (300, "ok", "clients.crl: valid"),
    ],
    ids=["expired", "soon", "fine"],
)
def test_a_revocation_list_has_an_end(tmp_path: Path, hours: int, level: str, said: str) -> None:
    clients, crl = Authority(tmp_path / "clients"), tmp_path / "clients.crl"
    pair = clients.issue("server", server=True, lasts=timedelta(days=90))
    crl.write_bytes(clients.crl(lasts=timedelta(hours=hours)))
    settings = (
        f'[kms.server]\ntls_cert = "{pair.cert}"\ntls_key = "{pair.key}"\nclient_ca = "{clients.ca_file}"\n'
    )
    told = doctor(configured(tmp_path, f'{settings}client_crl = "{crl}"\n'))

    assert said in told.at("client crl", level)


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
        process = tether.spawn([str(valkey.find_binary(os.environ)), *words], env={}, output=log)
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
            assert "appendfsync everysec" in doctor(install).at("redis aof", "warn")
            admin.config_set("appendfsync", "always")
            assert doctor(install).at("redis aof", "ok").startswith("on, appendfsync always")
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
    assert told.at("redis", "FAIL").endswith(": protected-mode no, where the users have passwords")
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


def test_a_port_that_somebody_else_has(install: Service) -> None:
    with closing(socket.create_server(("127.0.0.1", install.port + 1))):
        told = doctor(install)

    assert f"{install.port + 1}, for the worker, is used" in told.at("ports", "FAIL")
    assert told.exit_code == 69


def test_a_broker_that_is_away(tmp_path: Path) -> None:
    port = free_port()
    install = configured(tmp_path, f'[kms.redis]\nbroker_url = "amqp://127.0.0.1:{port}"\n')

    assert f"nothing answers at 127.0.0.1:{port}" in doctor(install).at("broker", "FAIL")


@pytest.mark.skipif(os.geteuid() != 0, reason="takes capabilities away")
@pytest.mark.parametrize(
    ("swaps", "level"), [(None, "warn"), ("", "ok"), ("/dev/dm-1 partition 8388604 0 -2\n", "warn")]
)
def test_memory_that_is_not_locked_is_a_warning_where_there_is_swap(
    tmp_path: Path, swaps: str | None, level: str
) -> None:
    if swaps is not None:
        (tmp_path / "swaps").write_text(f"Filename Type Size Used Priority\n{swaps}")
    asked = f"memory(pathlib.Path({str(tmp_path / 'swaps')!r}))"
    script = f"import pathlib\nfrom kms_cli.doctor.machine import memory\nfound = {asked}"
    argv = [sys.executable, "-P", "-c", f"{script}\nprint(found.level, found.text, found.next)"]

    ran = subprocess.run(without_mlock.words(*argv), capture_output=True, text=True, check=True)

    assert ran.stdout.startswith(f"{level} ")
    assert "memory is not locked" in ran.stdout
    assert ("LimitMEMLOCK=infinity" in ran.stdout) == (level == "warn")


def test_of_memory_there_is_a_line(install: Service) -> None:
    assert "core files and debuggers are blocked" in str(doctor(install).lines)


def test_programs_that_are_there_and_those_that_are_missing_are_listed(
    install: Service, tmp_path: Path
) -> None:
    (tmp_path / "ssh-agent").write_text("#!/bin/sh\n")
    (tmp_path / "ssh-agent").chmod(0o755)

    told = doctor(install, PATH=str(tmp_path))

    assert told.at("tools", "ok") == "found: ssh-agent; missing: age, sops, age-plugin-kms, prometheus: "


# -- the page ----------------------------------------------------------------------------------------


def subjects(path: Path) -> Iterator[str]:
    """What the lines of a module are about: an argument of the calls that make them."""
    at = {"Finding": 1, "private_file": 0, "_room": 0}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Call(func=ast.Name(id=name), args=arguments) if name in at:
                subject = arguments[at[name]]
                if isinstance(subject, ast.Constant):
                    yield str(subject.value)


def test_the_page_explains_every_line() -> None:
    sources = (ROOT / "src/kms_cli/doctor").glob("*.py")
    told = {subject for path in sources for subject in subjects(path)}
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8").partition("## By line")[2]
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)

    assert len(told) > 20
    assert {name for row in rows for name in re.findall("`(.*?)`", row)} == told
