import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from kms_cli import terminal
from kms_cli.main import run
from kms_client.requests import BY_CODE
from kms_protocol.error_texts import TEXTS
from support.cli.fixtures import BIN, environment, kms
from support.contract_server import ContractServer, Job
from support.ports import free_port
from support.waiting import WAIT_S, until

KMS = str(BIN / "kms")


@contextmanager
def running_kms(stand_in: ContractServer, folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    env = environment(folder, KMS_SERVICE_URL=stand_in.url)
    with subprocess.Popen([KMS, *words], cwd=folder, env=env, stderr=subprocess.PIPE, text=True) as running:
        yield running


@contextmanager
def encrypting(stand_in: ContractServer, folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``kms encrypt-file file`` of some megabytes."""
    (folder / "file").write_bytes(b"x" * 4_000_000)
    with running_kms(stand_in, folder, *options, "encrypt-file", "file") as running:
        yield running


def until_followed(stand_in: ContractServer) -> None:
    until(lambda: any("/jobs/job-1?wait=" in seen.path for seen in stand_in.seen), "it follows the job")


SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
GOES_ON = (
    "kms: the wait ended, not job job-1: `kms job wait job-1` waits on, `kms job cancel job-1` cancels it"
)


@SIGNALS
def test_interrupted_transfer_leaves_no_file_and_no_job(
    stand_in: ContractServer, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    stand_in.faults.steps_s = 100
    with encrypting(stand_in, tmp_path) as running:
        until_followed(stand_in)
        running.send_signal(number)
        _, said = running.communicate(timeout=WAIT_S)

    assert running.returncode == code
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert stand_in.jobs["job-1"].cancelled
    assert said.splitlines()[0] == "kms: cancelled job job-1"


def test_a_transfer_whose_job_cannot_be_cancelled_says_that_it_goes_on(
    stand_in: ContractServer, tmp_path: Path
) -> None:
    stand_in.faults.steps_s = 100
    with encrypting(stand_in, tmp_path) as running:
        until_followed(stand_in)
        stand_in.faults.token = "another"
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=WAIT_S)

    assert said.splitlines() == [GOES_ON, "kms: interrupted"]


@SIGNALS
@pytest.mark.parametrize("words", [("wait", "job-1"), ("submit", "encrypt", "/a", "/b", "--wait")], ids=str)
def test_an_interrupted_wait_leaves_the_job_and_says_how_to_go_on(
    stand_in: ContractServer, tmp_path: Path, words: tuple[str, ...], number: signal.Signals, code: int
) -> None:
    stand_in.faults.steps_s = 100
    if words[0] == "wait":
        stand_in.jobs["job-1"] = Job("encrypt", b"")
    with running_kms(stand_in, tmp_path, "job", *words) as running:
        until_followed(stand_in)
        running.send_signal(number)
        _, said = running.communicate(timeout=WAIT_S)

    assert (running.returncode, said.splitlines()[0]) == (code, GOES_ON)
    assert not stand_in.jobs["job-1"].cancelled


def test_a_result_whose_transfer_is_interrupted_is_kept(stand_in: ContractServer, tmp_path: Path) -> None:
    stand_in.faults.stalls = True
    with encrypting(stand_in, tmp_path) as running:
        until(lambda: any(seen.path.endswith("/result") for seen in stand_in.seen), "it fetches the result")
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=WAIT_S)
    stand_in.faults.stalls = False

    assert running.returncode == 130
    assert "kms: the result is kept: `kms job result job-1 -o file.age`\n" in said
    assert not stand_in.jobs["job-1"].cancelled
    env = environment(tmp_path, KMS_SERVICE_URL=stand_in.url)
    subprocess.run([KMS, "job", "result", "job-1", "-o", "file.age"], cwd=tmp_path, env=env, check=True)


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_CORE)[1] == 0, reason="no core file is made here at all"
)
@pytest.mark.parametrize(
    "command",
    [(KMS, "decrypt"), (sys.executable, "-P", "-m", "kms_cli.plugin.main", "--age-plugin=identity-v1")],
    ids=["kms", "plugin"],
)
def test_what_crashes_leaves_no_core_file(tmp_path: Path, command: tuple[str, ...]) -> None:
    raised = ("sh", "-c", 'ulimit -S -c "$(ulimit -H -c)"; exec "$@"', "sh", *command)
    with subprocess.Popen(raised, env=environment(tmp_path), stdin=subprocess.PIPE) as running:

        def limits() -> list[str]:
            lines = Path(f"/proc/{running.pid}/limits").read_text().splitlines()
            return next(line.split()[4:6] for line in lines if line.startswith("Max core"))

        until(lambda: limits() == ["0", "0"], "core files are off")
        running.kill()


@pytest.mark.parametrize(("offset", "use"), [(0, "the API"), (1, "the worker's metrics")])
def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path, offset: int, use: str) -> None:
    port = free_port()
    command = [KMS, "up", "--state-dir", "state", "--port", str(port)]
    with socket.create_server(("127.0.0.1", port + offset)):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False
        )

    assert (done.returncode, done.stdout) == (69, "")
    told = f"127.0.0.1 port {port + offset}, for {use}, cannot be used: Address already in use\n"
    assert f"{told}kms: hint: use `kms up --port 8090`, or find the holder: `ss -ltnp`\n" in done.stderr
    assert not (tmp_path / "state/valkey").exists()
    assert not list(tmp_path.rglob("*.pid"))


@pytest.mark.parametrize("words", ["help", "help jobs", "--help"])
def test_help_that_is_not_read_is_quiet(tmp_path: Path, words: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [KMS, *words.split()], env=environment(tmp_path), stdout=pipe, stderr=subprocess.PIPE, check=False
        )

    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("line", [[], ["job"]], ids=["kms", "kms job"])
def test_a_command_that_is_missing_is_an_error_and_lists_them(
    capsys: pytest.CaptureFixture[str], line: list[str]
) -> None:
    assert run(line) == 2
    shown = capsys.readouterr()
    assert "\nCommands:\n" in shown.err
    assert not shown.out


BY_JSON: Final = {
    "an unknown command": ("encrpt --json", 2, "usage"),
    "an unknown option": ("encrypt --contxt x --json", 2, "usage"),
    "an unknown global option": ("--nosuch --json", 2, "usage"),
    "a value": ("job list --state done --json", 2, "usage"),
    "a source": ("encrypt-file . --json", 2, "usage"),
    "what the command refuses": ("run --json -- true", 2, "usage"),
    "no command": ("--json", 2, "usage"),
    "no command of a group": ("job --json", 2, "usage"),
    "a file": ("--json run --env-file plain.env -- /nonexistent/program", 127, "program_not_found"),
    "a folder": ("--json run --env-file plain.env -- /", 126, "not_executable"),
    "an operating system": ("--json keygen -o nosuch/key", 1, "os_error"),
    "a context": ("encrypt --context nonsense --json", 65, "invalid_context"),
}


@pytest.mark.parametrize(("line", "exit_code", "code"), BY_JSON.values(), ids=BY_JSON)
def test_each_error_is_an_object_with_json(tmp_path: Path, line: str, exit_code: int, code: str) -> None:
    (tmp_path / "plain.env").write_text("NAME=value\n")
    done = kms(tmp_path, *line.split())

    assert (done.returncode, done.stdout) == (exit_code, b"")
    found = json.loads(done.stderr)["error"]
    assert (found["code"], found.keys()) == (code, {"code", "detail", "hint", "notes"})


def test_ctrl_c_is_an_object_with_json(stand_in: ContractServer, tmp_path: Path) -> None:
    stand_in.faults.steps_s = 100
    with encrypting(stand_in, tmp_path, "--json") as running:
        until(lambda: any("/jobs/job-1?wait=" in seen.path for seen in stand_in.seen), "it follows the job")
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=WAIT_S)

    assert running.returncode == 130
    assert json.loads(said.splitlines()[-1])["error"]["code"] == "interrupted"


@pytest.mark.parametrize(
    "line",
    [
        "run -- ls --json",
        "run ls --json",
        "run --env-file nosuch ls --json",
        "run --nosuch -- ls --json",
        "run --env-file plain.env /nonexistent/program --json",
    ],
)
def test_json_of_a_program_is_not_that_of_kms(tmp_path: Path, line: str) -> None:
    (tmp_path / "plain.env").write_text("NAME=value\n")

    assert kms(tmp_path, *line.split()).stderr.startswith(b"kms: error: ")


def test_every_hint_is_for_a_code_that_exists() -> None:
    assert {code for code, text in TEXTS.items() if text.hint} <= BY_CODE.keys() | {"unexpected_answer"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Not allowed.", "not allowed"), ("HTTP is off", "HTTP is off"), ("", ""), ("A", "A")],
)
def test_words_are_plain(text: str, expected: str) -> None:
    assert terminal.plain(text) == expected
