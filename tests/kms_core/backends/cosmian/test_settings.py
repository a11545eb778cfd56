"""``[kms.cosmian]`` and ``cosmian:`` URIs: what is refused at the start, and why."""

from pathlib import Path
from typing import Final

import pytest

from kms_core import keyring
from kms_core.settings.load import load
from kms_core.settings.model import Settings
from kms_protocol.errors import ConfigurationError

URL: Final = "https://kms.example.com"


def settings(folder: Path, **values: object) -> Settings:
    """Of a file with these keys below ``[kms.cosmian]``; others by their section, as ``kms__environment``."""
    overrides: dict[str, object] = {"state_dir": str(folder), "dev_backend": "cosmian"}
    for name, value in values.items():
        overrides[name.removeprefix("kms__") if name.startswith("kms__") else f"cosmian.{name}"] = value
    return load(None, {"COSMIAN_KMS_URL": URL, "HOME": str(folder)}, overrides=overrides)


def refusal(folder: Path, **values: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        keyring.build(settings(folder, **values))
    return caught.value.detail


def test_the_names_of_the_keys_are_the_settings(tmp_path: Path) -> None:
    ring = keyring.build(settings(tmp_path, kms__keys={"payroll": "cosmian:pay.roll-2"}))

    assert {name: key.backend.name for name, key in ring.keys.items()} == {
        "payroll": "cosmian",
        "provisioning-master-key": "cosmian",
    }
    assert ring.default.key_id == "provisioning-master-key"


@pytest.mark.parametrize(
    "uri",
    [
        "cosmian://host/pay",
        "cosmian:pay?x=1",
        "cosmian:pay#1",
        "cosmian:",
        "cosmian:a/b",
        'cosmian:["tag"]',
        "cosmian:a@1",
    ],
)
def test_a_uri_is_a_name_and_nothing_else(tmp_path: Path, uri: str) -> None:
    assert "cosmian:<name>" in refusal(tmp_path, kms__keys={"payroll": uri})


def test_one_credential_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "api-key"

    assert "and not both" in refusal(tmp_path, api_key="c2VjcmV0", api_key_file=str(file))
    assert "belong together" in refusal(tmp_path, client_cert_file=str(file))
    assert "belong together" in refusal(tmp_path, client_key_file=str(file))


def test_a_key_file_for_everybody_is_refused_in_prod(tmp_path: Path) -> None:
    file = tmp_path / "api-key"
    file.write_text("c2VjcmV0")
    file.chmod(0o644)

    assert "chmod 600" in refusal(tmp_path, kms__environment="prod", api_key_file=str(file))
    assert keyring.build(settings(tmp_path, api_key_file=str(file))).default.backend.server


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    file = tmp_path / "empty"
    file.write_text("")
    file.chmod(0o600)

    assert f"{file} holds no token" in refusal(tmp_path, api_key_file=str(file))
    assert "put the API token of our user there" in refusal(tmp_path, api_key_file=str(file))
    assert f"kms.cosmian.ca_file: {file}" in refusal(tmp_path, ca_file=str(file))
    assert str(file) in refusal(tmp_path, client_cert_file=str(file), client_key_file=str(file))


def test_a_protocol_is_one_of_three(tmp_path: Path) -> None:
    assert "auto, kmip, jose" in refusal(tmp_path, protocol="rest")
