"""In CI a test that is skipped fails, unless what it lacks cannot be had there: a pytest plugin.

At home a missing program skips. In CI it would hide that a law is no longer tested.
"""

import os
from collections.abc import Generator
from typing import Final

import pytest

ALLOWED: Final = (
    "no redis-server 7.2 on the PATH",  # Debian 12 brings 7.0; Debian 13 runs the test
    "COSMIAN_KMS_URL is not http://127.0.0.1:…, and only such a line can be cut",
    "cosmian-kms is not installed",  # which fails in CI by itself where there is a wheel
    "NOTHING IS FUZZED: atheris is not installed, or has no wheel for this Python or processor",  # likewise
    "terraform is not on the PATH, and no registry has it",
    "no core file is made here at all",  # a hard limit of the machine
    "needs a long /proc/crypto",  # the kernel's
    "this clone is shallow, or none: yesterday's version is not in its history",  # .ci/all runs in a full one
    "no image can be mounted here: it needs root, loop devices and mkfs",  # in a container
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure, in CI."""
    report = yield
    if not report.skipped or hasattr(report, "wasxfail") or not os.environ.get("CI"):
        return report
    reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
    if reason not in ALLOWED:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} would be skipped in CI: {reason}"
    return report
