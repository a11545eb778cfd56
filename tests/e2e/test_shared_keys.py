"""A key in OpenBao with ``share``: its calls are counted there, and installs open each other's files."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from kms_core.backends.wrap_keys import wrap_key_name
from kms_core.envelope import binding
from support.age_kms import head_of
from support.openbao import Bao
from support.service import Service, b64, unb64, without_checks

CALLS: Final = 200
ITEMS: Final = 1200  # three parts, of which two run at once


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bao, Path]]:
    """OpenBao with a file audit device, which has a line for each request."""
    folder = tmp_path_factory.mktemp("bao")
    server = Bao(folder, audit=folder / "audit.log")
    yield server, folder / "audit.log"
    server.close()


def asked(log: Path, key: str) -> tuple[int, int]:
    """How often OpenBao was asked to encrypt and to decrypt with a key."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    paths = [line["request"]["path"] for line in lines if line["type"] == "request"]
    return paths.count(f"transit/encrypt/{key}"), paths.count(f"transit/decrypt/{key}")


def install(folder: Path, server: Bao, key: str, redis_url: str) -> Service:
    settings = (
        f'default_key_id = "payroll"\n[kms.keys]\npayroll = "transit:{key}?share=5m"\n'
        f'{server.settings()}[kms.facade]\n[kms.jobs]\nspool_dir = "{folder.parent}/spool"\n'
    )
    return Service(folder, settings, redis_url)


def test_calls_batches_jobs_and_the_vault_api_ask_the_server_once(
    counted: tuple[Bao, Path], tmp_path: Path, redis_url: str
) -> None:
    server, log = counted
    key = server.new_key()
    with ExitStack() as stack:
        one, other = (stack.enter_context(install(tmp_path / name, server, key, redis_url)) for name in "ab")
        for each in (one, other):
            stack.enter_context(without_checks(each))
        one.start()
        other.start("api")
        with ThreadPoolExecutor(16) as threads:
            files = list(threads.map(lambda n: one.encrypt(b"%d" % n), range(CALLS)))
            for service in (one, other):
                assert list(threads.map(service.decrypt, files)) == [b"%d" % n for n in range(CALLS)]
        assert asked(log, key) == (1, 2)

        batch = {"operation": "encrypt", "items": [{"plaintext": b64(b"x")}] * 100}
        sealed = one.post("/batch", batch).json()["results"]
        opened = {"operation": "decrypt", "items": [{"ciphertext": item["ciphertext"]} for item in sealed]}
        assert one.post("/batch", opened).json()["failed"] == 0
        headers = {"X-Vault-Request": "true"}
        vault = one.http.put("/v1/transit/encrypt/payroll", json={"plaintext": b64(b"x")}, headers=headers)
        text = {"ciphertext": vault.json()["data"]["ciphertext"]}
        plain = one.http.put("/v1/transit/decrypt/payroll", json=text, headers=headers)
        assert unb64(plain.json()["data"]["plaintext"]) == b"x"
        assert asked(log, key) == (1, 2)

        items = [{"plaintext": b64(b"%d" % n), "context": f"row={n}"} for n in range(ITEMS)]
        one.wait(one.submit({"kind": "encrypt", "items": items}), "succeeded")
        assert asked(log, key)[0] <= 1 + len(one.pool_pids())

        wrapped = binding.read_wrap(head_of(files[0]).stanzas[0]).job
        name = wrap_key_name(wrapped)
        events = one.get(f"/audit?limit=1000&operation=encrypt&wrap_key={name}").json()["events"]
        assert len(events) >= CALLS + 100
        assert {event["wrap_key"] for event in events} == {name}
