from collections.abc import Mapping
from pathlib import Path

import pytest

from kms_core.settings.load import load
from kms_core.settings.model import Settings
from kms_core.settings.validation import check_exposure
from kms_protocol.errors import ConfigurationError

HOME = {"HOME": "/home/ada"}
COSMIAN = HOME | {"PROVISIONING_ENV": "prod", "COSMIAN_KMS_URL": "https://kms.test"}


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def read(tmp_path: Path, text: str, environ: Mapping[str, str] = HOME, **overrides: object) -> Settings:
    file = tmp_path / "kms.toml"
    file.write_text(text)
    return load(file, environ, overrides=overrides)


def refusal(tmp_path: Path, text: str, environ: Mapping[str, str] = HOME, **overrides: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, text, environ, **overrides)
    return caught.value.detail


# -- backends and environments -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prod", "PROD", " production "], ids=["plain", "upper", "alias"])
def test_names_of_prod(name: str) -> None:
    assert load(None, COSMIAN | {"PROVISIONING_ENV": name}).is_prod


def test_another_environment_chooses_its_backend(tmp_path: Path) -> None:
    text = "[kms]\nenvironment = 'staging'\n[kms.environments.staging]\nbackend = 'age'"
    settings = read(tmp_path, text)

    assert (settings.active_backend, settings.is_prod, settings.accept_foreign) == ("age", False, False)


def test_age_in_prod_must_be_allowed(tmp_path: Path) -> None:
    text = "[kms]\nenvironment = 'prod'\nprod_backend = 'age'\n"

    assert "allow_age_in_prod = true" in refusal(tmp_path, text)
    assert read(tmp_path, text + "allow_age_in_prod = true").active_backend == "age"


@pytest.mark.parametrize(
    ("cosmian", "message"),
    [
        ("", "export COSMIAN_KMS_URL"),
        ("server_url = 'http://c'", "http:// is refused in prod"),
        ("server_url = 'kms.test:9998'", "expected https://"),
        ("server_url = 'HTTPS://kms.test:9998'", "expected https://"),
        ("server_url = 'https://u:secret@c'", "no user, password"),
        ("server_url = 'https://c'\ntls_verify = false", "tls_verify = false is refused in prod"),
        (
            "server_url = 'https://c'\napi_key = 'secret'",
            "a credential in the settings themselves is",
        ),
    ],
    ids=["absent", "http", "no-scheme", "upper case", "password", "unverified", "literal key"],
)
def test_cosmian_in_prod_is_reached_by_verified_tls(tmp_path: Path, cosmian: str, message: str) -> None:
    detail = refusal(tmp_path, f"[kms]\nenvironment = 'prod'\n[kms.cosmian]\n{cosmian}")

    assert message in detail
    assert "secret" not in detail


def test_cosmian_in_dev_may_be_plain(tmp_path: Path) -> None:
    text = "[kms]\ndev_backend = 'cosmian'\n[kms.cosmian]\nserver_url = 'http://localhost:9999'"

    assert read(tmp_path, text).active_backend == "cosmian"


# -- exposure ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_in_dev_needs_no_authentication(bind: str) -> None:
    check_exposure(load(None, HOME | {"KMS_BIND": bind}))


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "10.0.0.1", "localhost.evil.example"])  # noqa: S104 - refused
def test_other_addresses_without_authentication_are_refused(tmp_path: Path, bind: str) -> None:
    with pytest.raises(ConfigurationError, match=r'mode = "none" under \[kms\.auth\]'):
        check_exposure(load(None, HOME | {"KMS_BIND": bind}))

    check_exposure(read(tmp_path, "[kms.auth]\nmode = 'none'", HOME | {"KMS_BIND": bind}))


def test_prod_without_authentication_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="The environment is prod"):
        check_exposure(load(None, COSMIAN))


@pytest.mark.parametrize(
    "root",
    [
        "/",
        "{state}",
        "{state}/..",
        "{state}/spool",
        "{state}/spool/x",
        "{state}/audit",
        "{state}/run",
        "{link}",
    ],
)
def test_a_root_over_or_in_private_directories_is_refused(tmp_path: Path, root: str) -> None:
    state, link = tmp_path / "state", tmp_path / "link"
    state.mkdir()
    link.symlink_to(state)
    text = f"[kms.jobs]\nroots = ['/srv/ok', '{root.format(state=state, link=link)}']"

    assert "kms.jobs.roots[1] overlaps" in refusal(tmp_path, text, state_dir=str(state))


def test_a_root_of_its_own_in_the_state_directory_is_allowed(tmp_path: Path) -> None:
    settings = load(None, HOME, overrides={"state_dir": tmp_path, "jobs.roots": [tmp_path / "files"]})

    assert settings.kms.jobs.roots == (tmp_path / "files",)


@pytest.mark.parametrize(
    "text",
    [
        "[kms.keys]\npay = 'age:///srv/in/private_key.txt?public=/k/public_key.txt'",
        "[kms.keys]\npay = 'age:///k/private%5Fkey.txt?public=/srv/in/public_key.txt'",
        "[kms.keys]\nlog = 'other://v/transit/keys/x'\na = 'age:///k/p'\npay = 'age:///srv/%69n/private_key.txt'",
        "[kms.cosmian]\napi_key_file = '/srv/in/token'",
        "[kms.age]\nprivate_key_path = '/srv/in/private_key.txt'",
        "[kms.audit]\npath = '/srv/in/audit'",
    ],
    ids=["private", "public", "quoted", "cosmian", "age", "audit"],
)
def test_key_files_and_records_under_a_root_are_refused(tmp_path: Path, text: str) -> None:
    assert "kms.jobs.roots[0] overlaps" in refusal(tmp_path, text + "\n[kms.jobs]\nroots = ['/srv/in']")


@pytest.mark.parametrize("uri", ["/k/secret.txt", "", "age://[secret"], ids=["path", "empty", "malformed"])
def test_a_key_that_is_no_uri_is_refused_and_not_echoed(tmp_path: Path, uri: str) -> None:
    detail = refusal(tmp_path, f"[kms.keys]\npay = '{uri}'")

    assert "kms.keys.pay: expected a URI" in detail
    assert "secret" not in detail


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("result_ttl_s = 2_592_001", "kms.jobs.result_ttl_s: expected int <= 2592000"),
        ("[kms.jobs.resource_leases]\n'root:/srv/other' = 1", 'has "root:/srv/other", which is no resource'),
        ("[kms.jobs.resource_leases]\n'bucket:x' = 1", "there are backend:age, root:/srv"),
        ("[kms.jobs.resource_leases]\n'backend:awskms' = 1", 'has "backend:awskms"'),
        ("[kms.jobs.resource_leases]\n'root:/srv/in' = 0", "resource_leases"),
    ],
)
def test_deadlines_and_bounds_of_jobs_are_checked(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(tmp_path, f"[kms.jobs]\nroots = ['/srv/in']\n{text}")


SPOOL = '[kms.jobs.spool_bucket]\nurl = "s3://one/spool/a"\n'
ONE = "[kms.jobs.buckets.one]\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SPOOL + ONE + 'read = [""]', 'overlaps "" of kms.jobs.buckets.one'),
        (SPOOL + ONE + 'write = ["spool/"]', 'overlaps "spool/"'),
        (SPOOL + ONE + 'read = ["in/", "spool/a/"]', 'overlaps "spool/a/"'),
        (SPOOL + ONE + 'write = ["spool/a/b/"]', 'overlaps "spool/a/b/"'),
        (SPOOL.replace("/spool/a", "") + ONE + 'read = ["in/"]', 'overlaps "in/"'),
        (SPOOL.replace("/spool/a", "/spool/../a"), "kms.jobs.spool_bucket.url"),
        (SPOOL.replace("s3://one", "https://one"), "kms.jobs.spool_bucket.url"),
        (SPOOL.replace("one", "On"), "kms.jobs.spool_bucket.url"),
        (SPOOL + 'access_key_id = "AKID"', "kms.jobs.spool_bucket.secret_key_file belong together"),
        (SPOOL + 'endpoint = "http://127.0.0.1:1"', "kms.jobs.spool_bucket.allow_http"),
        (SPOOL + 'endpoint = "ftp://x"', "kms.jobs.spool_bucket.endpoint"),
        (SPOOL + "buffer_bytes = 1000", "buffer_bytes"),
    ],
)
def test_bucket_of_the_spool_is_out_of_the_reach_of_jobs(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("url", "prefix"),
    [("s3://one", ""), ("s3://one/", ""), ("s3://one/a", "a/"), ("s3://one/a/b/", "a/b/")],
)
def test_prefix_of_the_spool_ends_in_a_slash(tmp_path: Path, url: str, prefix: str) -> None:
    others = '[kms.jobs.buckets.two]\nread = [""]\n'
    others += '[kms.jobs.buckets.one]\nread = ["ab/"]\nwrite = ["az/"]\n' if prefix else ""
    found = read(tmp_path, f'[kms.jobs.spool_bucket]\nurl = "{url}"\n{others}').kms.jobs.spool_bucket

    assert found
    assert (found.bucket, found.prefix) == ("one", prefix)


# -- pages of other sites ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origin",
    [
        "https://temporal.example.com",
        "https://cloud.temporal.io",
        "https://temporal.example.com:8443",
        "https://temporal",
        "https://10.0.0.7:65535",
        "https://[fd00::7]:8443",
        "https://xn--bcher-kva.example",
        "http://localhost",
        "http://localhost:8233",
        "http://127.0.0.1:8233",
        "http://[::1]:8233",
        "http://localhost:443",
        "https://localhost:80",
    ],
)
def test_origins_as_browsers_send_them_are_taken(tmp_path: Path, origin: str) -> None:
    found = read(tmp_path, f'[kms.server]\ncodec_origins = ["{origin}"]')

    assert found.kms.server.codec_origins == (origin,)


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "*",
        "null",
        "https://*",
        "https://*.example.com",
        "http://localhost:*",
        "https://",
        "temporal.example.com",
        "//temporal.example.com",
        "ftp://temporal.example.com",
        "file://",
        "chrome-extension://abc",
        "https://temporal.example.com/",
        "https://temporal.example.com/ui",
        "https://temporal.example.com?x",
        "https://temporal.example.com#x",
        "https://secret@temporal.example.com",
        "https://temporal.example.com.",
        "https://temporal..example.com",
        "https://Temporal.example.com",
        "HTTPS://temporal.example.com",
        "https://bücher.example",
        "https://temporal.example.com:443",
        "https://temporal.example.com:0",
        "https://temporal.example.com:08",
        "https://temporal.example.com:65536",
        "https://temporal.example.com:",
        "https://a.example https://b.example",
        "https://a.example,https://b.example",
        " https://temporal.example.com",
        "https://temporal.example.com\\n",
        "https://temporal.example.com:8443\\n",
        "https://temporal.example.com:443\\n",
        "http://temporal.example.com",
        "http://localhost.example.com",
        "http://localhost:80",
        "http://127.0.0.2:8233",
        "https://[::1",
        "https://^a|b$",
    ],
)
def test_other_text_is_no_origin(tmp_path: Path, origin: str) -> None:
    told = refusal(tmp_path, f'[kms.server]\ncodec_origins = ["https://a.example", "{origin}"]')

    assert told.startswith("kms.server.codec_origins[1]: expected one origin as browsers send it, such as ")
    assert "secret" not in told
