import io
import os
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import pytest

from kms_client import Client, ServiceUnreachable
from kms_client.attempts import Attempts
from kms_client.http_client import Upload
from kms_client.settings import ClientSettings
from kms_client.sync import run
from kms_protocol import errors, wire
from support.contract_server import ContractServer

MIB = 1024 * 1024


class Pipe(io.RawIOBase):
    """A source that cannot be rewound."""

    def __init__(self, data: bytes) -> None:
        self._inner = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401  # typeshed's WriteableBuffer
        return self._inner.readinto(buffer)


def finished(kms: Client, accepted: wire.JobAccepted) -> str:
    kms.wait(accepted.job_id)
    return accepted.job_id


def fetched(kms: Client, job_id: str) -> bytes:
    target = io.BytesIO()
    size = kms.download(job_id, target)

    assert size == len(target.getvalue())
    return target.getvalue()


def test_file_round_trip_with_progress(kms: Client, server: ContractServer) -> None:
    plaintext = bytes(range(256)) * 10_000
    sent: list[tuple[int, int | None]] = []
    job_id = finished(
        kms,
        kms.upload_encrypt(io.BytesIO(plaintext), context={"a": "1,2"}, progress=lambda *at: sent.append(at)),
    )

    again = finished(kms, kms.upload_decrypt(io.BytesIO(fetched(kms, job_id)), context={"a": "1,2"}))

    assert fetched(kms, again) == plaintext
    assert [at[0] for at in sent] == [MIB, 2 * MIB, len(plaintext)]
    assert server.headers_to("/files/encrypt")[0]["content-length"] == str(len(plaintext))


def test_pipe_is_sent_without_a_length(kms: Client, server: ContractServer) -> None:
    source = cast("BinaryIO", io.BufferedReader(Pipe(b"x" * 3 * MIB)))
    job_id = finished(kms, kms.upload_encrypt(source, key_id="default"))

    headers = server.headers_to("/files/encrypt")[0]
    assert (headers["transfer-encoding"], headers["x-kms-key-id"]) == ("chunked", "default")
    assert server.open(fetched(kms, job_id), None) == b"x" * 3 * MIB


def test_file_is_sent_again_from_where_it_stood(kms: Client, server: ContractServer) -> None:
    server.faults.dropped = 1
    source = io.BytesIO(b"head" + b"x" * MIB)
    source.seek(4)

    kms.upload_encrypt(source)

    keys = {headers["idempotency-key"] for headers in server.headers_to("/files/encrypt")}
    assert len(keys) == 1
    assert [len(seen.body) for seen in server.seen] == [MIB, MIB]


def test_pipe_is_not_sent_twice(kms: Client, server: ContractServer) -> None:
    server.faults.dropped = 1

    with pytest.raises(ServiceUnreachable):
        kms.upload_encrypt(cast("BinaryIO", io.BufferedReader(Pipe(b"x"))))

    assert len(server.seen) == 1


def test_a_pipe_whose_first_part_was_read_is_not_sent_from_its_second() -> None:
    """A connection that breaks while a part is sent leaves the generator where it yielded that part."""
    upload = Upload(cast("BinaryIO", io.BufferedReader(Pipe(b"x" * 2 * MIB))), None)
    next(upload.parts())

    assert not upload.rewind()


def test_a_pipe_without_data_is_not_taken_for_one_that_ended(kms: Client, server: ContractServer) -> None:
    """In non-blocking mode a read of an open pipe returns None."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    with io.FileIO(reading) as source, pytest.raises(errors.InvalidRequest, match="non-blocking"):
        kms.upload_encrypt(source)
    os.close(writing)

    assert not server.jobs


def test_shrinking_file_is_noticed(kms: Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3 * MIB)

    def cut(*_: object) -> None:
        source.truncate(MIB)

    with path.open("rb+") as source, pytest.raises(errors.InvalidRequest, match="became shorter"):
        kms.upload_encrypt(source, progress=cut)


def test_cut_download_is_resumed(kms: Client, server: ContractServer) -> None:
    job_id = finished(kms, kms.upload_encrypt(io.BytesIO(b"x" * MIB)))
    server.faults.cuts = 3

    assert server.open(fetched(kms, job_id), None) == b"x" * MIB

    asked = server.headers_to("/result", "GET")
    assert ["range" in headers for headers in asked] == [False, True, True, True]
    assert asked[1]["if-range"].startswith('"')


def test_result_that_changed_is_taken_anew(kms: Client, server: ContractServer) -> None:
    job_id = finished(kms, kms.upload_encrypt(io.BytesIO(b"x" * MIB)))
    server.faults.cuts, server.faults.changed_result = 1, True

    assert fetched(kms, job_id) == server.jobs[job_id].body


@pytest.mark.parametrize("how", ["download", "result"])
def test_a_result_that_is_refused_for_now_is_asked_for_again(
    kms: Client, server: ContractServer, how: str
) -> None:
    job_id = finished(kms, kms.upload_encrypt(io.BytesIO(b"x" * MIB)))
    server.faults.busy = 2

    data = fetched(kms, job_id) if how == "download" else b"".join(kms.result(job_id))
    assert data == server.jobs[job_id].body
    assert len(server.headers_to("/result", "GET")) == 3


@pytest.mark.parametrize(
    ("fault", "error"), [("busy", errors.JobsUnavailable), ("dropped", ServiceUnreachable)]
)
def test_a_download_without_headway_is_given_up(
    kms: Client, server: ContractServer, fault: str, error: type[Exception]
) -> None:
    job_id = finished(kms, kms.upload_encrypt(io.BytesIO(b"x")))
    setattr(server.faults, fault, 99)

    with pytest.raises(error):
        kms.download(job_id, io.BytesIO())
    assert getattr(server.faults, fault) > 90


def test_callers_that_are_refused_together_do_not_come_back_together() -> None:
    class Clock:
        slept: ClassVar[list[float]] = []

        async def sleep(self, seconds: float) -> None:
            self.slept.append(seconds)

    for _ in range(100):
        run(Attempts(ClientSettings("http://localhost"), Clock().sleep).pause(errors.RateLimited(), 5.0))

    assert all(5.0 <= seconds <= 7.5 for seconds in Clock.slept)
    assert max(Clock.slept) - min(Clock.slept) > 1.0


@pytest.mark.parametrize("kind", ["encrypt", "decrypt"])
def test_upload_has_the_options_of_its_caller(kms: Client, server: ContractServer, kind: str) -> None:
    upload = kms.upload_encrypt if kind == "encrypt" else kms.upload_decrypt
    upload(io.BytesIO(b"x"), priority="low", callback="ci", idempotency_key="mine")
    upload(io.BytesIO(b"x"), priority=None)

    named, plain = (seen.headers for seen in server.seen)
    options = {"x-kms-priority": "low", "x-kms-callback": "ci", "idempotency-key": "mine"}
    assert named.items() >= options.items()
    assert not {"x-kms-priority", "x-kms-callback"} & plain.keys()
