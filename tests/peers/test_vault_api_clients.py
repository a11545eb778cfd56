"""The ``bao`` command, hvac and a server that is unsealed by the façade: each as it is shipped."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import hvac
import pytest
from hvac.exceptions import Forbidden, InvalidPath, InvalidRequest

from support import pages
from support.cli.fixtures import environment
from support.openbao import binary
from support.ports import free_port
from support.programs import running
from support.service import b64
from support.vault_api import KEYS, Facade
from support.waiting import WAIT_S, until

HELLO: Final = b64(b"hello")
Json = dict[str, Any]


# -- bao -----------------------------------------------------------------------------------------------


def bao(facade: Facade, *words: str, **more: Any) -> Json:  # noqa: ANN401 -- of ``Facade.cli``
    """What the command prints, as JSON."""
    found: Json = json.loads(facade.cli(*words, BAO_FORMAT="json", **more).stdout)
    return found


@pytest.mark.parametrize("key", KEYS)
def test_the_bao_command_encrypts_decrypts_and_rewraps(facade: Facade, key: str) -> None:
    bound = (f"context={b64(b'c')}", f"associated_data={b64(b'a')}")
    made = bao(facade, "write", f"transit/encrypt/{key}", f"plaintext={HELLO}", *bound)["data"]
    bao(facade, "write", "-force", f"transit/keys/{key}/rotate")
    ciphertext = f"ciphertext={made['ciphertext']}"
    moved = bao(facade, "write", f"transit/rewrap/{key}", ciphertext, *bound)["data"]
    opened = bao(facade, "write", f"transit/decrypt/{key}", f"ciphertext={moved['ciphertext']}", *bound)

    assert moved["key_version"] == made["key_version"] + 1
    assert opened["data"] == {"plaintext": HELLO}


def test_the_bao_command_reads_lists_and_looks_around(facade: Facade) -> None:
    record = bao(facade, "read", "transit/keys/remote")["data"]
    listed: Any = bao(facade, "list", "transit/keys")
    mounts = bao(facade, "secrets", "list")
    status = bao(facade, "status")
    whoami = bao(facade, "token", "lookup")["data"]
    may = facade.cli("token", "capabilities", "transit/encrypt/default").stdout.strip()

    assert record["name"] == "remote"
    assert record["latest_version"] == max(map(int, record["keys"]))
    assert listed == [*KEYS]
    assert mounts["transit/"]["type"] == "transit"
    assert (status["initialized"], status["sealed"]) == (True, False)
    assert whoami["meta"] == {"tenant": "default"}
    assert 0 < whoami["ttl"] <= timedelta(days=1).total_seconds()
    assert whoami["id"] == facade.root
    assert may == "update"


def test_the_bao_command_logs_in_with_a_token_that_later_calls_use(facade: Facade, tmp_path: Path) -> None:
    environ: dict[str, Any] = {"HOME": str(tmp_path), "BAO_TOKEN": ""}

    facade.cli("login", facade.new_token("encrypt key=default")[1], **environ)

    made = bao(facade, "write", "transit/encrypt/default", f"plaintext={HELLO}", **environ)["data"]
    assert facade.data("PUT", "transit/decrypt/default", {"ciphertext": made["ciphertext"]})


# -- hvac ----------------------------------------------------------------------------------------------


@pytest.fixture
def client(facade: Facade) -> Iterator[hvac.Client]:
    made = hvac.Client(url=facade.url, token=facade.root)
    yield made
    made.adapter.close()


@pytest.mark.parametrize("key", KEYS)
def test_hvac_does_what_transit_does(client: hvac.Client, key: str) -> None:
    transit = client.secrets.transit
    made = transit.encrypt_data(key, HELLO, context=b64(b"c"))["data"]
    transit.rotate_key(key)
    moved = transit.rewrap_data(key, made["ciphertext"], context=b64(b"c"))["data"]
    batch = transit.encrypt_data(key, batch_input=[{"plaintext": HELLO}, {"plaintext": HELLO}])["data"]
    items = [{"ciphertext": one["ciphertext"]} for one in batch["batch_results"]]
    data_key = transit.generate_data_key(key, "plaintext", bits=128)["data"]

    assert transit.decrypt_data(key, moved["ciphertext"], context=b64(b"c"))["data"]["plaintext"] == HELLO
    opened = transit.decrypt_data(key, batch_input=items)["data"]["batch_results"]
    assert [one["plaintext"] for one in opened] == [HELLO, HELLO]
    assert transit.decrypt_data(key, data_key["ciphertext"])["data"]["plaintext"] == data_key["plaintext"]
    assert transit.read_key(key)["data"]["latest_version"] == moved["key_version"]
    assert transit.list_keys()["data"]["keys"] == [*KEYS]
    assert transit.create_key(key)["data"]["name"] == key


def test_hvac_raises_for_a_fault_what_it_raises_at_vault(client: hvac.Client, facade: Facade) -> None:
    transit = client.secrets.transit

    with pytest.raises(InvalidRequest, match="authentication failed"):
        transit.decrypt_data(
            "default", transit.encrypt_data("default", HELLO)["data"]["ciphertext"], context=b64(b"c")
        )
    with pytest.raises(InvalidPath):
        transit.read_key("nope")
    with pytest.raises(InvalidRequest, match="encryption key not found"):
        transit.create_key("nope")
    stranger = hvac.Client(url=facade.url, token="x")
    with pytest.raises(Forbidden):
        stranger.secrets.transit.read_key("default")
    assert not stranger.is_authenticated()
    stranger.adapter.close()


def test_hvac_sees_an_open_server_and_itself(client: hvac.Client) -> None:
    assert client.is_authenticated()
    assert client.sys.is_initialized()
    assert not client.sys.is_sealed()
    assert client.sys.read_health_status(method="GET")["sealed"] is False
    assert client.sys.read_health_status().status_code == 200
    assert client.sys.list_mounted_secrets_engines()["data"].keys() == {"transit/"}


# -- auto-unseal ---------------------------------------------------------------------------------------

SERVER: Final = """
storage "raft" {{
  path = "{folder}"
  node_id = "one"
  performance_multiplier = 1
}}
listener "tcp" {{ address = "127.0.0.1:{port}", tls_disable = true }}
api_addr = "http://127.0.0.1:{port}"
cluster_addr = "http://127.0.0.1:{next}"
seal "transit" {{
  address = "{address}"
  token = "{token}"
  mount_path = "team/transit"
  key_name = "{key}"
}}
"""


@contextmanager
def unsealing(folder: Path, port: int) -> Iterator[httpx.Client]:
    """A server of its own, that asks the façade to open its seal."""
    argv = [binary(), "server", f"-config={folder}/server.hcl"]
    environ = {"HOME": str(folder), "VAULT_MAX_RETRIES": "0"}
    url = f"http://127.0.0.1:{port}/v1/sys"
    with (
        running(argv, folder / "server.log", env=environ),
        httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client,
    ):
        yield client


def awaited(client: httpx.Client, folder: Path, *, sealed: bool) -> Json:
    found: Json = {}

    def is_so() -> bool:
        with suppress(httpx.HTTPError):
            found.update(client.get("/seal-status").json())
        return found.get("sealed") is sealed

    until(is_so, lambda: (folder / "server.log").read_text()[-2000:])
    return found


@pytest.mark.parametrize("key", KEYS)
def test_a_server_is_unsealed_by_the_facade_after_each_start(
    facade: Facade, tmp_path: Path, key: str
) -> None:
    token = facade.new_token(f"encrypt,decrypt key={key}")[1]
    port = free_port()
    settings = SERVER.format(
        folder=tmp_path, port=port, next=port + 1, address=facade.url, token=token, key=key
    )
    (tmp_path / "server.hcl").write_text(settings)
    with unsealing(tmp_path, port) as client:
        awaited(client, tmp_path, sealed=True)
        made = client.put("/init", json={"recovery_shares": 1, "recovery_threshold": 1})
        assert made.status_code == 200, made.text
        assert awaited(client, tmp_path, sealed=False)["initialized"]
    facade.data("PUT", f"transit/keys/{key}/rotate")

    with unsealing(tmp_path, port) as client:
        assert awaited(client, tmp_path, sealed=False)["type"] == "transit"


# -- the document ----------------------------------------------------------------------------------------


def test_the_examples_of_the_document_work_as_written(facade: Facade, tmp_path: Path) -> None:
    environ = facade.environ | environment(tmp_path)
    said = [
        pages.said(text.replace("http://localhost:8082", facade.url), tmp_path, environ)
        for text in pages.blocks_to_run("docs/vault-api.md", "sh")
    ]

    assert len(said) == 4
    assert "vault:v" in said[1]
    assert "password: hunter2" in said[2]
    assert "SGVsbG8=" in said[3]
