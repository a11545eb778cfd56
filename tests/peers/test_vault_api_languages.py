"""The programs of docs/integrations/go.md and rust-node-java.md, word for word: libraries of Vault.

What a program encrypts is decrypted by stock ``age``. Each is built once, and again when its section changes.
"""

import hashlib
import os
import re
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from kms_core.age import x25519
from support import pages
from support.credentials import SecuredService
from support.programs import locked_cache, program
from support.service import CANARY
from support.vault_api import NO_REDIS

PAGES: Final = Path(__file__).parents[2] / "docs/integrations"
LIMIT_S: Final = 600
SETTINGS: Final = """
[kms.auth]
mode = "required"
failures_per_minute = 1_000
[kms.auth.logins.approle]
method = "approle"
[kms.auth.logins.brief]
method = "approle"
ttl_s = 4
[kms.facade]
enabled = true
[kms.keys]
other = "age://{other}"
"""
ENVIRON: Final = {
    "GOWORK": "off",
    "NO_PROXY": "127.0.0.1",
    "CARGO_PROFILE_DEV_DEBUG": "0",  # builds in half the time
}
SCOPE: Final = "encrypt,decrypt,rewrap,rotate"
BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CIPHERTEXT: Final = re.compile(r"^vault:v([0-9]+):([A-Za-z0-9+/=]+)$", re.MULTILINE)
PLAINTEXT: Final = "secret-data"
KEYS: Final = {"default", "other"}
UNKNOWN: Final = "Unknown"  # the only code that Go CDK's driver has


@dataclass(frozen=True, slots=True)
class PageSection:
    """A section of a page. ``refused`` is what the library says of a ciphertext that a key does not open."""

    page: str
    section: str
    file: str
    refused: str
    moves: bool = True
    opened: str = PLAINTEXT


SPRING: Final = PageSection("rust-node-java.md", "Java: Spring Vault", "Main.java", "Status 400 ")
PAGE_SECTIONS: Final = [
    PageSection("go.md", "vault/api and openbao/api", "main.go", "400 ["),
    PageSection("go.md", "Go CDK", "main.go", UNKNOWN, moves=False),
    PageSection("go.md", "Tink", "main.go", "Code: 400", moves=False),
    PageSection("rust-node-java.md", "Rust", "main.rs", '400 ["', opened="c2VjcmV0LWRhdGE="),
    PageSection("rust-node-java.md", "Node.js", "main.mjs", "400 "),
    SPRING,
    PageSection("rust-node-java.md", "Java: vault-java-driver", "Main.java", '400 {"errors":["'),
]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredService]:
    folder = tmp_path_factory.mktemp("languages")
    other = folder / "other.txt"
    other.touch(0o600)
    other.write_text(x25519.X25519Identity.generate().export() + "\n")
    with SecuredService(folder / "install", SETTINGS.format(other=other), NO_REDIS) as running:
        yield running.start("api")


def require(file: str) -> None:
    """The programs that build and run a source file."""
    match file:
        case "main.go":
            program("go")
        case "main.rs":
            program("cargo")
        case "main.mjs":
            program("node")
            program("npm")
        case "Main.java":
            program("java")
            program("mvn")


def bash(script: str, folder: Path, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return pages.bash(script, folder, {**os.environ, **ENVIRON, **environ}, LIMIT_S)


def built(walk: PageSection) -> tuple[Path, list[str]]:
    """The folder of a section's program, and the commands of its last block, which run it."""
    require(walk.file)
    text = (PAGES / walk.page).read_text("utf-8").partition(f"\n## {walk.section}\n")[2].partition("\n## ")[0]
    found = BLOCK.findall(text)
    *builds, runs = [block for language, block in found if language == "sh"]
    slug = re.sub(r"\W+", "-", walk.section).lower()
    digest = hashlib.sha256(text.encode()).hexdigest()
    with locked_cache(f"vault-api-{slug}") as folder:
        place = folder / "program"
        done = folder / "done"
        if not done.exists() or done.read_text() != digest:
            done.unlink(missing_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            for language, block in found:
                if language == "xml":
                    (place / "pom.xml").write_text(block)
                elif language != "sh":
                    (place / walk.file).write_text(block)
            pages.said("\n".join(builds), place, os.environ | ENVIRON, LIMIT_S)
            done.write_text(digest)
    return place, runs.splitlines()


def credentials(service: SecuredService) -> dict[str, str]:
    token, text = service.new_token(SCOPE)
    return {
        "VAULT_ADDR": service.url,
        "VAULT_ROLE_ID": token.name,
        "VAULT_SECRET_ID": text,
        "VAULT_TOKEN": text,
    }


def opened_by_age(service: SecuredService, file: bytes) -> str:
    argv = [program("age"), "-d", "-i", str(service.state / "age/private_key.txt")]
    return subprocess.run(argv, input=file, capture_output=True, check=True).stdout.decode()


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("walk", PAGE_SECTIONS, ids=lambda walk: walk.section)
def test_a_program_of_the_page_does_what_its_library_can(secured: SecuredService, walk: PageSection) -> None:
    folder, commands = built(walk)

    for command in commands:
        ran = bash(command, folder, credentials(secured))

        assert ran.returncode == 0, ran.stderr
        lines = ran.stdout.splitlines()
        sealed = CIPHERTEXT.findall(ran.stdout)
        assert {opened_by_age(secured, b64decode(file)) for _, file in sealed} == {PLAINTEXT}
        assert lines[-1] == walk.opened
        assert walk.refused in ran.stdout.partition("refused: ")[2]
        if walk.moves:
            (before, _), (after, _) = sealed
            assert int(after) == int(before) + 1
            (listed,) = [line for line in lines if set(re.findall(r"\w+", line)) == KEYS]
            assert listed, "the keys of the service"


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("walk", PAGE_SECTIONS, ids=lambda walk: walk.section)
def test_a_program_says_that_its_credential_is_refused(secured: SecuredService, walk: PageSection) -> None:
    folder, commands = built(walk)
    wrong = credentials(secured) | dict.fromkeys(("VAULT_SECRET_ID", "VAULT_TOKEN"), f"kms_{CANARY}")

    for command in commands:
        ran = bash(command, folder, wrong)

        assert ran.returncode != 0
        said = ran.stdout + ran.stderr
        assert "permission denied" in said
        assert CANARY not in said
        assert not CIPHERTEXT.search(said)


@pytest.mark.timeout(LIMIT_S + 60)
def test_the_sessions_of_the_page_outlive_their_tokens_in_spring(
    secured: SecuredService, tmp_path: Path
) -> None:
    folder, _ = built(SPRING)
    source = Path(__file__).parent / "spring/SessionCalls.java"
    classes = (program("javac"), "-cp", f"{folder}/lib/*", "-d", str(tmp_path))
    subprocess.run([*classes, folder / "Main.java", source], check=True, capture_output=True, timeout=LIMIT_S)

    ran = bash(f"java -cp '{tmp_path}:{folder}/lib/*' SessionCalls brief", tmp_path, credentials(secured))

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "3"
