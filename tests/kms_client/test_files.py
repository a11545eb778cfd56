import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import pytest

from kms_client import Client, ServiceUnreachable, attempts
from kms_client.files import header_of
from kms_protocol import errors
from kms_protocol.error_texts import TEXTS
from kms_protocol.units import MiB
from support.contract_server import ContractServer
from support.waiting import monotonic_ahead

CONTENT = bytes(range(256)) * 5_000
CONTEXT = "env=test"
NONCE_BYTES = 16
Connect = Callable[..., Client]
OUTAGE = 5  # refused requests: more than the retries of a call without a deadline


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_SLOWEST_WAIT_S", 0.02)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_round_trip(kms: Client, server: ContractServer, source: Path, tmp_path: Path) -> None:
    sealed, opened = tmp_path / "sealed.age", tmp_path / "opened"
    stages: list[tuple[str, int, int | None]] = []

    job = kms.encrypt_file(source, str(sealed), context=CONTEXT, progress=lambda *at: stages.append(at))
    kms.decrypt_file(str(sealed), opened, context=CONTEXT)

    assert server.open(sealed.read_bytes(), CONTEXT) == opened.read_bytes() == CONTENT
    assert job.state == "succeeded"
    assert list(dict.fromkeys(stage for stage, _, _ in stages)) == ["sending", "waiting", "receiving"]
    assert stages[-1] == ("receiving", sealed.stat().st_size, sealed.stat().st_size)
    assert stat.S_IMODE(opened.stat().st_mode) == 0o600
    assert names(tmp_path) == {"source", "sealed.age", "opened"}


def test_result_is_deleted_unless_the_caller_can_ask_for_it_again(
    kms: Client, server: ContractServer, source: Path, tmp_path: Path
) -> None:
    once = kms.encrypt_file(source, tmp_path / "a")
    again = [
        kms.encrypt_file(source, tmp_path / "b", overwrite=True, idempotency_key="nightly").job_id
        for _ in range(2)
    ]

    assert len(set(again)) == 1
    assert server.released == [once.job_id]


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        *(("before", "dropped"), ("sending", "dropped"), ("waiting", "dropped"), ("receiving", "dropped")),
        ("receiving", "busy"),
    ],
)
def test_outage_is_outlived_at_each_stage(
    kms: Client, server: ContractServer, source: Path, stage: str, fault: str
) -> None:
    target = source.with_name("sealed")
    if stage == "before":
        setattr(server.faults, fault, OUTAGE)
    faults = [] if stage == "before" else [fault]

    def progress(at: str, *_: object) -> None:
        if at == stage and faults:
            setattr(server.faults, faults.pop(), OUTAGE)

    server.faults.cuts = 2
    kms.encrypt_file(source, target, progress=progress)

    assert server.open(target.read_bytes(), None) == CONTENT
    assert len(server.jobs) == 1
    assert (server.faults.dropped, server.faults.busy, faults) == (0, 0, [])


def test_outage_without_an_end_ends_the_transfer(
    kms: Client, server: ContractServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "OUTAGE_S", 0.3)
    server.faults.dropped = 10_000

    with pytest.raises(ServiceUnreachable):
        kms.encrypt_file(source, tmp_path / "sealed")
    assert names(tmp_path) == {"source"}


@pytest.mark.parametrize("call", ["encrypt", "status"])
def test_call_with_a_deadline_is_repeated_until_it_succeeds(
    kms: Client, server: ContractServer, call: str
) -> None:
    server.faults.dropped = OUTAGE
    patient = kms.within(60)
    args = (b"x",) if call == "encrypt" else ()

    assert getattr(patient, call)(*args)
    assert len(server.seen) == OUTAGE + 1


def test_deadline_ends_an_outage(connect: Connect, server: ContractServer) -> None:
    server.faults.dropped = 10_000

    with pytest.raises(ServiceUnreachable):
        connect(deadline_s=0.3).status()
    assert len(server.seen) > 3


def test_deadline_ends_a_wait_and_the_job_goes_on(
    connect: Connect, server: ContractServer, source: Path, tmp_path: Path
) -> None:
    server.faults.steps_s = 1000

    with pytest.raises(errors.JobNotFinished) as caught:
        connect(deadline_s=0.3).encrypt_file(source, tmp_path / "sealed", idempotency_key="k")
    assert caught.value.__notes__ == ["job id job-1"]
    assert not server.jobs["job-1"].cancelled

    server.faults.steps_s = 0
    connect().encrypt_file(source, tmp_path / "sealed", idempotency_key="k")

    assert len(server.jobs) == 1
    assert server.open((tmp_path / "sealed").read_bytes(), None) == CONTENT


@pytest.mark.parametrize("stage", ["sending", "receiving"])
def test_deadline_ends_a_transfer(connect: Connect, source: Path, tmp_path: Path, stage: str) -> None:
    """Also one that goes on, however slowly."""
    with ExitStack() as later:

        def progress(at: str, *_: object) -> None:
            if at == stage:
                later.enter_context(monotonic_ahead(3600))

        with pytest.raises(ServiceUnreachable, match="in the time given"):
            connect(deadline_s=60).encrypt_file(source, tmp_path / "sealed", progress=progress)
    assert names(tmp_path) == {"source"}


@pytest.mark.parametrize("gives_digests", [True, False], ids=["digest", "older service"])
def test_damaged_result_is_fetched_again(
    kms: Client, server: ContractServer, source: Path, tmp_path: Path, *, gives_digests: bool
) -> None:
    server.faults.damaged, server.faults.gives_digests = 2, gives_digests
    server.faults.cuts = 1
    kms.encrypt_file(source, tmp_path / "sealed")

    (job,) = server.jobs.values()
    assert ((tmp_path / "sealed").read_bytes() == job.body) is gives_digests


@pytest.mark.parametrize("how", ["encrypt_file", "rewrap_file", "download_to"])
def test_existing_target_is_kept(
    kms: Client, server: ContractServer, source: Path, tmp_path: Path, how: str
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    call = getattr(kms, how)

    with pytest.raises(errors.TargetExists, match="overwrite"):
        call("job" if how == "download_to" else source, target)

    assert (target.read_bytes(), server.seen) == (b"old", [])


def test_target_that_appears_meanwhile_is_kept(kms: Client, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"

    def progress(stage: str, *_: object) -> None:
        if stage == "receiving":
            target.write_bytes(b"of another program")

    with pytest.raises(errors.TargetExists) as caught:
        kms.encrypt_file(source, target, progress=progress)
    assert caught.value.__notes__ == ["job id job-1"]
    assert target.read_bytes() == b"of another program"
    assert names(tmp_path) == {"source", "target"}


def test_error_of_a_failed_job_says_what_to_do(kms: Client, source: Path, tmp_path: Path) -> None:
    kms.encrypt_file(source, tmp_path / "sealed", context=CONTEXT)

    with pytest.raises(errors.DecryptFailed) as caught:
        kms.decrypt_file(tmp_path / "sealed", tmp_path / "opened", context="env=other")

    assert "context" in caught.value.detail
    assert "kms inspect" in caught.value.hint
    assert caught.value.__notes__ == ["job id job-2"]
    assert not (tmp_path / "opened").exists()


def test_error_of_a_call_says_what_to_do(kms: Client) -> None:
    with pytest.raises(errors.NotACiphertext) as caught:
        kms.decrypt(b"no age file")

    assert caught.value.hint == TEXTS["not_a_ciphertext"].hint != ""


@pytest.mark.parametrize(
    ("source_name", "target_name"), [("absent", "target"), ("source", "no-folder/target"), ("source", "..")]
)
def test_unusable_name_is_an_error_before_anything_is_sent(
    kms: Client, server: ContractServer, source: Path, source_name: str, target_name: str
) -> None:
    with pytest.raises((FileNotFoundError, IsADirectoryError)):
        kms.encrypt_file(source.with_name(source_name), source.parent / target_name, overwrite=True)
    assert server.seen == []


def test_pipe_is_refused_and_not_waited_for(kms: Client, server: ContractServer, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(errors.InvalidRequest, match="upload_encrypt"):
        kms.encrypt_file(tmp_path / "pipe", tmp_path / "target")
    assert server.seen == []


# -- headers -------------------------------------------------------------------------------------------


def test_header_ends_with_its_nonce(server: ContractServer) -> None:
    sealed = server.seal(b"--- no line of a header\n---" * 9, None)
    file = BytesIO(sealed)
    header = header_of(file)

    first, rest = sealed.split(b"\n--- ", 1)
    assert header[: -NONCE_BYTES - 1] == first + b"\n--- " + rest.split(b"\n")[0]
    assert header + file.read() == sealed


@pytest.mark.parametrize("cut", [0, 30, -1], ids=["empty", "within a stanza", "within the nonce"])
def test_file_without_a_whole_header_is_no_ciphertext(server: ContractServer, cut: int) -> None:
    header = header_of(BytesIO(server.seal(b"x", None)))

    with pytest.raises(errors.NotACiphertext):
        header_of(BytesIO(header[:cut]))


def test_plaintext_is_no_ciphertext() -> None:
    with pytest.raises(errors.NotACiphertext):
        header_of(BytesIO(bytes(MiB)))
