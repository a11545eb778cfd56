"""What an environment file says, and what it must not."""

import pytest

from kms_cli.commands import run
from kms_protocol.errors import InvalidRequest

NOBODY: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A=1", {"A": "1"}),
        ("  export A = b c  # words", {"A": "b c"}),
        ("A=b#c", {"A": "b#c"}),
        ("A=", {"A": ""}),
        ("A=''", {"A": ""}),
        ("A='b # \\n' # words", {"A": "b # \\n"}),
        ('A="b \\"c\\" \\\\ # \\n" # words', {"A": 'b "c" \\ # \n'}),
        ("A='b\u2028B=2\x0bC=3\x85D=4'", {"A": "b\u2028B=2\x0bC=3\x85D=4"}),
        ("A=b\u2028B=2", {"A": "b\u2028B=2"}),
        ("A='1\n2'\nB=3", {"A": "1\n2", "B": "3"}),
        ("A='it\\'s'", {"A": "it's"}),
        ('A=${HOME}-$B\nB="${A}"', {"A": "${HOME}-$B", "B": "${A}"}),
        ("A=  # words", {"A": ""}),
        ("# words\n\nA=b=c\r\nB=2\n", {"A": "b=c", "B": "2"}),
        (' {"A": "1", "B": "x\\ny"}', {"A": "1", "B": "x\ny"}),
    ],
)
def test_what_a_file_says(text: str, expected: dict[str, str]) -> None:
    assert run.parse(text, "app.env") == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("A=1\nA=2\n", "Line 2 of app.env sets A a second time"),
        ("A=1\n\nnot a pair\n", "Line 3 of app.env is not NAME=value"),
        ("1A=1", "Line 1 of app.env is not NAME=value"),
        ("A", "Line 1 of app.env is not NAME=value"),
        ("=1", "Line 1 of app.env is not NAME=value"),
        ("'A B'=1", "Line 1 of app.env is not NAME=value"),
        ("A='open\n", "Line 1 of app.env is not NAME=value, or does not close a quote"),
        ('A="a" b', "Line 1 of app.env is not NAME=value, or does not close a quote"),
        ("B='1\n2'\n\nA='open\n", "Line 4 of app.env"),
        ('{"A": 1}', "app.env is not a JSON object of strings"),
    ],
)
def test_what_says_nothing_is_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        run.parse(text, "app.env")


@pytest.mark.parametrize(
    "name",
    [
        "LD_PRELOAD", "LD_LIBRARY_PATH", "DYLD_INSERT_LIBRARIES", "PATH", "PYTHONPATH", "KMS_SERVICE_URL",
        "BASH_ENV", "GIT_SSH_COMMAND", "NODE_OPTIONS", "RUBYOPT", "IFS", "GLIBC_TUNABLES",
        "HOME", "PS4", "PROMPT_COMMAND", "GIT_CONFIG_COUNT", "GIT_ASKPASS", "EDITOR", "PAGER", "LESSOPEN",
        "_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "CLASSPATH", "OPENSSL_CONF", "CORECLR_PROFILER_PATH",
        "DOTNET_STARTUP_HOOKS", "COR_ENABLE_PROFILING", "LUA_INIT_5_4",
        "KUBECONFIG", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "CLOUDSDK_PYTHON", "DOCKER_CONFIG",
        "HELM_PLUGINS", "TF_CLI_CONFIG_FILE", "ANSIBLE_CONFIG", "XDG_CONFIG_HOME", "GIT_TEMPLATE_DIR",
        "GIT_COMMON_DIR", "GOFLAGS", "GOENV", "GOROOT", "CC", "CXX", "RUSTC_WRAPPER", "CARGO_BUILD_RUSTC",
        "CARGO_HOME", "JAVA_HOME", "JAVA_OPTS", "MAVEN_OPTS", "MAVEN_ARGS", "GRADLE_OPTS", "ERL_ZFLAGS",
        "npm_config_node_options", "NPM_CONFIG_SCRIPT_SHELL",
        "GNUMAKEFLAGS", "MAKEFILES", "TAR_OPTIONS", "RUSTFLAGS", "RUSTDOCFLAGS", "CGO_LDFLAGS",
        "CARGO_ENCODED_RUSTFLAGS", "CFLAGS", "CMAKE_TOOLCHAIN_FILE", "SBT_OPTS", "KUBE_EDITOR",
        "SYSTEMD_PAGER", "LESS", "LESSKEY_CONTENT", "SVN_SSH", "HGRCPATH", "ANSIBLE_INVENTORY",
        "ANSIBLE_VAULT_PASSWORD_FILE", "ANSIBLE_PYTHON_INTERPRETER", "HELM_DATA_HOME", "VAULT_CONFIG_PATH",
        "DOTNET_ROOT", "GNUPGHOME", "KRB5_CONFIG", "YARN_YARN_PATH",
        "RESTIC_PASSWORD_COMMAND", "BORG_PASSCOMMAND", "BORG_RSH", "SOPS_AGE_KEY_CMD", "SOPS_GPG_EXEC",
        "RSYNC_CONNECT_PROG", "ZIPOPT", "PYTEST_ADDOPTS", "PYTEST_PLUGINS", "GUNICORN_CMD_ARGS",
        "KUBECTL_EXTERNAL_DIFF", "SSH_SK_HELPER", "SSH_SK_PROVIDER", "SSH_PKCS11_HELPER", "GOAUTH",
        "GOCACHEPROG", "GIT_PROXY_COMMAND", "GIT_EXTERNAL_DIFF",
        "VIMINIT", "MANPAGER", "RSYNC_RSH", "SUDO_ASKPASS", "PSQLRC", "R_PROFILE_USER",
        "FPATH", "JAVACMD", "PIP_CONFIG_FILE", "AWKLIBPATH", "ERL_LIBS", "GUILE_LOAD_PATH", "JULIA_LOAD_PATH",
        "CAML_LD_LIBRARY_PATH", "GST_PLUGIN_PATH", "PACKER_PLUGIN_PATH", "LIBMYSQL_PLUGIN_DIR",
        "GIO_EXTRA_MODULES",
    ],
)  # fmt: skip
def test_a_name_that_steers_programs_needs_leave(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"allow it with --allow {name}"):
        run.check(name, "1", "app.env", NOBODY)

    run.check(name, "1", "app.env", frozenset({name}))


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY", "CARGO_REGISTRY_TOKEN", "NPM_TOKEN", "NPM_CONFIG__AUTH", "TF_VAR_password",
        "ANSIBLE_VAULT_PASSWORD", "DOCKER_PASSWORD", "GITHUB_TOKEN", "GOOGLE_API_KEY", "PGPASSWORD", "CCID",
        "PIP_INDEX_URL", "LESSON", "EDITOR_TOKEN", "PAGERDUTY_TOKEN", "FEATURE_FLAGS", "HELM_KEY",
        "RESTIC_PASSWORD", "BORG_PASSPHRASE", "SOPS_AGE_KEY", "SSH_KEY", "EXEC_TOKEN", "COMMAND_KEY",
        "DB_PASSWORD", "PATHS", "OLD_PATH", "ENVIRONMENT", "_x", "GIT_TOKEN",
    ],
)  # fmt: skip
def test_a_name_of_a_secret_needs_no_leave(name: str) -> None:
    run.check(name, "1", "app.env", NOBODY)


def test_with_names_given_no_other_passes() -> None:
    only = frozenset({"DB_PASSWORD", "PATH"})
    run.check("DB_PASSWORD", "1", "app.env", NOBODY, only)
    run.check("PATH", "1", "app.env", NOBODY, only)

    for name in ("db_password", "DB_PASSWORD2", "LD_PRELOAD", "NOT_ON_ANY_LIST"):
        with pytest.raises(InvalidRequest, match=f"app.env sets {name}, which is none of --only"):
            run.check(name, "1", "app.env", NOBODY, only)


@pytest.mark.parametrize(("name", "value"), [("A-B", "1"), ("", "1"), ("A=B", "1"), ("A", "1\0")])
def test_what_no_environment_holds_is_refused(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest):
        run.check(name, value, "app.env", frozenset({name}))
