"""``kms status``: how full the spool is, and versions of workers."""

import msgspec
import pytest

from kms_cli.commands import service
from kms_protocol import __version__
from kms_protocol.admin import SpoolOut, StatusOut
from support.openapi_check import example_of


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


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        ({__version__: 2}, "2"),
        ({__version__: 1, "0.2.9": 1}, f"2: 1 of 0.2.9, 1 of {__version__}"),
        ({"0.2.9": 2}, "2: 2 of 0.2.9"),
        (None, "2"),
    ],
)
def test_status_names_versions_of_workers_that_differ(versions: dict[str, int] | None, told: str) -> None:
    """None: of a service that does not say them."""
    status = msgspec.convert({**example_of(StatusOut), "worker_versions": versions}, StatusOut)

    assert service._jobs(status)["workers"] == told  # noqa: SLF001 -- what the command prints


def test_status_names_versions_of_apis_that_differ() -> None:
    own = example_of(StatusOut)["version"]
    status = msgspec.convert({**example_of(StatusOut), "api_versions": {own: 2, "0.2.9": 1}}, StatusOut)

    assert service._jobs(status)["APIs"] == f"3: 1 of 0.2.9, 2 of {own}"  # noqa: SLF001 -- as above
