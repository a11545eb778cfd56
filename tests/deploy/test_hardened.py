"""The programs as they are deployed: under what the units forbid, before the Valkey of docker-compose.yml."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import httpx2 as httpx
import pytest
import redis
import yaml

from kms_cli.local.valkey import find_binary
from support.artefacts import ROOT, SYSTEMD, as_root, make_secrets
from support.ports import free_port, listens
from support.programs import program, running
from support.service import b64, unb64
from support.systemd_sandbox import USER, directives, system_calls
from support.waiting import answers, until

PYTHON: Final = Path(sys.executable)
UNITS: Final = {"kms-service": "kms-api.service", "kms-worker": "kms-worker.service"}
SETTINGS: Final = """
[kms]
environment = "prod"
prod_backend = "age"
allow_age_in_prod = true
state_dir = "{state}"
port = {port}
[kms.age]
private_key_path = "{secrets}/age_private_key.txt"
public_key_path = "{secrets}/age_public_key.txt"
[kms.redis]
url = "redis://kms@127.0.0.1:{redis}/0"
password_file = "{secrets}/redis_password"
[kms.auth]
mode = "none"
[kms.jobs]
roots = ["{state}/files"]
spool_identity_path = "{secrets}/spool.key"
intake_identity_path = "{secrets}/intake.key"
"""


@dataclass(frozen=True)
class Deployed:
    """Everything runs; ``state`` is the one directory that can be written."""

    http: httpx.Client
    state: Path
    redis_port: int
    processes: dict[str, subprocess.Popen[bytes]]

    def job(self, **job: object) -> dict[str, object]:
        """Submitted, and its end awaited."""
        sent = self.http.post("/api/v1/kms/jobs", json=job).raise_for_status().json()
        path = f"/api/v1/kms/jobs/{sent['job_id']}"

        def now() -> dict[str, object]:
            found: dict[str, object] = self.http.get(path).json()
            return found

        until(lambda: now()["state"] in {"succeeded", "failed"}, "the job ends")
        return now()


def sandboxed(unit: str, state: Path, *words: object) -> list[str]:
    return [
        str(word)
        for word in (PYTHON, ROOT / "tests/support/systemd_sandbox.py", SYSTEMD / unit, state, "--", *words)
    ]


def valkey_words(folder: Path, users: Path, port: int) -> list[str]:
    """The command of docker-compose.yml, in other places."""
    (server, *words) = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["valkey"][
        "command"
    ]
    assert server == "valkey-server"
    places = [str(users) if word == "/run/secrets/valkey_users" else word for word in words]
    here = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
    return [str(find_binary(os.environ)), *places, *here]


@pytest.fixture(scope="module", autouse=True)
def _systemd() -> None:
    program("systemd-analyze")  # expands the sets of system calls for tests/support/systemd_sandbox.py


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    as_root()
    folder = tmp_path_factory.mktemp("deployed")
    state, port, redis_port = folder / "state", free_port(), free_port()
    secrets = make_secrets(state / "credentials")
    (state / "files").mkdir()
    places = {"state": state, "port": port, "redis": redis_port, "secrets": secrets}
    (state / "kms.toml").write_text(SETTINGS.format_map(places))
    for path in (state, *state.rglob("*")):
        os.chown(path, USER, USER)
    for path in secrets.iterdir():  # as Kubernetes and systemd hand them on
        os.chown(path, 0, USER)
        path.chmod(0o440)
    (folder / "valkey").mkdir()
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    valkey = valkey_words(folder / "valkey", secrets / "users.acl", redis_port)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with ExitStack() as stack:
        stack.enter_context(running(valkey, folder / "valkey.log", lambda: listens(redis_port), env))
        for number, (name, unit) in enumerate(UNITS.items()):
            argv = sandboxed(unit, state, PYTHON.with_name(name), "--config", state / "kms.toml")
            is_up = partial(answers, f"http://127.0.0.1:{port + number}/livez")
            processes[name] = stack.enter_context(running(argv, folder / f"{name}.log", is_up, env))
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        yield Deployed(stack.enter_context(http), state, redis_port, processes)


def test_calls_and_jobs_do_what_they_do_elsewhere(deployed: Deployed) -> None:
    context = {"context": "env=prod"}
    sealed = deployed.http.post("/api/v1/kms/encrypt", json={"plaintext": b64(b"secret"), **context}).json()
    opened = deployed.http.post(
        "/api/v1/kms/decrypt", json={"ciphertext": sealed["ciphertext"], **context}
    ).json()
    (deployed.state / "files/in").write_bytes(b"many" * 1_000_000)
    os.chown(deployed.state / "files/in", USER, USER)
    files = f"file://{deployed.state}/files"

    bulk = deployed.job(kind="encrypt", items=[{"plaintext": b64(b"secret")}] * 3, **context)
    file = deployed.job(kind="encrypt", source=f"{files}/in", target=f"{files}/out", **context)

    assert unb64(opened["plaintext"]) == b"secret"
    assert (bulk["state"], file["state"]) == ("succeeded", "succeeded")
    assert (deployed.state / "files/out").read_bytes().startswith(b"age-encryption.org/v1\n")


def test_metrics_of_the_process_are_there(deployed: Deployed) -> None:
    worker = deployed.http.base_url.copy_with(port=(deployed.http.base_url.port or 0) + 1)

    for url in ("/metrics", f"{worker}/metrics"):
        assert "process_open_fds" in deployed.http.get(url).text


@pytest.mark.parametrize("name", UNITS)
def test_the_process_is_what_the_unit_makes_of_it(deployed: Deployed, name: str) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{deployed.processes[name].pid}/status").read_text().splitlines()
        if ":\t" in line
    )

    assert status["Uid"].split() == [str(USER)] * 4
    assert int(status["CapEff"], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


PRYING: Final = """
import ctypes, json, os, sys
pid, user = int(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
os.setgroups([])
os.setgid(user)
os.setuid(user)
def read(name):
    with open(f"/proc/{pid}/{name}", "rb", 0) as file:
        if name == "mem":
            file.seek(at)
        file.read(16)
def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
at = 0
attempts = {
    "maps": lambda: read("maps"),
    "mem": lambda: read("mem"),
    "environ": lambda: read("environ"),
    "auxv": lambda: read("auxv"),
    "files": lambda: os.listdir(f"/proc/{pid}/fd"),
    "seize": lambda: checked(libc.ptrace(0x4206, pid, 0, 0)),
    "attach": lambda: checked(libc.ptrace(16, pid, 0, 0)),
}
done = {}
for name, attempt in attempts.items():
    try:
        attempt()
        done[name] = "done"
        if name == "maps":
            at = int(open(f"/proc/{pid}/maps").read().split("-")[0], 16)
    except OSError:
        done[name] = "refused"
print(json.dumps(done))
"""


def attack_process(pid: int) -> dict[str, str]:
    """What another process of the service's user can read or steer of a process."""
    argv = [str(PYTHON), "-c", PRYING, str(pid), str(USER)]
    found: dict[str, str] = json.loads(
        subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    )
    return found


def test_another_process_of_the_same_user_reads_no_memory(deployed: Deployed) -> None:
    worker = deployed.processes["kms-worker"].pid
    pool = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()

    for pid in (deployed.processes["kms-service"].pid, worker, *map(int, pool)):
        assert set(attack_process(pid).values()) == {"refused"}


def test_a_program_without_protection_can_be_read() -> None:
    as_root()
    with subprocess.Popen(["/bin/sleep", "60"], user=USER, group=USER, extra_groups=[]) as bare:
        until(lambda: Path(f"/proc/{bare.pid}/comm").read_text() == "sleep\n", "it runs")
        assert set(attack_process(bare.pid).values()) >= {"done"}
        bare.kill()


def test_the_queue_lets_nobody_in_without_the_password(deployed: Deployed) -> None:
    with redis.Redis(port=deployed.redis_port) as stranger:
        assert stranger.ping()
        for words in (["GET", "kms:x"], ["KEYS", "*"], ["INFO"], ["CONFIG", "GET", "*"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                stranger.execute_command(*words)


# -- that the sandbox forbids at all ---------------------------------------------------------------------

ATTEMPTS: Final = {
    "write elsewhere": "open('/etc/kms-was-here', 'w')",
    "write over the program": "open(sys.executable, 'ab')",
    "memory to write and run": "mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)",
    "a packet socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "a netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "a namespace": "os.unshare_of_our_own()",
    "another user": "os.setuid(0)",
    "another owner": "os.chown('own', 0, 0)",
    "a set-user-id program": "os.chmod('own', 0o4755)",
    "a greater priority": "os.setpriority(os.PRIO_PROCESS, 0, -5)",
    "a root of its own": "os.chroot('.')",
}
JUDGE: Final = """
import ctypes, json, mmap, os, socket, sys
def unshare():
    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000):
        raise OSError(ctypes.get_errno(), "unshare")
os.unshare_of_our_own = unshare
open('own', 'w').close()
done = {}
for name, attempt in json.loads(sys.argv[1]).items():
    try:
        exec(attempt)
        done[name] = "done"
    except OSError as exc:
        done[name] = "refused"
os.chmod('own', 0o600)
print(json.dumps(done))
"""


@pytest.mark.parametrize("unit", UNITS.values())
def test_what_the_unit_forbids_is_refused(unit: str, tmp_path: Path) -> None:
    as_root()
    os.chown(tmp_path, USER, USER)

    argv = sandboxed(unit, tmp_path, PYTHON, "-c", JUDGE, json.dumps(ATTEMPTS))
    judged = subprocess.run(argv, capture_output=True, text=True, check=False)

    assert judged.returncode == 0, judged.stderr
    assert json.loads(judged.stdout) == dict.fromkeys(ATTEMPTS, "refused")


def test_an_allow_list_is_read_as_systemd_reads_it() -> None:
    calls = system_calls(directives(SYSTEMD / "kms-api.service")["SystemCallFilter"])

    assert {"read", "openat", "socket", "futex", "prlimit64", "prctl", "mlockall"} <= calls
    assert not calls & {"setuid", "chown", "mount", "ptrace", "bpf", "setpriority", "reboot", "init_module"}
