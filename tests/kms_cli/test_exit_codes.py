import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from kms_cli import terminal
from kms_cli.main import COMMANDS, JOB_COMMANDS, group
from kms_client.requests import BY_CODE
from support.cli.fixtures import BIN, environment
from support.contract_server import ContractServer
from support.waiting import WAIT_S, until

KMS = str(BIN / "kms")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_interrupted_transfer_leaves_no_file_and_no_job(
    stand_in: ContractServer, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    stand_in.faults.steps_s = 100
    (tmp_path / "file").write_bytes(b"x")
    env = environment(tmp_path, KMS_SERVICE_URL=stand_in.url)
    with subprocess.Popen(
        [KMS, "encrypt-file", "file"], cwd=tmp_path, env=env, stderr=subprocess.PIPE
    ) as running:
        until(lambda: any("/jobs/job-1?wait=" in seen.path for seen in stand_in.seen), "it follows the job")

        running.send_signal(number)
        _, said = running.communicate(timeout=WAIT_S)

    assert running.returncode == code
    assert b"Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert stand_in.jobs["job-1"].cancelled


def test_a_result_whose_transfer_is_interrupted_is_kept(stand_in: ContractServer, tmp_path: Path) -> None:
    stand_in.faults.stalls = True
    (tmp_path / "file").write_bytes(b"x" * 4_000_000)
    env = environment(tmp_path, KMS_SERVICE_URL=stand_in.url)
    with subprocess.Popen(
        [KMS, "encrypt-file", "file"], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    ) as running:
        until(lambda: any(seen.path.endswith("/result") for seen in stand_in.seen), "it fetches the result")

        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=WAIT_S)
    stand_in.faults.stalls = False

    assert running.returncode == 130
    assert "kms: the result is kept: `kms job result job-1 -o file.age`\n" in said
    assert not stand_in.jobs["job-1"].cancelled
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


def test_a_taken_port_is_reported_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        command = [KMS, "up", "--state-dir", "state", "--port", str(holder.getsockname()[1])]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False
        )

    assert done.returncode == 69
    assert "for the API, cannot be used: Address already in use\n" in done.stderr
    assert "kms: hint: use `kms up --port 8090`, or find the holder: `ss -ltnp`\n" in done.stderr


def test_broken_pipe_is_quiet(stand_in: ContractServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 4_000_000)
    env = environment(tmp_path, KMS_SERVICE_URL=stand_in.url)
    subprocess.run([KMS, "encrypt-file", "file"], cwd=tmp_path, env=env, check=True, capture_output=True)

    with subprocess.Popen(
        [KMS, "job", "result", "job-1"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        pipe = cast("BinaryIO", running.stdout)
        pipe.read(10)
        pipe.close()
        said = cast("BinaryIO", running.stderr).read()

    assert running.returncode == 141
    assert said == b""


@pytest.mark.parametrize("words", ["help", "help jobs", "--help"])
def test_help_that_is_not_read_is_quiet(tmp_path: Path, words: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [KMS, *words.split()], env=environment(tmp_path), stdout=pipe, stderr=subprocess.PIPE, check=False
        )

    assert (done.returncode, done.stderr) == (141, b"")


def test_help_loads_no_heavy_module() -> None:
    code = "import sys; from kms_cli.main import run; run(['--help']); print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    loaded = set(done.stdout.splitlines())
    assert not loaded & {"httpx2", "msgspec", "cryptography", "pyrage", "kms_client", "asyncio"}


def test_a_small_call_loads_no_more_of_http_than_it_needs() -> None:
    line = ["encrypt", "--url", "http://127.0.0.1:9"]
    code = f"import sys; from kms_cli.main import run; run({line}); print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, input="")

    loaded = set(done.stdout.splitlines())
    assert "kms_client" in loaded
    assert not loaded & {"httpx2", "rich", "cryptography", "pyrage", "asyncio", "urllib.request"}


@pytest.mark.parametrize("line", [[name] for name in COMMANDS] + [["job", name] for name in JOB_COMMANDS])
def test_every_command_has_help(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    group().main([*line, "--help"], prog_name="kms", standalone_mode=False)

    assert capsys.readouterr().out.startswith(f"Usage: kms {' '.join(line)}")


def test_every_hint_is_for_a_code_that_exists() -> None:
    assert terminal.HINTS.keys() <= BY_CODE.keys() | {"unexpected_answer"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Not allowed.", "not allowed"), ("HTTP is off", "HTTP is off"), ("", ""), ("A", "A")],
)
def test_words_are_plain(text: str, expected: str) -> None:
    assert terminal.plain(text) == expected
