"""Who can write to the spool, and has no key and no Redis: each change ends with a coded error, none with
another document. A real API, and the worker's code over the same install, step by step."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import httpx2 as httpx
import pytest
from prometheus_client import REGISTRY

from kms_core.age import header, stream
from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.envelope import sealing
from kms_core.jobs.model import Job, part_id
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.wire import PREFIX
from support.core_jobs import run_after_lease_expiry, run_job
from support.embedded_valkey import EmbeddedValkey
from support.failing_store import run_until_killed
from support.job_options import job_options
from support.job_stores import forge, uploaded
from support.service import Service, b64, check_problem, core_of

MIB: Final = 1024 * 1024
MINE: Final = Principal("local")
THEIRS: Final = Principal("mallory", "theirs")
CONTEXT: Final = "env=prod"


@dataclass(frozen=True)
class Install:
    """An API process, and a core that does what a worker does when a test says so."""

    service: Service
    core: Core

    def folder(self, job_id: str) -> Path:
        return self.service.spool / job_id

    def run(self, job_id: str) -> Job:
        run_job(job_id, self.core.worker_context, "w")
        for number in range(self.core.worker_context.store.part(job_id).job.parts):
            run_job(part_id(job_id, number), self.core.worker_context, "w")
        return self.core.worker_context.store.part(job_id).job

    def check_refused(self, job_id: str) -> None:
        """Run a job: it is refused, and so is its result."""
        ended = self.run(job_id)
        assert (ended.state, ended.error) == ("failed", "record_refused")
        check_problem(self.download(job_id), 410, "record_refused")

    def download(self, job_id: str, **headers: str) -> httpx.Response:
        return self.service.get(f"/jobs/{job_id}/result", headers=headers)


@pytest.fixture(scope="module")
def install(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Iterator[Install]:
    url = valkey.files.url_of(next(database_numbers))
    with Service(tmp_path_factory.mktemp("attacked"), "[kms.jobs]\ninline_bytes = 0\n", url) as running:
        running.start("api")
        yield Install(running, core_of(running))


# -- jobs ----------------------------------------------------------------------------------------------


KINDS: Final = ("encrypt", "decrypt", "rewrap", "items", "parts")
LINES: Final = {"items": 2, "parts": 501}


def options(who: Principal, kind: str, **urls: Any) -> SubmissionOptions:  # noqa: ANN401 -- of ``JobIn``
    return job_options(who, cast("wire.JobKind", kind), CONTEXT, **urls)


def sealed(install: Install, who: Principal, document: bytes) -> bytes:
    return install.core.kms.encrypt(who, document, Context.parse(CONTEXT)).ciphertext


def job(install: Install, kind: str, document: bytes = b"mine", who: Principal = MINE) -> str:
    """The id of a job over an upload, or over so many lines that decrypts a document."""
    body = document if kind == "encrypt" else sealed(install, who, document)
    if kind not in LINES:
        return uploaded(install.core, options(who, kind), body)
    lines = [wire.JobItem(ciphertext=body)] * LINES[kind]
    return install.core.submitter.items(options(who, "decrypt"), lines).job_id


def done(install: Install, kind: str, document: bytes = b"mine", who: Principal = MINE) -> str:
    """The id of a job that has succeeded."""
    job_id = job(install, kind, document, who)
    assert install.run(job_id).state == "succeeded"
    return job_id


def tree(install: Install, document: bytes) -> str:
    """A job over the files of a folder of its own; its result tells of them by name."""
    root = install.service.files / uuid.uuid4().hex
    for number in range(2):
        (root / "in").mkdir(parents=True, exist_ok=True)
        (root / f"in/{document.decode()}-{number}").write_bytes(document)
    (root / "out").mkdir()
    asked = options(MINE, "encrypt", source=f"file://{root}/in/*", target=f"file://{root}/out/")
    return install.core.submitter.files(asked).job_id


# -- what is exchanged ---------------------------------------------------------------------------------


def blob(folder: Path, role: str) -> Path:
    """The file of a role: ``upload`` and ``items``, or a result, whose name ends with its attempt."""
    (found,) = [path for path in folder.iterdir() if path.name.partition(".")[0] == role]
    return found


def _copy(theirs: Path, mine: Path, roles: tuple[str, ...] = ("",)) -> None:
    """Copy the files of some roles, or all, in place of those of the same role."""
    for path in theirs.iterdir():
        if path.name.startswith(roles):
            role = path.name.partition(".")[0]
            shutil.copyfile(path, next(mine.glob(f"{role}.*"), mine / path.name))


RESULTS: Final = ("head", "result", "files")
EXCHANGES: Final = {"folders": ("",), "inputs": ("upload", "items"), "results": RESULTS}
Damage = Callable[[Path], None]


@pytest.mark.parametrize("who", [MINE, THEIRS], ids=["same-tenant", "other-tenant"])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_another_job_are_refused(install: Install, kind: str, who: Principal) -> None:
    job_id, other = job(install, kind), job(install, kind, b"other", who)
    _copy(install.folder(other), install.folder(job_id))

    ended = install.run(job_id)

    if ended.parts:  # its parts end so
        assert (ended.state, ended.error, ended.items_failed) == ("failed", "items_failed", 501)
        lines = install.download(job_id).text.splitlines()
        assert {json.loads(line)["error"]["code"] for line in lines} == {"record_refused"}
    else:
        install.check_refused(job_id)
    assert install.run(other).state == "succeeded"


@pytest.mark.parametrize("who", [MINE, THEIRS], ids=["same-tenant", "other-tenant"])
@pytest.mark.parametrize("exchanged", EXCHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_results_of_another_job_are_refused(
    install: Install, kind: str, exchanged: str, who: Principal
) -> None:
    job_id, other = done(install, kind), done(install, kind, b"other", who)
    _copy(install.folder(other), install.folder(job_id), EXCHANGES[exchanged])

    answer = install.download(job_id)

    if exchanged == "inputs" and kind in LINES:  # which have no inputs by then
        assert {json.loads(line)["plaintext"] for line in answer.text.splitlines()} == {b64(b"mine")}
    else:
        check_problem(answer, 410, "record_refused")


@pytest.mark.parametrize("kind", KINDS)
def test_result_of_a_job_that_is_told_as_failed_is_not_handed_out(install: Install, kind: str) -> None:
    """Without its signed end nothing says what was written."""
    job_id = done(install, kind)
    forge(install.core.worker_context.store, job_id, state="failed", error="decrypt_failed")

    check_problem(install.download(job_id), 410, "result_expired")


def test_listing_of_another_job_is_refused(install: Install) -> None:
    job_id, other = tree(install, b"mine"), tree(install, b"other")
    for one in (job_id, other):
        run_job(one, install.core.worker_context, "w")  # lists and cuts
    _copy(install.folder(other), install.folder(job_id), RESULTS)

    ended = install.run(job_id)

    assert (ended.state, ended.error) == ("failed", "items_failed")
    check_problem(install.download(job_id), 410, "record_refused")
    assert install.run(other).state == "succeeded"


def test_results_of_parts_are_not_exchanged(install: Install) -> None:
    job_id = done(install, "parts")
    first, second = (blob(install.folder(job_id), f"result{number}") for number in range(2))
    first.rename(first.with_suffix(".kept"))
    second.rename(first)
    first.with_suffix(".kept").rename(second)

    check_problem(install.download(job_id), 410, "record_refused")


def test_head_of_an_earlier_attempt_is_refused(install: Install) -> None:
    job_id = job(install, "encrypt")
    run_until_killed(install.core, job_id, "finish", after=False)
    run_after_lease_expiry(install.core, job_id)
    folder = install.folder(job_id)

    assert install.download(job_id).status_code == 200
    earlier, later = sorted(folder.glob("head.*"), key=lambda path: path.stat().st_mtime)
    shutil.copyfile(earlier, later)
    check_problem(install.download(job_id), 410, "record_refused")


@pytest.mark.parametrize("run_first", [True, False], ids=["its-result", "its-items"])
def test_an_earlier_life_of_a_job_id_is_refused(install: Install, tmp_path: Path, *, run_first: bool) -> None:
    core, job_id = install.core, str(uuid.uuid4())

    def live(document: bytes) -> None:
        named = replace(options(MINE, "decrypt"), job_id=job_id, digest=document * 8)
        core.submitter.items(named, [wire.JobItem(ciphertext=sealed(install, MINE, document))])

    live(b"past")
    if run_first:
        assert install.run(job_id).state == "succeeded"
    shutil.copytree(install.folder(job_id), tmp_path / "kept")
    core.worker_context.store.redis.delete(f"kms:job:{job_id}")  # as it goes when it has expired
    core.submitter.spool.delete(job_id)
    live(b"mine")
    if run_first:
        assert install.run(job_id).state == "succeeded"
    _copy(tmp_path / "kept", install.folder(job_id))

    if run_first:
        check_problem(install.download(job_id), 410, "record_refused")
    else:
        install.check_refused(job_id)


# -- what is damaged -----------------------------------------------------------------------------------


def _flip(at: int) -> Damage:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return change


def _link(path: Path) -> None:
    kept = path.with_name("kept")
    path.rename(kept)
    path.symlink_to(kept)


damages = pytest.mark.parametrize("damage", [_flip(30), _flip(-1), _link], ids=["head", "MAC", "link"])
"""Samples: test_spool_contract.py and test_spool_folder.py have all."""


@damages
@pytest.mark.parametrize("kind", ["encrypt", "decrypt", "items"])
def test_damaged_input_is_refused(install: Install, kind: str, damage: Damage) -> None:
    job_id = job(install, kind)
    damage(next(install.folder(job_id).iterdir()))

    install.check_refused(job_id)


@damages
@pytest.mark.parametrize("role", ["upload", "head", "result0"])
def test_damaged_result_is_refused(install: Install, role: str, damage: Damage) -> None:
    job_id = done(install, "items" if role == "result0" else "encrypt")
    damage(blob(install.folder(job_id), role))

    check_problem(install.download(job_id), 410, "record_refused")


@pytest.mark.parametrize("kind", ["encrypt", "decrypt", "rewrap"])
def test_damage_in_the_first_slab_is_answered_as_a_problem(install: Install, kind: str) -> None:
    job_id = done(install, kind, bytes(500_000))
    _flip(400_000)(install.folder(job_id) / "upload")

    check_problem(install.download(job_id), 410, "record_refused")


@pytest.mark.parametrize("has_run", [False, True], ids=["queued", "succeeded"])
def test_maker_of_a_file_cannot_exchange_it_afterwards(install: Install, *, has_run: bool) -> None:
    """He knows its file key, so that another payload of his opens as well: the seal around it tells."""
    ciphertext, key = sealed(install, MINE, b"mine!"), install.core.kms.keyring.default
    head = header.parse(ciphertext, header.FILE_LIMITS)
    context = Context.parse(CONTEXT)
    file_key = sealing.unwrap_file(head, key.backend, key.ref("default"), context=context).file_key
    other = stream.seal(stream.payload_key(file_key, head.nonce), b"other")
    job_id = uploaded(install.core, options(MINE, "decrypt"), ciphertext)
    if has_run:
        assert install.run(job_id).state == "succeeded"
    path = install.folder(job_id) / "upload"
    path.write_bytes(ciphertext[: head.payload_offset] + other)

    if has_run:
        check_problem(install.download(job_id), 410, "record_refused")
    else:
        install.check_refused(job_id)


@pytest.mark.parametrize("kind", ["encrypt", "decrypt"])
def test_damage_far_behind_breaks_the_download_off(install: Install, kind: str) -> None:
    """What came before it is genuine; who resumes the download is told why it ended."""
    job_id = done(install, kind, os.urandom(6 * MIB))
    whole = install.download(job_id).content
    path = install.folder(job_id) / "upload"
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), bytes(200_000), 5 * MIB)
    received = bytearray()

    with pytest.raises(httpx.RemoteProtocolError):
        _receive(install, job_id, received)

    assert len(received) < 5 * MIB + 5000  # the head of a result is longer than that of its upload
    assert whole.startswith(bytes(received))
    resumed = install.download(job_id, Range=f"bytes={5 * MIB + 5000}-")
    check_problem(resumed, 410, "record_refused")
    assert install.download(job_id, Range="bytes=0-99").content == whole[:100]


def _receive(install: Install, job_id: str, received: bytearray) -> None:
    with install.service.http.stream("GET", f"{PREFIX}/jobs/{job_id}/result") as answer:
        for piece in answer.iter_raw():
            received += piece


# -- how it is told ------------------------------------------------------------------------------------


def test_a_refused_input_is_told_once(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = job(install, "items")
    _flip(-1)(install.folder(job_id) / "items")
    counter = "kms_spool_blobs_refused_total", {"role": "items"}
    before = REGISTRY.get_sample_value(*counter) or 0
    capsys.readouterr()

    install.run(job_id)

    assert capsys.readouterr().out.count("spool.blob_refused") == 1
    assert REGISTRY.get_sample_value(*counter) == before + 1
    assert _audited(install, job_id)["result"] == "record_refused"
    assert [one.job_id for one in install.core.worker_context.store.dead("default", 100)].count(job_id) == 1


def test_a_refused_result_is_told_once(install: Install) -> None:
    job_id = done(install, "encrypt")
    _flip(-1)(blob(install.folder(job_id), "head"))

    check_problem(install.download(job_id), 410, "record_refused")

    told = [line for line in install.service.output("api").splitlines() if job_id in line]
    assert sum("spool.blob_refused" in line for line in told) == 1
    assert _audited(install, job_id)["result"] == "record_refused"


def test_a_dead_letter_whose_file_is_put_back_runs(install: Install) -> None:
    job_id = job(install, "decrypt")
    path = install.folder(job_id) / "upload"
    before = path.read_bytes()
    _flip(-1)(path)
    assert install.run(job_id).error == "record_refused"

    path.write_bytes(before)
    install.core.worker_context.store.retry(job_id, "default")

    assert install.run(job_id).state == "succeeded"
    assert install.download(job_id).content == b"mine"


def _audited(install: Install, job_id: str) -> dict[str, str]:
    """The last audit record of a job."""
    text = "".join(path.read_text() for path in (install.service.state / "audit").glob("*.jsonl"))
    found = [json.loads(line) for line in text.splitlines() if job_id in line]
    return max(found, key=lambda record: record["time"])
