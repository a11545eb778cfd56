"""On the path of what a benchmark starts: hides what tests brought into .venv and users do not have.

httpcore2 loads h2 and structlog loads rich wherever they find them: 60 ms of a start, and 10 MB of a process.
"""

import sys

for name in ("h2", "rich"):
    sys.modules[name] = None  # type: ignore[assignment]  # documented: importing it raises ModuleNotFoundError
