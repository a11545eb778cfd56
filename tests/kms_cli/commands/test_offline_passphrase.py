"""``kms seal -p`` and ``kms open -p``: passphrases from files and the terminal, never from stdin."""

import os
import subprocess
from pathlib import Path

import pyrage
import pytest

from kms_core.age import header, stream
from kms_core.age.header import Stanza
from support.cli.fixtures import BIN, environment
from support.cli.offline import Workspace, workspace
from support.waiting import WAIT_S

WORD = "correct horse «battery»"


@pytest.fixture(name="workspace")
def a_desk(tmp_path: Path) -> Workspace:
    made = workspace(tmp_path)
    made.write("word", f"{WORD}\n".encode())
    (tmp_path / "word").chmod(0o600)
    return made


def test_pyrage_opens_what_a_passphrase_sealed(workspace: Workspace) -> None:
    sealed = workspace.made("seal", "--passphrase-file", "word", given=b"salary")

    assert pyrage.passphrase.decrypt(sealed, WORD) == b"salary"


def test_what_pyrage_sealed_is_opened_up_to_the_cost_that_is_allowed(workspace: Workspace) -> None:
    sealed = pyrage.passphrase.encrypt(b"salary", WORD)  # it chooses a work factor for this machine
    way = ["open", "--passphrase-file", "word", "--max-work-factor", "22"]

    assert workspace.made(*way, given=sealed) == b"salary"


def test_a_wrong_passphrase_opens_nothing(workspace: Workspace) -> None:
    sealed = workspace.made("seal", "--passphrase-file", "word", given=b"salary")
    workspace.write("word", b"another")
    done = workspace.kms("open", "--passphrase-file", "word", "-o", "out", given=sealed)

    assert (done.returncode, workspace.has("out")) == (65, False)
    assert b"kms: error: the passphrase is wrong" in done.stderr


@pytest.mark.parametrize("factor", ["19", "23", "64", "999"])
def test_a_costly_passphrase_file_is_refused_before_the_cost(workspace: Workspace, factor: str) -> None:
    file_key, nonce = os.urandom(16), os.urandom(16)
    stanza = Stanza(("scrypt", "A" * 22, factor), bytes(32))
    sealed = (
        header.render([stanza], file_key) + nonce + stream.seal(stream.payload_key(file_key, nonce), b"x")
    )
    done = workspace.kms("open", "--passphrase-file", "word", given=sealed)

    assert done.returncode == 65
    assert f"work factor {factor}, above the 18 allowed".encode() in done.stderr


def test_a_passphrase_file_and_a_key_file_are_told_apart(workspace: Workspace) -> None:
    by_word = workspace.made("seal", "--passphrase-file", "word", given=b"salary")
    by_key = workspace.made("seal", "-r", workspace.recipient, given=b"salary")
    wrong_key = workspace.kms("open", "-i", "key.txt", given=by_word)
    wrong_word = workspace.kms("open", "--passphrase-file", "word", given=by_key)

    assert (wrong_key.returncode, wrong_word.returncode) == (2, 2)
    assert b"encrypted with a passphrase: use -p" in wrong_key.stderr
    assert b"name your key file with -i" in wrong_word.stderr


def test_an_empty_passphrase_is_none(workspace: Workspace) -> None:
    workspace.write("word", b"\n")

    assert workspace.kms("seal", "--passphrase-file", "word", given=b"salary").returncode == 65


# -- the terminal ------------------------------------------------------------------------------------


def at_a_terminal(workspace: Workspace, command: str, typed: list[str]) -> tuple[int, str]:
    """Run a command line of a shell whose terminal is ours; type a line at each prompt."""
    ours, theirs = os.openpty()
    shell = f'exec 9<>"$0"; exec {command}'
    running = subprocess.Popen(
        ["bash", "-c", shell, os.ttyname(theirs)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        cwd=workspace.folder,
        env=environment(workspace.folder),
        start_new_session=True,  # so that the terminal it opens becomes its own
    )
    os.close(theirs)
    shown = b""
    for line in typed:
        shown += _until_prompt(ours)
        os.write(ours, f"{line}\n".encode())
    code = running.wait(WAIT_S)
    shown += _rest(ours)
    os.close(ours)
    return code, shown.decode()


def _until_prompt(terminal: int) -> bytes:
    shown = b""
    while not shown.rstrip().endswith(b":"):
        shown += os.read(terminal, 1000)
    return shown


def _rest(terminal: int) -> bytes:
    os.set_blocking(terminal, False)
    try:
        return os.read(terminal, 10_000)
    except OSError:  # nothing more: empty, or hung up
        return b""


def test_seal_asks_twice_at_the_terminal_and_leaves_stdin_to_the_data(workspace: Workspace) -> None:
    workspace.write("in", b"salary")
    kms = BIN / "kms"
    code, shown = at_a_terminal(workspace, f"{kms} seal -p -o out < in", [WORD, WORD])

    assert code == 0, shown
    assert WORD not in shown
    assert pyrage.passphrase.decrypt(workspace.read("out"), WORD) == b"salary"
    code, shown = at_a_terminal(workspace, f"{kms} open -o opened < out", [WORD])
    assert code == 0, shown
    assert workspace.read("opened") == b"salary"


def test_two_different_passphrases_are_asked_for_again(workspace: Workspace) -> None:
    workspace.write("in", b"salary")
    code, shown = at_a_terminal(
        workspace, f"{BIN / 'kms'} seal -p -o out < in", [WORD, "another", "salad days", "salad days"]
    )

    assert code == 0, shown
    assert pyrage.passphrase.decrypt(workspace.read("out"), "salad days") == b"salary"


def test_a_file_that_asks_for_a_passphrase_gets_no_binary_on_the_terminal(workspace: Workspace) -> None:
    workspace.write("in", b"salary")
    code, shown = at_a_terminal(workspace, f"{BIN / 'kms'} seal -r {workspace.recipient} in", [])

    assert code == 2
    assert "the output is binary" in shown
    assert "use -a for ASCII armor" in shown


@pytest.mark.parametrize("verb", ["seal", "open"])
def test_without_a_terminal_stdin_is_no_passphrase(workspace: Workspace, verb: str) -> None:
    sealed = pyrage.passphrase.encrypt(b"salary", WORD) if verb == "open" else f"{WORD}\n{WORD}\n".encode()
    done = subprocess.run(
        [str(BIN / "kms"), verb, "-p"],
        input=sealed,
        capture_output=True,
        check=False,
        env=environment(workspace.folder),
        start_new_session=True,
    )

    assert (done.returncode, done.stdout) == (2, b"")
    assert b"--passphrase-file" in done.stderr
