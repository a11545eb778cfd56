"""What opens the job records of the golden set. Imports nothing of the service."""

from typing import Final

from support.golden import golden_set, reference

SECRET: Final = reference.origin_key(golden_set.identity_secret("spool"))
"""The key that seals records: derived from the spool identity."""
