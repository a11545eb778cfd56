"""What opens the job records of the golden set. Imports nothing of the service."""

from typing import Final

from support.golden import manifest, reference

SECRET: Final = reference.origin_key(manifest.identity_secret("spool"))
"""The key that seals records: derived from the spool identity."""
