"""How long each script of Redis takes where its work is largest: Redis does nothing else in that time."""

import tempfile
from pathlib import Path

from benchmarks import report

from support import script_bounds

_COLUMNS = ["script", "much of", "commands", "ms, least", "ms, most"]


def main() -> None:
    options = report.options("scripts", "Scripts of Redis where their work is largest.", runs=5, budget_s=0.0)
    rows = []
    with tempfile.TemporaryDirectory(prefix="kms-bench-") as name, script_bounds.server(Path(name)) as client:
        for bound in script_bounds.BOUNDS:
            found = [script_bounds.measured(client, bound) for _ in range(options.plan.runs)]
            took = [each.microseconds / 1000 for each in found]
            options.note("scripts", bound.name, {"ms": min(took)})
            shown = (f"{found[0].commands:,}", f"{min(took):.2f}", f"{max(took):.2f}")
            rows.append([f"`{bound.script}`", bound.much, *shown])
    explanation = (
        "Of SLOWLOG, on a Valkey that does nothing else; each run begins with an empty database, and none is "
        "dropped: the least counts. 0.00 is less than 0.1 ms. "
        f"There are {script_bounds.TENANTS:,} tenants, {script_bounds.WORKERS:,} workers and "
        f"{script_bounds.ROOTS} roots, which no caller makes. A tenant that waits for a full backend costs "
        "15 commands of the claim that finds it full, and 8 of the end that frees it. "
        "Commands: of the whole call for each run of the script, those within it too."
    )
    options.write(
        [report.grid(f"Scripts of Redis, least of {options.plan.runs} runs", _COLUMNS, rows), explanation]
    )


if __name__ == "__main__":
    main()
