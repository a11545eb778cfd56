"""Anchors that settings name, from outside: command, doctor, status and metrics tell of an older log."""

import json
import os
import pwd
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kms_core.audit.keys import Concealer, Signer
from kms_core.audit.log import AuditLog
from support.audit_logs import AuditFolder, hours_ago, record
from support.service import Service
from support.waiting import until

NO_REDIS: Final = "unix:///nonexistent.sock"
EAGER: Final = "[kms.audit]\ncheckpoint_s = 1\n"


def verified(service: Service, *args: str) -> tuple[int, dict[str, Any]]:
    done = service.run_kms("audit", "verify", "--json", *args)
    return done.returncode, json.loads(done.stdout)


def doctor(service: Service) -> tuple[str, str]:
    """Level and text of what the doctor says of the log."""
    lines = [json.loads(line) for line in service.run_kms("doctor", "--json").stdout.splitlines()]
    (found,) = [line for line in lines if line["subject"] == "audit log"]
    return found["level"], found["text"]


def run_once(service: Service, plaintext: bytes) -> None:
    """A process that records an operation and closes its chain."""
    service.start("api")
    service.encrypt(plaintext)
    service.stop("api")


class Copy:
    def __init__(self, service: Service) -> None:
        self._folder, self._at = service.state / "audit", service.state.parent / "copy"
        shutil.copytree(self._folder, self._at)

    def put_back(self) -> None:
        shutil.rmtree(self._folder)
        shutil.copytree(self._at, self._folder)


def older_copy(service: Service) -> Copy:
    """A copy of a log that has gone on since."""
    run_once(service, b"old")
    made = Copy(service)
    run_once(service, b"new")
    return made


@pytest.fixture(params=["redis", "directory"])
def own(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> Iterator[Service]:
    """A service with anchors in one place, whose log may be hurt."""
    text = EAGER
    if request.param == "directory":
        text += f'anchor_redis = false\nanchor_dir = "{tmp_path}/second"\n'
    with Service(tmp_path, text, redis=redis_url) as running:
        yield running


def test_a_log_put_back_while_nothing_runs_is_found_by_all(own: Service) -> None:
    older = older_copy(own)
    assert verified(own)[1]["verdict"] == "intact"
    assert doctor(own)[0] == "ok"
    older.put_back()

    code, report = verified(own)
    assert (code, report["verdict"]) == (65, "damaged")
    assert [problem["code"] for problem in report["problems"]] == ["missing_chain"]
    assert "kms audit acknowledge-loss" in own.run_kms("audit", "verify").stderr
    level, text = doctor(own)
    assert (level, "missing_chain" in text) == ("FAIL", True)
    assert verified(own, "--no-anchors")[0] == 0, "without anchors nothing tells"

    own.start("api")
    until(lambda: "audit_anchors" in own.degraded, "the service says so")
    assert place_is(own, own.port, 0.0)
    assert "audit.anchor_ahead" in own.output("api")
    assert "KmsAuditOlderThanAnchors" in own.http.get("/ui").text
    assert own.http.get("/readyz").status_code == 200, "it still takes records"


def test_a_log_that_is_too_young_to_be_compared_is_not_called_compared(
    tmp_path: Path, redis_url: str
) -> None:
    with Service(tmp_path, redis=redis_url) as own:
        command_log(own).append(record())
        level, text = doctor(own)
        assert (level, "nothing was compared with anchors yet" in text) == ("ok", True)
        own.start("api")
        until(lambda: "it has all lines that the anchors" in doctor(own)[1], "the first anchor")


def test_a_log_put_back_while_the_service_runs_is_found(own: Service) -> None:
    older = older_copy(own)
    own.start("api")
    own.encrypt(b"more")
    assert "audit_anchors" not in own.degraded
    older.put_back()

    until(lambda: "audit_anchors" in own.degraded, "the service says so")


def test_a_worker_tells_too(own: Service) -> None:
    older_copy(own).put_back()
    own.start("worker")

    until(lambda: place_is(own, own.port + 1, 0.0), "it says so")


def test_processes_that_nobody_calls_begin_their_chains_and_are_not_degraded(own: Service) -> None:
    """A command has recorded a change a day ago, when no place of anchors was there."""
    log = command_log(own, clock=hours_ago(24))
    log.append(record())
    log.close()
    own.start()

    roles = {"api", "cli", "worker"}
    until(lambda: {path.name.partition("-")[0] for path in log.folder.iterdir()} == roles, "chains of all")
    until(lambda: own.degraded == [], "its first anchors are compared")
    until(lambda: place_is(own, own.port + 1, 1.0), "the worker compared them")
    assert (verified(own)[0], doctor(own)[0]) == (0, "ok")


def command_log(own: Service, **clock: Callable[[], int]) -> AuditLog:
    """The log of a command that reaches no place of anchors."""
    log = own.settings.kms.audit
    return AuditLog(log, "cli", Concealer.at(log.key_path), Signer.at(log.signing_key_path), **clock)


def place_is(own: Service, port: int, value: float) -> bool:
    """Whether the metrics of the process on a port say this of the place that has the anchors."""
    place = "directory" if (own.state.parent / "second").exists() else "redis"
    text = own.http.get(f"http://127.0.0.1:{port}/metrics").text
    return f'kms_audit_ok{{what="{place}"}} {value}' in text


def test_a_loss_is_acknowledged_on_record(own: Service) -> None:
    older_copy(own).put_back()
    shown = own.run_kms("audit", "acknowledge-loss")
    assert (shown.returncode, "is missing" in shown.stdout) == (1, True)
    lost = shown.stdout.partition(":")[0]
    assert own.run_kms("audit", "acknowledge-loss", "worker-x").returncode == 65
    own.start("api")
    until(lambda: "audit_anchors" in own.degraded, "the service says so")

    done = own.run_kms("audit", "acknowledge-loss", "--all")
    assert (done.returncode, lost in done.stdout) == (0, True), done.stderr
    until(lambda: "audit_anchors" not in own.degraded, "the loss is known")
    code, report = verified(own)
    assert (code, report["verdict"]) == (0, "intact")
    assert "acknowledged" in [note["code"] for note in report["notes"]]
    lines = [
        line for line in AuditFolder(own.state).operations() if line["operation"] == "audit.acknowledge_loss"
    ]
    assert [line["stage"] for line in lines] == ["intent", "outcome"]
    assert {line["principal"] for line in lines} == {pwd.getpwuid(os.getuid()).pw_name}
    assert {line["effect"].partition(":")[0] for line in lines} == {lost}
    again = own.run_kms("audit", "acknowledge-loss", "--all")
    assert (again.returncode, "every line" in again.stderr) == (0, True)


def test_of_two_places_the_later_anchor_says_what_is_lost(tmp_path: Path, redis_url: str) -> None:
    """The directory took no anchor of the end of a chain."""
    with Service(tmp_path, f'{EAGER}anchor_dir = "{tmp_path}/second"\n', redis=redis_url) as own:
        run_once(own, b"old")
        older = Copy(own)
        own.start("api")
        own.encrypt(b"new")
        until(lambda: len(list((tmp_path / "second").iterdir())) > 1, "a checkpoint is anchored")
        own.stop("api")
        file = max((tmp_path / "second").iterdir())
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:1]))
        older.put_back()

        assert own.run_kms("audit", "acknowledge-loss", "--all").returncode == 0
        assert verified(own)[1]["verdict"] == "intact"
        (line,) = [each for each in AuditFolder(own.state).operations() if each.get("stage") == "intent"]
        last = json.loads(lines[-1])
        assert str(line["effect"]).startswith(f"{last['chain']}:{last['seq']}-0-")
        assert len(lines) > 1


def test_anchors_that_cannot_be_read_are_no_intact_log(tmp_path: Path) -> None:
    """Nothing is compared: the command says why, and does not end with 0."""
    with Service(tmp_path, EAGER, redis=NO_REDIS) as own:
        run_once(own, b"x")
        code, report = verified(own)
        assert (code, report["verdict"], report["problems"]) == (69, "not compared", [])
        assert report["not_compared"] == {"Redis": "Redis does not answer"}
        assert "not compared with the anchors in Redis" in own.run_kms("audit", "verify").stdout
        assert verified(own, "--no-anchors")[0] == 0
        assert doctor(own)[0] == "warn"
        refused = own.run_kms("audit", "acknowledge-loss", "--all")
        assert (refused.returncode, "loss is unknown" in refused.stderr) == (69, True)

        own.start("api")
        until(lambda: "audit_anchors_away" in own.degraded, "the service says so")
        assert 'kms_audit_ok{what="redis"} NaN' in own.http.get("/metrics").text
        assert "audit.anchors_away" in own.output("api")


def test_a_service_that_starts_without_its_anchors_compares_them_later(tmp_path: Path) -> None:
    text = f'{EAGER}anchor_redis = false\nanchor_dir = "{tmp_path}/second"\n'
    with Service(tmp_path, text, redis=NO_REDIS) as own:
        older_copy(own).put_back()
        (tmp_path / "second").rename(tmp_path / "unmounted")
        (tmp_path / "second").touch()
        own.start("api")
        until(lambda: "audit_anchors_away" in own.degraded, "it says that nothing is compared")
        (tmp_path / "second").unlink()
        (tmp_path / "unmounted").rename(tmp_path / "second")

        until(lambda: "audit_anchors" in own.degraded, "it compares")
        assert "audit_anchors_away" not in own.degraded


def test_the_embedded_server_of_kms_up_is_asked_where_settings_name_none(tmp_path: Path) -> None:
    with Service(tmp_path, EAGER) as own:
        older_copy(own).put_back()
        found = own.run_kms("audit", "verify", KMS_REDIS_URL="")
        assert (found.returncode, "missing_chain" in found.stdout) == (65, True), found.stdout

        own.valkey.stop()
        away = own.run_kms("audit", "verify", KMS_REDIS_URL="")
        assert away.returncode == 0
        assert "kms up does not run on this machine" in away.stderr
