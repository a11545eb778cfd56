"""A worker, or the process that submits, dies at each of its effects; the job runs once all the same."""

import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kms_core.jobs import bulk_lines
from kms_core.jobs.execution import one_file
from kms_core.service import Kms
from support.core_jobs import CONTEXT, WHO, lines, now, submit_items
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

BAD: Final = 1
COUNT: Final = 3
GOOD: Final = COUNT - 1
IN_REDIS, IN_SPOOL = "", "[kms.jobs]\ninline_bytes = 0\n"
HISTORY: Final = re.compile(r"queued( running queued)* running failed")
DEATHS: Final[Kinds] = (
    ("before", "none"),
    ("after", "none"),
    ("after", "two"),
    ("after", "late"),
    ("power", "none"),
    ("pause", "none"),
    ("pause", "two"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with unrestricted(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture(params=["small", "spooled", "parts"])
def install(
    request: pytest.FixtureRequest, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Install]:
    """Jobs whose items and results are in Redis, in files, or in files and cut into parts of two items."""
    if request.param == "parts":
        monkeypatch.setattr(bulk_lines, "RUN_ITEMS", 2)
        monkeypatch.setattr(one_file, "RUN_ITEMS", 2)
    made = Install(tmp_path, server, IN_REDIS if request.param == "small" else IN_SPOOL)
    with installed(made):
        yield made


def opened(kms: Kms, line: dict[str, Any]) -> bytes | None:
    if line.get("error"):
        return None
    return kms.decrypt(WHO, b64decode(line["ciphertext"]), CONTEXT).plaintext


def observed(install: Install, job_id: str) -> dict[str, Any]:
    """What is the same after each play of a job, once it has ended."""
    records = [each for each in audited(install) if each.get("job_id") == job_id]
    core = install.core("api")
    job, result = now(core, job_id), lines(core, job_id)
    seen = {
        "state": (job.state, job.error),
        "counts": (job.items, job.items_done, job.items_failed, job.bytes_done, job.parts, job.parts_left),
        "indexes": [line["index"] for line in result],
        "plaintexts": [opened(core.kms, line) for line in result],
        "keys": keys(install),
        "events": events_law(told(install)[job_id], job.attempt),
        "audit": audit_law(records, {line["file_id"] for line in result if "file_id" in line}),
    }
    forget_all(install, lambda: seen.update(files=result_files(install)))
    install.end()
    return seen | {
        "log": audit_problems(install),
        "keys in the end": keys(install),
        "files in the end": files(install),
    }


def events_law(states: list[str], attempts: int) -> str:
    """Each attempt is reported once, and there is one end."""
    is_so = HISTORY.fullmatch(" ".join(states)) and states.count("running") == attempts
    return "" if is_so else f"{states} in {attempts} attempts"


def audit_law(records: list[dict[str, Any]], result: set[str]) -> str:
    """One submission; each item of the result has one record, and no item has more than one of each attempt."""
    done = [each["file_id"] for each in records if each["operation"] == "encrypt" and each["result"] == "ok"]
    failed = sum(each["operation"] == "encrypt" and each["result"] != "ok" for each in records)
    is_so = result <= set(done) and len(done) == len(set(done)) and GOOD <= len(done) <= 2 * GOOD
    is_so = is_so and 1 <= failed <= 2 and sum(each["operation"] == "job.submit" for each in records) == 1
    return "" if is_so else f"{len(done)} and {failed} items, {records}"


def result_files(install: Install) -> dict[str, int]:
    """The files of the result. An attempt that did not end the job may have left its own beside them."""
    found = files(install)
    return {name: max(1, count - 1) for name, count in found.items()}


def play(install: Install, cut: Cut) -> tuple[Process, dict[str, Any]]:
    """Submit a job, have a worker run it until it is cut, and others go on."""
    install.begin()
    job_id = submit_items(install.core("api"), COUNT, {BAD})
    name = install.worker_name()
    process = cut_off(install, cut, lambda core: drain(core.worker_context, name), "worker")
    go_on(install, cut.wake_ups)
    return process, observed(install, job_id)


def test_a_job_runs_once_whichever_effect_its_worker_dies_at(
    install: Install, record_property: Callable[[str, object], None]
) -> None:
    whole, expected = play(install, Cut())
    assert whole.missed == []
    assert expected["state"] == ("failed", "items_failed")
    assert expected["plaintexts"] == [b"0", None, b"2"]
    assert expected["log"] == []

    wrong = []
    for cut in cuts(whole.points, DEATHS):
        process, seen = play(install, cut)
        assert process.points[cut.at] == whole.points[cut.at]
        wrong += [
            f"{cut.moment} {whole.points[cut.at]}, {cut.wake_ups}: {each}"
            for each in differences(seen, expected)
        ]
    record_property("crash_points", len(whole.points))
    assert wrong == []
