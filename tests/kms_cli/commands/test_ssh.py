"""``kms ssh`` with the real ``ssh-keygen``, ``ssh-agent`` and ``ssh-add``."""

import json
import os
import re
import signal
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from support.age_plugin import Bench
from support.programs import program
from support.service import b64

CONTEXT: Final = ("--context", "infra=prod,purpose=deployment")
BEGIN: Final = b"-----BEGIN OPENSSH PRIVATE KEY-----"
PAST: Final = "2020-01-01T00:00:00Z"


@pytest.fixture
def agent(toolbench: Bench) -> Iterator[str]:
    """The socket of a running agent."""
    printed = toolbench.ok(program("ssh-agent"), "-s", "-a", str(toolbench.folder / "agent")).decode()
    pid = re.search(r"SSH_AGENT_PID=(\d+)", printed)
    assert pid is not None
    yield str(toolbench.folder / "agent")
    os.kill(int(pid[1]), signal.SIGTERM)


def failed(toolbench: Bench, *words: str) -> tuple[int, str]:
    done = toolbench.run(*kms(words))
    return done.returncode, done.stderr.decode()


def kms(words: tuple[str, ...]) -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", "kms_cli.main", *words)


def derived(toolbench: Bench, path: str) -> str:
    """The public part that OpenSSH makes of a private one."""
    return toolbench.ok(program("ssh-keygen"), "-y", "-f", path).decode().strip()


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_a_new_key_is_one_for_openssh(toolbench: Bench, kind: str) -> None:
    printed = toolbench.kms("ssh", "new", "temp_key", "--type", kind, *CONTEXT).decode()

    toolbench.kms("ssh", "open", "temp_key", *CONTEXT)

    private = toolbench.folder / "temp_key"
    assert (toolbench.folder / "temp_key.pub").read_text() == printed
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert printed.startswith(derived(toolbench, "temp_key"))
    assert re.fullmatch(r"\S+ \S+ temp_key not_after=\S+Z\n", printed)
    assert BEGIN in private.read_bytes()


def test_the_private_part_is_on_disk_sealed_alone(toolbench: Bench) -> None:
    toolbench.kms("ssh", "new", "temp_key", "--ttl", "1h", *CONTEXT)

    files = {path.name: path.read_bytes() for path in toolbench.folder.iterdir() if path.is_file()}
    until = files["temp_key.pub"].split(b"not_after=")[1].strip().decode()
    context = f"{CONTEXT[1]},not_after={until}"

    assert files.keys() == {"token", "temp_key.age", "temp_key.pub"}
    assert not any(BEGIN in content for content in files.values())
    assert toolbench.kms("decrypt", "--context", context, stdin=files["temp_key.age"]).startswith(BEGIN)
    assert abs(datetime.fromisoformat(until) - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=10)


def test_the_service_opens_no_key_whose_end_has_come(toolbench: Bench) -> None:
    """By the clock of the service, whatever the public part claims."""
    toolbench.kms("ssh", "new", "old", "--context", f"infra=prod,not_after={PAST}")
    public = toolbench.folder / "old.pub"
    told = failed(toolbench, "ssh", "open", "old", "--context", "infra=prod")
    public.unlink()
    by_service = failed(toolbench, "ssh", "open", "old", "--context", f"infra=prod,not_after={PAST}")
    later = failed(toolbench, "ssh", "open", "old", "--context", "infra=prod,not_after=2099-01-01T00:00:00Z")

    assert told[0] == by_service[0] == later[0] == 65
    assert f"old expired at {PAST}" in told[1]
    assert "decryption failed" in by_service[1]
    assert not (toolbench.folder / "old").exists()


def test_another_public_part_is_noticed(toolbench: Bench) -> None:
    for name in ("one", "two"):
        toolbench.kms("ssh", "new", name, "--ttl", "never", *CONTEXT)
    (toolbench.folder / "two.age").replace(toolbench.folder / "one.age")

    code, said = failed(toolbench, "ssh", "open", "one", *CONTEXT)

    assert (code, "one.age contains another key than one.pub" in said) == (65, True)


def test_nothing_is_overwritten_unasked(toolbench: Bench) -> None:
    toolbench.kms("ssh", "new", "temp_key", *CONTEXT)
    before = (toolbench.folder / "temp_key.pub").read_text()
    (toolbench.folder / "temp_key").write_text("mine")

    codes = [failed(toolbench, "ssh", word, "temp_key", *CONTEXT)[0] for word in ("new", "open")]
    (toolbench.folder / "temp_key.age").unlink()
    codes.append(failed(toolbench, "ssh", "new", "temp_key", *CONTEXT)[0])

    assert codes == [73, 73, 73]
    assert (toolbench.folder / "temp_key.pub").read_text() == before
    assert (toolbench.folder / "temp_key").read_text() == "mine"


def test_a_key_of_an_earlier_version_is_found(toolbench: Bench) -> None:
    toolbench.kms("ssh", "new", "temp_key", *CONTEXT)
    (toolbench.folder / "temp_key.age").rename(toolbench.folder / "temp_key.enc")

    toolbench.kms("ssh", "open", "temp_key", *CONTEXT)

    assert [row["name"] for row in json.loads(toolbench.kms("--json", "ssh", "list"))] == ["temp_key"]
    assert failed(toolbench, "ssh", "new", "temp_key", *CONTEXT)[0] == 73
    assert not (toolbench.folder / "temp_key.age").exists()


def test_without_a_service_nothing_is_left(toolbench: Bench) -> None:
    code, _ = failed(
        toolbench.within(KMS_SERVICE_URL="http://127.0.0.1:1"), "ssh", "new", "temp_key", *CONTEXT
    )

    assert code == 69
    assert not list(toolbench.folder.glob("temp_key*"))


def test_the_agent_gets_it_without_a_file_and_until_its_end(toolbench: Bench, agent: str) -> None:
    toolbench.kms("ssh", "new", "temp_key", "--ttl", "2h", *CONTEXT)
    ssh_add = program("ssh-add")
    public = (toolbench.folder / "temp_key.pub").read_text().rsplit(" ", 2)[0]

    said = toolbench.run(*kms(("ssh", "add", "temp_key", *CONTEXT)), SSH_AUTH_SOCK=agent)

    assert said.returncode == 0, said.stderr.decode()
    assert toolbench.ok(ssh_add, "-L", SSH_AUTH_SOCK=agent).decode().startswith(public)
    assert b"the agent has temp_key until 20" in said.stderr
    assert not (toolbench.folder / "temp_key").exists()


@pytest.mark.parametrize("public", [True, False], ids=["both parts", "without its public part"])
def test_the_agent_forgets_it_at_its_end(toolbench: Bench, tmp_path: Path, public: bool) -> None:
    """What the agent is told is how long, as ``ssh-add -t`` takes it."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "ssh-add").write_text('#!/bin/sh\necho "$@" >"$HOME/argv"\ncat >"$HOME/stdin"\n')
    (fake / "ssh-add").chmod(0o755)
    toolbench.kms("ssh", "new", "temp_key", "--ttl", "2h", *CONTEXT)
    context = CONTEXT
    if not public:
        line = (toolbench.folder / "temp_key.pub").read_text()
        (toolbench.folder / "temp_key.pub").unlink()
        context = ("--context", f"{CONTEXT[1]},{line.split()[-1]}")

    path = f"{fake}:{toolbench.environ['PATH']}"
    toolbench.kms("ssh", "add", "--confirm", "temp_key.age", *context, PATH=path, SSH_AUTH_SOCK="x")

    argv = (toolbench.folder / "argv").read_text().split()
    assert argv[:3] == ["-q", "-c", "-t"]
    assert 7000 < int(argv[3]) <= 7200
    assert argv[4:] == ["-"]
    assert (toolbench.folder / "stdin").read_bytes().startswith(BEGIN)


def test_without_an_agent_it_says_so(toolbench: Bench) -> None:
    program("ssh-add")

    assert failed(toolbench, "ssh", "add", "temp_key", *CONTEXT)[0] == 78


def test_a_list_shows_what_has_ended(toolbench: Bench) -> None:
    toolbench.kms("ssh", "new", "new", "--ttl", "never", "--comment", "ci deploy", *CONTEXT)
    toolbench.kms("ssh", "new", "old", "--context", f"not_after={PAST}")
    (toolbench.folder / "other.enc").write_bytes(b"x")
    (toolbench.folder / "new.enc").write_bytes(b"x")  # of 0.1, beside new.age
    fingerprint = toolbench.ok(program("ssh-keygen"), "-lf", "new.pub").decode().split()[1]

    rows = json.loads(toolbench.kms("--json", "ssh", "list"))
    expired = toolbench.kms("ssh", "list", "--expired").decode().splitlines()

    assert [(row["name"], row["state"], row["not_after"]) for row in rows] == [
        ("new", "valid", "never"),
        ("old", "expired", PAST),
    ]
    assert rows[0]["fingerprint"] == fingerprint
    assert [line.split()[0] for line in expired] == ["name", "old"]


def test_a_list_of_files_from_elsewhere_sends_the_terminal_nothing_but_text(toolbench: Bench) -> None:
    blob = b64(b"any")
    (toolbench.folder / "a\x1b[2J.enc").write_bytes(b"x")
    (toolbench.folder / "a\x1b[2J.pub").write_text(f"ssh-\x1b]0;owned\x07 {blob} c")

    assert toolbench.kms("ssh", "list").decode().replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "words",
    [
        ("--ttl", "soon"),
        ("--comment", "a\nb"),
        ("--comment", "not_after=2099-01-01T00:00:00Z"),
        ("--type", "dsa"),
    ],
)
def test_what_cannot_be_is_refused(toolbench: Bench, words: tuple[str, str]) -> None:
    assert failed(toolbench, "ssh", "new", "k", *words, *CONTEXT)[0] in {2, 65}
    assert not list(toolbench.folder.glob("k*"))


def test_a_sealed_file_that_is_no_key_is_not_called_one(toolbench: Bench) -> None:
    (toolbench.folder / "k.enc").write_bytes(toolbench.seal(b"not a key", ""))

    code, said = failed(toolbench, "ssh", "open", "k")

    assert (code, "contains no SSH key" in said) == (65, True)
