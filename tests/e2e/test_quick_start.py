"""The lines of the first document as a new user types them: quick start, unit and manifest."""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from kms_core.settings.files import MACHINE
from kms_protocol.errors import EXIT_CONFIGURATION
from support.pages import bash, said
from support.ports import free_port, listens
from support.programs import program, running

BIN: Final = Path(sys.executable).parent
KEYS: Final = """
mkdir -p ~/.config/provisioning/age
age-keygen -o ~/.config/provisioning/age/private_key.txt
age-keygen -y ~/.config/provisioning/age/private_key.txt > ~/.config/provisioning/age/public_key.txt
"""
FILE: Final = """
[kms]
dev_backend = "age"
prod_backend = "cosmian"
environment = "${PROVISIONING_ENV:-dev}"

[kms.age]
public_key_path = "~/.config/provisioning/age/public_key.txt"
private_key_path = "~/.config/provisioning/age/private_key.txt"

[kms.cosmian]
server_url = "${COSMIAN_KMS_URL:-https://kms.example.com}"
api_key = "${COSMIAN_API_KEY}"
default_key_id = "provisioning-master-key"
tls_verify = true
"""
ENCRYPT: Final = """
curl -X POST http://localhost:8082/api/v1/kms/encrypt \\
 -H "Content-Type: application/json" \\
 -d '{
 "plaintext": "SGVsbG8sIFdvcmxkIQ==",
 "context": "env=prod,service=api"
 }'
"""
DECRYPT: Final = """
curl -X POST http://localhost:8082/api/v1/kms/decrypt \\
 -H "Content-Type: application/json" \\
 -d '{
 "ciphertext": "...",
 "context": "env=prod,service=api"
 }'
"""
UNIT: Final = """
Environment="PROVISIONING_ENV=prod"
Environment="COSMIAN_KMS_URL=https://kms.example.com"
Environment="COSMIAN_API_KEY=your-api-key"
"""
MANIFEST: Final = """
 - name: PROVISIONING_ENV
 value: "prod"
 - name: COSMIAN_KMS_URL
 value: "https://kms.example.com"
 - name: COSMIAN_API_KEY
 valueFrom:
 secretKeyRef:
 name: cosmian-api-key
 key: api-key
"""


class User:
    """A new user with an empty home, who works in ``here``. The port is a free one in place of 8082."""

    def __init__(self, folder: Path) -> None:
        self.home, self.here, self.port = folder / "home", folder / "here", free_port()
        self.log = folder / "log"
        for made in (self.home, self.here):
            made.mkdir()
        self.state = self.home / ".local/state/kms-service"
        path = f"{BIN}:{os.environ['PATH']}"
        self.environ = {"HOME": str(self.home), "PATH": path, "LANG": "C.UTF-8", "KMS_PORT": str(self.port)}
        self.environ["KMS_SERVICE_URL"] = f"http://localhost:{self.port}"

    def types(self, lines: str) -> str:
        """What lines print that end with success."""
        return said(lines.replace(":8082", f":{self.port}"), self.here, self.environ)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """``kms-service`` until the end of the block."""
        argv = [program("bash"), "-c", 'cd "$1" && exec kms-service', "bash", self.here]
        with running(argv, self.log, lambda: listens(self.port), self.environ):
            yield

    def refusal(self) -> str:
        """What ``kms-service`` says that does not start, and names as the command to run."""
        done = bash("kms-service", self.here, self.environ)
        assert done.returncode == EXIT_CONFIGURATION, done.stderr
        (command,) = re.findall(r"`([^`]+)`", done.stderr)
        return str(command)


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path)


@pytest.mark.parametrize("with_file", [False, True], ids=["variables", "file"])
def test_the_quick_start_ends_with_a_ciphertext(user: User, with_file: bool) -> None:
    program("age-keygen")
    program("curl")
    if with_file:
        (user.here / "provisioning/config").mkdir(parents=True)
        (user.here / "provisioning/config/kms.toml").write_text(FILE)
    user.environ["PROVISIONING_ENV"] = "dev"
    user.types(KEYS)
    with user.serving():
        sealed = json.loads(user.types(ENCRYPT))["ciphertext"]
        opened = json.loads(user.types(DECRYPT.replace("...", sealed)))
        health = json.loads(user.types("curl http://localhost:8082/api/v1/kms/health"))
        assert user.types(f"kms decrypt --context env=prod,service=api <<< {sealed}") == "Hello, World!"

    assert (opened["plaintext"], health["status"]) == ("SGVsbG8sIFdvcmxkIQ==", "healthy")
    assert (user.state / "spool.key").stat().st_mode & 0o777 == 0o600


def of_unit() -> Mapping[str, str]:
    return dict(re.findall(r'^Environment="(\w+)=(.*)"$', UNIT, re.MULTILINE))


def of_manifest() -> Mapping[str, str]:
    """The Secret has the key of the unit."""
    named = dict(re.findall(r'- name: (\w+)\n value: "(.*)"', MANIFEST))
    return named | {"COSMIAN_API_KEY": of_unit()["COSMIAN_API_KEY"]}


@pytest.mark.parametrize("variables", [of_unit(), of_manifest()], ids=["unit", "manifest"])
def test_production_starts_after_a_command_for_each_thing_that_is_missing(
    user: User, variables: Mapping[str, str]
) -> None:
    """The commands are those that the errors name; the file is elsewhere than in /etc here."""
    user.environ |= variables
    decides = user.refusal()
    file = user.home / "etc/kms.toml"
    user.environ["KMS_CONFIG"] = str(file)
    assert str(MACHINE) in decides
    user.types(decides.replace(str(MACHINE), str(file)).replace(str(MACHINE.parent), str(file.parent)))

    user.types(user.refusal())
    assert (user.state / "spool.key").stat().st_mode & 0o777 == 0o600
    with user.serving():
        status = 'curl -o answer -w "%{http_code}" -X POST http://localhost:8082/api/v1/kms/encrypt -d '
        assert user.types(f"{status}'{{}}'") == "401"
        user.types("kms token create --name me --scope '*' -o me")
        by_token = '-H "Authorization: Bearer $(cat me)"'
        body = '{"plaintext": "SGVsbG8=", "context": "env=prod"}'
        assert user.types(f"{status}'{body}' {by_token}") == "503", "there is no server at kms.example.com"
