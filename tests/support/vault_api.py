"""The façade for tests: an install that asks everybody, over a key in a file and one in OpenBao."""

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import pytest

from support.credentials import SecuredService
from support.openbao import bao, binary

NO_REDIS: Final = "unix:///nonexistent/valkey.sock"
KEYS: Final = ("default", "remote")
SETTINGS: Final = """
require_context = true
[kms.auth]
mode = "required"
failures_per_minute = 1000
[kms.age]
data_keys = true
{transit}
[kms.tenants.acme]
keys = ["default"]
[kms.keys]
remote = "transit:{key}"
"""
Json = dict[str, Any]


class Facade(SecuredService):
    """An API with keys on this host and in a server."""

    def __init__(self, folder: Path) -> None:
        server = bao()
        settings = SETTINGS.format(transit=server.settings(), key=server.new_key())
        super().__init__(folder, settings, NO_REDIS)
        self.root = self.new_token("*,metrics,rotate")[1]
        self.home = folder / "home"
        self.home.mkdir()

    def call(self, method: str, path: str, body: object = None, **more: Any) -> httpx.Response:  # noqa: ANN401 -- httpx's own keywords
        """As a Vault client calls; ``token`` another than the one that may do everything."""
        headers = {"X-Vault-Request": "true", "X-Vault-Token": more.pop("token", self.root)}
        if body is not None:
            more["json"] = body
        return self.http.request(method, f"/v1/{path}", headers=headers | more.pop("headers", {}), **more)

    def data(self, method: str, path: str, body: object = None, **more: Any) -> Json:  # noqa: ANN401 -- as above
        answer = self.call(method, path, body, **more)
        assert answer.status_code == 200, answer.text
        found: Json = answer.json()["data"]
        return found

    def answered(self, operation: str) -> dict[str, int]:
        """How often which status was the answer to an operation, until now."""
        text = self.http.get("/metrics", headers={"X-Vault-Token": self.root}).text
        counts = re.findall(
            r"^kms_http_request_duration_seconds_count"
            rf'{{.*route="/v1/{{mount}}/{operation}/{{name}}",status="(\d+)"}} (\d+)',
            text,
            re.MULTILINE,
        )
        found = Counter[str]()
        for status, count in counts:  # of each method
            found[status] += int(count)
        return found

    def cli(
        self, *words: str, token: str = "", check: bool = True, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """The ``bao`` command against the façade; ``more`` is for its environment."""
        environ = {"BAO_ADDR": self.url, "BAO_TOKEN": token or self.root, "HOME": str(self.home)}
        return run([binary(), *words], environ | more, self.home, check=check)


def run(
    argv: list[str], environ: dict[str, str], folder: Path, *, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """A program that is given nothing but this environment."""
    done = subprocess.run(
        argv,
        cwd=folder,
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def facade(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Facade]:
    """One for all tests: they may rotate its keys, and nothing else."""
    with Facade(tmp_path_factory.mktemp("facade")) as running:
        yield running.start("api")
