"""``kms status``: how full the spool is."""

import pytest

from kms_cli.commands import service
from kms_protocol.admin import SpoolOut


@pytest.mark.parametrize(
    ("used", "limit", "told"),
    [
        (1024, 4096, "25% full, 1.0 KiB used of 4.0 KiB"),
        (1024, None, "25% full, 1.0 KiB used"),
        (None, None, "25% full"),
    ],
)
def test_status_says_how_much_of_the_spool_is_used(used: int | None, limit: int | None, told: str) -> None:
    assert service._spool(SpoolOut(full=0.25, used_bytes=used, limit_bytes=limit)) == told  # noqa: SLF001 -- what the command prints
