"""``kms seal`` and ``kms open`` with keys: sizes, files and pipes, and the tools of others both ways."""

import json
import os
import subprocess
from pathlib import Path

import pyrage
import pytest

from kms_core.age import armor, mlkem768x25519
from kms_core.age.header import FILE_LIMITS, parse
from support.cli.fixtures import BIN
from support.cli.offline import Workspace, write_key
from support.cli.offline import workspace as make_workspace
from support.programs import from_npm, program

MIB = 1024 * 1024
SIZES = [0, 1, 65535, 65536, 65537, MIB - 1, MIB, MIB + 1, 20 * MIB]
TYPAGE = "age-encryption@0.3.1"


def by(way: str, workspace: Workspace, args: list[str], given: bytes) -> bytes:
    """What a command makes of a file or a pipe, in a file or a pipe."""
    source, target = way.split(" to ")
    words = [*args, *(["-o", "to"] if target == "file" else [])]
    if source == "file":
        made = workspace.stdout_of(*words, workspace.write("from", given))
    else:
        made = workspace.stdout_of(*words, given=given)
    return workspace.read("to") if target == "file" else made


every_way = pytest.mark.parametrize("way", ["file to file", "file to pipe", "pipe to file", "pipe to pipe"])
every_size = pytest.mark.parametrize("size", SIZES)


def age(workspace: Workspace, *args: str, given: bytes) -> bytes:
    return subprocess.run(
        [program("age"), *args], input=given, capture_output=True, check=True, cwd=workspace.folder
    ).stdout


def to_pyrage(workspace: Workspace) -> pyrage.x25519.Identity:
    return pyrage.x25519.Identity.from_str(workspace.identity.export())


# -- with stock age ----------------------------------------------------------------------------------


@every_size
@every_way
def test_stock_age_opens_what_is_sealed(workspace: Workspace, way: str, size: int) -> None:
    plaintext = os.urandom(size)
    sealed = by(way, workspace, ["seal", "-r", workspace.recipient], plaintext)

    assert age(workspace, "-d", "-i", "key.txt", given=sealed) == plaintext


@every_size
@every_way
def test_what_stock_age_seals_is_opened(workspace: Workspace, way: str, size: int) -> None:
    plaintext = os.urandom(size)
    sealed = age(workspace, "-r", workspace.recipient, given=plaintext)

    assert by(way, workspace, ["open", "-i", "key.txt"], sealed) == plaintext


@pytest.mark.parametrize("size", [0, 1, 47, 48, 49, 65537, MIB + 1])
def test_armor_goes_both_ways(workspace: Workspace, size: int) -> None:
    plaintext = os.urandom(size)
    text = workspace.stdout_of("seal", "-a", "-r", workspace.recipient, given=plaintext)

    assert text.startswith(armor.BEGIN)
    assert age(workspace, "-d", "-i", "key.txt", given=text) == plaintext
    theirs = age(workspace, "-a", "-r", workspace.recipient, given=plaintext)
    assert by("file to file", workspace, ["open", "-i", "key.txt"], theirs) == plaintext


# -- with pyrage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 65536, MIB + 1])
def test_pyrage_goes_both_ways(workspace: Workspace, size: int) -> None:
    plaintext = os.urandom(size)
    sealed = workspace.stdout_of("seal", "-r", workspace.recipient, given=plaintext)

    assert pyrage.decrypt(sealed, [to_pyrage(workspace)]) == plaintext
    theirs = pyrage.encrypt(plaintext, [to_pyrage(workspace).to_public()])
    assert workspace.stdout_of("open", "-i", "key.txt", given=theirs) == plaintext


# -- post-quantum ------------------------------------------------------------------------------------


@pytest.fixture
def pq(workspace: Workspace) -> mlkem768x25519.HybridIdentity:
    identity = mlkem768x25519.HybridIdentity.generate()
    write_key(workspace.folder / "pq.txt", identity)
    return identity


@pytest.fixture(scope="session")
def typage() -> Path:
    """The age of the browsers, which knows post-quantum keys; fetched once."""
    return from_npm("typage", "node_modules/age-encryption", TYPAGE)


def javascript(typage: Path, work: str, key: str, given: bytes) -> bytes:
    """Run a line of JavaScript on ``given``, with ``key`` at hand."""
    script = f"""
        import {{ Encrypter, Decrypter }} from "age-encryption";
        import {{ readFileSync, writeSync }} from "node:fs";
        const [given, key] = [readFileSync(0), process.argv[1]];
        {work}
        writeSync(1, done);
    """
    command = [program("node"), "--input-type=module", "-e", script, key]
    return subprocess.run(command, input=given, capture_output=True, check=True, cwd=typage).stdout


def test_typage_opens_what_is_sealed_for_a_hybrid_key(
    workspace: Workspace, pq: mlkem768x25519.HybridIdentity, typage: Path
) -> None:
    sealed = workspace.stdout_of("seal", "-r", pq.recipient.text, given=b"salary")
    work = "const d = new Decrypter(); d.addIdentity(key); const done = await d.decrypt(given);"

    assert javascript(typage, work, pq.export(), sealed) == b"salary"


def test_what_typage_seals_for_a_hybrid_key_is_opened(
    workspace: Workspace, pq: mlkem768x25519.HybridIdentity, typage: Path
) -> None:
    work = "const e = new Encrypter(); e.addRecipient(key); const done = await e.encrypt(given);"
    sealed = javascript(typage, work, pq.recipient.text, b"salary")

    assert b"\n-> mlkem768x25519 " in sealed
    assert workspace.stdout_of("open", "-i", "pq.txt", given=sealed) == b"salary"


@every_way
def test_a_hybrid_key_opens_what_was_sealed_for_it(
    workspace: Workspace, pq: mlkem768x25519.HybridIdentity, way: str
) -> None:
    sealed = workspace.stdout_of("seal", "-r", pq.recipient.text, given=b"salary" * 50_000)

    assert by(way, workspace, ["open", "-i", "key.txt", "-i", "pq.txt"], sealed) == b"salary" * 50_000


def test_classic_and_hybrid_recipients_do_not_mix(
    workspace: Workspace, pq: mlkem768x25519.HybridIdentity
) -> None:
    workspace.write("recipients", f"{workspace.recipient}\n".encode())
    done = workspace.kms("seal", "-r", pq.recipient.text, "-R", "recipients", given=b"salary")

    assert (done.returncode, done.stdout) == (2, b"")
    assert b"do not mix" in done.stderr


# -- recipients and identities -----------------------------------------------------------------------


def test_every_recipient_of_a_file_opens_it_and_each_stands_once(workspace: Workspace) -> None:
    other = beside(workspace)
    workspace.write("recipients", f"# us\n\n{workspace.recipient}\n  {other.recipient}\n".encode())
    sealed = workspace.stdout_of("seal", "-R", "recipients", "-r", workspace.recipient, given=b"salary")

    assert len(parse(sealed, FILE_LIMITS).stanzas) == 2
    assert workspace.stdout_of("open", "-i", "key.txt", given=sealed) == b"salary"
    assert other.stdout_of("open", "-i", "key.txt", given=sealed) == b"salary"


def beside(workspace: Workspace) -> Workspace:
    (workspace.folder / "other").mkdir()
    return make_workspace(workspace.folder / "other")


def test_the_key_of_somebody_else_opens_nothing(workspace: Workspace) -> None:
    sealed = workspace.stdout_of("seal", "-r", workspace.recipient, given=b"salary")
    other = beside(workspace)
    done = other.kms("open", "-i", "key.txt", "-o", "out", given=sealed)

    assert done.returncode == 65
    assert other.names() == {"key.txt"}


def test_a_key_that_others_can_read_is_used_with_a_warning(workspace: Workspace) -> None:
    sealed = workspace.stdout_of("seal", "-r", workspace.recipient, given=b"salary")
    workspace.key.chmod(0o644)
    done = workspace.kms("open", "-i", "key.txt", given=sealed)

    assert done.stdout == b"salary"
    assert b"warning: key.txt can be read by others" in done.stderr


def test_passphrases_and_ssh_keys_are_left_to_stock_age(workspace: Workspace) -> None:
    sealed = pyrage.passphrase.encrypt(b"salary", "hunter2")
    workspace.write("ssh", b"-----BEGIN OPENSSH PRIVATE KEY-----\n")
    by_key = workspace.kms("open", "-i", "key.txt", "-o", "out", given=sealed)
    without = workspace.kms("open", "-o", "out", given=sealed)
    by_ssh = workspace.kms("open", "-i", "ssh", "-o", "out", given=sealed)

    assert (by_key.returncode, without.returncode, by_ssh.returncode) == (65, 2, 65)
    assert b"encrypted with a passphrase: use `age -d`" in by_key.stderr
    assert b"for a passphrase use `age -d`" in without.stderr
    assert b"SSH keys: `age -d -i ssh`" in by_ssh.stderr
    assert not workspace.has("out")


# -- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["seal", "open"])
def test_an_existing_file_is_replaced_by_force_only(workspace: Workspace, verb: str) -> None:
    args = ["seal", "-r", workspace.recipient] if verb == "seal" else ["open", "-i", "key.txt"]
    given = workspace.stdout_of("seal", "-r", workspace.recipient, given=b"salary")
    workspace.write("out", b"old")

    assert workspace.kms(*args, "-o", "out", given=given).returncode == 73
    assert workspace.read("out") == b"old"
    workspace.stdout_of(*args, "-f", "-o", "out", given=given)
    assert workspace.read("out") != b"old"
    assert workspace.names() == {"key.txt", "out"}


def test_a_device_is_written_to_and_stays_a_device(workspace: Workspace) -> None:
    os.mkfifo(workspace.path("fifo"))
    reader = subprocess.Popen(["cat", workspace.path("fifo")], stdout=subprocess.PIPE)
    workspace.stdout_of("seal", "-r", workspace.recipient, "-o", "fifo", given=b"salary")
    sealed, _ = reader.communicate(timeout=30)

    assert (workspace.folder / "fifo").is_fifo()
    assert workspace.stdout_of("open", "-i", "key.txt", given=sealed) == b"salary"


def test_a_file_of_the_kernel_is_not_as_empty_as_it_looks(workspace: Workspace) -> None:
    sealed = workspace.stdout_of("seal", "-r", workspace.recipient, "/proc/version")

    assert workspace.stdout_of("open", "-i", "key.txt", given=sealed) == Path("/proc/version").read_bytes()


def test_a_redirected_file_is_read_from_where_it_stands(workspace: Workspace) -> None:
    workspace.write("from", b"skipped" + b"salary")
    with (workspace.folder / "from").open("rb") as given:
        given.seek(7)
        command = [str(BIN / "kms"), "seal", "-r", workspace.recipient, "-o", "out"]
        subprocess.run(command, stdin=given, check=True, cwd=workspace.folder, capture_output=True)

    assert workspace.stdout_of("open", "-i", "key.txt", "out") == b"salary"


def test_json_says_what_was_written(workspace: Workspace) -> None:
    done = workspace.kms("seal", "--json", "-r", workspace.recipient, "-o", "out", given=b"salary")
    size = (workspace.folder / "out").stat().st_size

    assert json.loads(done.stdout) == {"source": "stdin", "output": "out", "bytes": size}
