"""The Vault API of a process: its TLS, its end, and where it is on."""

import http.client
import os
import signal
import socket
import time
from pathlib import Path
from typing import Final

import pytest

from kms_core.settings.load import load
from support.revocation import Revoking
from support.service import Service, b64
from support.vault_api import NO_REDIS
from support.waiting import until

BODY: Final = b'{"plaintext": "aGVsbG8="}'


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_signal_ends_the_port_and_what_had_begun_is_finished(tmp_path: Path) -> None:
    with Service(tmp_path, redis=NO_REDIS) as service:
        service.start("api")
        begun = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
        begun.putrequest("PUT", "/v1/transit/encrypt/default")
        begun.putheader("Content-Length", str(len(BODY)))
        begun.endheaders(BODY[:5])
        metrics = "kms_inflight 2.0"  # this one, and the one that asks
        until(lambda: metrics in service.http.get("/metrics").text, "the request is on its way")
        service.http.close()

        os.kill(service.pid("api"), signal.SIGTERM)
        until(lambda: not listens(service.port), "the port is closed")
        begun.send(BODY[5:])
        answer = begun.getresponse()

        assert answer.status == 200
        assert answer.read()
        begun.close()
        assert service.stop("api") == -signal.SIGTERM
        assert "Traceback" not in service.output("api")


def test_a_backend_that_is_away_is_worth_another_try_and_its_address_is_told_to_nobody(
    tmp_path: Path,
) -> None:
    settings = '[kms.transit]\naddress = "http://127.0.0.1:9"\ntoken = "t"\n[kms.keys]\naway = "transit:k"\n'
    body = {"plaintext": b64(b"x")}
    with Service(tmp_path, settings, NO_REDIS) as service:
        service.start("api")
        answers = [
            service.http.put("/v1/transit/encrypt/away", json=body),
            service.http.put("/v1/transit/encrypt/away", json={"batch_input": [body]}),
            service.http.get("/v1/transit/keys/away"),
        ]
        here = service.http.put("/v1/transit/encrypt/default", json=body)

    for answer in answers:
        assert (answer.status_code, list(answer.json())) == (503, ["errors"])
        assert answer.json()["errors"][0].startswith("unavailable: ")
        assert int(answer.headers["retry-after"]) >= 1
        assert "127.0.0.1" not in answer.text
    assert here.status_code == 200


def test_without_the_facade_there_is_no_such_path(tmp_path: Path) -> None:
    with Service(tmp_path, "[kms.facade]\nenabled = false\n", NO_REDIS) as service:
        service.start("api")
        for path in ("transit/encrypt/default", "sys/health"):
            assert service.http.post(f"/v1/{path}", json={"plaintext": b64(b"x")}).status_code == 404


@pytest.mark.parametrize(("environment", "enabled"), [("dev", True), ("prod", False), ("staging", False)])
def test_the_facade_is_there_by_default_in_dev_alone(tmp_path: Path, environment: str, enabled: bool) -> None:
    (tmp_path / "kms.toml").write_text(
        f'[kms]\nenvironment = "{environment}"\nprod_backend = "age"\nallow_age_in_prod = true\n'
        '[kms.environments.staging]\nbackend = "age"\n'
    )

    assert load(tmp_path / "kms.toml", {"HOME": str(tmp_path)}).kms.facade.enabled is enabled


def test_a_connection_without_a_handshake_ends(tmp_path: Path) -> None:
    """uvloop would hold it for a minute, and no bound of the port counts it."""
    with Revoking(tmp_path, has_lists=False).start("api") as service:
        begun = time.monotonic()
        with socket.create_connection(("127.0.0.1", service.port), 50) as silent:
            said = silent.recv(1)

    assert said == b""
    assert time.monotonic() - begun < 40
