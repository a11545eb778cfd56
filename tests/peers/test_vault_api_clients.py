"""The ``bao`` command, hvac and a server that is unsealed by the façade: each as it is shipped."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import hvac
import pytest
from hvac.exceptions import Forbidden, InvalidPath, InvalidRequest

from kms_core.programs.tether import spawn
from support.openbao import binary
from support.ports import free_port
from support.service import b64
from support.vault_api import KEYS, Facade, run
from support.waiting import WAIT_S, until_up

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


def test_the_bao_command_makes_data_keys(facade: Facade) -> None:
    made = bao(facade, "write", "-force", "transit/datakey/plaintext/default", "bits=512")["data"]
    sealed = bao(facade, "write", "-force", "transit/datakey/wrapped/default")["data"]
    opened = bao(facade, "write", "transit/decrypt/default", f"ciphertext={made['ciphertext']}")["data"]

    assert opened["plaintext"] == made["plaintext"]
    assert len(made["plaintext"]) == len(b64(bytes(64)))
    assert sealed.keys() == {"ciphertext", "key_version"}


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


def test_the_bao_command_says_what_is_wrong(facade: Facade) -> None:
    for words, said in (
        (("read", "transit/keys/nope"), "No value found"),
        (("write", "transit/encrypt/nope", f"plaintext={HELLO}"), "encryption key not found"),
        (("write", "transit/encrypt/default", "plaintext=hello!"), "base64"),
        (("write", "-wrap-ttl=1m", "-force", "transit/datakey/plaintext/default"), "not wrapped"),
        (("delete", "transit/keys/default"), "deletion is not allowed"),
        (("write", "transit/keys/default", "derived=true"), "none is derived"),
        (("token", "renew"), "not renewable"),
    ):
        failed = facade.cli(*words, check=False)
        assert failed.returncode == 2
        assert said in failed.stderr
    assert "permission denied" in facade.cli("read", "transit/keys/default", token="x", check=False).stderr


def test_the_bao_command_logs_in_with_a_token_that_later_calls_use(facade: Facade, tmp_path: Path) -> None:
    environ: dict[str, Any] = {"HOME": str(tmp_path), "BAO_TOKEN": ""}

    facade.cli("login", facade.make("encrypt key=default")[1], **environ)

    made = bao(facade, "write", "transit/encrypt/default", f"plaintext={HELLO}", **environ)["data"]
    assert facade.data("PUT", "transit/decrypt/default", {"ciphertext": made["ciphertext"]})


AUTO_AUTH: Final = """
vault {{ address = "{address}" }}
auto_auth {{
  method "token_file" {{ config = {{ token_file_path = "{folder}/token" }} }}
  sink "file" {{ config = {{ path = "{folder}/sink" }} }}
}}
"""
TEMPLATE: Final = """
exit_after_auth = true
template {{
  source = "{folder}/template"
  destination = "{folder}/rendered"
}}
"""
LISTENER: Final = """
api_proxy {{ use_auto_auth_token = true }}
listener "tcp" {{
  address = "127.0.0.1:{port}"
  tls_disable = true
}}
"""


def test_the_agent_logs_in_and_renders_a_template(facade: Facade, tmp_path: Path) -> None:
    ciphertext = facade.data("PUT", "transit/encrypt/default", {"plaintext": HELLO})["ciphertext"]
    token = facade.make("decrypt key=default")[1]
    (tmp_path / "token").write_text(token)
    secret = f'with secret "transit/decrypt/default" "ciphertext={ciphertext}"'
    (tmp_path / "template").write_text(f"{{{{ {secret} }}}}{{{{ .Data.plaintext }}}}{{{{ end }}}}")
    settings = (AUTO_AUTH + TEMPLATE).format(address=facade.url, folder=tmp_path)
    (tmp_path / "agent.hcl").write_text(settings)

    facade.cli("agent", f"-config={tmp_path}/agent.hcl")

    assert (tmp_path / "sink").read_text() == token
    assert (tmp_path / "rendered").read_text() == HELLO


def test_the_proxy_adds_its_token_to_calls_of_others(facade: Facade, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(facade.make("encrypt key=default")[1])
    port = free_port()
    settings = (AUTO_AUTH + LISTENER).format(address=facade.url, folder=tmp_path, port=port)
    (tmp_path / "proxy.hcl").write_text(settings)
    log = tmp_path / "proxy.log"
    with log.open("wb") as output:
        argv = [binary(), "proxy", f"-config={tmp_path}/proxy.hcl"]
        process = spawn(argv, env={"HOME": str(tmp_path)}, output=output)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1/", timeout=WAIT_S, trust_env=False) as client:
            body = {"plaintext": HELLO}
            call = partial(client.put, "transit/encrypt/default", json=body)
            until_up(process, lambda: is_success(call), log.read_text)
            ciphertext = call().json()["data"]["ciphertext"]
            listed = client.request("LIST", "transit/keys").json()["data"]["keys"]
            refused = client.put("transit/decrypt/default", json={"ciphertext": ciphertext})
    finally:
        process.kill()
        process.wait()

    assert facade.data("PUT", "transit/decrypt/default", {"ciphertext": ciphertext}) == {"plaintext": HELLO}
    assert listed == ["default"]
    assert (refused.status_code, "permission denied" in refused.text) == (403, True)


def is_success(call: Callable[[], httpx.Response]) -> bool:
    try:
        return call().is_success
    except httpx.HTTPError:
        return False


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
    with (folder / "server.log").open("ab") as log:
        argv = [binary(), "server", f"-config={folder}/server.hcl"]
        process = spawn(argv, env={"HOME": str(folder), "VAULT_MAX_RETRIES": "0"}, output=log)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}/v1/sys", timeout=WAIT_S, trust_env=False)
    try:
        yield client
    finally:
        client.close()
        process.kill()
        process.wait()


def awaited(client: httpx.Client, folder: Path, *, sealed: bool) -> Json:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            found: Json = client.get("/seal-status").json()
        except httpx.HTTPError:
            found = {}
        if found.get("sealed") is sealed:
            return found
        time.sleep(0.02)
    raise TimeoutError((folder / "server.log").read_text()[-2000:])


@pytest.mark.parametrize("key", KEYS)
def test_a_server_is_unsealed_by_the_facade_after_each_start(
    facade: Facade, tmp_path: Path, key: str
) -> None:
    token = facade.make(f"encrypt,decrypt key={key}")[1]
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

DOCUMENT: Final = (Path(__file__).parents[2] / "docs/vault-api.md").read_text("utf-8")
EXAMPLES: Final = re.findall(r"<!-- run -->\n```sh\n(.*?)```", DOCUMENT, re.DOTALL)


def test_the_examples_of_the_document_work_as_written(facade: Facade, tmp_path: Path) -> None:
    environ = facade.environ | {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    said = [
        run(
            ["bash", "-euo", "pipefail", "-c", text.replace("http://localhost:8082", facade.url)],
            environ,
            tmp_path,
        )
        for text in EXAMPLES
    ]

    assert len(said) == 4
    assert "vault:v" in said[1].stdout
    assert "password: hunter2" in said[2].stdout
    assert "SGVsbG8=" in said[3].stdout
