"""``kms seal`` and ``kms open`` with keys: sizes, files and pipes, and the tools of others both ways."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyrage
import pytest

from kms_core.age import armor, mlkem768x25519
from kms_core.age.header import FILE_LIMITS, parse
from support.cli.fixtures import BIN
from support.cli.offline import Workspace, workspace, write_key
from support.programs import kept, program

MIB = 1024 * 1024
SIZES = [0, 1, 65535, 65536, 65537, MIB - 1, MIB, MIB + 1, 20 * MIB]
TYPAGE = "age-encryption@0.3.1"
Way = Callable[[Workspace, list[str], bytes], bytes]


@pytest.fixture(name="workspace")
def a_desk(tmp_path: Path) -> Workspace:
    return workspace(tmp_path)


def file_to_file(workspace: Workspace, args: list[str], given: bytes) -> bytes:
    workspace.made(*args, "-o", "to", workspace.write("from", given))
    return workspace.read("to")


def file_to_pipe(workspace: Workspace, args: list[str], given: bytes) -> bytes:
    return workspace.made(*args, workspace.write("from", given))


def pipe_to_file(workspace: Workspace, args: list[str], given: bytes) -> bytes:
    workspace.made(*args, "-o", "to", given=given)
    return workspace.read("to")


def pipe_to_pipe(workspace: Workspace, args: list[str], given: bytes) -> bytes:
    return workspace.made(*args, given=given)


WAYS: list[Way] = [file_to_file, file_to_pipe, pipe_to_file, pipe_to_pipe]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
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
def test_stock_age_opens_what_is_sealed(workspace: Workspace, way: Way, size: int) -> None:
    plaintext = os.urandom(size)
    sealed = way(workspace, ["seal", "-r", workspace.recipient], plaintext)

    assert age(workspace, "-d", "-i", "key.txt", given=sealed) == plaintext


@every_size
@every_way
def test_what_stock_age_seals_is_opened(workspace: Workspace, way: Way, size: int) -> None:
    plaintext = os.urandom(size)
    sealed = age(workspace, "-r", workspace.recipient, given=plaintext)

    assert way(workspace, ["open", "-i", "key.txt"], sealed) == plaintext


@pytest.mark.parametrize("size", [0, 1, 47, 48, 49, 65537, MIB + 1])
def test_armor_goes_both_ways(workspace: Workspace, size: int) -> None:
    plaintext = os.urandom(size)
    text = workspace.made("seal", "-a", "-r", workspace.recipient, given=plaintext)

    assert text.startswith(armor.BEGIN)
    assert age(workspace, "-d", "-i", "key.txt", given=text) == plaintext
    theirs = age(workspace, "-a", "-r", workspace.recipient, given=plaintext)
    assert file_to_file(workspace, ["open", "-i", "key.txt"], theirs) == plaintext


# -- with pyrage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 65536, MIB + 1])
def test_pyrage_goes_both_ways(workspace: Workspace, size: int) -> None:
    plaintext = os.urandom(size)
    sealed = workspace.made("seal", "-r", workspace.recipient, given=plaintext)

    assert pyrage.decrypt(sealed, [to_pyrage(workspace)]) == plaintext
    theirs = pyrage.encrypt(plaintext, [to_pyrage(workspace).to_public()])
    assert workspace.made("open", "-i", "key.txt", given=theirs) == plaintext


# -- post-quantum ------------------------------------------------------------------------------------


@pytest.fixture
def pq(workspace: Workspace) -> mlkem768x25519.HybridIdentity:
    identity = mlkem768x25519.HybridIdentity.generate()
    write_key(workspace.folder / "pq.txt", identity)
    return identity


@pytest.fixture(scope="session")
def typage() -> Path:
    """The age of the browsers, which knows post-quantum keys; fetched once."""
    npm = shutil.which("npm")
    with kept("typage") as folder:
        library = folder / "node_modules" / "age-encryption"
        if npm and not library.exists():
            install = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), TYPAGE]
            subprocess.run(install, check=False, capture_output=True, timeout=120)
        if library.exists():
            return folder
    if os.environ.get("CI"):
        pytest.fail(f"npm could not fetch {TYPAGE}, and CI must not skip what compares with it")
    pytest.skip(f"npm could not fetch {TYPAGE}")


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
    sealed = workspace.made("seal", "-r", pq.recipient.text, given=b"salary")
    work = "const d = new Decrypter(); d.addIdentity(key); const done = await d.decrypt(given);"

    assert javascript(typage, work, pq.export(), sealed) == b"salary"


def test_what_typage_seals_for_a_hybrid_key_is_opened(
    workspace: Workspace, pq: mlkem768x25519.HybridIdentity, typage: Path
) -> None:
    work = "const e = new Encrypter(); e.addRecipient(key); const done = await e.encrypt(given);"
    sealed = javascript(typage, work, pq.recipient.text, b"salary")

    assert b"\n-> mlkem768x25519 " in sealed
    assert workspace.made("open", "-i", "pq.txt", given=sealed) == b"salary"


@every_way
def test_a_hybrid_key_opens_what_was_sealed_for_it(
    workspace: Workspace, pq: mlkem768x25519.HybridIdentity, way: Way
) -> None:
    sealed = workspace.made("seal", "-r", pq.recipient.text, given=b"salary" * 50_000)

    assert way(workspace, ["open", "-i", "key.txt", "-i", "pq.txt"], sealed) == b"salary" * 50_000


def test_classic_and_hybrid_recipients_do_not_mix(
    workspace: Workspace, pq: mlkem768x25519.HybridIdentity
) -> None:
    workspace.write("recipients", f"{workspace.recipient}\n".encode())
    done = workspace.kms("seal", "-r", pq.recipient.text, "-R", "recipients", given=b"salary")

    assert (done.returncode, done.stdout) == (2, b"")
    assert b"do not mix" in done.stderr


# -- recipients and identities -----------------------------------------------------------------------


def test_every_recipient_of_a_file_opens_it_and_each_stands_once(workspace: Workspace) -> None:
    other = desk_beside(workspace)
    workspace.write("recipients", f"# us\n\n{workspace.recipient}\n  {other.recipient}\n".encode())
    sealed = workspace.made("seal", "-R", "recipients", "-r", workspace.recipient, given=b"salary")

    assert len(parse(sealed, FILE_LIMITS).stanzas) == 2
    assert workspace.made("open", "-i", "key.txt", given=sealed) == b"salary"
    assert other.made("open", "-i", "key.txt", given=sealed) == b"salary"


def desk_beside(desk_: Workspace) -> Workspace:
    (desk_.folder / "other").mkdir()
    return workspace(desk_.folder / "other")


def test_the_key_of_somebody_else_opens_nothing(workspace: Workspace) -> None:
    sealed = workspace.made("seal", "-r", workspace.recipient, given=b"salary")
    other = desk_beside(workspace)
    done = other.kms("open", "-i", "key.txt", "-o", "out", given=sealed)

    assert done.returncode == 65
    assert other.names() == {"key.txt"}


def test_a_key_that_others_can_read_is_used_with_a_warning(workspace: Workspace) -> None:
    sealed = workspace.made("seal", "-r", workspace.recipient, given=b"salary")
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


def test_the_result_is_readable_by_its_owner_alone_and_alone_in_its_folder(workspace: Workspace) -> None:
    workspace.made("seal", "-r", workspace.recipient, "-o", "out", given=b"salary")

    assert (workspace.folder / "out").stat().st_mode & 0o777 == 0o600
    assert workspace.names() == {"key.txt", "out"}


@pytest.mark.parametrize(
    "verb", [["seal", "-r", "RECIPIENT"], ["open", "-i", "key.txt"]], ids=["seal", "open"]
)
def test_an_existing_file_is_replaced_by_force_only(workspace: Workspace, verb: list[str]) -> None:
    args = [workspace.recipient if word == "RECIPIENT" else word for word in verb]
    given = workspace.made("seal", "-r", workspace.recipient, given=b"salary")
    workspace.write("out", b"old")

    assert workspace.kms(*args, "-o", "out", given=given).returncode == 73
    assert workspace.read("out") == b"old"
    workspace.made(*args, "-f", "-o", "out", given=given)
    assert workspace.read("out") != b"old"
    assert workspace.names() == {"key.txt", "out"}


def test_a_device_is_written_to_and_stays_a_device(workspace: Workspace) -> None:
    os.mkfifo(workspace.path("fifo"))
    reader = subprocess.Popen(["cat", workspace.path("fifo")], stdout=subprocess.PIPE)
    workspace.made("seal", "-r", workspace.recipient, "-o", "fifo", given=b"salary")
    sealed, _ = reader.communicate(timeout=30)

    assert (workspace.folder / "fifo").is_fifo()
    assert workspace.made("open", "-i", "key.txt", given=sealed) == b"salary"


def test_a_file_of_the_kernel_is_not_as_empty_as_it_looks(workspace: Workspace) -> None:
    sealed = workspace.made("seal", "-r", workspace.recipient, "/proc/version")

    assert workspace.made("open", "-i", "key.txt", given=sealed) == Path("/proc/version").read_bytes()


def test_a_redirected_file_is_read_from_where_it_stands(workspace: Workspace) -> None:
    workspace.write("from", b"skipped" + b"salary")
    with (workspace.folder / "from").open("rb") as given:
        given.seek(7)
        command = [str(BIN / "kms"), "seal", "-r", workspace.recipient, "-o", "out"]
        subprocess.run(command, stdin=given, check=True, cwd=workspace.folder, capture_output=True)

    assert workspace.made("open", "-i", "key.txt", "out") == b"salary"


def test_json_says_what_was_written(workspace: Workspace) -> None:
    done = workspace.kms("seal", "--json", "-r", workspace.recipient, "-o", "out", given=b"salary")
    size = (workspace.folder / "out").stat().st_size

    assert json.loads(done.stdout) == {"source": "stdin", "output": "out", "bytes": size}
