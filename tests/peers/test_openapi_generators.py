"""docs/integrations/generated-clients.md, word for word: clients made of the OpenAPI document.

Each walk fetches its generator, has it read the document of a service, and runs the program of the page.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support import pages
from support.credentials import REQUIRED, SecuredService
from support.openapi_check import FILE
from support.programs import locked_cache, program

PAGE: Final = (Path(__file__).parents[2] / "docs/integrations/generated-clients.md").read_text("utf-8")
LIMIT_S: Final = 900
UPLOAD: Final = bytes(range(256)) * 4096
GENERATORS: Final = {
    "Go": ("main.go", ("go", "curl")),
    "Java": ("Main.java", ("java", "mvn")),
    "TypeScript": ("main.ts", ("node", "npm", "curl")),
}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, module_redis: str) -> Iterator[SecuredService]:
    with SecuredService(tmp_path_factory.mktemp("secured"), REQUIRED, module_redis) as running:
        running.start()
        running.http.headers.update(running.token_header("*"))
        yield running


def run(script: str, folder: Path, **environ: str) -> str:
    """What a script prints."""
    environ = os.environ | {"GOWORK": "off", "NO_PROXY": "127.0.0.1"} | environ
    return pages.said(script, folder, environ, LIMIT_S)


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("language", GENERATORS)
def test_a_generated_client_does_what_the_page_says(
    secured: SecuredService, language: str, tmp_path: Path
) -> None:
    file, programs = GENERATORS[language]
    for name in programs:
        program(name)
    section = PAGE.partition(f"\n## {language}\n")[2].partition("\n## ")[0]
    section = section.replace("http://localhost:8082", secured.url)
    (source,) = re.findall(r"```(?:go|java|ts)\n(.*?)```", section, re.DOTALL)
    (tmp_path / file).write_text(source)
    (tmp_path / "backup.tar").write_bytes(UPLOAD)
    token = secured.http.headers["Authorization"].removeprefix("Bearer ")

    said = run("\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL)), tmp_path, KMS_TOKEN=token)

    assert said.rstrip().endswith("secret-data")
    job_id = secured.upload("decrypt", (tmp_path / "backup.tar.age").read_bytes(), "env=prod")
    secured.wait(job_id, "succeeded")
    assert secured.result(job_id) == UPLOAD


@pytest.mark.timeout(LIMIT_S + 60)
def test_linters_have_no_warning(tmp_path: Path) -> None:
    npm = program("npm")
    (tmp_path / ".spectral.yaml").write_text('extends: ["spectral:oas"]\n')
    with locked_cache("openapi-linters") as folder:
        run(
            f"{npm} install --silent --no-audit --no-fund --prefix {folder} @redocly/cli@2.77.0"
            " @stoplight/spectral-cli@6.16.3",
            folder,
        )
    bin_ = folder / "node_modules/.bin"

    run(f"{bin_}/spectral lint --fail-severity hint {FILE}", tmp_path)
    found = run(
        f"{bin_}/redocly lint --extends recommended --format json {FILE}", tmp_path, REDOCLY_TELEMETRY="off"
    )

    assert '"totals"' in found
    assert re.search(r'"warnings": 0\b', found), found
