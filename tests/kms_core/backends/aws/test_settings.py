"""How keys in AWS KMS are opened: settings, URIs, regions, credentials."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import CredentialRetrievalError

from kms_core.backends.aws.backend import AwsCipher, open_key
from kms_core.backends.aws.client import AwsKmsClient
from kms_core.backends.aws.settings import AwsKmsSection
from kms_core.http_client import Unreachable
from kms_core.keyring import build
from kms_protocol.errors import BackendUnavailable, ConfigurationError
from support.aws_scripted import ARN, KEY, scripted, working
from support.aws_servers import REGION
from support.ports import free_port
from support.settings_files import read

# -- credentials -------------------------------------------------------------------------------------

NOWHERE = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null"}


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**NOWHERE, "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("no_credentials")
def test_credentials_that_come_later_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(working) as (url, script):
        cipher = AwsCipher(AwsKmsClient(AwsKmsSection(region=REGION, endpoint_url=url)), KEY)
        with pytest.raises(BackendUnavailable, match=r"kms\.awskms\.profile"):
            cipher.versions()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "a+token")

        assert cipher.versions()
    assert script.bad_signatures == 0
    assert b"X-Amz-Security-Token: a+token" in script.raw[-1]


@pytest.mark.usefixtures("no_credentials")
def test_a_failing_source_of_credentials_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    config.write_text("[profile broken]\ncredential_process = false\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    cipher = AwsCipher(
        AwsKmsClient(AwsKmsSection(region=REGION, endpoint_url="http://127.0.0.1:9", profile="broken")), KEY
    )

    with pytest.raises(BackendUnavailable, match=CredentialRetrievalError.__name__):
        cipher.versions()


@pytest.mark.usefixtures("no_credentials")
def test_a_source_of_credentials_that_does_not_answer_is_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("of a pod")
    port = free_port()
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/kms")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{port}")
    cipher = AwsCipher(AwsKmsClient(AwsKmsSection(region=REGION, endpoint_url="http://127.0.0.1:9")), KEY)

    with pytest.raises(Unreachable):
        cipher.versions()


# -- opening -----------------------------------------------------------------------------------------


def toml(uri: str) -> str:
    return f'[kms]\ndefault_key_id = "k"\n[kms.awskms]\nregion = "eu-central-1"\n[kms.keys]\nk = "{uri}"\n'


@pytest.mark.parametrize(
    "uri",
    [
        "awskms:",
        "awskms://alias/name",
        "awskms:alias/",
        "awskms:alias/name?zone=1",
        "awskms:alias/name?region=",
        "awskms:alias/name?region=a&region=b",
        "awskms:alias/name#x",
        "awskms:alias/na me",
        f"awskms:key/{KEY}",
        "awskms:arn:aws:s3:::bucket",
        f"awskms:arn:aws:kms:{REGION}:1111:key/{KEY}",
    ],
)
def test_a_uri_that_names_no_key_is_refused_at_start(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ConfigurationError, match="awskms:alias/name"):
        build(read(tmp_path, toml(uri)))


@pytest.mark.parametrize(
    ("uri", "host"),
    [
        ("awskms:alias/name", "kms.eu-central-1.amazonaws.com"),
        ("awskms:alias/name?region=eu-west-1", "kms.eu-west-1.amazonaws.com"),
        (f"awskms:{ARN}", f"kms.{REGION}.amazonaws.com"),
        (f"awskms:arn:aws-cn:kms:cn-north-1:111122223333:key/{KEY}", "kms.cn-north-1.amazonaws.com.cn"),
    ],
)
@pytest.mark.usefixtures("no_credentials")
def test_the_region_decides_the_host(
    tmp_path: Path, uri: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://elsewhere.example.invalid")  # chooses no host here
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # so that nobody is asked
    backend = build(read(tmp_path, toml(uri))).named("k").backend
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")

    health = backend.health_check()

    assert not health.healthy
    assert host in health.detail


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[kms]\ndev_backend = "awskms"', r"kms\.awskms\.key_id"),
        (toml("awskms:alias/a") + "[kms.awskms2]\n", "awskms2"),
        (toml("awskms:alias/a").replace("region", 'profile = "nobody"\nregion'), "nobody"),
        (toml("awskms:alias/a").replace('region = "eu-central-1"', ""), "region"),
        (toml("awskms:alias/a").replace("eu-central-1", "not a region"), "region"),
    ],
    ids=["no key", "unknown section", "no such profile", "no region", "a strange region"],
)
@pytest.mark.usefixtures("no_credentials")
def test_settings_that_cannot_work_are_refused_at_start(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        build(read(tmp_path, text))


@pytest.mark.parametrize(
    ("endpoint", "environment", "fits"),
    [
        ("https://vpce.example.com", "prod", True),
        ("http://127.0.0.1:4566", "dev", True),
        ("http://[::1]:4566", "dev", True),
        ("http://127.0.0.1:4566", "prod", False),
        ("http://kms.example.com", "dev", False),
        ("https://user@kms.example.com", "dev", False),
        ("kms.example.com", "dev", False),
    ],
)
def test_an_endpoint_needs_tls_except_on_this_machine(
    tmp_path: Path, endpoint: str, environment: str, *, fits: bool
) -> None:
    text = (
        f'[kms]\nenvironment = "{environment}"\nprod_backend = "awskms"\ndev_backend = "awskms"\n'
        f'[kms.awskms]\nkey_id = "alias/a"\nendpoint_url = "{endpoint}"\n'
    )
    if fits:
        assert read(tmp_path, text).backend(AwsKmsSection).endpoint_url == endpoint
        return
    with pytest.raises(ConfigurationError, match=r"kms\.awskms\.endpoint_url"):
        read(tmp_path, text)


def test_the_section_alone_opens_the_active_backend(tmp_path: Path) -> None:
    text = '[kms]\ndev_backend = "awskms"\n[kms.awskms]\nkey_id = "alias/a"\nregion = "eu-west-1"\n'
    backend = open_key(None, read(tmp_path, text).backend(AwsKmsSection), strict=False)

    assert (backend.name, bool(backend.server), backend.data_keys) == ("awskms", True, True)


def test_without_the_extra_the_start_says_what_to_install() -> None:
    code = "import sys; sys.modules['botocore.auth'] = None; import kms_core.backends.aws.backend"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert run.returncode != 0
    assert "ConfigurationError: Keys in AWS KMS need another package: run `pip install botocore`" in (
        run.stderr
    )
