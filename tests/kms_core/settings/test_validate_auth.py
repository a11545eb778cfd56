"""Settings of callers and tenants: what would not do what it says stops the start."""

from pathlib import Path

import pytest

from kms_core.settings.load import load
from kms_core.settings.model import Settings
from kms_core.settings.validation import check_exposure
from kms_protocol.errors import ConfigurationError
from support.credentials import authenticator_of

REQUIRED = "[kms.auth]\nmode = 'required'\n"
TLS = "[kms.server]\ntls_cert = '/t/c'\ntls_key = '/t/k'\nclient_ca = '/t/ca'\n"
REVIEW = "review_url = '{}'\nreview_token_file = '/t/reviewer'\n"
ISSUER = "[kms.auth.issuers.corp]\nissuer = 'https://id'\naudience = 'kms'\n"
KEYS = "jwks_url = 'https://id/keys'\n"


def read(tmp_path: Path, text: str, **environ: str) -> Settings:
    file = tmp_path / "kms.toml"
    file.write_text(text)
    return load(file, {"HOME": "/home/ada", **environ})


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
        (REQUIRED + ISSUER + KEYS + "jwks_file = '/k'\n", "not by both"),
        (REQUIRED + ISSUER + "jwks_url = 'http://id/keys'\n", "expected https://"),
        (REQUIRED + ISSUER + "jwks_url = 'https://u:hunter2@id/keys'\n", "no user, password"),
        (REQUIRED + ISSUER + "jwks_url = 'file:///keys'\n", "expected https://"),
        (REQUIRED + ISSUER + "jwks_url = 'https://bücher.example/keys'\n", "in ASCII"),
        (REQUIRED + ISSUER + "jwks_url = 'https://[hunter2'\n", "expected https://"),
        (REQUIRED + ISSUER + KEYS + "algorithms = ['HS256']\n", "kms.auth.issuers.corp.algorithms"),
        (REQUIRED + ISSUER + KEYS + "algorithms = ['none']\n", "kms.auth.issuers.corp.algorithms"),
        (REQUIRED + ISSUER + KEYS + "algorithms = []\n", "kms.auth.issuers.corp.algorithms"),
        (REQUIRED + ISSUER + KEYS + "leeway_s = 3600\n", "kms.auth.issuers.corp.leeway_s"),
        (REQUIRED + ISSUER + KEYS + "tenant_claim = 'org'\n", "set both or neither"),
        (REQUIRED + ISSUER + KEYS + "tenants = ['a']\n", "set both or neither"),
        (REQUIRED + ISSUER + KEYS + "tenant = 'a b'\n", "kms.auth.issuers.corp.tenant"),
        (REQUIRED + ISSUER + KEYS + "scopes = ['status', 'encript']\n", "scopes[1]: a scope begins"),
        (
            REQUIRED + ISSUER + KEYS + "[kms.auth.issuers.corp.grants.g]\nwhen = {}\nscopes = []\n",
            "name a claim",
        ),
        (
            REQUIRED + ISSUER + KEYS + "[kms.auth.issuers.corp.grants.g]\nwhen = {a = 'b'}\nscopes = ['x']\n",
            "grants.g.scopes[0]",
        ),
        (REQUIRED + ISSUER + KEYS + ISSUER.replace("corp", "twin") + KEYS, "the same issuer"),
        (REQUIRED + "[kms.auth.certificates.a]\nsubject = 'DNS:a'\nscopes = []\n", "need client_ca"),
        (REQUIRED + TLS + "[kms.auth.certificates.a]\nsubject = 'a'\nscopes = []\n", "expected DNS:name"),
        (REQUIRED + ISSUER + "review_url = 'https://k'\n", "belong together"),
        (REQUIRED + ISSUER + "review_token_file = '/t/k'\n", "belong together"),
        (REQUIRED + ISSUER + KEYS + REVIEW.format("https://k"), "review_url: it replaces"),
        (REQUIRED + ISSUER + REVIEW.format("http://k"), "review_url: expected https://"),
        (REQUIRED + ISSUER + REVIEW.format("https://u:p@k"), "review_url: no user, password"),
        ("[kms.auth.logins.a]\nmethod = 'approle'\n", 'write mode = "required"'),
        (REQUIRED + "[kms.auth.logins.token]\nmethod = 'approle'\n", "no login can have this name"),
        (REQUIRED + "[kms.auth.logins.'a/b']\nmethod = 'approle'\n", "kms.auth.logins"),
        (REQUIRED + "[kms.auth.logins.a]\nmethod = 'jwt'\n", "a.issuer: expected the name"),
        (REQUIRED + "[kms.auth.logins.a]\nmethod = 'jwt'\nissuer = 'corp'\n", "a.issuer: expected the name"),
        (REQUIRED + "[kms.auth.logins.a]\nmethod = 'approle'\nissuer = 'corp'\n", "it is for method"),
        (REQUIRED + "[kms.auth.logins.a]\nmethod = 'ldap'\n", "a.method: expected one of"),
        (REQUIRED + "[kms.auth.logins.a]\nmethod = 'approle'\nttl_s = 90000\n", "a.ttl_s"),
        (
            "[kms.facade]\nenabled = false\n" + REQUIRED + "[kms.auth.logins.a]\nmethod = 'approle'\n",
            "set enabled under",
        ),
        (REQUIRED + TLS + "[kms.auth.certificates.a]\nsubject = 'DNS:a'\nscopes = ['x']\n", "scopes[0]"),
        ("[kms.server]\nclient_crl = '/t/crl'\n", "client_crl: name the authority"),
        (
            "[kms.server]\ntrusted_proxies = ['proxy']\n",
            "trusted_proxies[0]: expected an address or a network",
        ),
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
        (
            REQUIRED + "tokens_path = '/srv/in/tokens'\n[kms.jobs]\nroots = ['/srv/in']\n",
            "kms.auth.tokens_path",
        ),
        (REQUIRED + "tokens = '/t/tokens'\n", "kms.auth.tokens"),
        (REQUIRED + "tokens = 'file://host/t'\n", "kms.auth.tokens: expected file:///path"),
        (REQUIRED + "tokens = 's3://state/tokens'\n", "add a section [kms.jobs.buckets.state]"),
        (
            REQUIRED + "tokens = 's3://state/a/../b'\n[kms.jobs.buckets.state]\n",
            "kms.auth.tokens: a part of the key is",
        ),
        (REQUIRED + "tokens = 's3://state'\n[kms.jobs.buckets.state]\n", "kms.auth.tokens: expected s3://"),
        (
            REQUIRED + "tokens = 's3://state/in/tokens'\n[kms.jobs.buckets.state]\nread = ['in/']\n",
            "jobs could read or write it",
        ),
        (
            REQUIRED + "tokens = 's3://state/tokens'\n[kms.jobs.buckets.state]\nwrite = ['']\n",
            "jobs could read or write it",
        ),
        (
            REQUIRED + "tokens = 's3://state/in/tokens'\n[kms.jobs.buckets.state]\n"
            "[kms.jobs.spool_bucket]\nurl = 's3://state/in'\n",
            "kms.auth.tokens: it is in the spool",
        ),
        (REQUIRED + "max_stale_s = 0\n", "kms.auth.max_stale_s"),
        (
            REQUIRED + "tokens = 'file:///srv/in/tokens'\n[kms.jobs]\nroots = ['/srv/in']\n",
            "kms.auth.tokens",
        ),
        (TLS.replace("/t/k", "/srv/in/k") + "[kms.jobs]\nroots = ['/srv/in']\n", "kms.server.tls_key"),
    ],
    ids=lambda text: text.replace("\n", " ")[-60:],
)
def test_settings_that_contradict_themselves_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, text)

    assert message in caught.value.detail
    assert "hunter2" not in caught.value.detail


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


def test_an_issuer_alone_is_enough_and_nobody_is_asked_at_the_start(tmp_path: Path) -> None:
    assert authenticator_of(read(tmp_path, REQUIRED + ISSUER)) is not None


@pytest.mark.parametrize("bind", ["0.0.0.0", "10.0.0.1"])  # noqa: S104 -- not bound
def test_an_address_off_loopback_is_served_to_those_who_are_asked(tmp_path: Path, bind: str) -> None:
    check_exposure(read(tmp_path, f"[kms]\nbind = '{bind}'\n{REQUIRED}"))

    with pytest.raises(ConfigurationError, match="kms token create"):
        check_exposure(read(tmp_path, f"[kms]\nbind = '{bind}'\n"))


def test_prod_is_served_to_those_who_are_asked(tmp_path: Path) -> None:
    prod = "[kms]\nenvironment = 'prod'\nprod_backend = 'age'\nallow_age_in_prod = true\n"
    settings = read(tmp_path, prod + REQUIRED)
    check_exposure(settings)

    assert not settings.kms.server.docs
    with pytest.raises(ConfigurationError, match="The environment is prod"):
        check_exposure(read(tmp_path, prod))


def test_nobody_is_asked_unless_settings_say_so(tmp_path: Path) -> None:
    assert authenticator_of(read(tmp_path, "")) is None
    assert authenticator_of(read(tmp_path, "[kms.auth]\nmode = 'none'\n")) is None
    assert authenticator_of(read(tmp_path, REQUIRED)) is not None
