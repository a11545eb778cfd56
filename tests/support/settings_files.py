"""Settings in a file that a test writes, and what is said where they are refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from kms_core.settings.load import load
from kms_core.settings.model import Settings
from kms_protocol.errors import ConfigurationError

HOME: Final = {"HOME": "/home/ada"}


def read(folder: Path, text: str, environ: Mapping[str, str] = HOME, **overrides: object) -> Settings:
    file = folder / "kms.toml"
    file.write_text(text)
    return load(file, environ, overrides=overrides)


def refusal(folder: Path, text: str, environ: Mapping[str, str] = HOME, **overrides: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(folder, text, environ, **overrides)
    return caught.value.detail
