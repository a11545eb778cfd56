"""``kms seal`` and ``kms open``: parts of files, damaged files, and ends that come too early."""

import os
import signal
import subprocess
from collections.abc import Callable
from typing import BinaryIO, cast

import pytest

from kms_core.age import stream
from kms_core.age.header import FILE_LIMITS, parse
from support.cli.fixtures import BIN, environment
from support.cli.offline import Workspace
from support.programs import program
from support.waiting import WAIT_S, until

CHUNK = 65536
SIZE = 5 * CHUNK + 1000
Change = Callable[[bytes, int], bytes]


def flipped(data: bytes, at: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


CHANGES: dict[str, tuple[Change, int]] = {  # what is done, and how many whole chunks are genuine before it
    "flipped-nonce": (lambda file, payload: flipped(file, payload - 1), 0),
    "flipped-third-chunk": (lambda file, payload: flipped(file, payload + 2 * stream.SEALED_CHUNK), 2),
    "cut-to-whole-chunks": (lambda file, payload: file[: payload + 5 * stream.SEALED_CHUNK], 5),
    "extended-by-a-byte": (lambda file, _: file + b"\0", 5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("into", ["file", "pipe"])
def test_a_damaged_payload_releases_genuine_chunks_to_a_pipe_and_no_file(
    workspace: Workspace, change: str, into: str
) -> None:
    plaintext = os.urandom(SIZE)
    sealed = workspace.stdout_of("seal", "-r", workspace.recipient, given=plaintext)
    damage, chunks = CHANGES[change]
    given = workspace.write("in", damage(sealed, parse(sealed, FILE_LIMITS).payload_offset))
    done = workspace.kms("open", "-i", "key.txt", "-o", "out" if into == "file" else "-", given)

    assert done.returncode == 65
    assert b"kms: error: the file is damaged" in done.stderr
    assert workspace.names() == {"key.txt", "in"}
    assert done.stdout == (plaintext[: chunks * CHUNK] if into == "pipe" else b"")


@pytest.mark.parametrize("at", [0, 10, 30, 100, 140, 200], ids=lambda at: f"byte-{at}")
def test_a_damaged_header_releases_nothing(workspace: Workspace, at: int) -> None:
    sealed = flipped(workspace.stdout_of("seal", "-r", workspace.recipient, given=b"salary"), at)
    for output in ("-", "out"):
        done = workspace.kms("open", "-i", "key.txt", "-o", output, given=sealed)

        assert (done.returncode, done.stdout) == (65, b"")
    assert workspace.names() == {"key.txt"}


def test_damaged_armor_releases_no_file(workspace: Workspace) -> None:
    text = workspace.stdout_of("seal", "-a", "-r", workspace.recipient, given=bytes(300_000))
    for damaged in (text[:-40], text + b"x", text.replace(b"\n", b"\n\n", 3000)):
        done = workspace.kms("open", "-i", "key.txt", "-o", "out", given=damaged)

        assert done.returncode == 65
    assert workspace.names() == {"key.txt"}


@pytest.mark.parametrize(
    "given", [b"", b"age", b"salary" * 100, bytes(300_000)], ids=["none", "cut", "text", "zeros"]
)
def test_what_is_no_age_file_is_called_that(workspace: Workspace, given: bytes) -> None:
    done = workspace.kms("open", "-i", "key.txt", given=given)

    assert (done.returncode, done.stdout) == (65, b"")
    assert b"age file" in done.stderr


# -- parts -------------------------------------------------------------------------------------------

PARTS = [
    *[(0, 1), (0, SIZE), (CHUNK - 1, 2), (CHUNK, CHUNK), (7, 0)],
    *[(SIZE - 1, 1), (SIZE - 1, 99), (SIZE, 1), (SIZE + 9, 9), (70_000, None)],
]


@pytest.mark.parametrize(("offset", "length"), PARTS)
def test_a_part_is_what_the_whole_has_there(workspace: Workspace, offset: int, length: int | None) -> None:
    """Without a length it goes to the end."""
    plaintext = os.urandom(SIZE)
    workspace.stdout_of("seal", "-r", workspace.recipient, "-o", "in", given=plaintext)
    asked = ["--offset", str(offset), *([] if length is None else ["--length", str(length)])]
    workspace.stdout_of("open", "-i", "key.txt", *asked, "-o", "out", "in")

    assert workspace.stdout_of("open", "-i", "key.txt", *asked, "in") == workspace.read("out")
    assert workspace.read("out") == plaintext[offset:][:length]


def test_a_part_of_a_cut_file_is_refused_though_its_chunks_are_whole(workspace: Workspace) -> None:
    sealed = workspace.stdout_of("seal", "-r", workspace.recipient, given=bytes(SIZE))
    workspace.write("in", sealed[: parse(sealed, FILE_LIMITS).payload_offset + 3 * stream.SEALED_CHUNK])
    done = workspace.kms("open", "-i", "key.txt", "--length", "5", "in")

    assert (done.returncode, done.stdout) == (65, b"")


@pytest.mark.parametrize("armored", [[], ["-a"]], ids=["pipe", "armor"])
def test_a_pipe_and_armor_have_no_parts(workspace: Workspace, armored: list[str]) -> None:
    sealed = workspace.stdout_of("seal", *armored, "-r", workspace.recipient, given=b"salary")
    workspace.write("in", sealed)
    done = workspace.kms("open", "-i", "key.txt", "--length", "5", *(["in"] if armored else []), given=sealed)

    assert (done.returncode, done.stdout) == (2, b"")


# -- ends --------------------------------------------------------------------------------------------


def way(workspace: Workspace, verb: str) -> list[str]:
    return ["seal", "-r", workspace.recipient] if verb == "seal" else ["open", "-i", "key.txt"]


def started(workspace: Workspace, *args: str) -> subprocess.Popen[bytes]:
    words, env = [str(BIN / "kms"), *args], environment(workspace.folder)
    return subprocess.Popen(words, stdin=-1, stdout=-1, stderr=-1, cwd=workspace.folder, env=env)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
@pytest.mark.parametrize("verb", ["seal", "open"])
def test_an_interruption_leaves_no_file(
    workspace: Workspace, verb: str, number: signal.Signals, code: int
) -> None:
    age = subprocess.run(
        [program("age"), "-r", workspace.recipient], input=bytes(2**21), capture_output=True, check=True
    )
    before = workspace.names()
    with started(workspace, *way(workspace, verb), "-o", "out") as running:
        pipe = cast("BinaryIO", running.stdin)
        pipe.write(age.stdout[: 2**20])
        pipe.flush()
        until(lambda: any(name.startswith(".out") for name in workspace.names()), "it writes its output")
        running.send_signal(number)
        running.wait(WAIT_S)
        said = cast("BinaryIO", running.stderr).read()
        pipe.close()

    assert running.returncode == code
    assert b"Traceback" not in said
    assert workspace.names() == before


@pytest.mark.parametrize("verb", ["seal", "open"])
def test_a_reader_that_leaves_ends_it_quietly(workspace: Workspace, verb: str) -> None:
    sealed = workspace.stdout_of("seal", "-r", workspace.recipient, given=bytes(8 * 2**20))
    with started(workspace, *way(workspace, verb), workspace.write("in", sealed)) as running:
        output = cast("BinaryIO", running.stdout)
        output.read(10)
        output.close()
        said = cast("BinaryIO", running.stderr).read()

    assert (running.returncode, said) == (141, b"")
