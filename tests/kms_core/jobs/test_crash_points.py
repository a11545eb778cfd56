"""A worker, or the process that submits, dies at each of its effects; the job runs once all the same.

Equal to the undisturbed run are: the state and the counts of the job, its content, the keys of Redis, the
files of the result, and that nothing is left in the end. What may differ is the number of attempts, as
``events_law`` and ``audit_law`` say, and files of an attempt that did not end the job: these go with the
result.
"""

import re
from base64 import b64decode
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest

from kms_core.container import Core, build_intake
from kms_core.jobs import bulk_lines
from kms_core.jobs.execution import one_file
from kms_core.jobs.submission import celery_intake
from kms_protocol import wire
from kms_protocol.errors import JobsUnavailable
from support import core_jobs
from support.celery_messages import body, seal
from support.core_jobs import CONTEXT, WHO, lines, now, result
from support.crash_points import (
    Cut,
    Install,
    Kinds,
    audit_problems,
    audited,
    cut_off,
    cuts,
    differences,
    drain,
    files,
    forget_all,
    go_on,
    installed,
    keys,
    located,
    spool_folders,
    told,
)
from support.effects import Process
from support.embedded_valkey import unrestricted
from support.job_options import job_options
from support.job_stores import uploaded
from support.service import b64

DATA: Final = b"a small file" * 100
LOCK_S: Final = 121  # a message is in the hands of one worker for so long
HISTORY: Final = re.compile(
    r"queued( running( committing)? queued)*( running)?( committing)? (succeeded|failed)"
)
DEATHS: Final[Kinds] = (
    ("before", "none"),
    ("after", "two"),
    ("power", "late"),
    ("pause", "none"),
    ("twice", "none"),
)
"""Before an effect is after the one before: what is left there is found by one process, and by two."""


@dataclass(frozen=True)
class JobKind:
    """How a job is submitted, under an Idempotency-Key or none, and its content, opened.

    ``records`` are those of an attempt: an item whose context is none has no record. ``prepare`` writes
    what the job needs.
    """

    submit: Callable[[Install, Core, str], str]
    content: Callable[[Install, Core, str], object]
    operation: wire.JobKind = "encrypt"
    records: int = 1
    settings: str = ""
    run_items: int = 500
    prepare: Callable[[Install], object] = lambda _: None
    is_message: bool = False


def opened(core: Core, ciphertext: bytes) -> bytes:
    return core.kms.decrypt(WHO, ciphertext, CONTEXT).plaintext


def three_items(_: Install, core: Core, key: str) -> str:
    contexts = (None, "no equals sign", None)
    items = (wire.JobItem(plaintext=b"%d" % at, context=context) for at, context in enumerate(contexts))
    return core.submitter.items(job_options(WHO, "encrypt", CONTEXT, idempotency=key), items).job_id


def item_contents(_: Install, core: Core, job_id: str) -> object:
    return [
        line["error"]["code"] if line.get("error") else opened(core, b64decode(line["ciphertext"]))
        for line in lines(core, job_id)
    ]


def upload(_: Install, core: Core, key: str) -> str:
    return uploaded(core, job_options(WHO, "encrypt", CONTEXT, idempotency=key), DATA)


def upload_content(_: Install, core: Core, job_id: str) -> object:
    return opened(core, result(core, job_id))


def seal_upload(install: Install) -> None:
    ciphertext = install.own.kms.encrypt(WHO, DATA, CONTEXT).ciphertext
    (install.service.files / "sealed").write_bytes(ciphertext)


def sealed_upload(install: Install, core: Core, key: str) -> str:
    sealed = (install.service.files / "sealed").read_bytes()
    return uploaded(core, job_options(WHO, "decrypt", CONTEXT, idempotency=key), sealed)


def plain_content(_: Install, core: Core, job_id: str) -> object:
    return result(core, job_id)


def write_source(install: Install) -> None:
    (install.service.files / "in").write_bytes(DATA)


def write_both(install: Install) -> None:
    write_source(install)
    (install.service.files / "out").write_bytes(b"old")


def file(install: Install, core: Core, key: str) -> str:
    root = install.service.files
    overwrite = (root / "out").exists()
    return core_jobs.submit(core, "encrypt", root / "in", root / "out", overwrite=overwrite, idempotency=key)


def write_message(install: Install) -> None:
    recipient = str(celery_intake.recipient(install.settings.kms.jobs.intake_identity_path))
    contexts = (None, "no equals sign", None)
    items = [{"plaintext": b64(b"%d" % at), "context": context} for at, context in enumerate(contexts)]
    job = {"kind": "encrypt", "context": dict(CONTEXT.pairs), "items": items}
    (install.service.files / "message").write_text(seal(recipient, body(job)))


def message(install: Install, core: Core, _: str) -> str:
    intake = build_intake(install.settings, core.submitter)
    assert intake
    return intake.accept((install.service.files / "message").read_text(), install.worker_name())


def file_contents(install: Install, core: Core, _: str) -> object:
    return {
        each.name: opened(core, each.read_bytes()) if each.name == "out" else each.read_bytes()
        for each in install.service.files.iterdir()
    }


SUBMISSIONS: Final = (*("items", "items in files", "upload", "message", "message in a file", "file"),)
IN_FILES: Final = "[kms.jobs]\ninline_bytes = 0\n"
ITEMS: Final = JobKind(three_items, item_contents, records=2)
MESSAGE: Final = replace(ITEMS, submit=message, prepare=write_message, is_message=True)
KINDS: Final = {
    "items": ITEMS,
    "items in files": replace(ITEMS, settings=IN_FILES),
    "items in parts": replace(ITEMS, settings=IN_FILES, run_items=2),
    "upload": JobKind(upload, upload_content),
    "upload in a file": JobKind(upload, upload_content, settings=IN_FILES),
    "upload to be opened": JobKind(
        sealed_upload, plain_content, "decrypt", settings=IN_FILES, prepare=seal_upload
    ),
    "message": MESSAGE,
    "message in a file": replace(MESSAGE, settings=IN_FILES),
    "file": JobKind(file, file_contents, prepare=write_source),
    "file that is replaced": JobKind(file, file_contents, prepare=write_both),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with unrestricted(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture(params=[name for name in KINDS if "message" not in name])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> JobKind:
    found = KINDS[request.param]
    for module in (bulk_lines, one_file):
        monkeypatch.setattr(module, "RUN_ITEMS", found.run_items)
    return found


@pytest.fixture
def install(kind: JobKind, server: str, tmp_path: Path) -> Iterator[Install]:
    made = Install(tmp_path, server, kind.settings)
    with installed(made):
        yield made


def observed(
    install: Install, kind: JobKind, job_id: str, submissions: Collection[int] = (1,)
) -> dict[str, Any]:
    """What is the same after each play of a job, once it has ended."""
    records = [each for each in audited(install) if each.get("job_id") == job_id]
    core = install.own
    job = now(core, job_id)
    seen: dict[str, Any] = {
        "state": (job.state, job.error),
        "counts": (job.items, job.items_done, job.items_failed, job.bytes_done, job.parts, job.parts_left),
        "content": kind.content(install, core, job_id),
        "keys": keys(install),
        "events": events_law(told(install)[job_id], job.attempt),
        "audit": audit_law(kind, records, submissions),
    }
    forget_all(install, lambda: seen.update(files=result_files(install, job_id)))
    install.end()
    in_the_end = {"keys in the end": keys(install), "files in the end": files(install)}
    return seen | in_the_end | {"log": audit_problems(install)}


def events_law(states: list[str], attempts: int) -> str:
    """Each attempt is reported once, and there is one end."""
    is_so = HISTORY.fullmatch(" ".join(states)) and states.count("running") == attempts
    return "" if is_so else f"{states} in {attempts} attempts"


def audit_law(kind: JobKind, records: list[dict[str, Any]], submissions: Collection[int]) -> str:
    """An attempt has a record of each item, or none; of two attempts, one at least has them.

    Each effect that was begun has an outcome: there is one commit, whoever finishes it.
    """
    made = [each["result"] for each in records if each["operation"] == kind.operation]
    is_so = kind.records <= len(made) <= 2 * kind.records and set(made) == {"ok"}
    is_so = is_so and sum(each["operation"] == "job.submit" for each in records) in submissions
    begun = {each["effect"] for each in records if each.get("stage") == "intent"}
    done = {each["effect"] for each in records if each.get("stage") == "outcome"}
    is_so = is_so and begun == done and len(done) <= 1
    return (
        "" if is_so else f"{[(each['operation'], each.get('result')) for each in records]}, {begun}, {done}"
    )


def result_files(install: Install, job_id: str) -> dict[str, int]:
    """The files of the result. The attempt that did not end the job may have left its own beside each."""
    return {name: max(1, count - 1) for name, count in files(install, job_id).items()}


# -- the worker --------------------------------------------------------------------------------------------


def play(install: Install, kind: JobKind, cut: Cut) -> tuple[Process, dict[str, Any]]:
    """Submit a job, have a worker run it until it is cut, and others go on."""
    install.begin()
    kind.prepare(install)
    job_id = kind.submit(install, install.core("api"), "")
    name = install.worker_name()
    process = cut_off(install, cut, lambda core: drain(core.worker_context, name), "worker")
    go_on(install, cut.wake_ups)
    return process, observed(install, kind, job_id)


def test_a_job_runs_once_whichever_effect_its_worker_dies_at(
    install: Install, kind: JobKind, record_property: Callable[[str, object], None]
) -> None:
    whole, expected = play(install, kind, Cut())
    assert {"claim", "finish"} <= {point.effect for point in whole.points}
    assert whole.missed == []
    assert expected["events"] == expected["audit"] == ""
    assert expected["log"] == []
    assert not expected["files in the end"]

    wrong = []
    for cut in cuts(whole.points, DEATHS):
        at = f"{cut.moment} {whole.points[cut.at or 0]}, {cut.wake_ups}"
        with located(at):
            process, seen = play(install, kind, cut)
            assert process.points[: cut.at] == whole.points[: cut.at]
        wrong += [f"{at}: {each}" for each in differences(seen, expected)]
    record_property("crash_points", len(whole.points))
    assert not wrong, "\n".join(wrong)


# -- the process that submits ------------------------------------------------------------------------------


def submission(
    install: Install, kind: JobKind, cut: Cut, *, is_repeated: bool
) -> tuple[Process, dict[str, Any] | None]:
    """Submit a job by a process that is cut, perhaps again under the same key, and have it run.

    The job as it is observed; None if there is none, and then there is nothing of it. While the process
    stands still, for less than the term of a lock, another one submits the same job.
    """
    install.begin()
    kind.prepare(install)
    answers: list[str] = []

    def submit(core: Core) -> None:
        with suppress(JobsUnavailable):  # another process has the message in hand: it comes again
            answers.append(kind.submit(install, core, "key"))

    process = cut_off(install, cut, submit, "api", lambda: submit(install.core("api")))
    if not process.is_dead:
        assert spool_folders(install) <= set(jobs(install))
    stored = jobs(install)
    assert len(stored) <= 1
    assert stored[:1] == answers[:1] or process.is_dead, "what was acknowledged is stored"
    if is_repeated:
        install.advance(LOCK_S)
        submit(install.core("api"))
    assert set(answers) <= set(jobs(install))
    assert len(jobs(install)) <= 1
    assert jobs(install) == stored or not stored
    go_on(install)
    if not (found := jobs(install)):
        forget_all(install)
        install.end()
        rest = (keys(install).keys() - {"kms:install"}, files(install), audit_problems(install))
        assert not any(rest), rest
        return process, None
    # a message that is taken again leaves no record; another call does
    least = int(not process.is_dead) if kind.is_message else len(answers)
    return process, observed(install, kind, found[0], range(least, 4))


def jobs(install: Install) -> list[str]:
    """All jobs that a caller sees."""
    return [raw.decode() for raw in install.redis.zrange("kms:tenant:default", 0, -1)]


@pytest.mark.parametrize("kind", SUBMISSIONS, indirect=True)
@pytest.mark.parametrize("is_repeated", [False, True])
def test_a_job_is_submitted_once_or_not_at_all(
    install: Install,
    kind: JobKind,
    record_property: Callable[[str, object], None],
    *,
    is_repeated: bool,
) -> None:
    """Whichever effect the process dies at. With the same Idempotency-Key there is one job in the end."""
    whole, expected = submission(install, kind, Cut(), is_repeated=is_repeated)
    assert whole.missed == []
    assert expected
    assert expected["events"] == expected["audit"] == ""
    stored = [point.effect for point in whole.points].index("submit")

    wrong = []
    for cut in cuts(whole.points, [("after", "none")] if is_repeated else DEATHS):
        at = f"{cut.moment} {whole.points[cut.at or 0]}"
        with located(at):
            _, seen = submission(install, kind, cut, is_repeated=is_repeated)
        if seen is None:
            wrong += [f"{at}: lost"] * (is_repeated or (cut.at or 0) > stored)
        else:
            wrong += [f"{at}: {each}" for each in differences(seen, expected)]
    record_property("crash_points", len(whole.points))
    assert not wrong, "\n".join(wrong)
