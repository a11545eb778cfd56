"""Settings files that are found below the working directory: which are read, and what they may not send."""

import os
import stat
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import pytest

from kms_core.backends import SCHEMES, table_of
from kms_core.settings import load as load_module
from kms_core.settings.load import load
from kms_core.settings.model import KmsSection
from kms_core.settings.trust import is_sent
from kms_protocol.errors import ConfigurationError

FOUND = Path("provisioning/config/kms.toml")
STRANGER = 4711
HOME = {"HOME": "/home/ada"}
NAMES_NO_ADDRESS = {  # settings of text that no peer is sent, and no name is looked up for
    "kms.accept_weak",
    "kms.environment",
    "kms.log.level",
    "kms.server.allowed_hosts",
    "kms.server.codec_origins",
    "kms.server.trusted_proxies",
    "kms.tenants.*.keys",
    "kms.auth.certificates.*.subject",
    "kms.auth.certificates.*.tenant",
    "kms.auth.certificates.*.scopes",
    "kms.auth.logins.*.issuer",
}

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file to another user")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a settings file that nobody else can change."""
    cwd = tmp_path / "repository"
    cwd.mkdir(mode=0o755)
    monkeypatch.chdir(cwd)
    FOUND.parent.mkdir(parents=True)
    write("")
    return cwd


def write(text: str) -> None:
    FOUND.write_text(f"[kms]\nport = 9001\n{text}")


def refusal(**environ: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(None, HOME | environ)
    return caught.value.detail


def assert_says_how_to_trust(told: str, here: Path) -> None:
    assert f"--config {here / FOUND}" in told
    assert f"KMS_CONFIG={here / FOUND}" in told


# -- who may have written it -------------------------------------------------------------------------


def test_a_file_of_this_user_is_read() -> None:
    assert load(None, HOME).kms.port == 9001


PLACES = {"file": FOUND, "folder": FOUND.parent, "parent": FOUND.parent.parent, "cwd": Path()}
each_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


@each_place
@pytest.mark.parametrize("bit", [stat.S_IWGRP, stat.S_IWOTH], ids=["group", "others"])
def test_what_others_can_write_to_is_refused(place: Path, bit: int, here: Path) -> None:
    place.chmod(stat.S_IMODE(place.stat().st_mode) | bit)

    told = refusal()

    written = place if place.parts else here
    assert f"others can write to {written} " in told
    assert f"chmod go-w {written}" in told
    assert_says_how_to_trust(told, here)


@root_only
@each_place
def test_what_belongs_to_another_user_is_refused(place: Path, here: Path) -> None:
    os.chown(place, STRANGER, -1)

    told = refusal()

    assert f"{place if place.parts else here} belongs to another user (uid {STRANGER})" in told
    assert_says_how_to_trust(told, here)


@root_only
def test_a_file_of_root_is_read_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)

    assert load(None, HOME).kms.port == 9001


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_a_named_file_is_read_whoever_may_write_to_it(how: str, here: Path) -> None:
    FOUND.chmod(0o666)
    named = here / FOUND

    found = load(named, HOME) if how == "flag" else load(None, HOME | {"KMS_CONFIG": str(named)})

    assert found.kms.port == 9001


def test_a_sticky_folder_may_be_writable(here: Path) -> None:
    here.chmod(0o1777)

    assert load(None, HOME).kms.port == 9001


@root_only
def test_what_others_own_in_a_sticky_folder_is_refused(here: Path) -> None:
    here.chmod(0o1777)
    os.chown("provisioning", STRANGER, -1)

    assert "provisioning belongs to another user" in refusal()


def elsewhere(tmp_path: Path) -> Path:
    """The file moved out of the working directory, and a link in its place."""
    moved = tmp_path / "elsewhere"
    moved.mkdir(mode=0o755)
    target = FOUND.rename(moved / "kms.toml")
    FOUND.symlink_to(target)
    return target


def test_a_link_to_a_file_of_this_user_is_read(tmp_path: Path) -> None:
    elsewhere(tmp_path)

    assert load(None, HOME).kms.port == 9001


def test_a_link_to_what_others_can_write_to_is_refused(tmp_path: Path) -> None:
    target = elsewhere(tmp_path)
    target.parent.chmod(0o777)

    assert f"others can write to {target.parent} " in refusal()


@root_only
def test_a_link_of_another_user_is_refused(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    os.chown(FOUND, STRANGER, -1, follow_symlinks=False)

    assert "kms.toml belongs to another user" in refusal()


@root_only
def test_a_relative_link_through_another_users_folder_is_refused(here: Path) -> None:
    (here / "theirs").mkdir()
    FOUND.rename(here / "theirs/kms.toml")
    FOUND.symlink_to("../../theirs/kms.toml")
    os.chown(here / "theirs", STRANGER, -1)

    assert "theirs belongs to another user" in refusal()


# -- what it says ------------------------------------------------------------------------------------

VAULT = 'dev_backend = "transit"\n[kms.transit]\nkey_name = "k"\naddress = "https://x.test"\n'
AWS = 'dev_backend = "awskms"\n[kms.awskms]\nkey_id = "alias/k"\nregion = "eu-central-1"\n'
COSMIAN = 'dev_backend = "cosmian"\n[kms.cosmian]\n'
BUCKET = '[kms.jobs.buckets.mine]\nread = [""]\n'
SECRET = {"SECRET": "canary"}
SENDS_A_VARIABLE = {
    "address": (
        'dev_backend = "transit"\n[kms.transit]\naddress = "https://${SECRET}.test"',
        "transit.address",
    ),
    "path": (COSMIAN + 'server_url = "https://x.test/${SECRET}"', "cosmian.server_url"),
    "default": (COSMIAN + 'server_url = "${SECRET:-https://x.test}"', "cosmian.server_url"),
    "token": (VAULT + 'token = "${SECRET}"', "transit.token"),
    "name": (VAULT.replace('"k"', '"${SECRET}"') + 'token = "t"', "transit.key_name"),
    "mount": (VAULT + 'token = "t"\nmount = "${SECRET}"', "transit.mount"),
    "endpoint": (AWS + 'endpoint_url = "https://x.test/${SECRET}"', "awskms.endpoint_url"),
    "webhook": (
        '[kms.jobs.endpoints.e]\nurl = "https://x.test/${SECRET}"\nsecret_file = "s"',
        "endpoints.e.url",
    ),
    "folder": ('[kms.age]\nprivate_key_path = "/tmp/${SECRET}"', "age.private_key_path"),
    "traces": ('[kms.traces]\nendpoint = "https://localhost/${SECRET}"', "traces.endpoint"),
    "key": ('[kms.keys]\nk = "transit:${SECRET}"', "keys.k"),
    "bind": ('bind = "${SECRET}.x.test"', "kms.bind"),
}


@pytest.mark.parametrize(("text", "setting"), SENDS_A_VARIABLE.values(), ids=SENDS_A_VARIABLE)
def test_a_found_file_sends_no_variable(text: str, setting: str, here: Path) -> None:
    write(text)

    told = refusal(**SECRET)

    assert f"{setting} uses ${{SECRET}}, " in told
    assert "canary" not in told
    assert_says_how_to_trust(told, here)


SENDS_A_CREDENTIAL = {
    "vault": (VAULT + 'token_file = "/root/.vault-token"', {}, "transit.address", "token_file"),
    "kv": (
        'dev_backend = "vault-kv"\n[kms.vault_kv]\npath = "k"\naddress = "https://x.test"\ntoken_file = "t"',
        {},
        "vault_kv.address",
        "token_file",
    ),
    "cosmian file": (
        COSMIAN + 'server_url = "https://x.test"\napi_key_file = "k"',
        {},
        "server_url",
        "api_key_file",
    ),
    "cosmian variable": (
        COSMIAN + 'server_url = "https://x.test"',
        {"COSMIAN_API_KEY": "canary"},
        "cosmian.server_url",
        "COSMIAN_API_KEY",
    ),
    "cosmian unverified": (
        COSMIAN + "tls_verify = false",
        {"COSMIAN_API_KEY": "canary", "COSMIAN_KMS_URL": "https://mine.test"},
        "cosmian.tls_verify",
        "COSMIAN_API_KEY",
    ),
    "cosmian authority": (
        COSMIAN + 'ca_file = "ca.pem"',
        {"COSMIAN_API_KEY": "canary", "COSMIAN_KMS_URL": "https://mine.test"},
        "cosmian.ca_file",
        "COSMIAN_API_KEY",
    ),
    "aws": (AWS + 'endpoint_url = "https://x.test"', {}, "awskms.endpoint_url", "AWS tools"),
    "aws authority": (AWS + 'ca_file = "ca.pem"', {}, "awskms.ca_file", "AWS tools"),
    "redis authority": (
        '[kms.redis]\nca_file = "ca.pem"',
        {"KMS_REDIS_URL": "rediss://:canary@mine.test"},
        "redis.ca_file",
        "KMS_REDIS_URL",
    ),
    "webhook": (
        '[kms.jobs.endpoints.e]\nurl = "https://x.test"\nsecret_file = "s"',
        {},
        "endpoints.e.url",
        "secret_file",
    ),
    "traces": (
        '[kms.traces]\nenabled = true\nendpoint = "https://localhost"',
        {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=canary"},
        "traces.endpoint",
        "OTEL_EXPORTER_OTLP_HEADERS",
    ),
}


@pytest.mark.parametrize(
    ("text", "environ", "setting", "credential"), SENDS_A_CREDENTIAL.values(), ids=SENDS_A_CREDENTIAL
)
def test_a_found_file_does_not_decide_who_receives_a_credential(
    text: str, environ: dict[str, str], setting: str, credential: str, here: Path
) -> None:
    write(text)

    told = refusal(**environ)

    assert f"{setting} decides who receives " in told
    assert credential in told
    assert "canary" not in told
    assert_says_how_to_trust(told, here)
    assert load(here / FOUND, HOME | environ).kms.port == 9001, "a file that is named may do all this"


MINE = {"KMS_REDIS_URL": "rediss://mine.test", "COSMIAN_KMS_URL": "https://mine.test"}
CHOOSES_A_CREDENTIAL = {
    "awskms.profile": AWS + 'profile = "admin"',
    "keys.k": '[kms.keys]\nk = "awskms:alias/k?region=eu-central-1&profile=admin"',
    "redis.password_file": '[kms.redis]\npassword_file = "/home/ada/.netrc"',
    "redis.client_key_file": '[kms.redis]\nclient_cert_file = "c"\nclient_key_file = "/home/ada/key.pem"',
    "cosmian.api_key_file": COSMIAN + 'api_key_file = "/home/ada/.netrc"',
    "cosmian.client_key_file": COSMIAN
    + 'api_key = "k"\nclient_cert_file = "c"\nclient_key_file = "/home/ada/key.pem"',
}


@pytest.mark.parametrize(("setting", "text"), CHOOSES_A_CREDENTIAL.items(), ids=CHOOSES_A_CREDENTIAL)
def test_a_found_file_chooses_no_credential_of_the_user(setting: str, text: str, here: Path) -> None:
    """Not for servers that the user named either: a file of his could become a password there."""
    write(text)

    told = refusal(**MINE)

    assert f"kms.{setting} chooses a credential of this user" in told
    assert_says_how_to_trust(told, here)
    assert load(here / FOUND, HOME | MINE).kms.port == 9001, "a file that is named may do all this"


def test_a_password_file_goes_to_no_server_of_this_machine() -> None:
    """Any user of this machine may listen there."""
    write('[kms.redis]\nurl = "redis://127.0.0.1:7777"\npassword_file = "/home/ada/.netrc"')

    assert "kms.redis.password_file chooses a credential of this user" in refusal()


DECIDES = {
    "accept_weak": 'accept_weak = ["server.tls_cert"]',
    "state_dir": 'state_dir = "state"',
    "auth.mode": '[kms.auth]\nmode = "none"',
    "auth.mode by a default": '[kms.auth]\nmode = "${XDG_UNSET:-none}"',
    "auth.tokens_path": '[kms.auth]\ntokens_path = "tokens.json"',
    "auth.tokens": '[kms.auth]\ntokens = "file:///tmp/tokens"',
    "auth.issuers": '[kms.auth.issuers.i]\nissuer = "https://x.test"\naudience = "a"',
    "auth.logins": '[kms.auth.logins.approle]\nmethod = "approle"',
    "auth.certificates": '[kms.auth.certificates.c]\nsubject = "DNS:x"\nscopes = ["*"]',
    "server.client_ca": '[kms.server]\nclient_ca = "ca.pem"',
    "server.allowed_hosts": '[kms.server]\nallowed_hosts = ["x.test"]',
    "server.codec_origins": '[kms.server]\ncodec_origins = ["https://x.test"]',
    "server.trusted_proxies": '[kms.server]\ntrusted_proxies = ["10.0.0.0/8"]',
    "server.metrics": '[kms.server]\nmetrics = "open"',
    "server.tls_cert": '[kms.server]\ntls_cert = "c.pem"\ntls_key = "k.pem"',
    "jobs.roots": '[kms.jobs]\nroots = ["/home/ada"]',
    "jobs.buckets": BUCKET,
    "jobs.spool_bucket": '[kms.jobs.spool_bucket]\nurl = "s3://mine/spool"',
    "jobs.spool_dir": '[kms.jobs]\nspool_dir = "/home/ada/.cache"',
    "jobs.spool_identity_path": '[kms.jobs]\nspool_identity_path = "k"',
    "jobs.intake_identity_path": '[kms.jobs]\nintake_identity_path = "k"',
    "audit.path": '[kms.audit]\npath = "audit"',
    "audit.key_path": '[kms.audit]\nkey_path = "k"',
    "audit.signing_key_path": '[kms.audit]\nsigning_key_path = "k"',
    "audit.keep_days": "[kms.audit]\nkeep_days = 1",
    "audit.checkpoint_s": "[kms.audit]\ncheckpoint_s = 999999999",
    "audit.checkpoint_lines": "[kms.audit]\ncheckpoint_lines = 999999999",
    "audit.anchor_redis": "[kms.audit]\nanchor_redis = false",
    "audit.anchor_dir": '[kms.audit]\nanchor_dir = "anchors"',
    "audit.copies": '[kms.audit]\ncopies = "copies"',
    "redis.url": '[kms.redis]\nurl = "redis://x.test"',
    "redis.broker_url": '[kms.redis]\nbroker_url = "amqp://x.test"',
    "traces.endpoint": '[kms.traces]\nenabled = true\nendpoint = "https://x.test"',
}


@pytest.mark.parametrize(("setting", "text"), DECIDES.items(), ids=DECIDES)
def test_a_found_file_decides_neither_callers_nor_files_of_jobs(setting: str, text: str, here: Path) -> None:
    """Its author could have jobs of his encrypt the user's files, or a spool of his choice swept."""
    write(text)

    told = refusal()

    assert f"kms.{setting.split(maxsplit=1)[0]} is not taken from " in told
    assert_says_how_to_trust(told, here)


def test_a_found_file_does_not_replace_the_settings_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even an empty one would switch off what the other demands, such as authentication."""
    machine = tmp_path / "etc.toml"
    machine.write_text("[kms]\nport = 9002\n[kms.auth]\nmode = 'required'\n")
    monkeypatch.setattr(load_module, "SEARCHED", (FOUND, machine))

    assert f"Both {FOUND} and {machine} exist: name the one to read" in refusal()
    assert load(None, HOME | {"KMS_CONFIG": str(machine)}).kms.auth.mode == "required"
    FOUND.unlink()
    assert load(None, HOME).kms.port == 9002


def test_a_socket_in_the_repository_is_no_redis_of_this_machine() -> None:
    write('[kms.redis]\nurl = "unix:///repository/redis.sock"')

    assert "kms.redis.url is not taken from " in refusal()


def test_a_second_broker_behind_one_of_this_machine_is_refused() -> None:
    """Celery takes a list of brokers, by semicolons."""
    write('[kms.redis]\nbroker_url = "amqp://127.0.0.1//;amqp://x.test"')

    assert "kms.redis.broker_url: one URL belongs there" in refusal()


def test_flags_and_variables_may_name_what_a_found_file_may_not() -> None:
    write('state_dir = "state"')

    assert load(None, HOME | {"KMS_STATE_DIR": "/srv/state"}).state_dir == Path("/srv/state")


FITS = {
    "no file of a secret": (VAULT + 'token = "its-own"', {}),
    "variables give address and key": (
        COSMIAN + "tls_verify = true",
        {"COSMIAN_KMS_URL": "https://mine.test", "COSMIAN_API_KEY": "k"},
    ),
    "variables replace its address": (
        COSMIAN + 'server_url = "${COSMIAN_KMS_URL:-https://x.test}"\napi_key = "${COSMIAN_API_KEY}"',
        {"COSMIAN_KMS_URL": "https://mine.test", "COSMIAN_API_KEY": "k"},
    ),
    "the layout of the seed in dev": (
        '[kms.cosmian]\nserver_url = "${COSMIAN_KMS_URL:-https://x.test}"\napi_key = "${COSMIAN_API_KEY}"',
        {},
    ),
    "not in use": (VAULT.replace("dev_", "prod_") + 'token = "${SECRET}"\ntoken_file = "t"', SECRET),
    "names no address": ('environment = "${PROVISIONING_ENV:-dev}"\n[kms.log]\nlevel = "${LEVEL:-info}"', {}),
    "AWS's own endpoint": (AWS, {}),
    "own Redis": ('[kms.redis]\nurl = "redis://127.0.0.1:6379/3"', {}),
}


@pytest.mark.parametrize(("text", "environ"), FITS.values(), ids=FITS)
def test_a_found_file_that_sends_nothing_is_read(text: str, environ: dict[str, str]) -> None:
    write(text)

    assert load(None, HOME | environ).kms.port == 9001


def test_every_setting_of_text_is_withheld_or_known_to_stay_here() -> None:
    """A new setting of text must be sorted: into ``settings_trust``, or into the list above."""
    backends = (leaves(shape, f"kms.{table_of(scheme)}") for scheme, shape in SCHEMES.items())
    texts = {*leaves(KmsSection, "kms"), *chain.from_iterable(backends)}

    assert {where for where in texts if not is_sent(where)} == NAMES_NO_ADDRESS


def leaves(kind: Any, where: str) -> Iterator[str]:  # noqa: ANN401 -- kinds are run-time types
    """The dotted names of all settings that hold free text."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for item in msgspec.structs.fields(kind):
            yield from leaves(item.type, f"{where}.{item.encode_name}")
    elif get_origin(kind) is dict:
        yield from leaves(get_args(kind)[1], where if where == "kms.keys" else f"{where}.*")
    elif kind is str:
        yield where
    else:
        members = [member for member in get_args(kind) if not isinstance(member, str | msgspec.Meta)]
        yield from dict.fromkeys(leaf for member in members for leaf in leaves(member, where))
