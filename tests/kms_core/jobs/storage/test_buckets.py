"""What jobs may name by ``s3://``: how URLs are read, which prefixes count, what settings refuse."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from kms_core.jobs.storage import s3
from kms_core.jobs.storage.s3 import Allowed, Buckets, parse
from kms_core.s3.bucket import Bucket
from kms_core.s3.connection import Credentials, S3Connection, S3Endpoint
from kms_core.settings.load import load as load_settings
from kms_protocol.errors import ConfigurationError, PathRefused

LINE = S3Connection(
    S3Endpoint("http://127.0.0.1:1", "r", lambda: Credentials("a", "b"), None, 1.0), first_wait_s=0.0
)
JOBS = Buckets({"b": Allowed(Bucket("b", LINE, path_style=True), ("in/", "both/"), ("out/", "both/"))})


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("s3://b/k", "k"),
        ("s3://b/in/a b+c", "in/a b+c"),
        ("s3://b/in/%C3%BC%20%25%3F%23%2A", "in/ü %?#*"),
        ("s3://b/" + "k" * 1024, "k" * 1024),
    ],
)
def test_a_key_is_decoded_once(url: str, key: str) -> None:
    assert parse(url) == ("b", key)


@pytest.mark.parametrize(
    "url",
    [
        "file:///b/k",
        "S3://b/k",
        "s3:/b/k",
        "s3://b",
        "s3://b/",
        "s3:///k",
        "s3://b/in/",
        "s3://b/in//k",
        "s3://b/in/../k",
        "s3://b/in/%2e%2e/k",
        "s3://b/./k",
        "s3://b/in%2Fk",
        "s3://b/k?versionId=1",
        "s3://b/k#x",
        "s3://b/%zz",
        "s3://b/%00",
        "s3://b/a%0Ab",
        "s3://b/%ff",
        "s3://b/" + "k" * 1025,
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(PathRefused):
        parse(url)


@pytest.mark.parametrize(
    ("url", "read", "write"),
    [
        ("s3://b/in/k", True, False),
        ("s3://b/out/deep/k", False, True),
        ("s3://b/both/k", True, True),
        ("s3://b/in", False, False),
        ("s3://b/in-2/k", False, False),
        ("s3://b/%69n/k", True, False),
        ("s3://other/in/k", False, False),
    ],
)
def test_prefixes_say_what_may_be_read_and_written(url: str, *, read: bool, write: bool) -> None:
    for allowed, ask in ((read, JOBS.reading), (write, JOBS.writing)):
        with nullcontext() if allowed else pytest.raises(PathRefused):
            assert ask(url)[0].name == "b"


@pytest.mark.parametrize("url", ["s3://b/", "s3://b/out/", "s3://b/in", "s3://other/in/", "s3://b/in/../x/"])
def test_what_may_not_be_read_is_not_listed(url: str) -> None:
    with pytest.raises(PathRefused):
        next(JOBS.listing(url))


# -- settings ------------------------------------------------------------------------------------------------


def built(tmp_path: Path, section: str, environment: str = "dev") -> Buckets:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    secret.chmod(0o600)
    (tmp_path / "kms.toml").write_text(
        f'[kms]\nenvironment = "{environment}"\nallow_age_in_prod = true\n'
        f'prod_backend = "age"\n[kms.environments.staging]\nbackend = "age"\n'
        f"[kms.jobs.buckets.bkt]\n{section.format(secret=secret)}"
    )
    environ = {"HOME": str(tmp_path), "KMS_STATE_DIR": str(tmp_path / "state")}
    return s3.build_buckets(load_settings(tmp_path / "kms.toml", environ))


KEY = 'access_key_id = "AKID"\nsecret_key_file = "{secret}"\n'


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ('access_key_id = "AKID"\n', "belong together"),
        ('secret_key_file = "{secret}"\n', "belong together"),
        (KEY + 'read = ["in"]\n', r"bkt\.read.*slash"),
        (KEY + 'write = ["/out/"]\n', r"bkt\.write.*slash"),
        (KEY + 'write = ["out/../"]\n', r"bkt\.write.*slash"),
        (KEY + 'endpoint = "ftp://host"\n', r"bkt\.endpoint"),
        (KEY + 'endpoint = "https://user:pw@host"\n', r"bkt\.endpoint"),
        (KEY + 'endpoint = "http://127.0.0.1:8333"\n', "allow_http"),
        (KEY + 'ca_file = "{secret}"\n', r"bkt\.ca_file"),
        (KEY + "timeout_s = 0.0\n", "timeout_s"),
        (KEY + "reads = []\n", 'did you mean "read"'),
        (KEY.replace("{secret}", "/nonexistent"), "secret_key_file"),
    ],
)
def test_an_unsafe_section_stops_the_start(tmp_path: Path, section: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        built(tmp_path, section)


@pytest.mark.parametrize(
    ("environment", "host", "fine"),
    [
        ("dev", "weed", True),
        ("dev", "127.0.0.1", True),
        ("staging", "127.0.0.1", True),
        ("staging", "weed", False),
        ("prod", "127.0.0.1", False),
    ],
)
def test_http_is_for_loopback_and_for_dev(tmp_path: Path, environment: str, host: str, *, fine: bool) -> None:
    section = KEY + f'endpoint = "http://{host}:8333"\nallow_http = true\n'

    with nullcontext() if fine else pytest.raises(ConfigurationError, match="http://"):
        built(tmp_path, section, environment)


def test_two_buckets_of_one_store_and_key_are_on_one_line(tmp_path: Path) -> None:
    section = KEY + 'read = [""]\nendpoint = "{{}}"\n'
    first = section.replace("{{}}", "https://a.example.com/s3")
    jobs = built(tmp_path, f"{first}[kms.jobs.buckets.same]\n{first}")
    lines = {id(jobs.reading(f"s3://{name}/k")[0].line) for name in ("bkt", "same")}
    other = built(tmp_path, first + "[kms.jobs.buckets.other]\n" + first.replace("AKID", "AKID2"))

    assert len(lines) == 1
    assert len({id(other.reading(f"s3://{name}/k")[0].line) for name in ("bkt", "other")}) == 2


def test_without_a_key_it_is_that_of_the_environment(tmp_path: Path) -> None:
    jobs = built(tmp_path, 'read = [""]\n')

    assert jobs.reading("s3://bkt/k")[0].line.endpoint.endpoint == "https://s3.us-east-1.amazonaws.com"


def test_nothing_is_allowed_unless_it_is_listed_and_an_empty_prefix_is_the_whole_bucket(
    tmp_path: Path,
) -> None:
    nothing, readable = built(tmp_path, KEY), built(tmp_path, KEY + 'read = [""]\n')

    assert readable.reading("s3://bkt/anything")[1] == "anything"
    for ask in (nothing.reading, nothing.writing, readable.writing):
        with pytest.raises(PathRefused):
            ask("s3://bkt/k")


@pytest.mark.parametrize("name", ["ab", "a/b", '"a b"', '"..b"', '"abc\\n"', "a" * 64])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError):
        built(tmp_path, KEY + f"[kms.jobs.buckets.{name}]\n")
