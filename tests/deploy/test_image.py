"""The Dockerfile: its linter, and that what it names is there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509

from kms_protocol.errors import EXIT_CONFIGURATION, EXIT_UNAVAILABLE
from support.artefacts import DEPLOY, ROOT, as_root, passes
from support.credentials import Authority
from support.programs import venv_program
from support.service import Service
from support.waiting import until

DOCKERFILE: Final = DEPLOY / "Dockerfile"
TEXT: Final = DOCKERFILE.read_text()
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN: Final = re.compile(r"^([a-z0-9.-]+)==(\S+)", re.MULTILINE)


def pins(name: str) -> dict[str, str]:
    return dict(PIN.findall((ROOT / name).read_text()))


def test_the_linter_finds_nothing() -> None:
    passes(venv_program("hadolint"), "--failure-threshold", "style", DOCKERFILE)


def test_every_program_is_on_the_path_of_the_image() -> None:
    linked = re.findall(
        r"/opt/kms/bin/([a-z-]+)(?= |$)", next(line for line in TEXT.splitlines() if "ln -s" in line)
    )

    assert sorted(linked) == sorted(PROJECT["scripts"])


def test_what_is_copied_is_let_through_to_the_builder() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word.removeprefix("./")
        for words in re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, re.MULTILINE)
        for word in words.split()
    }

    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


STAND_INS: Final = {
    "apt-get": "echo http://me:hunter2@mirror.invalid/debian",
    "unshare": 'shift; exec "$@"',
    "debootstrap": """
shift $(($# - 3)) # suite, target and mirror are left
mkdir -p "$2/etc/apt" "$2/usr/bin" "$2/var/log"
echo "deb $3 $1 main" >"$2/etc/apt/sources.list"
echo "from $3" >"$2/var/log/bootstrap.log"
""",
    "buildah": """
case $1 in
inspect) exit 1 ;;
add) cp -r "$4" "$HERE/base" ;;
esac
""",
}


def test_no_password_of_a_mirror_is_in_the_base(tmp_path: Path) -> None:
    """debootstrap writes the address of its mirror down. Programs that take minutes are stood in for."""
    as_root()
    own, base = tmp_path / "bin", tmp_path / "base"
    own.mkdir()
    for name, text in STAND_INS.items():
        (own / name).write_text(f"#!/bin/sh\n{text}")
        (own / name).chmod(0o755)
    more = {"PATH": f"{own}:{os.environ['PATH']}", "HERE": str(tmp_path), "TMPDIR": str(tmp_path)}
    scripts = tmp_path / "tree/scripts"
    scripts.mkdir(parents=True)
    shutil.copy(ROOT / "scripts/image", scripts)
    shutil.copy(ROOT / "pyproject.toml", scripts.parent)
    (scripts / "venv.sh").write_text(
        f"root={shlex.quote(str(scripts.parent))} venv={shlex.quote(sys.prefix)}\n"
        "say() { :; }\nready() { :; }\n"
    )
    passes(scripts / "image", env=os.environ | more)

    assert (base / "etc/apt/sources.list").read_text() == "deb http://mirror.invalid/debian trixie main\n"
    files = [path for path in base.rglob("*") if path.is_file()]
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []


def test_the_image_has_the_pins_of_the_service_and_every_optional_backend() -> None:
    image, runtime = pins("requirements/image.lock"), pins("requirements/runtime.lock")

    assert image.items() >= runtime.items()
    wanted = {
        re.split(r"[^a-z0-9-]", need)[0]
        for needs in PROJECT["optional-dependencies"].values()
        for need in needs
    }
    assert image.keys() >= wanted


# -- the health check ------------------------------------------------------------------------------------


def alive(service: Service, *words: str) -> int:
    argv = [sys.executable, "-m", "kms_api.server.healthcheck", *words]
    return subprocess.run(argv, env=service.environ, capture_output=True, timeout=30, check=False).returncode


@pytest.fixture
def own(tmp_path: Path, redis_url: str) -> Iterator[Service]:
    with Service(tmp_path, redis=redis_url) as found:
        yield found


def test_an_answering_service_is_healthy(service: Service) -> None:
    assert alive(service) == 0
    assert alive(service, "worker") == 0


def test_one_that_does_not_answer_is_not(own: Service) -> None:
    assert alive(own) == EXIT_UNAVAILABLE
    assert alive(own, "worker") == EXIT_UNAVAILABLE


def test_wrong_settings_are_told_apart(own: Service) -> None:
    own.config.write_text("[kms]\nprot = 1\n")

    assert alive(own) == EXIT_CONFIGURATION


@pytest.mark.parametrize("asked", ["optional", "required"])
def test_a_service_of_tls_is_healthy_without_a_certificate_for_the_probe(
    tmp_path: Path, redis_url: str, asked: str
) -> None:
    authority = Authority(tmp_path / "ca")
    pair = authority.issue("server", x509.DNSName("kms.example.com"), server=True)
    tls = (
        f'[kms.server]\ntls_cert = "{pair.cert}"\ntls_key = "{pair.key}"\n'
        f'client_ca = "{authority.ca_file}"\nclient_cert = "{asked}"\n'
    )
    with Service(tmp_path, tls, redis=redis_url) as secure:
        secure.spawn("api")

        until(lambda: alive(secure) == 0, "the health check passes")
