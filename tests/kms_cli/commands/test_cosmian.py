"""``kms cosmian init-key``, and how API and worker start with keys on a Cosmian KMS server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx2 as httpx
import pytest

from kms_core.age.x25519 import X25519Identity
from support.age_kms import write_identities
from support.audit_logs import Place
from support.contract.cosmian_double import CosmianDouble
from support.contract.faults import unused_url
from support.ports import free_port
from support.programs import tied
from support.waiting import WAIT_S, until

BIN: Final = Path(sys.executable).parent
SETTINGS: Final = """
[kms]
dev_backend = "cosmian"
port = {port}
[kms.cosmian]
default_key_id = "master"
[kms.keys]
{keys}
"""


@pytest.fixture
def double() -> Iterator[CosmianDouble]:
    with CosmianDouble() as made:
        yield made


class Install:
    """Settings and a state directory, and the programs in them."""

    def __init__(self, folder: Path, cosmian_url: str, keys: str = 'payroll = "cosmian:pay"') -> None:
        self.port = free_port()
        config, state = folder / "kms.toml", folder / "state"
        config.write_text(SETTINGS.format(port=self.port, keys=keys))
        state.mkdir(mode=0o700)
        write_identities(state / "spool.key", X25519Identity.generate())
        self._environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "KMS_CONFIG": str(config),
            "KMS_STATE_DIR": str(state),
            "KMS_REDIS_URL": unused_url().replace("http:", "redis:"),
            "COSMIAN_KMS_URL": cosmian_url,
        }

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit code, results, words."""
        done = subprocess.run(
            [BIN / words[0], *words[1:]],
            env=self._environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_S,
        )
        return done.returncode, done.stdout, done.stderr

    @contextmanager
    def service(self) -> Iterator[str]:
        """The API, once it answers."""
        process = subprocess.Popen(tied(BIN / "kms-service"), env=self._environ, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{self.port}"
        try:
            until(lambda: process.poll() is not None or _answers(url), "the API answers")
            assert process.poll() is None
            yield url
        finally:
            process.terminate()
            process.wait(WAIT_S)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/livez", trust_env=False).is_success
    except httpx.TransportError:
        return False


def test_keys_are_made_once(double: CosmianDouble, tmp_path: Path) -> None:
    install, where = Install(tmp_path, double.url), f"Cosmian KMS at {double.url.removeprefix('http://')}"

    assert install.run("kms", "cosmian", "init-key") == (
        0,
        f"created master, version 1, on {where}\ncreated pay, version 1, on {where}\n",
        "",
    )
    assert install.run("kms", "cosmian", "init-key") == (
        0,
        f"master exists, version 1, on {where}\npay exists, version 1, on {where}\n",
        "",
    )
    code, said, _ = install.run("kms", "--json", "cosmian", "init-key")
    assert (code, json.loads(said.splitlines()[0])) == (0, {"name": "master", "version": "1", "made": False})
    recorded = [
        (line["effect"].rpartition("-")[0], line["stage"]) for line in Place(tmp_path / "state").operations()
    ]
    assert sorted(recorded) == sorted(
        [(name, stage) for name in ("master", "pay") for stage in ("intent", "outcome")] * 3
    )


def test_a_key_that_only_opens_old_files_is_not_made(double: CosmianDouble, tmp_path: Path) -> None:
    write_identities(tmp_path / "age.txt", X25519Identity.generate())
    keys = f'moved = ["age://{tmp_path}/age.txt", "cosmian:before?seal=false"]'

    code, said, _ = Install(tmp_path, double.url, keys).run("kms", "cosmian", "init-key")
    assert (code, len(said.splitlines())) == (0, 1)
    assert "master" in said


def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    code, _, words = Install(tmp_path, unused_url()).run("kms", "cosmian", "init-key")

    assert code == 69
    assert "no connection to Cosmian KMS" in words
    intent, outcome = Place(tmp_path / "state").operations()
    assert (intent["operation"], outcome["result"]) == ("key.create", "backend_unavailable")


@pytest.mark.parametrize("program", ["kms-service", "kms-worker"])
def test_nothing_starts_without_its_key_and_the_error_says_how_to_make_it(
    double: CosmianDouble, tmp_path: Path, program: str
) -> None:
    code, _, words = Install(tmp_path, double.url).run(program)

    assert code == 78
    assert words.splitlines()[-1].startswith(f"{program}: error: The key pay on Cosmian KMS at ")
    assert words.endswith("is not there: make it with `kms cosmian init-key`\n")


def test_a_server_that_is_away_degrades_and_does_not_stop_a_start(
    double: CosmianDouble, tmp_path: Path
) -> None:
    install = Install(tmp_path, double.url)
    install.run("kms", "cosmian", "init-key")
    double.stop()
    with install.service() as url:
        health = httpx.get(f"{url}/api/v1/kms/health", trust_env=False)

    assert (health.status_code, health.json()["status"]) == (503, "unhealthy")


def test_what_the_service_seals_with_a_key_on_cosmian_it_opens(double: CosmianDouble, tmp_path: Path) -> None:
    install = Install(tmp_path, double.url)
    install.run("kms", "cosmian", "init-key")
    with install.service() as url, httpx.Client(base_url=f"{url}/api/v1/kms", trust_env=False) as kms:
        sealed = kms.post("/encrypt", json={"plaintext": "c2VjcmV0", "context": "row=7"}).json()
        right = {"ciphertext": sealed["ciphertext"], "context": "row=7"}
        opened, refused = (
            kms.post("/decrypt", json=right),
            kms.post("/decrypt", json=right | {"context": "row=8"}),
        )

    assert (sealed["backend"], sealed["key_id"], sealed["key_version"]) == ("cosmian", "master", "1")
    assert opened.json()["plaintext"] == "c2VjcmV0"
    assert (refused.status_code, refused.json()["code"]) == (400, "decrypt_failed")
