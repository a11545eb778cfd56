"""Counts the points at which a process may die, and writes the table of docs/proof.md (``scripts/proof``).

Each test of the enumeration records its points (``crash_points``) in the report of pytest; the id of the test
is the kind of job.
"""

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET  # nosec B405
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs/proof.md"
TESTS: Final = sorted(str(path) for path in (ROOT / "tests/kms_core/jobs").glob("test_crash_points*.py"))
BEGIN, END = "<!-- counts: scripts/proof writes them -->\n", "<!-- end of the counts -->\n"


def counted(report: ET.Element) -> Iterator[tuple[str, str, int]]:
    """The kind of a job, ``worker`` or ``submission``, and the number of points."""
    for case in report.iter("testcase"):
        name, _, kind = case.get("name", "").rstrip("]").partition("[")
        for found in case.iterfind("properties/property[@name='crash_points']"):
            role = "submission" if "submitted" in name else "worker"
            kind = re.sub("^(True|False)-", "", kind)
            where = "below roots: " if case.get("classname", "").endswith("of_trees") else ""
            yield where + kind, role, int(found.get("value", ""))


def table(report: ET.Element) -> str:
    """The points of each kind, by who dies. Raises KeyError for a kind that no worker runs."""
    points: dict[str, dict[str, int]] = {}
    for kind, role, count in counted(report):
        points.setdefault(kind, {})[role] = count
    rows = [
        f"| {kind} | {found.get('worker', '')} | {found.get('submission', '')} |\n"
        for kind, found in sorted(points.items())
    ]
    total = sum(sum(found.values()) for found in points.values())
    head = "| job | points of a worker | of a submission |\n|---|---|---|\n"
    place = f"{sys.platform} with Python {sys.version.split()[0]}"
    return f"{head}{''.join(rows)}\n{total} points in all, on {place}.\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *TESTS], cwd=ROOT, check=False
        )
        if done.returncode:
            return done.returncode
        text = PAGE.read_text("utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}{table(ET.parse(report).getroot())}{END}{after}", "utf-8")  # noqa: S314 # nosec B314
    return 0


if __name__ == "__main__":
    sys.exit(main())
