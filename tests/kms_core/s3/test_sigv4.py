"""Signatures for S3: AWS's published examples, and botocore as a second opinion; and credentials."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as TheirCredentials

from kms_core.s3.connection import (
    Credentials,
    Request,
    credentials_from_environment,
    credentials_from_file,
    sign,
)
from kms_protocol.errors import ConfigurationError, Unavailable

# "Examples: Signature Calculations in AWS Signature Version 4", Amazon S3 API reference
KEY = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
HOST = "examplebucket.s3.amazonaws.com"
NOON = datetime(2013, 5, 24, tzinfo=UTC)
NOTHING = hashlib.sha256(b"").hexdigest()
EXAMPLES = {
    "get": (
        Request("GET", HOST, "/test.txt", {}, {"Range": "bytes=0-9"}, NOTHING),
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
    ),
    "put": (
        Request(
            "PUT",
            HOST,
            "/test%24file.text",
            {},
            {"Date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
            hashlib.sha256(b"Welcome to Amazon S3.").hexdigest(),
        ),
        "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
    ),
    "lifecycle": (
        Request("GET", HOST, "/", {"lifecycle": ""}, {}, NOTHING),
        "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
    ),
    "list": (
        Request("GET", HOST, "/", {"max-keys": "2", "prefix": "J"}, {}, NOTHING),
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_published_examples_have_their_signatures(name: str) -> None:
    request, signature = EXAMPLES[name]

    assert sign(request, KEY, "us-east-1", NOON)["Authorization"].endswith(f"Signature={signature}")


@pytest.mark.parametrize("token", ["", "session/token+=="], ids=["lasting", "temporary"])
@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/b/a%20b/%C3%BC%2B~", {}),
        ("/b/k", {"uploadId": "a/b+c=&d", "partNumber": "1"}),
        ("/b", {"list-type": "2", "prefix": "a b/ü", "continuation-token": "x+/="}),
    ],
    ids=["key", "upload", "listing"],
)
def test_botocore_signs_alike(path: str, query: dict[str, str], token: str) -> None:
    key = Credentials(KEY.access_key_id, KEY.secret_key, token)
    request = Request("PUT", "127.0.0.1:8333", path, query, {"If-None-Match": "*"}, NOTHING)
    now = datetime.now(UTC)
    theirs = AWSRequest("PUT", f"http://127.0.0.1:8333{request.target}", headers={"If-None-Match": "*"})
    S3SigV4Auth(TheirCredentials(KEY.access_key_id, KEY.secret_key, token or None), "s3", "eu-x").add_auth(
        theirs
    )
    now = datetime.strptime(theirs.context["timestamp"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)

    ours = sign(request, key, "eu-x", now)

    assert ours["Authorization"] == theirs.headers["Authorization"]
    assert ours.get("x-amz-security-token") == theirs.headers.get("X-Amz-Security-Token")


def test_secrets_are_in_no_repr() -> None:
    text = repr(Credentials("AKID", "secret-key", "secret-token"))

    assert "AKID" in text
    assert "secret" not in text.replace("secret_key", "")


def test_a_secret_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    (tmp_path / "key").chmod(0o600)

    assert credentials_from_file("AKID", tmp_path / "key", "where", strict=True)() == Credentials(
        "AKID", "s3cret"
    )


def test_a_secret_that_others_can_read_is_refused_in_prod_alone(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret")
    (tmp_path / "key").chmod(0o644)

    with pytest.raises(ConfigurationError, match="chmod 600"):
        credentials_from_file("AKID", tmp_path / "key", "where", strict=True)
    assert credentials_from_file("AKID", tmp_path / "key", "where", strict=False)().secret_key == "s3cret"


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff"], ids=["missing", "empty", "blank", "binary"])
def test_a_secret_that_cannot_be_is_refused_at_start(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
        (tmp_path / "key").chmod(0o600)

    with pytest.raises(ConfigurationError, match="where"):
        credentials_from_file("AKID", tmp_path / "key", "where", strict=True)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder where AWS tools look for ``credentials`` and ``config``, and nowhere else."""
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path


def test_the_environment_gives_what_aws_tools_would_use(environment: Path) -> None:
    (environment / "credentials").write_text(
        "[default]\naws_access_key_id = AKIDFILE\naws_secret_access_key = s\naws_session_token = t\n"
    )

    assert credentials_from_environment("where")() == Credentials("AKIDFILE", "s", "t")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("", "secret_key_file"),
        ("[default]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = missing\n", "not available now"),
    ],
    ids=["none", "not-now"],
)
def test_without_credentials_the_store_is_not_available(environment: Path, config: str, told: str) -> None:
    (environment / "config").write_text(config)

    with pytest.raises(Unavailable, match=told):
        credentials_from_environment("where")()
