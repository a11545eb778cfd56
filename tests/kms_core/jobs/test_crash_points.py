"""A worker, or the process that submits, dies at each of its effects; the job runs once all the same.

Equal to the undisturbed run are: the state and the counts of the job, its content, the keys of Redis, the files of
the result, and that nothing is left in the end. What may differ is the number of attempts, as ``events_law`` and
``audit_law`` say, and files of attempts that did not end the job, which go with the result.
"""

import re
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from kms_core.container import Core
from kms_core.jobs import bulk_lines
from kms_core.jobs.execution import one_file
from kms_protocol import wire
from support import core_jobs
from support.core_jobs import CONTEXT, WHO, lines, now, result, submit_items
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
    told,
)
from support.effects import Process
from support.embedded_valkey import unrestricted
from support.job_options import job_options
from support.job_stores import uploaded

DATA: Final = b"a small file" * 100
HISTORY: Final = re.compile(
    r"queued( running( committing)? queued)*( running)?( committing)? (succeeded|failed)"
)
DEATHS: Final[Kinds] = (
    ("before", "none"),
    ("after", "none"),
    ("after", "two"),
    ("after", "late"),
    ("power", "none"),
    ("pause", "none"),
    ("pause", "two"),
)


@dataclass(frozen=True)
class JobKind:
    """How a job is submitted, and what it has made, opened; the operations of an attempt, good and bad ones."""

    submit: Callable[[Install, Core], str]
    content: Callable[[Install, Core, str], object]
    operation: wire.JobKind = "encrypt"
    good: int = 1
    bad: int = 0
    settings: str = ""
    run_items: int = 500


def opened(core: Core, ciphertext: bytes) -> bytes:
    return core.kms.decrypt(WHO, ciphertext, CONTEXT).plaintext


def three_items(_: Install, core: Core) -> str:
    return submit_items(core, 3, {1})


def item_contents(_: Install, core: Core, job_id: str) -> object:
    return [
        (
            line["index"],
            line["error"]["code"] if line.get("error") else opened(core, b64decode(line["ciphertext"])),
        )
        for line in lines(core, job_id)
    ]


def upload(_: Install, core: Core) -> str:
    return uploaded(core, job_options(WHO, "encrypt", CONTEXT), DATA)


def sealed_upload(_: Install, core: Core) -> str:
    sealed = core.kms.encrypt(WHO, DATA, CONTEXT).ciphertext
    return uploaded(core, job_options(WHO, "decrypt", CONTEXT), sealed)


def upload_content(_: Install, core: Core, job_id: str) -> object:
    return opened(core, result(core, job_id))


def plain_content(_: Install, core: Core, job_id: str) -> object:
    return result(core, job_id)


def file(install: Install, core: Core) -> str:
    root = install.service.files
    (root / "in").write_bytes(DATA)
    return core_jobs.submit(core, "encrypt", root / "in", root / "out")


def replaced_file(install: Install, core: Core) -> str:
    root = install.service.files
    (root / "in").write_bytes(DATA)
    (root / "out").write_bytes(b"old")
    return core_jobs.submit(core, "encrypt", root / "in", root / "out", overwrite=True)


def file_contents(install: Install, core: Core, _: str) -> object:
    return {
        each.name: opened(core, each.read_bytes()) if each.name == "out" else each.read_bytes()
        for each in install.service.files.iterdir()
    }


IN_FILES: Final = "[kms.jobs]\ninline_bytes = 0\n"
KINDS: Final = {
    "items": JobKind(three_items, item_contents, good=2, bad=1),
    "items in files": JobKind(three_items, item_contents, good=2, bad=1, settings=IN_FILES),
    "items in parts": JobKind(three_items, item_contents, good=2, bad=1, settings=IN_FILES, run_items=2),
    "upload": JobKind(upload, upload_content),
    "upload in a file": JobKind(upload, upload_content, settings=IN_FILES),
    "upload to be opened": JobKind(sealed_upload, plain_content, "decrypt", settings=IN_FILES),
    "file": JobKind(file, file_contents),
    "file that is replaced": JobKind(replaced_file, file_contents),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with unrestricted(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture(params=KINDS)
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


def observed(install: Install, kind: JobKind, job_id: str) -> dict[str, Any]:
    """What is the same after each play of a job, once it has ended."""
    records = [each for each in audited(install) if each.get("job_id") == job_id]
    core = install.core("api")
    job = now(core, job_id)
    seen: dict[str, Any] = {
        "state": (job.state, job.error),
        "counts": (job.items, job.items_done, job.items_failed, job.bytes_done, job.parts, job.parts_left),
        "content": kind.content(install, core, job_id),
        "keys": keys(install),
        "events": events_law(told(install)[job_id], job.attempt),
        "audit": audit_law(kind, records),
    }
    forget_all(install, lambda: seen.update(files=result_files(install)))
    install.end()
    in_the_end = {"keys in the end": keys(install), "files in the end": files(install)}
    return seen | in_the_end | {"log": audit_problems(install)}


def events_law(states: list[str], attempts: int) -> str:
    """Each attempt is reported once, and there is one end."""
    is_so = HISTORY.fullmatch(" ".join(states)) and states.count("running") == attempts
    return "" if is_so else f"{states} in {attempts} attempts"


def audit_law(kind: JobKind, records: list[dict[str, Any]]) -> str:
    """One submission. An attempt has a record of each item, or none; of two attempts, one at least has them.

    Each effect that was begun has an outcome: it is one commit, whoever finishes that.
    """
    ends = Counter(each["result"] == "ok" for each in records if each["operation"] == kind.operation)
    is_so = kind.good <= ends[True] <= 2 * kind.good and kind.bad <= ends[False] <= 2 * kind.bad
    is_so = is_so and sum(each["operation"] == "job.submit" for each in records) == 1
    begun = {each["effect"] for each in records if each.get("stage") == "intent"}
    done = {each["effect"] for each in records if each.get("stage") == "outcome"}
    is_so = is_so and begun == done and len(done) <= 1
    return "" if is_so else f"{records}"


def result_files(install: Install) -> dict[str, int]:
    """The files of the result. The attempt that did not end the job may have left its own beside each."""
    return {name: max(1, count - 1) for name, count in files(install).items()}


def play(install: Install, kind: JobKind, cut: Cut) -> tuple[Process, dict[str, Any]]:
    """Submit a job, have a worker run it until it is cut, and others go on."""
    install.begin()
    job_id = kind.submit(install, install.core("api"))
    name = install.worker_name()
    process = cut_off(install, cut, lambda core: drain(core.worker_context, name), "worker")
    go_on(install, cut.wake_ups)
    return process, observed(install, kind, job_id)


def test_a_job_runs_once_whichever_effect_its_worker_dies_at(
    install: Install, kind: JobKind, record_property: Callable[[str, object], None]
) -> None:
    whole, expected = play(install, kind, Cut())
    assert whole.missed == []
    assert expected["events"] == expected["audit"] == ""
    assert expected["log"] == []
    assert not expected["files in the end"]

    wrong = []
    for cut in cuts(whole.points, DEATHS):
        process, seen = play(install, kind, cut)
        assert process.points[: cut.at] == whole.points[: cut.at]
        at = f"{cut.moment} {process.points[cut.at or 0]}, {cut.wake_ups}"
        wrong += [f"{at}: {each}" for each in differences(seen, expected)]
    record_property("crash_points", len(whole.points))
    assert wrong == []
