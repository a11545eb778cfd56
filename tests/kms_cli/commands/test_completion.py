"""``kms completion`` and ``kms help``: the Tab key in real shells."""

import os
import re
import select
import shlex
import socket
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from kms_cli.command_line import COMMANDS, JOB_COMMANDS, KEYS_COMMANDS, topics
from kms_cli.commands.completion import topic
from kms_cli.main import BROKEN_PIPE, TERMINATED
from kms_cli.terminal import INTERRUPTED
from kms_client import Client
from support.cli.fixtures import BIN, environment
from support.contract_server import ContractServer
from support.ports import free_port
from support.programs import program
from support.waiting import WAIT_S

KMS: Final = str(BIN / "kms")
READY: Final = "tab-> "
SHELLS: Final = {  # how each starts without the files of its user, and asks for lines
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(kms completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], 'autoload -Uz compinit; compinit -u -D; eval "$(kms completion zsh)"'),
}
LINES: Final = {  # what is typed before the Tab key, and what stands there after it
    "gener": "generate-key",
    "job rel": "job release",
    "--all": "--allow-http",
    "decrypt --outp": "decrypt --output",
    "generate-key --key-spec AES_1": "generate-key --key-spec AES_128",
    "encrypt --key-id ": "encrypt --key-id default",
    "--json keys usage d": "--json keys usage default",
    "job wait jo": "job wait job-1",
    "help keys us": "help keys usage",
    "help exit": "help exit-codes",
    "encrypt-file conf": "encrypt-file config.yaml",
}


@pytest.fixture
def env(stand_in: ContractServer, tmp_path: Path) -> dict[str, str]:
    """The environment of a shell in a folder with a file; the service has a job."""
    (tmp_path / "config.yaml").touch()
    with Client(stand_in.url) as client, (tmp_path / "config.yaml").open("rb") as file:
        client.upload_encrypt(file)
    return environment(tmp_path, KMS_SERVICE_URL=stand_in.url, TERM="dumb")


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, env: dict[str, str], tmp_path: Path) -> Iterator["Terminal"]:
    """The terminal of a shell that waits for its first line."""
    command, setup = SHELLS[request.param]
    program(command[0])
    ours, theirs = os.openpty()
    command = ["setsid", "--ctty", "--wait", *command]
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    ) as running:
        os.close(theirs)
        try:
            terminal = Terminal(ours)
            terminal.type(f"{setup}; PS1='tab''-> '\n")  # the prompt is no part of its own echo
            terminal.until(READY)
            yield terminal
        finally:
            running.kill()
            os.close(ours)


@dataclass
class Terminal:
    """The terminal of a shell: what is typed there, and what it shows."""

    fd: int
    _shown: str = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, text: str) -> None:
        """Read on until it shows a text, and to no further than that."""
        while text not in self._shown:
            readable, _, _ = select.select([self.fd], [], [], WAIT_S)
            assert readable, f"{text!r} is not in {self._shown!r}"
            self._shown += os.read(self.fd, 65536).decode(errors="replace")
        self._shown = self._shown.partition(text)[2]


def test_the_tab_key_completes_in_a_shell(shell: Terminal) -> None:
    """Ctrl-A goes to the start of the line: the completed line is echoed, and not run."""
    for typed, completed in LINES.items():
        shell.type(f"kms {typed}\t\x01echo 'line:' \n")
        shell.until(f"line: kms {completed}")
        shell.until(READY)


def test_fish_completes(env: dict[str, str], tmp_path: Path) -> None:
    program("fish")
    for typed, completed in LINES.items():
        script = 'kms completion fish | source; complete --do-complete "kms $typed"'
        command = ["fish", "--no-config", "-c", script]
        done = subprocess.run(
            command, cwd=tmp_path, env={**env, "typed": typed}, capture_output=True, text=True, check=True
        )
        assert completed.split()[-1] in re.split(r"[\t\n]", done.stdout), typed


def printed(env: dict[str, str], *words: str) -> str:
    return subprocess.run([KMS, *words], env=env, capture_output=True, text=True, check=True).stdout


def answered(env: dict[str, str], *words: str) -> tuple[str, str]:
    """What the script of bash is answered for the last of the words."""
    asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    asked["_KMS_COMPLETE"] = "bash_complete"
    done = subprocess.run(
        [KMS], env={**env, **asked}, capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("kms", ""), COMMANDS),
        (("kms", "job", ""), JOB_COMMANDS),
        (("kms", "keys", ""), KEYS_COMMANDS),
        (("kms", "help", ""), (*COMMANDS, *topics())),
        (("kms", "help", "keys", "rot"), ["rotate"]),
    ],
)
def test_commands_and_topics_are_offered_without_their_modules(
    env: dict[str, str], words: tuple[str, ...], offered: Iterable[str]
) -> None:
    assert answered(env, *words)[0].split() == [f"plain,{name}" for name in offered]


@pytest.mark.parametrize("fault", ["away", "address", "token", "foreign_answer", "busy"])
@pytest.mark.parametrize("words", [("encrypt", "--key-id"), ("job", "show")])
def test_completion_is_silent_on_errors(
    env: dict[str, str], stand_in: ContractServer, fault: str, words: tuple[str, ...]
) -> None:
    if fault == "away":
        env["KMS_SERVICE_URL"] = f"http://127.0.0.1:{free_port()}"
    elif fault == "address":
        env["KMS_SERVICE_URL"] = "not a url"
    else:
        setattr(stand_in.faults, fault, "another" if fault == "token" else 5)

    assert answered(env, "kms", *words, "''") == ("\n", "")


def test_a_service_that_never_answers_is_waited_for_briefly(env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env["KMS_SERVICE_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert answered(env, "kms", "encrypt", "--key-id", "''") == ("\n", "")


@pytest.mark.parametrize(
    "line", ["nothing ", "job nothing ", "encrypt --nothing ", "--url", "help nothing "], ids=str
)
def test_a_line_that_is_wrong_is_completed_in_silence(env: dict[str, str], line: str) -> None:
    assert answered(env, "kms", *line.split(" "))[1] == ""


def test_completion_uses_the_token_and_the_address_on_the_line(
    env: dict[str, str], stand_in: ContractServer, tmp_path: Path
) -> None:
    stand_in.faults.token = "right"
    (tmp_path / "token").write_text("right")
    env["KMS_SERVICE_URL"] = "http://127.0.0.1:9"
    words = (
        "--url",
        stand_in.url,
        "--token-file",
        shlex.quote(str(tmp_path / "token")),
        "encrypt",
        "--key-id",
        "''",
    )

    assert answered(env, "kms", *words) == ("plain,default\n", "")


def test_what_a_service_names_is_no_command_of_a_terminal(
    env: dict[str, str], stand_in: ContractServer
) -> None:
    stand_in.jobs["\x1b[2Jjob-2"] = stand_in.jobs.pop("job-1")

    assert answered(env, "kms", "job", "show", "''")[0] == "plain,?[2Jjob-2\n"


@pytest.mark.parametrize(
    "name", [name for name, (place, _) in COMMANDS.items() if not isinstance(place, str)]
)
def test_the_help_of_a_group_promises_what_it_has(name: str) -> None:
    groups = {group: place for group, (place, _) in COMMANDS.items() if not isinstance(place, str)}
    known = {inner for table in groups.values() for inner in table}
    words = set(re.findall(r"[a-z-]+", COMMANDS[name][1].lower()))

    assert words & known <= groups[name].keys()


# -- help --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("encrypt",), ("job",), ("job", "list"), ("help",)], ids=" ".join)
def test_help_is_the_help_of_the_command(env: dict[str, str], words: tuple[str, ...]) -> None:
    shown = printed(env, "help", *words)

    assert shown == printed(env, *words, "--help")
    assert shown.startswith(" ".join(["Usage: kms", *words]))


@pytest.mark.parametrize("name", topics())
def test_a_topic_is_a_short_text_for_any_terminal(name: str) -> None:
    assert name not in COMMANDS, "kms help shows the command"
    lines = topic(name).splitlines()

    assert lines[1] == "", "after the summary"
    assert 8 <= len([line for line in lines if line]) <= 30
    assert max(map(len, lines)) <= 80


def test_exit_codes_of_signals_are_those_of_the_command() -> None:
    named = re.findall(r"\b1\d\d\b", topic("exit-codes"))

    assert list(map(int, named)) == [INTERRUPTED, TERMINATED, BROKEN_PIPE]


def test_help_shows_a_topic_and_lists_it(env: dict[str, str]) -> None:
    shown = printed(env, "help", "environment")

    assert re.search(r"^    KMS_TOKEN_FILE +--token-file: File that holds", shown, re.MULTILINE)
    assert re.search(r"^    KMS_PORT +port$", shown, re.MULTILINE)
    assert re.search(r"^  environment  ", printed(env, "help"), re.MULTILINE)
