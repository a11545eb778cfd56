"""The texts of errors by code: what the ``kms`` command, and answers about jobs, say of each."""

from pathlib import Path
from typing import Final

import msgspec


class ErrorText(msgspec.Struct, frozen=True):
    """The next step after an error; of one that ends a job or item also the cause, and the next step then."""

    hint: str = ""
    job_detail: str = ""
    job_hint: str = ""


NO_TEXT: Final = ErrorText()
TEXTS: Final = msgspec.toml.decode(
    Path(__file__).with_name("error_texts.toml").read_bytes(), type=dict[str, ErrorText]
)
"""By code. Not each code has texts."""
