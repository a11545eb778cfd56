"""Where a token goes, and which settings count. By stock age: peers/test_age_plugin.py."""

from pathlib import Path

import pytest

from kms_cli.plugin.main import KeysOfTargets
from kms_cli.plugin.names import PluginTarget
from kms_protocol.context import Context
from kms_protocol.errors import ConfigurationError

PROD = Context.parse("env=prod")


def test_no_token_goes_to_an_address_that_a_recipient_names(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("kms_x")
    keys = KeysOfTargets(
        {"KMS_SERVICE_URL": "https://own.invalid", "KMS_TOKEN_FILE": str(tmp_path / "token")}
    )
    target = PluginTarget("default", PROD, "https://elsewhere.invalid", in_process=False)

    with pytest.raises(ConfigurationError, match=r"KMS_TOKEN_FILE is for https://own\.invalid"):
        keys.wrap(bytes(16), target)
    with pytest.raises(ConfigurationError, match=r"KMS_TOKEN_FILE is for https://own\.invalid"):
        keys.unwrap(b"", target)


def test_settings_are_named_by_an_absolute_path() -> None:
    """A working directory belongs to whoever packed it."""
    keys = KeysOfTargets({"KMS_CONFIG": "kms.toml"})

    with pytest.raises(ConfigurationError, match="an absolute path in KMS_CONFIG"):
        keys.wrap(bytes(16), PluginTarget(None, PROD, None, in_process=True))
