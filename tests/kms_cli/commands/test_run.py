"""``kms run``: what a program finds in its environment, and what nobody finds anywhere else."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from support.age_plugin import ENV, AgeTools
from support.service import b64

SECRET: Final = "hunter2 with spaces"
SHOW: Final = ("--", "/usr/bin/env")
KMS: Final = (sys.executable, "-P", "-m", "kms_cli.main")


def sealed(age_tools: AgeTools, text: str, name: str = "") -> str:
    """The base64 of an encrypted text; also in a file, if there is a name."""
    made = b64(age_tools.seal(text.encode()))
    if name:
        (age_tools.folder / name).write_text(made + "\n")
    return made


def shown(age_tools: AgeTools, *words: str) -> dict[str, str]:
    """The environment of a program that is run."""
    printed = age_tools.kms("run", "--context", ENV, *words, *SHOW, "-0").decode()
    return dict(entry.split("=", 1) for entry in printed.split("\0") if entry)


def refused(age_tools: AgeTools, *words: str) -> tuple[int, str]:
    done = age_tools.run(*KMS, "run", "--context", ENV, *words)
    assert done.stdout == b""
    return done.returncode, done.stderr.decode()


def test_sealed_values_are_in_the_environment_of_the_program(age_tools: AgeTools) -> None:
    value = sealed(age_tools, SECRET)
    sealed(age_tools, "from a file\n", "token.enc")
    (age_tools.folder / "app.env").write_text(
        f"# what the app needs\nexport DB_PASSWORD={value}\nAPI_TOKEN=@token.enc\nLOG_LEVEL='debug' # plain\n"
    )

    within = age_tools.within(LOG_LEVEL="info", KEPT="yes")
    found = shown(within, "--env-file", "app.env", "--env", "ALSO=token.enc")

    assert {name: found[name] for name in ("DB_PASSWORD", "API_TOKEN", "LOG_LEVEL", "ALSO", "KEPT")} == {
        "DB_PASSWORD": SECRET,
        "API_TOKEN": "from a file",
        "LOG_LEVEL": "debug",
        "ALSO": "from a file",
        "KEPT": "yes",
    }


@pytest.mark.parametrize(
    "text",
    [f'A="{SECRET}"\nB=two\\nlines\n', json.dumps({"A": SECRET, "B": "two\\nlines"})],
    ids=["dotenv", "JSON"],
)
def test_a_file_that_is_sealed_as_a_whole(age_tools: AgeTools, text: str) -> None:
    sealed(age_tools, text, "all.env.enc")

    found = shown(age_tools, "--env-file", "all.env.enc")

    assert (found["A"], found["B"]) == (SECRET, "two\\nlines")
    files = [path.read_bytes() for path in age_tools.folder.rglob("*") if path.is_file()]
    assert not [content for content in files if SECRET.encode() in content]


def test_the_program_takes_the_place_of_the_command(age_tools: AgeTools) -> None:
    """Its exit code, its signals, its arguments: nothing is in between."""
    sealed(age_tools, SECRET, "s.enc")
    script = 'trap "exit 7" TERM; echo $$ "$1"; while :; do sleep 0.05; done'
    words = (*KMS, "run", "--context", ENV, "--env", "S=s.enc", "--", "sh", "-c", script, "sh", "--flag")
    with subprocess.Popen(
        words, cwd=age_tools.folder, env=age_tools.environ, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        pid, flag = running.stdout.readline().split()
        argv = Path(f"/proc/{pid}/cmdline").read_bytes()
        limits = Path(f"/proc/{pid}/limits").read_text()
        held = list(Path(f"/proc/{pid}/fd").iterdir())
        running.send_signal(signal.SIGTERM)
        code = running.wait(60)

    assert (int(pid), flag, code) == (running.pid, "--flag", 7)
    assert SECRET.encode() not in argv
    assert [line.split()[4] for line in limits.splitlines() if line.startswith("Max core")] == ["0"]
    assert len(held) <= 4


@pytest.mark.parametrize(
    ("words", "code"),
    [(("sh", "-c", "kill -KILL $$"), -9), (("no-such-program",), 127), (("/etc/passwd",), 126)],
)
def test_the_exit_code_is_that_of_the_program(age_tools: AgeTools, words: tuple[str, ...], code: int) -> None:
    sealed(age_tools, SECRET, "s.enc")

    assert refused(age_tools, "--env", "S=s.enc", *words)[0] == code


ORDINARY: Final = (1 << 31) - 1  # glibc's posix_spawn ignores signal 32, its own, and Python 3.13 uses that


def test_a_program_finds_signals_as_a_shell_leaves_them(age_tools: AgeTools) -> None:
    """Python ignores SIGPIPE; a program that inherits that does not end when its reader does."""
    sealed(age_tools, SECRET, "s.enc")
    printed = age_tools.kms(
        "run", "--context", ENV, "--env", "S=s.enc", "grep", "SigIgn", "/proc/self/status"
    )

    assert int(printed.split()[1], 16) & ORDINARY == 0


def test_names_that_steer_programs_are_refused_unless_allowed(age_tools: AgeTools) -> None:
    (age_tools.folder / "app.env").write_text("PYTHONPATH=/tmp/evil\n")

    code, said = refused(age_tools, "--env-file", "app.env", *SHOW)

    assert code == 65
    assert "allow it with --allow PYTHONPATH" in said
    assert "evil" not in said
    allowed = shown(age_tools, "--env-file", "app.env", "--allow", "PYTHONPATH")
    assert allowed["PYTHONPATH"] == "/tmp/evil"


def test_only_lets_no_other_name_through(age_tools: AgeTools) -> None:
    """From a file as a whole, from its values, and from the command line: later ones, too."""
    (age_tools.folder / "app.env").write_text("TOKEN=a\n")
    (age_tools.folder / "more.env").write_text("TOKEN=b\nNOT_ON_ANY_LIST=/tmp/evil\n")
    sealed(age_tools, SECRET, "s.enc")
    only = ("--only", "TOKEN", "--only", "PATH", "--env-file", "app.env")

    assert shown(age_tools, *only)["TOKEN"] == "a"
    for words in (("--env-file", "more.env"), ("--env", "NOT_ON_ANY_LIST=s.enc")):
        code, said = refused(age_tools, *only, *words, *SHOW)
        assert code == 65
        assert "sets NOT_ON_ANY_LIST, which is none of --only" in said
        assert "evil" not in said
    code, said = refused(age_tools, *only, "--allow", "PATH", *SHOW)
    assert (code, "leave out --allow" in said) == (2, True)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("A=YWdlLWVuY3J5cHRpb24ub3JnL3Yx!\n", "begins as an encrypted text in base64, but is not one"),
        ("A=@missing.enc\n", "missing.enc: no such file"),
        ("A=@app.env\n", "app.env is not an encrypted file"),
    ],
)
def test_a_value_that_cannot_be_opened_is_refused(age_tools: AgeTools, content: str, why: str) -> None:
    (age_tools.folder / "app.env").write_text(content)

    code, said = refused(age_tools, "--env-file", "app.env", *SHOW)

    assert code in {1, 65}
    assert why in said


def test_another_context_runs_nothing(age_tools: AgeTools) -> None:
    sealed(age_tools, SECRET, "s.enc")
    done = age_tools.run(*KMS, "run", "--context", "env=dev", "--env", "S=s.enc", "--", "touch", "ran")

    assert done.returncode == 65
    assert not (age_tools.folder / "ran").exists()


def test_nothing_to_open_is_a_misuse(age_tools: AgeTools) -> None:
    assert refused(age_tools, *SHOW)[0] == 2
    assert refused(age_tools, "--env", "S", *SHOW)[0] == 2
