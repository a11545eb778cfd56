"""The names in ``degraded``: one table for the service, `kms doctor`, the page, the runbooks and the docs."""

import re
from pathlib import Path
from typing import Final

from kms_api.ui.render import load_runbooks
from kms_core.observability.degraded import DEGRADED

PAGE: Final = Path(__file__).parents[3] / "docs/troubleshooting.md"


def test_docs_have_the_table() -> None:
    row = re.compile(r"^\| `(\w+)` \| (warn|FAIL) \| (.+) \| (.+) \| (Kms\w+) \|$", re.MULTILINE)

    assert row.findall(PAGE.read_text()) == [
        (name, each.level, each.text, each.then, each.alert) for name, each in DEGRADED.items()
    ]


def test_each_name_has_a_runbook() -> None:
    assert {each.alert for each in DEGRADED.values()} <= {each.alert for each in load_runbooks()}
