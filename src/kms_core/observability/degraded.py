"""The names in ``degraded`` of the status: what each means and what to do."""

from pathlib import Path
from typing import Final, Literal

import msgspec


class DegradedPart(msgspec.Struct, frozen=True):
    """A part that does not work as it should: ``level`` in `kms doctor`, and the alert with its runbook."""

    level: Literal["warn", "FAIL"]
    alert: str
    text: str
    then: str


DEGRADED: Final = msgspec.toml.decode(
    Path(__file__).with_name("degraded.toml").read_bytes(), type=dict[str, DegradedPart]
)
"""By name. A service of a later version may have others."""
