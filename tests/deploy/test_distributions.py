"""The two distributions, the service and its client, as they are built and installed."""

import hashlib
import os
import re
import ssl
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography import x509

from support.artefacts import DEPLOY, ROOT, passes, run
from support.cli.fixtures import running_up
from support.contract_server import running
from support.credentials import Authority
from support.ports import free_port
from support.programs import locked_cache
from support.wheels import build, copy_sources

CLIENT: Final[dict[str, Any]] = tomllib.loads((ROOT / "client/pyproject.toml").read_text())["project"]
SYNC_PACKAGES: Final = {"kms_service_client", "msgspec"}
ASYNC_PACKAGES: Final = {"anyio", "idna", "typing_extensions", "httpcore2", "h11", "truststore"}
SYNC: Final = """
import sys
sys.path.insert(0, sys.argv[1])
from kms_client import Client
with Client(sys.argv[2], retries=0) as kms:
    sealed = kms.encrypt(b"secret-data", context="env=prod")
    print(kms.decrypt(sealed.ciphertext, context="env=prod").plaintext)
"""
ASYNC: Final = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from kms_client import AsyncClient
async def main():
    async with AsyncClient(sys.argv[2], retries=0) as kms:
        sealed = await kms.encrypt(b"secret-data", context="env=prod")
        print((await kms.decrypt(sealed.ciphertext, context="env=prod")).plaintext)
asyncio.run(main())
"""
FAKE: Final = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from kms_client.testing import FakeService
async def main():
    async with FakeService().async_client() as kms:
        print((await kms.decrypt((await kms.encrypt(b"secret-data")).ciphertext)).plaintext)
asyncio.run(main())
"""
pytestmark = pytest.mark.timeout(600)  # a busy machine takes long to install


def build_both(sources: Path, folder: Path) -> list[Path]:
    build(sources / "client", folder, "sdist", "wheel")
    return build(sources, folder, "sdist", "wheel")


def sha256_of(files: list[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The sdist and the wheel of both."""
    top = tmp_path_factory.mktemp("built")
    return build_both(copy_sources(top / "sources"), top / "dist")


@pytest.fixture(scope="module")
def wheels(built: list[Path]) -> dict[str, Path]:
    return {path.name.partition("-")[0]: path for path in built if path.suffix == ".whl"}


# -- what they hold ---------------------------------------------------------------------------------------


def test_each_package_belongs_to_one_of_them(wheels: dict[str, Path]) -> None:
    packages = {
        name: {member.partition("/")[0] for member in members(wheel) if ".dist-info/" not in member}
        for name, wheel in wheels.items()
    }

    assert packages["kms_service_client"] == {"kms_protocol", "kms_client"}
    assert packages["kms_service"] == {"kms_core", "kms_api", "kms_worker", "kms_cli"}


def test_every_file_of_the_sources_is_in_one_of_them(wheels: dict[str, Path]) -> None:
    tracked = passes(
        "git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "src"
    ).split()
    held = [
        f"src/{member}"
        for wheel in wheels.values()
        for member in members(wheel)
        if ".dist-info/" not in member
    ]

    assert sorted(held) == sorted(tracked)


def test_the_client_is_typed(wheels: dict[str, Path]) -> None:
    assert {"kms_client/py.typed", "kms_protocol/py.typed"} <= members(wheels["kms_service_client"]).keys()


def test_a_wheel_of_an_sdist_is_the_wheel_of_the_tree(
    built: list[Path], wheels: dict[str, Path], tmp_path: Path
) -> None:
    for sdist in (path for path in built if path.name.endswith(".tar.gz")):
        name = sdist.name.removesuffix(".tar.gz")
        with tarfile.open(sdist) as archive:
            if hasattr(tarfile, "data_filter"):  # Python 3.11.4 and later
                archive.extraction_filter = tarfile.data_filter
            archive.extractall(tmp_path / "sources")  # noqa: S202 -- what this test has built
        (again,) = build(tmp_path / "sources" / name, tmp_path / name)

        assert members(again) == members(wheels[name.rpartition("-")[0]])


def test_two_builds_give_the_same_bytes(built: list[Path], tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "another folder")
    for path in sources.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    (sources / "src/kms_client/__pycache__").mkdir()
    (sources / "src/kms_client/__pycache__/aio.cpython-311.pyc").write_bytes(b"left over")
    again = build_both(sources, tmp_path / "dist")

    assert len(again) == 4
    assert sha256_of(again) == sha256_of(built)


def test_the_image_builds_both_from_what_is_copied(wheels: dict[str, Path], tmp_path: Path) -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = " ".join(re.findall(r"^COPY (?!--from|requirements)(.+) \S+$", text, re.MULTILINE)).split()
    sources = copy_sources(tmp_path / "src", *(name.removeprefix("./") for name in copied))
    (words,) = re.findall(r"^RUN /opt/build/bin/pip (wheel .+?) \\$", text, re.MULTILINE)

    argv = words.replace("/wheel ", f"{tmp_path / 'made'} ").split()
    passes(sys.executable, "-m", "pip", "--no-cache-dir", *argv, cwd=sources)

    made = sorted((tmp_path / "made").iterdir())
    assert [path.name for path in made] == sorted(path.name for path in wheels.values())


# -- the client alone -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def needed() -> Iterator[Path]:
    """Wheels of all that the client needs, as locked; fetched once from the configured index."""
    pins = re.findall(r"^(\S+==\S+)", (ROOT / "requirements/runtime.lock").read_text(), re.MULTILINE)
    wanted = [*CLIENT["dependencies"], *CLIENT["optional-dependencies"]["async"]]
    with locked_cache("client-wheels") as folder:
        constraints = folder / "constraints"
        constraints.write_text("\n".join(pins))
        fetch = (
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--only-binary",
            ":all:",
            "--dest",
            folder,
        )
        words = (*fetch, "--find-links", folder, "--constraint", constraints, *wanted)
        if run(*words, "--no-index").returncode != 0:
            done = run(*words)
            if done.returncode != 0:
                pytest.skip(f"nothing is fetched: {done.stderr}")
        yield folder


def installed(folder: Path, needed: Path, wheel: Path, extra: str = "") -> set[str]:
    """Install the wheel into an empty folder; the names of the distributions there."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--target", folder)
    options = ("--no-index", "--find-links", needed, "--constraint", needed / "constraints")
    passes(*pip, *options, f"{wheel}{extra}")
    return {path.name.partition("-")[0] for path in folder.glob("*.dist-info")}


@pytest.fixture(scope="module")
def sync_only(tmp_path_factory: pytest.TempPathFactory, needed: Path, wheels: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("sync")
    names = installed(folder, needed, wheels["kms_service_client"])
    assert names == SYNC_PACKAGES
    return folder


@pytest.fixture(scope="module")
def with_async(tmp_path_factory: pytest.TempPathFactory, needed: Path, wheels: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("async")
    names = installed(folder, needed, wheels["kms_service_client"], "[async]")
    assert names <= SYNC_PACKAGES | ASYNC_PACKAGES
    return folder


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def https(authority: Authority) -> Iterator[str]:
    """The URL of a server whose certificate only ``authority`` vouches for."""
    pair = authority.issue("server", x509.IPAddress(IPv4Address("127.0.0.1")), server=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pair.cert, pair.key)
    with running(tls) as service:
        yield service.url


def python(code: str, *words: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run code without any site-packages and without any variable but ``environ``."""
    return run(sys.executable, "-I", "-S", "-W", "error", "-c", code, *words, env=environ)


@pytest.mark.parametrize("client", ["sync_only", "with_async"])
def test_a_client_calls_by_the_authorities_of_the_system(
    request: pytest.FixtureRequest, client: str, https: str, authority: Authority
) -> None:
    code = SYNC if client == "sync_only" else ASYNC
    done = python(code, request.getfixturevalue(client), https, SSL_CERT_FILE=str(authority.ca_file))

    assert (done.returncode, done.stdout) == (0, "b'secret-data'\n"), done.stderr


def test_an_authority_that_the_system_does_not_have_is_not_trusted(sync_only: Path, https: str) -> None:
    done = python(SYNC, sync_only, https)

    assert done.returncode == 1
    assert f"ServiceUnreachable: The certificate of {https} is not trusted" in done.stderr


def test_the_async_client_says_what_it_lacks(sync_only: Path, https: str) -> None:
    done = python(ASYNC, sync_only, https)

    assert done.returncode == 1
    assert (
        "ConfigurationError: AsyncClient needs anyio and httpcore2: install the client with its extra async"
        in done.stderr
    )


def test_the_stand_in_for_tests_needs_nothing_else(sync_only: Path) -> None:
    done = python(FAKE, sync_only)

    assert (done.returncode, done.stdout) == (0, "b'secret-data'\n"), done.stderr


# -- the service ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Path:
    """A virtual environment of both wheels; it sees what ``.venv`` has, but for editable installations."""
    made = tmp_path_factory.mktemp("prefix") / "venv"
    passes(sys.executable, "-m", "venv", "--without-pip", made)
    pip = (sys.executable, "-m", "pip", "--python", made / "bin/python")
    passes(*pip, "install", "--quiet", "--no-index", "--no-deps", *wheels.values())
    packages = sysconfig.get_path("purelib", vars={"base": str(made), "platbase": str(made)})
    (Path(packages) / "beside.pth").write_text(sysconfig.get_path("purelib"))  # it reads no .pth files there
    passes(*pip, "check")
    return made


def test_kms_runs_from_both_wheels(prefix: Path, tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    url = f"http://127.0.0.1:{free_port()}"
    where = passes(
        prefix / "bin/python", "-P", "-c", "import kms_client, kms_cli; print(kms_client, kms_cli)"
    )
    assert where.count(str(prefix)) == 2
    kms, called = prefix / "bin/kms", environ | {"KMS_SERVICE_URL": url}
    words = ("--state-dir", tmp_path / "state", "--port", url.rpartition(":")[2])
    with running_up(tmp_path / "up.log", environ, *words, program=kms):
        sealed = run(kms, "encrypt", "--context", "env=prod", env=called, input="secret-data")
        assert sealed.returncode == 0, sealed.stderr
        opened = run(kms, "decrypt", "--context", "env=prod", env=called, input=sealed.stdout)

    assert (opened.stdout, opened.returncode) == ("secret-data", 0), opened.stderr
