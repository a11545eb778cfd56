from collections.abc import Mapping
from pathlib import Path

import pytest

from kms_core.settings.load import check_exposure, load
from kms_core.settings.model import Settings
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
        ("server_url = 'https://u:secret@c'", "no user, password"),
        ("server_url = 'https://c'\ntls_verify = false", "tls_verify = false is refused in prod"),
        ("server_url = 'https://c'\napi_key = 'secret'", "a key in the settings themselves is refused"),
    ],
    ids=["absent", "http", "no-scheme", "password", "unverified", "literal key"],
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


# -- what requests may hold ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["json_bytes", "json_bytes_per_tenant", "json_bytes_per_credential"])
@pytest.mark.parametrize(
    ("limits", "largest"),
    [("", 33_554_432), ("json_job_bytes = 100\n", 3_145_728), ("json_body_bytes = 50_000_000\n", 50_000_000)],
    ids=["default", "calls", "raised"],
)
def test_the_largest_json_body_fits_into_each_bound(
    tmp_path: Path, name: str, limits: str, largest: int
) -> None:
    text = f"[kms.limits]\n{limits}[kms.server]\n{name} = "

    assert f"kms.server.{name}: expected at least {largest}" in refusal(tmp_path, f"{text}{largest - 1}")
    assert getattr(read(tmp_path, f"{text}{largest}").kms.server, name) == largest
