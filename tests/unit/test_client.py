import io
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, cast

import anyio.from_thread
import httpx
import pytest

from cli.contract_server import ContractServer, running
from kms_client import AsyncClient, Client, ServiceUnreachable, UnexpectedAnswer, calls
from kms_client.events import Event, EventParser
from kms_client.problems import Reply, by_code, error_of, failure, tree
from kms_client.settings import ClientSettings
from kms_client.transport import transport_errors
from kms_core import errors, wire
from kms_core.context import Context
from kms_core.errors import KmsError

Connect = Callable[..., Client]
MIB = 1024 * 1024


class OnEventLoop:
    """An AsyncClient on an event loop of another thread, with the calls of a Client."""

    def __init__(self, client: AsyncClient, portal: anyio.from_thread.BlockingPortal) -> None:
        self._client = client
        self._portal = portal

    def __getattr__(self, name: str) -> Callable[..., object]:
        async def call(*args: object, **named: object) -> object:
            found = getattr(self._client, name)(*args, **named)
            return [item async for item in found] if hasattr(found, "__anext__") else await found

        return lambda *args, **named: self._portal.call(lambda: call(*args, **named))


@pytest.fixture
def server() -> Iterator[ContractServer]:
    with running() as service:
        yield service


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest, server: ContractServer) -> Iterator[Connect]:
    made: list[Client] = []
    with anyio.from_thread.start_blocking_portal() as portal:

        def of(url: str = server.url, **options: Any) -> Client:  # noqa: ANN401  # Options, passed through
            if request.param == "sync":
                made.append(Client(url, **options))
            else:
                made.append(cast("Client", OnEventLoop(AsyncClient(url, **options), portal)))
            return made[-1]

        yield of
        for client in made:
            client.close()


@pytest.fixture
def kms(connect: Connect) -> Client:
    return connect()


def requests(server: ContractServer, path: str, method: str = "POST") -> list[dict[str, str]]:
    return [dict(seen.headers) for seen in server.seen if path in seen.path and seen.method == method]


# -- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted({kind.code for kind in tree(KmsError)}))
def test_every_code_becomes_its_class(code: str) -> None:
    core = [kind for kind in tree(KmsError) if kind.__module__ == "kms_core.errors" and kind.code == code]
    body = wire.encode(
        wire.Problem(type="urn:x", title="t", status=418, detail="why", code=code, request_id="r-9")
    )

    error = error_of(Reply(418, {}, body))

    assert type(error) is (core[-1] if core else UnexpectedAnswer)
    assert error.detail == "why"
    assert error.__notes__ == ["request id r-9"]


def test_classes_that_share_a_code_give_the_deeper_one() -> None:
    assert by_code()["invalid_request"] is errors.InvalidRequest
    assert by_code()["forbidden"] is errors.Forbidden


def test_unknown_code_keeps_its_text() -> None:
    error = failure("items_failed")

    assert isinstance(error, UnexpectedAnswer)
    assert "items_failed" in str(error)


@pytest.mark.parametrize(
    ("status", "kind"), [(502, errors.Unavailable), (404, UnexpectedAnswer), (500, UnexpectedAnswer)]
)
def test_answers_of_others_are_told_from_ours(status: int, kind: type[KmsError]) -> None:
    assert type(error_of(Reply(status, {}, b"<html>"))) is kind


@pytest.mark.parametrize(
    ("value", "expected"),
    [("7", 7.0), ("", None), ("soon", None), ("Tue, 24 Nov 2020 00:00:00 GMT", 0.0)],
    ids=["seconds", "absent", "nonsense", "date in the past"],
)
def test_retry_after_is_read(value: str, expected: float | None) -> None:
    assert Reply(503, {"retry-after": value}, b"").retry_after_s() == expected


# -- contexts in headers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (None, ""),
        ("env=prod,service=api", "env%3Dprod%2Cservice%3Dapi"),
        ({"b": "2", "a": "1"}, "a%3D1%2Cb%3D2"),
        ({"ort": "Köln"}, "ort%3DK%C3%B6ln"),
        ({"a": "1,2"}, "%7B%22a%22%3A%221%2C2%22%7D"),
        ({"{a": "1"}, "%7B%22%7Ba%22%3A%221%22%7D"),
    ],
    ids=["none", "text", "mapping", "utf-8", "comma", "brace"],
)
def test_header_context(context: wire.ContextIn, expected: str) -> None:
    assert calls.header_text(context) == expected


def test_wrong_context_costs_no_request(kms: Client, server: ContractServer) -> None:
    with pytest.raises(errors.InvalidContext):
        kms.encrypt(b"x", context="no-equals-sign")

    assert not server.seen


# -- single calls ------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [None, "env=prod", {"a": "1,2"}], ids=["none", "text", "mapping"])
def test_round_trip(kms: Client, context: wire.ContextIn) -> None:
    sealed = kms.encrypt(b"secret-data", context=context)

    assert kms.decrypt(sealed.ciphertext, context=context).plaintext == b"secret-data"
    assert (sealed.key_id, sealed.key_version, sealed.backend) == ("default", "0a1b2c3d", "age")


def test_wrong_context_is_decrypt_failed(kms: Client) -> None:
    sealed = kms.encrypt(b"secret-data", context="env=prod")

    with pytest.raises(errors.DecryptFailed):
        kms.decrypt(sealed.ciphertext, context="env=dev")


def test_data_key_with_and_without_plaintext(kms: Client) -> None:
    assert len(bytes(kms.generate_data_key("AES_128").plaintext or b"")) == 16
    assert not kms.generate_data_key(without_plaintext=True).plaintext


def test_refused_data_keys(kms: Client, server: ContractServer) -> None:
    server.faults.data_keys = False

    with pytest.raises(errors.DataKeysUnsupported):
        kms.generate_data_key()


def test_rewrap_changes_the_context(kms: Client) -> None:
    sealed = kms.encrypt(b"x", context="env=dev")

    moved = kms.rewrap(sealed.ciphertext, context="env=dev", new_context="env=prod")

    assert kms.decrypt(moved.ciphertext, context="env=prod").plaintext == b"x"


def test_batch_keeps_refusals_in_place(kms: Client) -> None:
    good = wire.BatchItem(ciphertext=kms.encrypt(b"x").ciphertext)

    answer = kms.batch("decrypt", [good, wire.BatchItem(ciphertext=b"junk")])

    assert answer.failed == 1
    assert answer.results[0].plaintext == b"x"
    assert answer.results[1].error == wire.ErrorCode(code="not_a_ciphertext")


def test_unhealthy_is_an_answer(kms: Client, server: ContractServer) -> None:
    assert kms.health().status == "healthy"

    server.faults.unhealthy = True

    assert kms.health().status == "unhealthy"


def test_status_and_keys(kms: Client) -> None:
    assert kms.status().operations.by["encrypt"].ok == 2
    assert [key.current_version for key in kms.keys().keys if key.default] == ["0a1b2c3d"]


def test_token_file_is_read_for_each_request(
    connect: Connect, server: ContractServer, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("old\n")
    kms = connect(token_file=file)
    server.faults.token = "new"

    with pytest.raises(errors.Unauthenticated):
        kms.status()
    file.write_text("new\n")

    assert kms.status().version == "0.1.0"


def test_unreadable_token_file_is_a_configuration_error(connect: Connect, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="token file"):
        connect(token_file=tmp_path / "absent").status()


@pytest.mark.parametrize("url", ["localhost:8082", "ftp://h", "http://", "http://a:b@h", "http://h:x"])
def test_wrong_address_is_refused(url: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        Client(url)


# -- retries -----------------------------------------------------------------------------------------


def test_busy_service_is_asked_again(kms: Client, server: ContractServer) -> None:
    server.faults.busy = 2

    assert kms.status().version == "0.1.0"
    assert len(server.seen) == 3


@pytest.mark.parametrize("retry_after", [None, "3600"], ids=["unsaid", "too long"])
def test_no_retry_without_a_short_retry_after(
    kms: Client, server: ContractServer, retry_after: str | None
) -> None:
    server.faults.busy, server.faults.retry_after = 1, retry_after

    with pytest.raises(errors.JobsUnavailable) as caught:
        kms.status()

    assert caught.value.retry_after_s == float(retry_after or 5)
    assert len(server.seen) == 1


def test_retries_are_bounded(kms: Client, server: ContractServer) -> None:
    server.faults.dropped = 9

    with pytest.raises(ServiceUnreachable):
        kms.status()

    assert len(server.seen) == 3


def test_nothing_listening_says_how_to_start_it(connect: Connect) -> None:
    with pytest.raises(ServiceUnreachable) as caught:
        connect("http://127.0.0.1:9", retries=0).status()

    assert "kms up" in caught.value.hint
    assert caught.value.exit_code == 69


def test_another_server_is_recognised(kms: Client, server: ContractServer) -> None:
    server.faults.foreign_answer = True

    with pytest.raises(UnexpectedAnswer):
        kms.status()


# -- jobs --------------------------------------------------------------------------------------------


def bulk_job() -> wire.JobIn:
    return wire.JobIn(kind="encrypt", items=[wire.JobItem(plaintext=b"a"), wire.JobItem(plaintext=b"b")])


def test_submit_repeats_one_idempotency_key(kms: Client, server: ContractServer) -> None:
    server.faults.dropped = 1

    accepted = kms.submit(bulk_job())

    keys = {headers["idempotency-key"] for headers in requests(server, "/jobs")}
    assert (len(server.seen), len(keys)) == (2, 1)
    assert uuid.UUID(keys.pop()).version == 4
    assert accepted.links.self_.endswith(accepted.job_id)


def test_two_submits_have_two_idempotency_keys(kms: Client) -> None:
    assert kms.submit(bulk_job()).job_id != kms.submit(bulk_job()).job_id


@pytest.mark.parametrize("way", ["events", "polling", "broken events"])
def test_wait_sees_the_end(kms: Client, server: ContractServer, way: str) -> None:
    server.faults.events = way != "polling"
    server.faults.broken_events = 2 if way == "broken events" else 0
    seen: list[str] = []

    job = kms.wait(kms.submit(bulk_job()).job_id, progress=lambda job: seen.append(job.state))

    assert job.state == "succeeded"
    assert seen[-1] == "succeeded"
    assert len(set(seen)) > 1


def test_wait_outlives_a_restart(kms: Client, server: ContractServer) -> None:
    job_id = kms.submit(bulk_job()).job_id
    server.faults.busy, server.faults.dropped = 2, 2

    assert kms.wait(job_id).state == "succeeded"


def test_wait_has_an_end(kms: Client, server: ContractServer) -> None:
    server.faults.steps_s = 100

    with pytest.raises(errors.JobNotFinished):
        kms.wait(kms.submit(bulk_job()).job_id, timeout_s=0.3)


def test_wait_for_an_unknown_job(kms: Client) -> None:
    with pytest.raises(errors.UnknownJob):
        kms.wait("no-such-job")


def test_jobs_are_listed_by_page(kms: Client) -> None:
    for _ in range(3):
        kms.submit(bulk_job())

    first = kms.jobs(limit=2)

    assert len(first.jobs) == 2
    assert len(kms.jobs(limit=2, cursor=first.next).jobs) == 1
    assert kms.jobs(state="cancelled").jobs == []


def test_cancel(kms: Client, server: ContractServer) -> None:
    server.faults.steps_s = 100

    assert kms.cancel(kms.submit(bulk_job()).job_id).state == "cancelled"


def test_bulk_results_come_item_by_item(kms: Client) -> None:
    job_id = kms.submit(bulk_job()).job_id
    kms.wait(job_id)

    items = list(kms.items(job_id))

    assert [item.index for item in items] == [0, 1]
    assert kms.decrypt(bytes(items[1].ciphertext or b"")).plaintext == b"b"


def test_result_before_the_end(kms: Client, server: ContractServer) -> None:
    server.faults.steps_s = 100

    with pytest.raises(errors.JobNotFinished):
        list(kms.result(kms.submit(bulk_job()).job_id))


def test_odd_job_ids_stay_in_their_place(kms: Client, server: ContractServer) -> None:
    with pytest.raises(errors.UnknownJob):
        kms.job("../status?x")

    assert server.seen[-1].path.endswith("/jobs/..%2Fstatus%3Fx")


# -- streams -----------------------------------------------------------------------------------------


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
    assert requests(server, "/files/encrypt")[0]["content-length"] == str(len(plaintext))


def test_pipe_is_sent_without_a_length(kms: Client, server: ContractServer) -> None:
    source = cast("BinaryIO", io.BufferedReader(Pipe(b"x" * 3 * MIB)))
    job_id = finished(kms, kms.upload_encrypt(source, key_id="default"))

    headers = requests(server, "/files/encrypt")[0]
    assert (headers["transfer-encoding"], headers["x-kms-key-id"]) == ("chunked", "default")
    assert server.open(fetched(kms, job_id), None) == b"x" * 3 * MIB


def test_file_is_sent_again_from_where_it_stood(kms: Client, server: ContractServer) -> None:
    server.faults.dropped = 1
    source = io.BytesIO(b"head" + b"x" * MIB)
    source.seek(4)

    kms.upload_encrypt(source)

    keys = {headers["idempotency-key"] for headers in requests(server, "/files/encrypt")}
    assert len(keys) == 1
    assert [len(seen.body) for seen in server.seen] == [MIB, MIB]


def test_pipe_is_not_sent_twice(kms: Client, server: ContractServer) -> None:
    server.faults.dropped = 1

    with pytest.raises(ServiceUnreachable):
        kms.upload_encrypt(cast("BinaryIO", io.BufferedReader(Pipe(b"x"))))

    assert len(server.seen) == 1


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

    asked = requests(server, "/result", "GET")
    assert ["range" in headers for headers in asked] == [False, True, True, True]
    assert asked[1]["if-range"].startswith('"')


def test_result_that_changed_is_taken_anew(kms: Client, server: ContractServer) -> None:
    job_id = finished(kms, kms.upload_encrypt(io.BytesIO(b"x" * MIB)))
    server.faults.cuts, server.faults.changes = 1, True

    assert fetched(kms, job_id) == server.jobs[job_id].body


def test_download_gives_up_without_headway(kms: Client, server: ContractServer) -> None:
    job_id = finished(kms, kms.upload_encrypt(io.BytesIO(b"x")))
    server.faults.dropped = 99

    with pytest.raises(ServiceUnreachable):
        kms.download(job_id, io.BytesIO())

    assert server.faults.dropped > 90


# -- the parts ---------------------------------------------------------------------------------------


def test_events_in_any_pieces() -> None:
    text = b": hi\r\nid: 4\r\nevent: running\r\ndata: {\r\ndata: }\r\n\r\ndata: x\n\n\nevent: unfinished\n"
    expected = [Event("running", "{\n}"), Event("message", "x")]

    for size in range(1, len(text)):
        parser = EventParser()
        pieces = [text[at : at + size] for at in range(0, len(text), size)]

        assert [event for piece in pieces for event in parser.feed(piece)] == expected
        assert parser.last_id == "4"


def test_endless_line_is_not_kept() -> None:
    parser = EventParser()

    with pytest.raises(UnexpectedAnswer):
        list(parser.feed(b"x" * (MIB + 1)))


def test_sync_client_works_inside_an_event_loop(server: ContractServer) -> None:
    async def inside() -> str:
        with Client(server.url) as kms:
            return kms.status().version

    assert anyio.run(inside) == "0.1.0"


def test_abandoned_result_gives_its_connection_back(server: ContractServer) -> None:
    with Client(server.url) as kms:
        job_id = finished(kms, kms.upload_encrypt(io.BytesIO(b"x" * MIB)))
        with closing(cast("Any", kms.result(job_id))) as chunks:
            next(chunks)

        assert kms.status().version == "0.1.0"


def test_secrets_are_not_shown(server: ContractServer) -> None:
    call = calls.encrypt(b"plain", "env=prod", None)
    settings = ClientSettings.of(server.url, {"token": "tok-123"})

    assert "cGxhaW4" not in repr(call)
    assert "tok-123" not in repr(settings)
    assert Context.parse("env=prod").keys == ("env",)


def test_whatever_httpx_raises_becomes_ours() -> None:
    def leaves(top: type[Exception]) -> Iterator[type[Exception]]:
        yield top
        for child in top.__subclasses__():
            yield from leaves(child)

    for kind in leaves(httpx.TransportError):
        with pytest.raises(KmsError), transport_errors("http://h"):
            raise kind("x")
