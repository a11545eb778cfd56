"""``-`` as the source and the output of file commands: pipes of any size, and what a terminal is shown."""

import hashlib
import io
import json
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import BinaryIO, Final, cast

import pyrage
import pytest

from kms_cli import age_files
from kms_cli.age_files import InputStream
from kms_core.envelope.sealing import Sealing
from kms_core.payload.files import FileRange
from kms_core.payload.parallel import DEFAULTS
from kms_protocol.errors import InvalidRequest
from support.cli import fixtures
from support.cli.at_terminal import at_terminal
from support.cli.fixtures import BIN, RunningService, environment
from support.contract_server import ContractServer
from support.waiting import WAIT_S

KMS: Final = str(BIN / "kms")
MIB: Final = 1024 * 1024
Ran = subprocess.CompletedProcess[bytes]
BINARY: Final = bytes(range(256))
REFUSED: Final = "kms: error: the output is binary, and stdout is a terminal\n"
BY_JOB: Final = "--priority=normal"  # an option of jobs, so the stream is sent to the service
FORCE: Final = "kms: hint: name a file with --output, or force it with `--output -`\n"


@pytest.fixture
def env(stand_in: ContractServer, tmp_path: Path) -> dict[str, str]:
    return environment(tmp_path, KMS_SERVICE_URL=stand_in.url)


def kms(env: dict[str, str], *words: str, given: bytes = b"") -> Ran:
    return fixtures.kms(Path(env["HOME"]), *words, given=given, **env)


@contextmanager
def sending(
    env: dict[str, str], *parts: bytes
) -> Iterator[tuple[subprocess.Popen[bytes], BinaryIO, BinaryIO]]:
    """``kms encrypt-file -`` as a job that was sent these parts: the process, its stdout and its stderr."""
    command = [KMS, "encrypt-file", "-", BY_JOB]
    with subprocess.Popen(command, env=env, stdin=-1, stdout=-1, stderr=-1) as running:
        source = cast("BinaryIO", running.stdin)
        for part in parts:
            source.write(part)
            source.flush()
        source.close()
        yield running, cast("BinaryIO", running.stdout), cast("BinaryIO", running.stderr)


def slabs(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield hashlib.shake_128(number.to_bytes(4, "big")).digest(64) * (MIB // 64)


def test_a_pipe_of_any_size_takes_constant_memory_and_no_disk(
    real_service: RunningService, tmp_path: Path
) -> None:
    """``ulimit`` bounds a process to 96 MiB of memory, and kills one that writes a byte to a file."""
    count = 160
    url = environment(tmp_path, KMS_SERVICE_URL=real_service.url, PYTHONDONTWRITEBYTECODE="1")

    def started(command: str, stdin: int) -> subprocess.Popen[bytes]:
        line = f"ulimit -f 0 -d 98304; exec kms {command} --context env=prod"
        return subprocess.Popen(["bash", "-c", line], env=url, stdin=stdin, stdout=subprocess.PIPE)

    sealing = started("encrypt-file -", subprocess.PIPE)
    source, sealed = cast("BinaryIO", sealing.stdin), cast("BinaryIO", sealing.stdout)
    opening = started("decrypt-file -", sealed.fileno())
    sealed.close()

    def feed() -> None:
        with source:
            for slab in slabs(count):
                source.write(slab)

    feeder, digest = Thread(target=feed), hashlib.sha256()
    feeder.start()
    with cast("BinaryIO", opening.stdout) as opened:
        while part := opened.read(MIB):
            digest.update(part)
    feeder.join()

    expected = hashlib.sha256()
    for slab in slabs(count):
        expected.update(slab)
    assert digest.digest() == expected.digest()
    assert [process.wait(WAIT_S) for process in (sealing, opening)] == [0, 0]


# -- small files: one call -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, len(BINARY), MIB])
def test_a_small_file_takes_one_call_and_is_a_file_of_the_service(
    here: dict[str, str], real_service: RunningService, tmp_path: Path, size: int
) -> None:
    (tmp_path / "file").write_bytes(BINARY * (size // len(BINARY)))
    before = jobs_of(here)
    kms(here, "encrypt-file", "file", "--context", "env=prod")
    opened = kms(here, "decrypt-file", "file.age", "-o", "out", "--context=env=prod")

    assert (opened.returncode, (tmp_path / "out").read_bytes()) == (0, (tmp_path / "file").read_bytes())
    assert jobs_of(here) == before
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file.age", "out")} == {0o600}
    shown = json.loads(kms(here, "inspect", "--json", "file.age").stdout)
    padded = ["kms-service/pad"] if size >= MIB else []
    assert shown["stanzas"].split(", ") == ["X25519", "kms-service/context", "kms-service/origin", *padded]
    key = real_service.state_dir / "age" / "private_key.txt"
    identity = pyrage.x25519.Identity.from_str(key.read_text().split()[-1])
    assert (
        pyrage.decrypt((tmp_path / "file.age").read_bytes(), [identity]) == (tmp_path / "file").read_bytes()
    )


def asked(stand_in: ContractServer) -> list[str]:
    return [seen.path.removeprefix("/api/v1/kms/") for seen in stand_in.seen if seen.method == "POST"]


@pytest.mark.parametrize(
    ("size", "words", "path"),
    [
        (MIB, "", "encrypt"),
        (MIB + 1, "", "files/encrypt"),
        (1, BY_JOB, "files/encrypt"),
        (1, "--keep-for 1d", "files/encrypt"),
    ],
)
def test_a_larger_file_and_one_with_options_of_jobs_takes_a_job(
    env: dict[str, str], stand_in: ContractServer, size: int, words: str, path: str
) -> None:
    file = Path(env["HOME"]) / "file"
    file.write_bytes(b"x" * size)

    assert kms(env, "encrypt-file", "file", *words.split()).returncode == 0
    assert asked(stand_in) == [path]
    assert stand_in.open(file.with_name("file.age").read_bytes(), None) == b"x" * size


@pytest.mark.parametrize("armored", [False, True])
def test_a_service_that_takes_less_in_one_call_gets_all_of_the_file_for_a_job(
    env: dict[str, str], stand_in: ContractServer, tmp_path: Path, *, armored: bool
) -> None:
    plaintext = BINARY * 1000
    (tmp_path / "file").write_bytes(plaintext)
    stand_in.faults.single_bytes = len(plaintext) // 2
    kms(env, "encrypt-file", "file")
    if armored:
        opened = pyrage.decrypt((tmp_path / "file.age").read_bytes(), [stand_in.identity])
        public = [stand_in.identity.to_public()]
        (tmp_path / "file.age").write_bytes(pyrage.encrypt(opened, public, armored=True))

    assert kms(env, "decrypt-file", "file.age", "-o", "out").returncode == 0
    assert asked(stand_in) == ["encrypt", "files/encrypt", "decrypt", "files/decrypt"]
    assert (tmp_path / "out").read_bytes() == plaintext


def test_a_pipe_by_name_is_sent_for_a_job(
    env: dict[str, str], stand_in: ContractServer, tmp_path: Path
) -> None:
    line = "kms encrypt-file <(printf x) -o out"
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, check=True)

    assert asked(stand_in) == ["files/encrypt"]


def test_a_small_file_that_fails_leaves_what_is_there(
    env: dict[str, str], stand_in: ContractServer, tmp_path: Path
) -> None:
    (tmp_path / "file.age").write_bytes(stand_in.seal(BINARY, "env=prod"))
    (tmp_path / "file").write_bytes(b"older")
    refused = kms(env, "decrypt-file", "file.age", "--force", "--context=env=dev")
    kept = kms(env, "decrypt-file", "file.age", "--context=env=prod")

    assert (refused.returncode, kept.returncode) == (65, 73)
    assert (tmp_path / "file").read_bytes() == b"older"
    assert asked(stand_in) == ["decrypt"]
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "file.age"]


# -- pipes by file keys --------------------------------------------------------------------------------


@pytest.fixture
def here(real_service: RunningService, tmp_path: Path) -> dict[str, str]:
    return environment(tmp_path, KMS_SERVICE_URL=real_service.url)


def jobs_of(env: dict[str, str]) -> set[str]:
    listed = json.loads(kms(env, "job", "list", "--json", "--limit", "1000").stdout)
    return {job["job_id"] for job in listed["jobs"]}


@pytest.mark.parametrize("size", [0, len(BINARY), 2 * MIB])
def test_a_pipe_is_a_file_of_the_service_and_no_job(
    here: dict[str, str], real_service: RunningService, tmp_path: Path, size: int
) -> None:
    plaintext, before = BINARY * (size // len(BINARY)), jobs_of(here)
    sealed = kms(here, "encrypt-file", "-", "--context", "env=prod", given=plaintext).stdout
    (tmp_path / "sealed").write_bytes(sealed)
    opened = kms(here, "decrypt-file", "sealed", "-o", "-", "--context=env=prod")

    assert (opened.returncode, opened.stdout, opened.stderr) == (0, plaintext, b"")
    assert jobs_of(here) == before
    shown = json.loads(kms(here, "inspect", "--json", "sealed").stdout)
    padded = ["kms-service/pad"] if size >= MIB else []
    assert shown["stanzas"].split(", ") == ["X25519", "kms-service/context", "kms-service/origin", *padded]
    assert not padded or shown["header_bytes"] % 4096 == 0
    sent = kms(here, "decrypt-file", "sealed", "-o", "out", "--context=env=prod", BY_JOB)
    assert (sent.returncode, (tmp_path / "out").read_bytes()) == (0, plaintext)
    key = str(real_service.state_dir / "age" / "private_key.txt")
    assert kms(here, "open", "-i", key, "--context=env=prod", given=sealed).stdout == plaintext


def test_a_pipe_opens_what_a_job_sealed(here: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BINARY)
    kms(here, "encrypt-file", "file", "--context", "env=prod", BY_JOB)
    sealed = (tmp_path / "file.age").read_bytes()

    assert kms(here, "decrypt-file", "-", "--context=env=prod", given=sealed).stdout == BINARY
    refused = kms(here, "decrypt-file", "-", "--context=env=dev", given=sealed)
    assert (refused.returncode, refused.stdout) == (65, b"")


@pytest.mark.parametrize("output", ["-", "out"])
def test_a_file_that_is_cut_off_gives_its_whole_chunks_and_an_error(
    here: dict[str, str], tmp_path: Path, output: str
) -> None:
    """After 4 KiB of header and a nonce a MiB has 15 whole chunks of 64 KiB, each with a tag of 16 bytes."""
    plaintext = BINARY * (2 * MIB // len(BINARY))
    sealed = kms(here, "encrypt-file", "-", given=plaintext).stdout
    done = kms(here, "decrypt-file", "-", "-o", output, given=sealed[:MIB])

    assert done.returncode == 65
    assert b"kms: error: the file is damaged: it was truncated or changed" in done.stderr
    assert done.stdout == (plaintext[: 15 * 64 * 1024] if output == "-" else b"")
    assert (b"kms: note: the output is incomplete" in done.stderr) == (output == "-")
    assert not list(tmp_path.iterdir())


def test_a_source_that_shrinks_on_its_way_into_a_pipe_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"shrank")
    with io.FileIO(tmp_path / "source") as source:
        given = InputStream(source, FileRange(source.fileno(), size=15))
        with pytest.raises(InvalidRequest, match="changed while it was read"):
            age_files.seal(Sealing(b"", bytes(16), bytes(16)), given, io.BytesIO(), DEFAULTS)


@pytest.mark.parametrize("operation", ["wrap", "unwrap"])
def test_a_pipe_without_the_permission_is_sent_to_the_service_and_that_is_told(
    env: dict[str, str], here: dict[str, str], stand_in: ContractServer, operation: str
) -> None:
    told = f"the token lacks `{operation}`: the service works on the stream, as far as its spool has room"
    if operation == "wrap":
        done = kms(env, "encrypt-file", "-", given=BINARY)
        assert (done.returncode, stand_in.open(done.stdout, None)) == (0, BINARY)
    else:
        sealed = kms(here, "encrypt-file", "-", given=BINARY).stdout
        done = kms(env, "decrypt-file", "-", given=sealed)
        assert next(iter(stand_in.jobs.values())).kind == "decrypt"
        assert [each.body for each in stand_in.seen if "/files/" in each.path] == [sealed]

    assert done.stderr.decode().splitlines()[0] == f"kms: {told}"


# -- pipes by jobs -------------------------------------------------------------------------------------


def test_a_slow_sender_of_a_pipe_is_sent_on_at_once(env: dict[str, str], stand_in: ContractServer) -> None:
    """A service closes connections on which nothing arrives: less than a MiB must not wait for more."""
    with sending(env, b"some", b"some", b"some") as (running, pipe, _):
        sealed = pipe.read()

    assert running.returncode == 0
    assert stand_in.seen[0].headers["transfer-encoding"] == "chunked"
    assert stand_in.open(sealed, None) == b"some" * 3


def test_a_file_on_stdin_is_sent_with_its_length_and_once_more_if_needed(
    env: dict[str, str], stand_in: ContractServer, tmp_path: Path
) -> None:
    stand_in.faults.dropped = 1
    (tmp_path / "in").write_bytes(b"head" + BINARY)
    line = f"read -rN 4; kms encrypt-file - {BY_JOB}"  # bash reads its bytes and no more of a file
    with (tmp_path / "in").open("rb") as given:
        done = subprocess.run(["bash", "-c", line], env=env, stdin=given, capture_output=True, check=True)

    assert [seen.headers["content-length"] for seen in stand_in.seen[:2]] == [str(len(BINARY))] * 2
    assert stand_in.open(done.stdout, None) == BINARY


@pytest.mark.parametrize("armored", [False, True])
def test_an_age_file_on_a_pipe_is_decrypted(
    env: dict[str, str], stand_in: ContractServer, tmp_path: Path, *, armored: bool
) -> None:
    sealed = stand_in.seal(BINARY * 4096, None)
    if armored:
        public = stand_in.identity.to_public()
        sealed = pyrage.encrypt(pyrage.decrypt(sealed, [stand_in.identity]), [public], armored=True)
    done = kms(env, "decrypt-file", "-", given=sealed)

    assert (done.returncode, done.stdout, done.stderr) == (0, BINARY * 4096, b"")
    assert not list(tmp_path.iterdir())


def test_what_is_no_age_file_is_not_sent(env: dict[str, str], stand_in: ContractServer) -> None:
    done = kms(env, "decrypt-file", "-", given=BINARY)

    assert (done.returncode, done.stdout) == (65, b"")
    assert b"kms: error: neither an age file nor an armored one\n" in done.stderr
    assert not stand_in.seen


@pytest.mark.parametrize("command", ["decrypt-file -", "job result job-1", "job result job-1 -o -"])
def test_a_result_that_breaks_off_is_told_as_incomplete(
    env: dict[str, str], stand_in: ContractServer, command: str
) -> None:
    sealed = stand_in.seal(BINARY * 4 * 4096, None)
    kms(env, "decrypt-file", "-", given=sealed)
    stand_in.faults.cuts, stand_in.faults.changed_result = 1, True
    done = kms(env, *command.split(), given=sealed)

    assert done.returncode == 1
    assert done.stdout == BINARY * 2 * 4096
    assert b"kms: note: the output is incomplete: discard what was written\n" in done.stderr


@pytest.mark.parametrize("size", [1, 4 * MIB])
def test_a_full_disk_behind_stdout_is_told(env: dict[str, str], stand_in: ContractServer, size: int) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [KMS, "encrypt-file", "-", BY_JOB]
        done = subprocess.run(command, env=env, input=b"x" * size, stdout=full, stderr=-1, check=False)

    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        "kms: the result is kept: `kms job result job-1 -o -`",
        "kms: the output is incomplete: discard what was written",
        "kms: error: no space left on device",
        "kms: hint: free space on that disk, or write to another",
    ]
    assert stand_in.jobs


def test_a_file_that_cannot_be_written_is_named_and_its_result_kept(
    env: dict[str, str], stand_in: ContractServer, tmp_path: Path
) -> None:
    """A limit on the size of files fails as a full disk does, and needs no root."""
    (tmp_path / "in").write_bytes(b"x" * 4 * MIB)
    line = "ulimit -f 100; exec kms encrypt-file in -o 'a name'"
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, check=False)

    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        "kms: the result is kept: `kms job result job-1 -o 'a name'`",
        "kms: error: a name: file too large",
        "kms: hint: write to another disk, or raise the limit of `ulimit -f`",
    ]
    assert list(stand_in.jobs) == ["job-1"]
    assert [found.name for found in tmp_path.iterdir()] == ["in"]
    assert kms(env, "job", "result", "job-1", "-o", "a name").returncode == 0


def test_a_file_name_cannot_forge_a_message(
    env: dict[str, str], stand_in: ContractServer, tmp_path: Path
) -> None:
    (tmp_path / "in\nkms: forged").write_bytes(b"x")
    done = kms(env, "encrypt-file", "in\nkms: forged")
    again = kms(env, "encrypt-file", "in\nkms: forged")

    report = "kms: encrypted in?kms: forged to in?kms: forged.age"
    assert done.stderr.decode().startswith(report)
    assert again.stderr.decode().startswith("kms: error: in?kms: forged.age exists\n")
    assert len(stand_in.seen) == 1


@pytest.mark.parametrize("words", [(), ("--json",)], ids=" ".join)
def test_decrypt_writes_a_file(
    env: dict[str, str], stand_in: ContractServer, tmp_path: Path, words: tuple[str, ...]
) -> None:
    sealed = stand_in.seal(BINARY, None)
    done = kms(env, "decrypt", "-o", "out", *words, given=sealed)
    again = kms(env, "decrypt", "-o", "out", *words, given=sealed)

    assert (done.returncode, done.stdout, (tmp_path / "out").read_bytes()) == (0, b"", BINARY)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600
    assert again.returncode == 73


def test_an_interrupted_transfer_says_what_is_in_the_pipe(
    env: dict[str, str], stand_in: ContractServer
) -> None:
    stand_in.faults.stalls = True
    with sending(env, b"x" * 4 * MIB) as (running, pipe, errors):
        pipe.read(MIB)
        running.send_signal(signal.SIGINT)
        pipe.read()
        said = errors.read()
    stand_in.faults.stalls = False

    assert running.returncode == 130
    assert b"kms: the output is incomplete: discard what was written\n" in said
    assert b"kms: the result is kept: `kms job result job-1 -o -`\n" in said


def test_a_ciphertext_that_is_refused_leaves_the_pipe_empty(
    env: dict[str, str], stand_in: ContractServer
) -> None:
    done = kms(env, "decrypt-file", "-", "--context", "env=dev", given=stand_in.seal(BINARY, "env=prod"))

    assert (done.returncode, done.stdout) == (65, b"")
    assert b"kms: error: decryption failed" in done.stderr


def test_a_reader_that_goes_away_leaves_no_result(env: dict[str, str], stand_in: ContractServer) -> None:
    with sending(env, b"x" * 4 * MIB) as (running, pipe, errors):
        pipe.read(10)
        pipe.close()
        said = errors.read()

    assert (running.returncode, said) == (141, b"")
    last = stand_in.seen[-1]
    assert (last.method, last.path) == ("DELETE", "/api/v1/kms/jobs/job-1/result")


# -- terminals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["encrypt-file -", "rewrap-file -"])
def test_a_ciphertext_goes_to_a_terminal_only_if_asked(
    env: dict[str, str], stand_in: ContractServer, tmp_path: Path, command: str
) -> None:
    code, shown = at_terminal(f"echo secret | kms {command}", tmp_path, env)

    assert (code, shown) == (2, REFUSED + FORCE)
    assert not stand_in.seen


def test_a_pipe_gets_bytes_and_no_report(env: dict[str, str], stand_in: ContractServer) -> None:
    for output in ([], ["-o", "-"]):
        done = kms(env, "encrypt-file", "-", BY_JOB, *output, "--json", given=BINARY)
        assert (done.returncode, done.stderr, stand_in.open(done.stdout, None)) == (0, b"", BINARY)


@pytest.mark.parametrize(
    "command", ["decrypt-file -", "decrypt-file sealed -o -", "decrypt", "decrypt -o -"], ids=str
)
def test_text_is_shown_on_a_terminal(
    env: dict[str, str], stand_in: ContractServer, tmp_path: Path, command: str
) -> None:
    (tmp_path / "sealed").write_bytes(stand_in.seal("Zoë: 1\n\t👩‍👩‍👧\n".encode(), None))

    assert at_terminal(f"kms {command} < sealed", tmp_path, env) == (0, "Zoë: 1\n\t👩‍👩‍👧\n")


@pytest.mark.parametrize(
    "data",
    [BINARY, b"\x1b]0;owned\x07", b"text \xff", b"\xc2\x9b2J", b"a\0"],
    ids=["all", "escape", "no-utf-8", "c1", "nul"],
)
@pytest.mark.parametrize("command", ["decrypt-file -", "decrypt", "job result job-1", "open -i key -"])
def test_what_is_no_text_is_kept_from_a_terminal(
    env: dict[str, str], stand_in: ContractServer, tmp_path: Path, command: str, data: bytes
) -> None:
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text(str(stand_in.identity))
    sealed = stand_in.seal(data, None)
    kms(env, "decrypt-file", "-", given=sealed)
    if command.startswith("open"):
        sealed = kms(env, "seal", "-r", str(stand_in.identity.to_public()), given=data).stdout
    (tmp_path / "sealed").write_bytes(sealed)

    assert at_terminal(f"kms {command} < sealed", tmp_path, env) == (2, REFUSED + FORCE)


def test_binary_data_goes_to_a_terminal_if_asked(
    env: dict[str, str], stand_in: ContractServer, tmp_path: Path
) -> None:
    (tmp_path / "sealed").write_bytes(stand_in.seal(b"\x1b[1m\0", None))

    for command in ("decrypt -o -", f"decrypt-file - -o - {BY_JOB}", "job result job-1 -o -"):
        assert at_terminal(f"kms {command} < sealed", tmp_path, env) == (0, "\x1b[1m\0")
