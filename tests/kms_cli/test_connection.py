"""What the command prints at a terminal before a further attempt of a call."""

from pathlib import Path

import pytest

from kms_protocol.errors import BackendUnavailable
from support.cli.at_terminal import at_terminal
from support.cli.fixtures import environment
from support.contract_server import ContractServer


@pytest.mark.parametrize(("words", "says"), [("", True), (" 2>&1 | cat", False), (" --json", False)])
def test_a_further_attempt_is_announced_at_a_terminal_only(
    stand_in: ContractServer, tmp_path: Path, words: str, *, says: bool
) -> None:
    stand_in.faults.busy, stand_in.faults.busy_with = 9, BackendUnavailable
    stand_in.faults.retry_after = "1"
    env = environment(tmp_path, KMS_SERVICE_URL=stand_in.url)
    _, shown = at_terminal(f"printf x | kms encrypt{words}", tmp_path, env)

    first = "kms: the key backend is not available: next try in 1 s (attempts left: 1)\n"
    assert shown.startswith(first) == says
    assert shown.count("next try") == says
    assert len(stand_in.headers_to("/encrypt")) == 2
