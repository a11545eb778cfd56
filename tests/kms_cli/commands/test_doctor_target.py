"""Which service ``kms doctor`` checks, and whose settings ``kms config show`` prints: those of what runs."""

import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from support.cli.doctor import DoctorReport, told_by
from support.cli.fixtures import BIN, TIMEOUT_S, environment, running_up
from support.ports import free_port
from support.service import Service
from support.waiting import WAIT_S

PASSWORD: Final = "hunter2"


@dataclass(frozen=True)
class User:
    """A user with a home and a directory for sockets, as a login gives them."""

    home: Path

    def environ(self, **more: str) -> dict[str, str]:
        return environment(self.home, XDG_RUNTIME_DIR=str(self.home / "r"), **more)

    def up(
        self, state: Path | None, port: int, cwd: Path | None = None, **more: str
    ) -> AbstractContextManager[subprocess.Popen[str]]:
        """A real ``kms up`` in another terminal."""
        named = [] if state is None else ["--state-dir", state]
        log = self.home / f"{port}.log"
        return running_up(log, self.environ(**more), *named, "--port", port, cwd=cwd)

    def kms(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        words, environ = [str(BIN / "kms"), *arguments], self.environ(**more)
        return subprocess.run(
            words, env=environ, cwd=self.home, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )

    def doctor(self, *arguments: str, **more: str) -> DoctorReport:
        return told_by(self.kms("doctor", "--json", *arguments, **more))


@pytest.fixture
def user(tmp_path: Path) -> User:
    return user_at(tmp_path)


def user_at(home: Path) -> User:
    (home / "r").mkdir(mode=0o700)
    return User(home)


@dataclass(frozen=True)
class TwoServices:
    """Two ``kms up`` of one user; ``last`` was started after ``first``."""

    user: User
    first: tuple[Path, int]
    last: tuple[Path, int]


@pytest.fixture(scope="module")
def two_services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoServices]:
    home = tmp_path_factory.mktemp("two")
    given = TwoServices(user_at(home), (home / "first öf two", free_port()), (home / "last", free_port()))
    with ExitStack() as stack:
        stack.enter_context(given.user.up(*given.first))
        stack.enter_context(given.user.up(*given.last))
        yield given


def test_without_options_it_is_the_kms_up_that_runs(user: User) -> None:
    port, state = free_port(), user.home / "elsewhere"
    with user.up(state, port):
        told, shown = user.doctor(), user.kms("config", "show", "--changed")
        asked = user.kms("health")
        url = user.kms("config", "show", "redis.url")
    after, none = user.doctor(), user.kms("config", "show", "redis.url")

    assert told.lines[0]["subject"] == "target"
    assert asked.stdout.startswith("healthy (age, ")
    assert told.all("target", "ok") == [f"http://127.0.0.1:{port}, state {state}: kms up runs it: "]
    assert told.exit_code == 0
    assert f"http://127.0.0.1:{port} answers" in told.all("service", "ok")[0]
    assert told.all("redis", "ok")[0].startswith(f"{user.home}/r/kms-")
    assert shown.stdout.splitlines()[:3] == [
        "[kms]",
        f"port = {port}  # kms up, which runs",
        f'state_dir = "{state}"  # kms up, which runs',
    ]
    assert url.stdout.startswith(f"unix://{user.home}/r/kms-")
    default = user.home / ".local/state/kms-service"
    assert after.all("target", "ok") == [
        f"http://127.0.0.1:8082, state {default}: kms up does not run it: ",
        "nothing of a service is found here, so it is only asked: ",
    ]
    assert none.stdout == "redis://127.0.0.1:6379/0\n"
    assert list((user.home / "r").iterdir()) == []


def test_a_default_state_directory_is_not_taken_for_a_named_one(user: User) -> None:
    """With a named one the Age keys are in it, not where tools look for them."""
    port = free_port()
    with user.up(None, port):
        told = user.doctor()
        assert "warning" not in user.kms("token", "list").stderr

    assert (
        f"http://127.0.0.1:{port}, state {user.home}/.local/state/kms-service: "
        in told.all("target", "ok")[0]
    )
    assert told.all("self-test", "ok") == ["default (age) wraps and unwraps: "]
    assert told.exit_code == 0


def test_a_kms_up_that_was_killed_does_not_run(user: User) -> None:
    with user.up(user.home / "elsewhere", free_port()) as process:
        process.kill()
        process.wait(WAIT_S)

        assert len(list((user.home / "r").glob("kms-*/up.json"))) == 1
        assert "kms up does not run it" in user.doctor().all("target", "ok")[0]


def test_of_two_it_takes_the_newest_and_says_how_to_name_the_other(two_services: TwoServices) -> None:
    (other, _), (state, port) = two_services.first, two_services.last
    told = two_services.user.doctor()
    shown = two_services.user.kms("config", "show", "port")

    assert told.all("target", "ok") == [f"http://127.0.0.1:{port}, state {state}: kms up runs it: "]
    doubt = f"kms up runs 2 times, this is {state}: for another: --state-dir '{other}'"
    assert told.all("target", "warn") == [doubt]
    assert shown.stdout == f"{port}\n"
    assert shown.stderr == f"kms: warning: {doubt}\n"


@pytest.mark.parametrize("by", ["state", "url", "port"])
def test_of_two_a_name_takes_one_without_doubt(two_services: TwoServices, by: str) -> None:
    state, port = two_services.first
    variables = {
        "state": {"KMS_STATE_DIR": str(state)},
        "url": {"KMS_SERVICE_URL": f"http://localhost:{port}"},
        "port": {"KMS_PORT": str(port)},
    }
    told = two_services.user.doctor(**variables[by])
    shown = two_services.user.kms("config", "show", "state_dir", **variables[by])

    assert f":{port}, state {state}: kms up runs it" in told.all("target", "ok")[0]
    assert told.all("target", "warn") == []
    assert told.exit_code == 0
    assert (shown.stdout, shown.stderr) == (f"{state}\n", "")


@pytest.mark.parametrize("words", [("token", "list"), ("config", "lint")])
def test_a_command_about_another_state_than_what_runs_says_so(
    two_services: TwoServices, words: tuple[str, ...]
) -> None:
    """Or a backup would be one of an install that nobody uses."""
    said = two_services.user.kms(*words).stderr
    named = two_services.user.kms(*words, "--state-dir", str(two_services.first[0])).stderr

    default = two_services.user.home / ".local/state/kms-service"
    warning = f"kms: warning: this is about {default}, and kms up runs with another: --state-dir "
    assert said.count("warning: this is about") == 1
    assert f"{warning}{two_services.last[0]}\n" in said
    assert "warning: this is about" not in named


def test_a_service_of_another_install_than_the_state_fails(two_services: TwoServices) -> None:
    told = two_services.user.doctor(
        "--state-dir", str(two_services.first[0]), "--url", f"http://127.0.0.1:{two_services.last[1]}"
    )

    assert "is of another install" in told.all("target", "FAIL")[0]
    assert "--state-dir" in told.all("target", "FAIL")[0]
    assert told.exit_code == 78


def test_what_only_kms_up_has_in_its_environment_is_named_and_not_shown(user: User, redis_url: str) -> None:
    secret = redis_url.replace("?", f"?client_name={PASSWORD}&")
    with user.up(user.home / "elsewhere", free_port(), KMS_REDIS_URL=secret):
        told = user.doctor()
        shown = user.kms("config", "show", "redis.url")
        same = user.doctor(KMS_REDIS_URL=secret)
        noted = [path.read_text() for path in (user.home / "r").glob("kms-*/*")]

    assert told.all("target", "warn") == [
        "kms up runs with KMS_REDIS_URL, this command without: set the same here"
    ]
    assert "KMS_REDIS_URL" in shown.stderr
    assert same.all("target", "warn") == []
    assert len(noted) == 1
    assert PASSWORD not in f"{told.lines}{noted}"


def test_what_kms_up_found_is_read_by_commands_elsewhere(user: User) -> None:
    """Also after it has ended. No code of its working directory is imported."""
    folder, port = user.home / "repository", free_port()
    file, marker = folder / "provisioning/config/kms.toml", folder / "imported"
    file.parent.mkdir(parents=True)
    file.write_text("[kms]\nrequire_context = true\n")
    for name in ("kms_api", "kms_worker", "kms_core", "msgspec"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')")
    shown = ("config", "show", "require_context")
    with user.up(None, port, cwd=folder):
        told, named, running = user.doctor(), user.doctor("--config", str(file)), user.kms(*shown)
        said = (user.home / f"{port}.log").read_text()
    ended = user.kms(*shown)
    file.unlink()
    gone = user.kms(*shown)

    assert f"kms: settings: {file}\n" in said
    assert told.all("settings", "ok") == [f"read from {file}, environment dev: "]
    assert "kms up runs it" in named.all("target", "ok")[0], "it handed on KMS_CONFIG"
    assert (running.stdout, running.stderr) == ("true\n", "")
    assert (ended.stdout, ended.stderr) == ("true\n", "")
    assert not marker.exists()
    assert gone.returncode == 78
    assert f"{file}, which the service read last, is gone" in gone.stderr


def test_without_kms_up_it_is_the_address_of_the_settings(tmp_path: Path) -> None:
    install = Service(tmp_path, redis="unix:///nonexistent/valkey.sock")
    first, *_, last = install.run_kms("doctor").stdout.splitlines()

    assert first.startswith(f"ok    target        http://127.0.0.1:{install.port}, state {install.state}: ")
    assert f"nothing answers at http://127.0.0.1:{install.port}" in last
