"""Pages of docs/integrations, word for word, where tokens are required."""

import json
import os
import re
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from support import pages
from support.cli.fixtures import environment
from support.credentials import SecuredService
from support.openbao import binary
from support.ports import free_port
from support.programs import locked_cache, program
from support.vault_api import NO_REDIS

PAGES: Final = Path(__file__).parents[2] / "docs/integrations"
LIMIT_S: Final = 300
SETTINGS: Final = """
[kms.auth]
mode = "required"
[kms.auth.logins.approle]
method = "approle"
[kms.facade]
enabled = true
"""


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredService]:
    with SecuredService(tmp_path_factory.mktemp("pages"), SETTINGS, NO_REDIS) as running:
        yield running.start("api")


@pytest.fixture
def environ(secured: SecuredService, tmp_path: Path) -> dict[str, str]:
    """What a user has: the service's address, a token, and the programs of this tree on the PATH."""
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(secured.new_token("encrypt,decrypt")[1])
    return secured.environ | environment(tmp_path, KMS_SERVICE_URL=secured.url, KMS_TOKEN_FILE=str(token))


def blocks_to_run(page: str) -> list[str]:
    return pages.blocks_to_run(f"docs/integrations/{page}", "sh")


def bash(script: str, folder: Path, environ: Mapping[str, str]) -> str:
    """What a script prints."""
    return pages.said(script, folder, environ, LIMIT_S)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def test_an_agent_and_a_proxy_of_openbao_decrypt(
    secured: SecuredService, environ: dict[str, str], here: Path
) -> None:
    program("curl")
    (here.parent / "bin").mkdir()
    (here.parent / "bin/bao").symlink_to(binary())
    path = f"{here.parent / 'bin'}{os.pathsep}{environ['PATH']}"
    script = "\n".join(blocks_to_run("bao.md")).replace("http://localhost:8082", secured.url)

    bash(script.replace("127.0.0.1:8200", f"127.0.0.1:{free_port()}"), here, environ | {"PATH": path})

    assert (here / "app.env").read_text() == "password=hunter2\n"
    assert (here / "app.env").stat().st_mode & 0o777 == 0o600


@pytest.mark.timeout(LIMIT_S + 60)
def test_consul_template_decrypts(secured: SecuredService, environ: dict[str, str], here: Path) -> None:
    program("go")
    program("curl")
    install, render = blocks_to_run("consul-template.md")
    with locked_cache("consul-template") as folder:
        fetched = folder / "fetched"
        if not fetched.exists() or fetched.read_text() != install:
            bash(install, folder, os.environ | {"PATH": environ["PATH"], "GOWORK": "off"})
            fetched.write_text(install)
    render = render.replace("http://localhost:8082", secured.url)
    environ = environ | {"PATH": f"{folder}{os.pathsep}{environ['PATH']}"}

    bash(render, here, environ)

    assert (here / "app.env").read_text() == "password=hunter2\n"
    assert (here / "app.env").stat().st_mode & 0o777 == 0o600
    (here / "app.env").unlink()
    (here / "password.transit").write_text("vault:v1:bm8gZmlsZQ==")
    login = {"VAULT_ADDR": secured.url, "VAULT_TOKEN": (here / "templates.token").read_text().strip()}
    with pytest.raises(AssertionError, match="Code: 400"):
        bash("consul-template -config=templates.hcl -once -vault-retry=false", here, environ | login)
    assert not (here / "app.env").exists()


def test_restic_takes_its_password_from_kms_run(environ: dict[str, str], here: Path) -> None:
    program("restic")
    (script,) = blocks_to_run("commands.md")

    said = bash(script, here, environ)

    assert re.search(r"^snapshot [0-9a-f]{8} saved$", said, re.MULTILINE)
    assert (here / "repository/config").is_file()


@pytest.mark.timeout(LIMIT_S + 60)
def test_pyarrow_has_the_keys_of_a_parquet_file_wrapped(
    secured: SecuredService, environ: dict[str, str], here: Path
) -> None:
    fetch, run = blocks_to_run("parquet.md")
    with locked_cache("pyarrow") as folder:
        fetched = folder / "fetched"
        if not fetched.exists() or fetched.read_text() != fetch:
            shutil.rmtree(folder / "lib", ignore_errors=True)
            bash(fetch, folder, os.environ | {"PATH": environ["PATH"]})
            fetched.write_text(fetch)
    (here / "lib").symlink_to(folder / "lib")
    (source,) = re.findall(r"```python\n(.*?)```", (PAGES / "parquet.md").read_text("utf-8"), re.DOTALL)
    (here / "people.py").write_text(source)

    said = bash(run, here, environ)

    assert said == "[{'name': 'ada', 'salary': 4711}, {'name': 'bob', 'salary': 4712}]\n"
    file = (here / "people.parquet").read_bytes()
    assert file[:4] == b"PARE"  # the magic of an encrypted footer
    options = 'partial(KmsClient, token_file=os.environ["KMS_TOKEN_FILE"])'
    assert options in source
    other = source.replace(options, "KmsClient").replace(
        'URL"])', 'URL"], key_access_token=os.environ["TOKEN"])'
    )
    (here / "people.py").write_text(other)
    assert bash(run, here, environ | {"TOKEN": secured.new_token("encrypt,decrypt")[1]}) == said
    wrapped = {json.loads(f'"{text.decode()}"') for text in re.findall(rb'"wrappedKEK":"([^"]+)"', file)}
    identity = str(secured.state / "age/private_key.txt")
    for text in wrapped:
        opened = subprocess.run(
            [program("age"), "-d", "-i", identity], input=b64decode(text), capture_output=True, check=True
        )
        assert len(opened.stdout) == 16  # Parquet's key encryption keys are of AES-128
    assert wrapped
