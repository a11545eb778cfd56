"""The same calls, commands and jobs on every backend, by settings alone; a file that moves between them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from support.aws_servers import ACCESS_KEY, SECRET_KEY
from support.aws_servers import moto as aws
from support.contract.rig_cosmian import cosmian, new_key, server_url
from support.openbao import bao, kv
from support.service import CONTEXT, Service, b64, unb64

DATA: Final = bytes(range(256)) * 8000  # 2 MB: two slabs
ITEMS: Final = 600  # two parts
OTHER: Final = "env=other"


@dataclass(frozen=True)
class BackendCase:
    """A backend: the settings that choose it, the URI of the same key, its name in stanzas."""

    section: str
    uri: str
    name: str


def age(folder: Path) -> BackendCase:
    return BackendCase('dev_backend = "age"\n', f"age://{folder}/state/age/private_key.txt", "age")


def cosmian_place(folder: Path) -> BackendCase:
    del folder
    url = server_url()
    key = new_key(cosmian(url)).name
    section = f'dev_backend = "cosmian"\n[kms.cosmian]\nserver_url = "{url}"\ndefault_key_id = "{key}"\n'
    return BackendCase(section, f"cosmian:{key}", "cosmian")


def transit(folder: Path) -> BackendCase:
    del folder
    server = bao()
    key = server.new_key()
    section = f'dev_backend = "transit"\n{server.settings()}key_name = "{key}"\n'
    return BackendCase(section, f"transit:{key}", "transit")


def vault_kv(folder: Path) -> BackendCase:
    del folder
    server = bao()
    path = f"kms/{server.new_key()}"
    kv(server, path).rotate()  # makes the first version
    section = f'dev_backend = "vault-kv"\n{server.settings("vault_kv")}path = "{path}"\n'
    return BackendCase(section, f"vault-kv:{path}", "vault-kv")


def awskms(folder: Path) -> BackendCase:
    del folder
    server = aws()
    alias = server.new_alias()
    section = (
        f'dev_backend = "awskms"\n[kms.awskms]\nkey_id = "{alias}"\nregion = "us-east-1"\n'
        f'endpoint_url = "{server.url}"\n'
    )
    return BackendCase(section, f"awskms:{alias}", "awskms")


PLACES: Final[dict[str, Callable[[Path], BackendCase]]] = {
    "age": age,
    "cosmian": cosmian_place,
    "transit": transit,
    "vault-kv": vault_kv,
    "awskms": awskms,
}


class Install(Service):
    """With the credentials that AWS tools take from the environment."""

    @property
    def environ(self) -> dict[str, str]:
        return super().environ | {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}


@pytest.fixture(params=list(PLACES))
def install(
    request: pytest.FixtureRequest, tmp_path: Path, redis_url: str
) -> Iterator[tuple[Install, BackendCase]]:
    place = PLACES[request.param](tmp_path)
    with Install(tmp_path, place.section, redis_url) as running:
        yield running.start(), place


def test_calls_commands_and_jobs_are_the_same_everywhere(install: tuple[Install, BackendCase]) -> None:
    service, place = install
    first = service.post("/encrypt", {"plaintext": b64(b"salary"), "context": CONTEXT}).json()
    ciphertext = unb64(first["ciphertext"])
    assert first["backend"] == place.name
    assert service.decrypt(ciphertext) == b"salary"
    refused = service.post("/decrypt", {"ciphertext": b64(ciphertext), "context": OTHER})
    assert refused.json()["code"] == "decrypt_failed"

    words, url = ("--context", OTHER), service.url
    sealed = service.run_kms("encrypt", *words, given="by command", KMS_SERVICE_URL=url)
    opened = service.run_kms("decrypt", *words, given=sealed.stdout, KMS_SERVICE_URL=url)
    assert opened.stdout == "by command", f"{sealed.stderr}\n{opened.stderr}"

    (service.files / "plain").write_bytes(DATA)
    reference = {"source": f"file://{service.files}/plain", "target": f"file://{service.files}/sealed"}
    back = {"source": f"file://{service.files}/sealed", "target": f"file://{service.files}/back"}
    service.wait(service.submit({"kind": "encrypt", "context": CONTEXT, **reference}), "succeeded")
    service.wait(service.submit({"kind": "decrypt", "context": CONTEXT, **back}), "succeeded")
    assert (service.files / "back").read_bytes() == DATA

    items = [{"plaintext": b64(b"%d" % n), "context": f"row={n}"} for n in range(ITEMS)]
    done = service.wait(service.submit({"kind": "encrypt", "items": items}), "succeeded")
    rows = service.lines(done["job_id"])
    again = [{"ciphertext": row["ciphertext"], "context": f"row={row['index']}"} for row in rows]
    done = service.wait(service.submit({"kind": "decrypt", "items": again}), "succeeded")
    plain = [unb64(row["plaintext"]) for row in service.lines(done["job_id"])]
    assert plain == [b"%d" % n for n in range(ITEMS)]


def test_rotation_and_rewrap_are_the_same_everywhere(install: tuple[Install, BackendCase]) -> None:
    service, _ = install
    first = service.post("/encrypt", {"plaintext": b64(b"salary"), "context": CONTEXT}).json()
    made = service.post(f"/keys/{first['key_id']}/rotate").json()
    second = service.post("/rewrap", {"ciphertext": first["ciphertext"], "context": CONTEXT}).json()

    assert made["key_version"] == second["key_version"] != first["key_version"]
    for answer in (first, second):
        assert service.decrypt(unb64(answer["ciphertext"])) == b"salary"
