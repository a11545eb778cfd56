import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kms_core.backends import SCHEMES, table_of
from kms_core.backends.age_settings import AgeSection
from kms_core.backends.cosmian.settings import CosmianSection
from kms_core.sections import Section
from kms_core.settings.load import VARIABLES, load
from kms_core.settings.model import KmsSection
from kms_protocol import wire
from kms_protocol.errors import ConfigurationError
from support.settings_files import HOME, read, refusal

EXAMPLE = Path(__file__).parents[3] / "docs/kms.example.toml"
SEED = """
[kms]
dev_backend = "age"
prod_backend = "cosmian"
environment = "${PROVISIONING_ENV:-dev}"

[kms.age]
public_key_path = "~/.config/provisioning/age/public_key.txt"
private_key_path = "~/.config/provisioning/age/private_key.txt"

[kms.cosmian]
server_url = "${COSMIAN_KMS_URL:-https://kms.example.com}"
api_key = "${COSMIAN_API_KEY}"
default_key_id = "provisioning-master-key"
tls_verify = true
"""
COSMIAN = HOME | {
    "PROVISIONING_ENV": "prod",
    "COSMIAN_KMS_URL": "https://kms.test",
    "COSMIAN_API_KEY": "hunter2",
}


# -- defaults ----------------------------------------------------------------------------------------


def test_no_file_is_needed() -> None:
    settings = load(None, HOME)

    assert (settings.environment, settings.active_backend, settings.is_prod) == ("dev", "age", False)
    assert (settings.kms.bind, settings.kms.port) == ("127.0.0.1", 8082)
    assert settings.kms.default_key_id is None
    assert not settings.kms.require_context
    assert settings.backend(AgeSection).accept_foreign
    assert settings.state_dir == Path("/home/ada/.local/state/kms-service")
    assert settings.kms.jobs.spool_dir == settings.state_dir / "spool"
    assert settings.kms.jobs.spool_identity_path == settings.state_dir / "spool.key"
    assert settings.kms.audit.path == settings.state_dir / "audit"
    assert settings.kms.redis.url == settings.kms.redis.broker_url == "redis://127.0.0.1:6379/0"


@pytest.mark.parametrize(
    ("environment", "table", "expected"),
    [
        ("dev", "", True),
        ("dev", "[kms.age]\ndata_keys = false", False),
        ("staging", "[kms.environments.staging]\nbackend = 'age'", False),
        ("prod", "", False),
        ("prod", "[kms.age]\ndata_keys = true", True),
    ],
)
def test_age_gives_data_keys_by_default_in_dev_only(
    tmp_path: Path, environment: str, table: str, expected: bool
) -> None:
    text = f"[kms]\nenvironment = '{environment}'\nprod_backend = 'age'\nallow_age_in_prod = true\n{table}"

    assert read(tmp_path, text).backend(AgeSection).data_keys is expected


def test_the_seed_file_works_in_dev_without_the_cosmian_key(tmp_path: Path) -> None:
    settings = read(tmp_path, SEED)

    assert settings.backend(AgeSection).private_key_path == Path(
        "/home/ada/.config/provisioning/age/private_key.txt"
    )
    assert settings.backend(CosmianSection).api_key is None


def test_the_seed_file_works_in_prod(tmp_path: Path) -> None:
    settings = read(tmp_path, SEED, COSMIAN)

    assert (settings.active_backend, settings.is_prod, settings.kms.require_context) == (
        "cosmian",
        True,
        True,
    )
    assert settings.backend(CosmianSection).server_url == "https://kms.test"
    assert settings.backend(CosmianSection).api_key == "hunter2"
    assert not settings.backend(AgeSection).accept_foreign


def test_the_seed_variables_work_without_a_file() -> None:
    settings = load(None, COSMIAN)

    assert settings.active_backend == "cosmian"
    assert settings.backend(CosmianSection).default_key_id == "provisioning-master-key"


def test_age_keys_follow_a_named_state_directory(tmp_path: Path) -> None:
    for settings in (
        load(None, HOME | {"KMS_STATE_DIR": "/srv/s"}),
        load(None, HOME, overrides={"state_dir": Path("/srv/s")}),
        read(tmp_path, '[kms]\nstate_dir = "/srv/s"'),
    ):
        assert settings.backend(AgeSection).public_key_path == Path("/srv/s/age/public_key.txt")
        assert settings.backend(AgeSection).private_key_path == Path("/srv/s/age/private_key.txt")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HOME": "/h", "XDG_STATE_HOME": "/x"}, "/x/kms-service"),
        ({"HOME": "/h", "XDG_STATE_HOME": "x"}, "/h/.local/state/kms-service"),
        ({"HOME": "/h", "XDG_STATE_HOME": ""}, "/h/.local/state/kms-service"),
    ],
    ids=["xdg", "relative", "empty"],
)
def test_state_directory_by_xdg(environ: dict[str, str], expected: str) -> None:
    assert load(None, environ).state_dir == Path(expected)


def test_without_home_a_state_directory_must_be_named() -> None:
    with pytest.raises(ConfigurationError, match="KMS_STATE_DIR"):
        load(None, {})

    assert load(None, {"KMS_STATE_DIR": "/s"}).backend(AgeSection).public_key_path == Path(
        "/s/age/public_key.txt"
    )


def test_tilde_without_home_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"kms\.state_dir \(from KMS_STATE_DIR\): .*HOME is not set"):
        load(None, {"KMS_STATE_DIR": "~/s"})


# -- search and precedence ---------------------------------------------------------------------------


def test_only_a_named_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here, file = Path("provisioning/config/kms.toml"), tmp_path / "named.toml"
    here.parent.mkdir(parents=True)
    here.write_text("[kms]\nport = 9001")
    file.write_text("[kms]\nport = 9002")

    assert load(None, HOME | {"KMS_CONFIG": ""}).kms.port == 8082
    assert load(None, HOME | {"KMS_CONFIG": str(file)}).kms.port == 9002
    assert load(here, HOME | {"KMS_CONFIG": str(file)}).kms.port == 9001


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_a_named_file_must_be_there(tmp_path: Path, how: str) -> None:
    missing = tmp_path / "absent.toml"
    with pytest.raises(ConfigurationError, match=r"absent\.toml does not exist: .* kms config init > \S"):
        load(missing, HOME) if how == "flag" else load(None, HOME | {"KMS_CONFIG": str(missing)})


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    text, environ = "[kms]\nport = 1001", HOME | {"KMS_PORT": "1002"}

    assert read(tmp_path, "").kms.port == 8082
    assert read(tmp_path, text).kms.port == 1001
    assert read(tmp_path, text, environ).kms.port == 1002
    assert read(tmp_path, text, environ, port=1003).kms.port == 1003
    assert read(tmp_path, text, environ, port=None).kms.port == 1002


@pytest.mark.parametrize("variable", VARIABLES)
def test_every_variable_reaches_its_key(variable: str) -> None:
    redis = {"KMS_REDIS_URL": "redis://v", "KMS_BROKER_URL": "redis://v"}
    text = ({"KMS_PORT": "999", "PROVISIONING_ENV": "development"} | redis).get(variable, "https://v")
    expected = {"KMS_PORT": 999, "PROVISIONING_ENV": "dev", "KMS_STATE_DIR": Path("https://v")} | redis
    settings = load(None, HOME | {variable: text})
    first, *names = VARIABLES[variable].split(".")
    found: object = settings.backends.get(first) or getattr(settings.kms, first)
    for name in names:
        found = getattr(found, name)

    assert found == expected.get(variable, "https://v")


def test_an_empty_variable_counts_as_unset() -> None:
    assert load(None, HOME | {"KMS_BIND": "", "PROVISIONING_ENV": ""}) == load(None, HOME)


def test_kms_log_wins_over_rust_log() -> None:
    assert load(None, HOME | {"KMS_LOG": "warn", "RUST_LOG": "trace"}).kms.log.level == "warn"


def test_the_broker_follows_redis() -> None:
    assert load(None, HOME | {"KMS_REDIS_URL": "rediss://r/1"}).kms.redis.broker_url == "rediss://r/1"
    assert load(None, HOME | {"KMS_BROKER_URL": "amqp://b"}).kms.redis.url == "redis://127.0.0.1:6379/0"

    unix = load(None, HOME, overrides={"redis.url": "unix://u:p@/run/v.sock?db=2"}).kms.redis
    assert unix.broker_url == "redis+socket://u:p@/run/v.sock?virtual_host=2"


# -- variables in strings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "environ", "expected"),
    [
        ("${A}", {"A": "x"}, "x"),
        ("${A:-d}", {}, "d"),
        ("${A:-d}", {"A": ""}, "d"),
        ("${A:-}", {}, ""),
        ("<${A}-${B:-b}>", {"A": "a"}, "<a-b>"),
        ("${A}", {"A": "${B}", "B": "no"}, "${B}"),
        ("$${A}", {"A": "x"}, "${A}"),
        ("$A $", {"A": "x"}, "$A $"),
        ("${A:-redis://h/0?x=y}", {}, "redis://h/0?x=y"),
    ],
    ids=["set", "default", "empty", "empty-default", "two", "not-twice", "escape", "bare", "url"],
)
def test_variables_in_strings(tmp_path: Path, written: str, environ: dict[str, str], expected: str) -> None:
    settings = read(tmp_path, f'[kms.server]\nallowed_hosts = ["{written}"]', HOME | environ)

    assert settings.kms.server.allowed_hosts == (expected,)


def test_variables_stand_for_numbers_flags_and_array_items(tmp_path: Path) -> None:
    text = '[kms]\nport = "${P:-99}"\nrequire_context = "${C}"\n[kms.jobs]\nroots = ["${R}/files"]'
    kms = read(tmp_path, text, HOME | {"C": "true", "R": "/srv"}).kms

    assert (kms.port, kms.require_context, kms.jobs.roots) == (99, True, (Path("/srv/files"),))


@pytest.mark.parametrize(
    "written", ["${A-b}", "${", "${1}", "${A"], ids=["dash", "open", "digit", "unclosed"]
)
def test_malformed_variables_are_refused(tmp_path: Path, written: str) -> None:
    assert "kms.redis.url: write ${NAME}" in refusal(tmp_path, f'[kms.redis]\nurl = "{written}"')


@pytest.mark.parametrize(
    ("text", "variable"),
    [
        ('[kms.redis]\nurl = "${GONE}"', "kms.redis.url uses ${GONE}"),
        ('[kms.age]\npublic_key_path = "${GONE}"', "kms.age.public_key_path uses ${GONE}"),
        ('[kms.keys]\npay = "age:///${GONE}"', "kms.keys.pay uses ${GONE}"),
        ('[kms]\nenvironment = "${GONE}"', "kms.environment uses ${GONE}"),
        (SEED + '[kms.keys]\npay = "cosmian://k"', "kms.cosmian.api_key uses ${COSMIAN_API_KEY}"),
        (SEED.replace(":-dev", ":-prod"), "kms.cosmian.api_key uses ${COSMIAN_API_KEY}"),
    ],
    ids=["redis", "active-backend", "key", "environment", "backend-of-a-key", "active-backend-in-prod"],
)
def test_an_unset_variable_in_use_is_refused(tmp_path: Path, text: str, variable: str) -> None:
    assert f"{variable}, which is not set: export " in refusal(tmp_path, text)


def test_a_variable_of_an_idle_backend_may_be_unset(tmp_path: Path) -> None:
    text = '[kms.age]\npublic_key_path = "${GONE}"\n[kms.cosmian]\nserver_url="https://c"'

    assert read(tmp_path, text, HOME | {"PROVISIONING_ENV": "prod"}).active_backend == "cosmian"


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[kms]\nprot = 1", 'kms.prot is not a setting; did you mean "port"?'),
        ("[kms.server]\nupload = 1", 'did you mean "uploads"?'),
        ("[kms.zzzz]", "kms.zzzz is not a setting"),
        ("[kmz]", "[kmz] is not a setting: everything is below [kms]"),
        ('[kms]\nport = "secret"', "kms.port: expected int, got str"),
        ("[kms]\nport = 0", "kms.port: expected int >= 1"),
        ("[kms]\nallow_age_in_prod = 1", "kms.allow_age_in_prod: expected bool, got int"),
        ("kms = 1", "kms: expected a table"),
        ("[kms]\nage = 'secret'", "kms.age: expected a table"),
        ("[kms]\nredis = 'secret'", "kms.redis: expected a table"),
        ("[kms]\njobs = 'secret'", "kms.jobs: expected a table"),
        (
            "[kms]\ndev_backend = 'aje'",
            "kms.dev_backend: expected one of age, cosmian, transit, vault-kv, awskms; did",
        ),
        ("[kms]\ndev_backend = 'aje'", 'did you mean "age"?'),
        ("[kms.auth]\nmode = 'secret'", "kms.auth.mode: expected one of none"),
        ("[kms.environments.staging]", "kms.environments.staging.backend is missing"),
        ("[kms.environments.prod]\nbackend = 'age'", "kms.environments.prod: set kms.prod_backend instead"),
        ("[kms]\nenvironment = 'pord'", "kms.environment: expected one of dev, prod; did you mean"),
        ("[kms.keys]\n'a b' = 'age:x'", "kms.keys: the name of an entry: expected str matching"),
        ('[kms.keys]\n"pay\\n" = "age:x"', "kms.keys: the name of an entry: expected str matching"),
        ("[kms.keys]\na = 7", "kms.keys.a: expected"),
        ("[kms.jobs]\nroots = 'secret'", "kms.jobs.roots: expected array, got str"),
        ("[kms.jobs]\nroots = [7]", "kms.jobs.roots[0]: expected a path"),
        ("[kms.jobs]\nroots = ['secret']", "kms.jobs.roots[0]: expected an absolute path"),
        ("[kms.age]\npublic_key_path = ''", "kms.age.public_key_path: expected a path"),
        ("kms = secret", "is not valid TOML"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:24],
)
def test_wrong_settings_are_refused_by_path_and_never_echoed(tmp_path: Path, text: str, message: str) -> None:
    detail = refusal(tmp_path, text)

    assert message in detail
    assert str(tmp_path / "kms.toml") in detail
    assert "secret" not in detail


def test_wrong_variables_are_named_and_never_echoed() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(None, HOME | {"KMS_PORT": "secret"})

    assert caught.value.detail == "kms.port (from KMS_PORT): expected int, got str"


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kms.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="is not UTF-8 text"):
        load(tmp_path / "kms.toml", HOME)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("KMS_PROT", '; did you mean "KMS_PORT"?'),
        ("KMS_REDIS", '; did you mean "KMS_REDIS_URL"?'),
        ("KMS_ÿ", ""),
        ("KMS_LISTEN_PORT", ""),
        ("KMS_SERVICE_HOST", ""),
        ("KMS_PORT_X", ""),
    ],
    ids=["typo", "short", "far", "like a link", "a link without address", "a part of a link"],
)
def test_an_unknown_kms_variable_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(None, HOME | {name: "my-host"})

    assert f"{name} is not known{hint}" in caught.value.detail


@pytest.mark.parametrize(
    "links",
    [
        {"KMS_PORT": "tcp://10.0.0.1:8082", "KMS_SERVICE_HOST": "10.0.0.1", "KMS_SERVICE_PORT": "8082"},
        {"KMS_SERVICE_PORT": "tcp://10.0.0.1:8082", "KMS_SERVICE_SERVICE_HOST": "10.0.0.1"},
        {"KMS_SERVICE_SERVICE_PORT_HTTP": "8082", "KMS_REDIS_PORT": "tcp://10.0.0.1:6379"},
        {"KMS_PORT_8082_TCP": "tcp://10.0.0.1:8082", "KMS_PORT_8082_TCP_PROTO": "tcp"},
        {"KMS_PORT_8082_TCP_PORT": "8082", "KMS_PORT_8082_TCP_ADDR": "fd00::1"},
    ],
    ids=["kms", "kms-service", "named-ports", "port", "port-parts"],
)
def test_kubernetes_service_links_are_ignored(links: dict[str, str]) -> None:
    assert load(None, HOME | links) == load(None, HOME)


# -- secrets, shape, example -------------------------------------------------------------------------


def test_no_value_appears_in_repr() -> None:
    settings = load(None, COSMIAN | {"KMS_REDIS_URL": "redis://:pa55@r"})

    assert "KmsSection(…)" in repr(settings.kms)
    assert not {"hunter2", "pa55"} & set(
        re.findall(r"\w+", repr([settings, settings.kms, settings.kms.redis]))
    )
    assert settings.backend(CosmianSection).__rich_repr__() == []


def test_key_ids_have_one_grammar() -> None:
    (kind,) = (item.type for item in msgspec.structs.fields(KmsSection) if item.name == "default_key_id")

    assert repr(wire.KEY_ID_PATTERN) in str(kind)


def sections(shape: type[Section], path: str = "kms") -> Iterator[tuple[str, str]]:
    for item in msgspec.structs.fields(shape):
        if isinstance(item.type, type) and issubclass(item.type, Section):
            yield from sections(item.type, f"{path}.{item.name}")
        else:
            yield path, item.name


def test_the_example_says_the_defaults() -> None:
    assert load(EXAMPLE, HOME) == load(None, HOME)


KEYS = (
    *sections(KmsSection),
    *(key for scheme, shape in SCHEMES.items() for key in sections(shape, f"kms.{table_of(scheme)}")),
)


@pytest.mark.parametrize(("path", "key"), KEYS, ids=str)
def test_the_example_shows_every_key(path: str, key: str) -> None:
    tables = re.split(r"^(?:# )?\[(.+)\]$", EXAMPLE.read_text(), flags=re.MULTILINE)
    body = dict(zip(tables[1::2], tables[2::2], strict=True)).get(path, "")

    assert re.search(rf"^(# )?{key} = ", body, re.MULTILINE) or f"[{path}.{key}" in "".join(
        EXAMPLE.read_text()
    )


def test_the_example_holds_with_its_comments_opened(tmp_path: Path) -> None:
    text = re.sub(r"^# (?=\w+ = |\[)", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    settings = read(tmp_path, text, COSMIAN, environment="staging")

    assert settings.active_backend == "age"
    assert settings.kms.auth.mode == "required"
