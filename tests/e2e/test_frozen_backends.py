"""Key servers that are frozen (SIGSTOP): how soon that is known, and how soon another backend answers."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import pytest

from support.credentials import REQUIRED, SecuredService
from support.openbao import Bao
from support.sealed_keys import age_file, root_settings, seal
from support.service import Service, b64
from support.waiting import RealTime, until

ROOT_UP: Final = 'kms_backend_up{backend="transit",key_id="root",use="seal"}'
KNOWN_S: Final = 60.0
TIMEOUT_S: Final = 5.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Bao]:
    """One that a test freezes."""
    (tmp_path / "bao").mkdir()
    made = Bao(tmp_path / "bao")
    yield made
    os.kill(made.pid, signal.SIGCONT)
    made.close()


def down(service: Service, headers: dict[str, str]) -> list[dict[str, Any]]:
    """What the status lists for this caller."""
    found: list[dict[str, Any]] = service.get("/status", headers=headers).json()["backends_down"]
    return found


def test_a_frozen_root_is_named_within_a_minute_while_calls_go_on(
    tmp_path: Path, redis_url: str, server: Bao
) -> None:
    settings = root_settings(server) + f"[kms.server]\nprocesses = 2\n{REQUIRED}"
    with SecuredService(tmp_path, settings, redis_url) as service:
        seal(service, "default", age_file(service))
        seal(service, "kms:spool", service.settings.kms.jobs.spool_identity_path)
        service.start()
        operator, tenant = service.token_header("status,metrics"), service.token_header("status,encrypt")
        until(lambda: service.metric(ROOT_UP, headers=operator) == 1, "the root was asked")

        os.kill(server.pid, signal.SIGSTOP)
        frozen = RealTime.now_s()
        until(lambda: down(service, operator), "the status names the root")
        took_s = RealTime.now_s() - frozen

        (named,) = down(service, operator)
        assert (named["key_id"], named["backend"], named["root"]) == ("root", "transit", True)
        assert took_s < KNOWN_S
        assert down(service, tenant) == []
        assert service.get("/status", headers=operator).json()["degraded"] == []
        assert service.metric(ROOT_UP, headers=operator) == 0
        worker = httpx.get(f"http://127.0.0.1:{service.port + 1}/metrics", headers=operator, trust_env=False)
        assert f"{ROOT_UP} 0.0" in worker.text
        answer = service.post("/encrypt", {"plaintext": b64(b"x"), "context": "a=b"}, headers=tenant)
        assert answer.status_code == 200, answer.text
        assert service.http.get("/readyz").status_code == 200
        assert service.output("api", "worker").count("backend.down") == 1, "one process of the host asks"

        os.kill(server.pid, signal.SIGCONT)
        until(lambda: service.metric(ROOT_UP, headers=operator) == 1, "the root is back")
        assert down(service, operator) == []


def test_the_doctor_asks_each_backend_and_each_root_itself(tmp_path: Path, server: Bao) -> None:
    keys = f'payroll = ["age://{tmp_path}/state/age/private_key.txt", "transit:{server.new_key()}"]\n'
    with Service(tmp_path, root_settings(server, timeout_s=1.0) + keys, "unix:///nonexistent") as service:
        assert "root key 'root' (transit) wraps and unwraps" in service.run_kms("doctor").stdout
        os.kill(server.pid, signal.SIGSTOP)
        told = service.run_kms("doctor").stdout

    assert "payroll (age) wraps and unwraps" in told
    assert "payroll (transit) does not wrap and unwrap" in told
    assert "root key 'root' (transit) does not wrap and unwrap" in told


def test_a_worker_asks_where_the_api_has_ended(tmp_path: Path, redis_url: str, server: Bao) -> None:
    with Service(tmp_path, root_settings(server), redis_url) as service:
        service.start()
        until(lambda: service.metric(ROOT_UP) == 1, "the root was asked")
        service.kill("api")
        os.kill(server.pid, signal.SIGSTOP)
        frozen = RealTime.now_s()
        until(lambda: "backend.down" in service.output("worker"), "the worker asks")

        assert RealTime.now_s() - frozen < KNOWN_S


def test_a_file_opens_in_time_by_the_second_backend_in_calls_and_in_jobs(
    tmp_path: Path, redis_url: str, server: Bao
) -> None:
    private = tmp_path / "state" / "age" / "private_key.txt"
    keys = f'[kms.keys]\npayroll = ["transit:{server.new_key()}", "age://{private}"]\n'
    with Service(tmp_path, f'default_key_id = "payroll"\n{server.settings()}{keys}', redis_url) as service:
        service.start()
        file = service.encrypt(b"salary")
        os.kill(server.pid, signal.SIGSTOP)

        took_s = []
        for _ in range(2):
            began = RealTime.now_s()
            assert service.decrypt(file) == b"salary"
            took_s.append(RealTime.now_s() - began)
        assert took_s[0] < TIMEOUT_S
        assert took_s[1] < 1.5, "the one that was silent is asked last"
        began = RealTime.now_s()
        items = [{"ciphertext": b64(file), "context": "env=prod,service=api"}]
        service.wait(service.submit({"kind": "decrypt", "items": items}), "succeeded")
        assert RealTime.now_s() - began < TIMEOUT_S
