"""What the command prints at a terminal while a call takes long."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from kms_cli import waiting
from kms_protocol.errors import BackendUnavailable
from support.cli.at_terminal import at_terminal
from support.cli.fixtures import environment
from support.contract_server import ContractServer
from support.waiting import until


def test_an_answer_that_is_late_is_said_to_be_awaited(
    stand_in: ContractServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.01)
    stand_in.faults.held = Event()
    with ThreadPoolExecutor(1) as pool, waiting.client(stand_in.url, {}) as kms:
        answer = pool.submit(kms.status)
        what = f"kms: waiting for an answer of {stand_in.url}"
        until(lambda: what in capsys.readouterr().err, "it says what it waits for")
        stand_in.faults.held.set()

        assert answer.result().version == "0.1.0"
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("words", "says"), [("", True), (" 2>&1 | cat", False), (" --json", False)])
def test_a_further_attempt_is_announced_at_a_terminal_only(
    stand_in: ContractServer, tmp_path: Path, words: str, *, says: bool
) -> None:
    stand_in.faults.busy, stand_in.faults.busy_with = 9, BackendUnavailable
    stand_in.faults.retry_after = "1"
    env = environment(tmp_path, KMS_SERVICE_URL=stand_in.url)
    _, shown = at_terminal(f"printf x | kms encrypt{words}", tmp_path, env)

    first = "kms: the key backend is not available: trying again in 1 s (attempts left: 1)\n"
    assert shown.startswith(first) == says
    assert shown.count("trying again") == says
    assert len(stand_in.headers_to("/encrypt")) == 2
