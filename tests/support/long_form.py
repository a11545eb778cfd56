"""The long form of tests, by ``KMS_LONG=1``; CONTRIBUTING.md lists those that have one."""

import os
from typing import Final

IS_LONG: Final = os.environ.get("KMS_LONG", "") not in {"", "0"}
RUNS: Final = range(3 if IS_LONG else 1)
"""Parameters of a test that is run once, and three times in its long form."""
