from pathlib import Path

import pytest

from kms_core.backends.age_settings import AgeSection
from kms_core.settings.load import load
from kms_core.settings.validation import check_exposure
from kms_protocol.errors import ConfigurationError
from support.credentials import authenticator_of
from support.settings_files import HOME, read, refusal

COSMIAN = HOME | {"PROVISIONING_ENV": "prod", "COSMIAN_KMS_URL": "https://kms.test"}


# -- backends and environments -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prod", "PROD", " production "], ids=["plain", "upper", "alias"])
def test_names_of_prod(name: str) -> None:
    assert load(None, COSMIAN | {"PROVISIONING_ENV": name}).is_prod


def test_another_environment_chooses_its_backend(tmp_path: Path) -> None:
    text = "[kms]\nenvironment = 'staging'\n[kms.environments.staging]\nbackend = 'age'"
    settings = read(tmp_path, text)

    assert (settings.active_backend, settings.is_prod) == ("age", False)
    assert not settings.backend(AgeSection).accept_foreign


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
    with pytest.raises(ConfigurationError, match=r'kms token create.*mode = "none" under \[kms\.auth\]'):
        check_exposure(load(None, HOME | {"KMS_BIND": bind}))

    for mode in ("none", "required"):
        check_exposure(read(tmp_path, f"[kms.auth]\nmode = '{mode}'", HOME | {"KMS_BIND": bind}))


def test_prod_without_authentication_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="The environment is prod"):
        check_exposure(load(None, COSMIAN))

    settings = read(tmp_path, "[kms.auth]\nmode = 'required'", COSMIAN)
    check_exposure(settings)
    assert not settings.kms.server.docs


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


def test_a_link_to_itself_is_left_to_what_opens_it(tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to("link")
    text = f"[kms.jobs]\nspool_dir = '{link}'\nroots = ['{link}/root']"

    assert "kms.jobs.roots[0] overlaps" in refusal(tmp_path, text, state_dir=str(tmp_path / "state"))


def test_a_root_of_its_own_in_the_state_directory_is_allowed(tmp_path: Path) -> None:
    settings = load(None, HOME, overrides={"state_dir": tmp_path, "jobs.roots": [tmp_path / "files"]})

    assert settings.kms.jobs.roots == (tmp_path / "files",)


@pytest.mark.parametrize(
    "text",
    [
        "[kms.keys]\npay = 'age:///srv/in/private_key.txt?public=/k/public_key.txt'",
        "[kms.keys]\npay = 'age:///k/private%5Fkey.txt?public=/srv/in/public_key.txt'",
        "[kms.keys]\nlog = 'other://v/transit/keys/x'\na = 'age:///k/p'\npay = 'age:///srv/%69n/private_key.txt'",
        "[kms.keys]\npay = 'age:file:///srv/%69n/document'",
        "[kms.auth]\nmode = 'required'\ntokens = 'file:///srv/%69n/tokens'",
        "[kms.audit]\npath = '/srv/in/audit'",
    ],
    ids=["private", "public", "quoted", "document", "tokens", "audit"],
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


# -- callers and tenants -------------------------------------------------------------------------------

REQUIRED = "[kms.auth]\nmode = 'required'\n"
TLS = "[kms.server]\ntls_cert = '/t/c'\ntls_key = '/t/k'\nclient_ca = '/t/ca'\n"
REVIEW = "review_url = '{}'\nreview_token_file = '/t/reviewer'\n"
ISSUER = "[kms.auth.issuers.corp]\nissuer = 'https://id'\naudience = 'kms'\n"
KEYS = "jwks_url = 'https://id/keys'\n"
JWT = REQUIRED + ISSUER + KEYS
GRANT = JWT + "[kms.auth.issuers.corp.grants.g]\n"
LOGIN = REQUIRED + "[kms.auth.logins.a]\n"
TOKENS = REQUIRED + "tokens = 's3://state/in/tokens'\n[kms.jobs.buckets.state]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ISSUER + KEYS, 'write mode = "required"'),
        ("[kms.auth]\nmode = 'none'\n" + ISSUER + KEYS, 'write mode = "required"'),
        (TLS + "[kms.auth.certificates.a]\nsubject = 'DNS:a'\nscopes = []\n", 'write mode = "required"'),
        ("[kms.auth]\nmode = 'optional'\n", "kms.auth.mode: expected one of none, required"),
        (REQUIRED + ISSUER.replace("https://id", "corp"), "found by discovery"),
        (REQUIRED + ISSUER.replace("https://id", "http://id"), "found by discovery"),
        (REQUIRED + ISSUER.replace("https://id", "https://id?a=hunter2"), "found by discovery"),
        (REQUIRED + ISSUER.replace("https://id", "https://u:hunter2@id"), "found by discovery"),
        (JWT + "jwks_file = '/k'\n", "not by both"),
        (REQUIRED + ISSUER + "jwks_url = 'http://id/keys'\n", "expected https://"),
        (REQUIRED + ISSUER + "jwks_url = 'https://u:hunter2@id/keys'\n", "no user, password"),
        (REQUIRED + ISSUER + "jwks_url = 'file:///keys'\n", "expected https://"),
        (REQUIRED + ISSUER + "jwks_url = 'https://bücher.example/keys'\n", "in ASCII"),
        (REQUIRED + ISSUER + "jwks_url = 'https://[hunter2'\n", "expected https://"),
        (JWT + "algorithms = ['HS256']\n", "kms.auth.issuers.corp.algorithms"),
        (JWT + "algorithms = ['none']\n", "kms.auth.issuers.corp.algorithms"),
        (JWT + "algorithms = []\n", "kms.auth.issuers.corp.algorithms"),
        (JWT + "leeway_s = 3600\n", "kms.auth.issuers.corp.leeway_s"),
        (JWT + "tenant_claim = 'org'\n", "set both or neither"),
        (JWT + "tenants = ['a']\n", "set both or neither"),
        (JWT + "tenant = 'a b'\n", "kms.auth.issuers.corp.tenant"),
        (JWT + "scopes = ['status', 'encript']\n", "scopes[1]: a scope begins"),
        (GRANT + "when = {}\nscopes = []\n", "name a claim"),
        (GRANT + "when = {a = 'b'}\nscopes = ['x']\n", "grants.g.scopes[0]"),
        (JWT + ISSUER.replace("corp", "twin") + KEYS, "the same issuer"),
        (REQUIRED + "[kms.auth.certificates.a]\nsubject = 'DNS:a'\nscopes = []\n", "need client_ca"),
        (REQUIRED + TLS + "[kms.auth.certificates.a]\nsubject = 'a'\nscopes = []\n", "expected DNS:name"),
        (REQUIRED + ISSUER + "review_url = 'https://k'\n", "belong together"),
        (REQUIRED + ISSUER + "review_token_file = '/t/k'\n", "belong together"),
        (JWT + REVIEW.format("https://k"), "review_url: it replaces"),
        (REQUIRED + ISSUER + REVIEW.format("http://k"), "review_url: expected https://"),
        (REQUIRED + ISSUER + REVIEW.format("https://u:p@k"), "review_url: no user, password"),
        ("[kms.auth.logins.a]\nmethod = 'approle'\n", 'write mode = "required"'),
        (REQUIRED + "[kms.auth.logins.token]\nmethod = 'approle'\n", "no login can have this name"),
        (REQUIRED + "[kms.auth.logins.'a/b']\nmethod = 'approle'\n", "kms.auth.logins"),
        (LOGIN + "method = 'jwt'\n", "a.issuer: expected the name"),
        (LOGIN + "method = 'jwt'\nissuer = 'corp'\n", "a.issuer: expected the name"),
        (LOGIN + "method = 'approle'\nissuer = 'corp'\n", "it is for method"),
        (LOGIN + "method = 'ldap'\n", "a.method: expected one of"),
        (LOGIN + "method = 'approle'\nttl_s = 90000\n", "a.ttl_s"),
        ("[kms.facade]\nenabled = false\n" + LOGIN + "method = 'approle'\n", "set enabled under"),
        (REQUIRED + TLS + "[kms.auth.certificates.a]\nsubject = 'DNS:a'\nscopes = ['x']\n", "scopes[0]"),
        ("[kms.server]\nclient_crl = '/t/crl'\n", "client_crl: name the authority"),
        ("[kms.server]\ntrusted_proxies = ['proxy']\n", "[0]: expected an address or a network"),
        ("[kms.server]\ntrusted_proxies = ['::1', '10.1.2.3/8']\n", "trusted_proxies[1]: expected"),
        ("[kms.server]\ntrusted_proxies = ['0.0.0.0/0']\n", "this trusts every address"),
        ("[kms.server]\ntrusted_proxies = ['10.0.0.0/8', '::/0']\n", "this trusts every address"),
        ("[kms.server]\ntrusted_proxies = ['0.0.0.0/1', '128.0.0.0/1']\n", "this trusts every address"),
        ("[kms.server]\ntls_cert = '/t/c'\n", "belong together"),
        ("[kms.server]\ntls_key = '/t/c'\n", "belong together"),
        ("[kms.server]\nclient_ca = '/t/c'\n", "need TLS"),
        ("[kms.server]\nclient_cert = 'required'\n", "in client_ca"),
        ("[kms.tenants.a]\nburst = 5\n", "needs requests_per_s"),
        ("[kms.tenants.a]\nrequests_per_s = 0\n", "kms.tenants.a.requests_per_s"),
        ("[kms.tenants.'a/b']\nopen_jobs = 5\n", "kms.tenants"),
        (REQUIRED + "tokens = '/t/tokens'\n", "kms.auth.tokens"),
        (REQUIRED + "tokens = 'file://host/t'\n", "kms.auth.tokens: expected file:///path"),
        (REQUIRED + "tokens = 's3://state/tokens'\n", "add a section [kms.jobs.buckets.state]"),
        (TOKENS.replace("in/tokens", "a/../b"), "kms.auth.tokens: a part of the key is"),
        (TOKENS.replace("/in/tokens", ""), "kms.auth.tokens: expected s3://"),
        (TOKENS + "read = ['in/']\n", "jobs could read or write it"),
        (TOKENS + "write = ['']\n", "jobs could read or write it"),
        (TOKENS + "[kms.jobs.spool_bucket]\nurl = 's3://state/in'\n", "kms.auth.tokens: it is in the spool"),
        (REQUIRED + "max_stale_s = 0\n", "kms.auth.max_stale_s"),
        (REQUIRED + "tokens = 'file:///srv/t'\n[kms.jobs]\nroots = ['/srv']\n", "kms.auth.tokens"),
    ],
    ids=lambda text: text.replace("\n", " ")[-60:],
)
def test_settings_of_callers_that_contradict_themselves_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    detail = refusal(tmp_path, text)

    assert message in detail
    assert "hunter2" not in detail


@pytest.mark.parametrize(
    "text",
    [
        REQUIRED + ISSUER + "jwks_url = 'http://127.0.0.1:9000/keys'\n",
        REQUIRED + ISSUER.replace("https://id", "http://127.0.0.1:9000"),
    ],
    ids=["by its URL", "by discovery"],
)
def test_loopback_in_dev_may_be_an_issuer_without_tls(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text).kms.auth.issuers["corp"].leeway_s == 30

    prod = "[kms]\nenvironment = 'prod'\nprod_backend = 'age'\nallow_age_in_prod = true\n"
    for refused in (text.replace("127.0.0.1", "10.0.0.1"), prod + text):
        with pytest.raises(ConfigurationError, match="expected https"):
            read(tmp_path, refused)


def test_nobody_is_asked_unless_settings_say_so(tmp_path: Path) -> None:
    assert authenticator_of(read(tmp_path, "")) is None
    assert authenticator_of(read(tmp_path, "[kms.auth]\nmode = 'none'\n")) is None
    for text in (REQUIRED, REQUIRED + ISSUER):  # no issuer is asked at the start
        assert authenticator_of(read(tmp_path, text)) is not None
