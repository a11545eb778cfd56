"""What an environment file says, and what it must not."""

import pytest

from kms_cli.commands import env_file
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
        ("# words\n\nA=b=c\r\nB=2\n", {"A": "b=c", "B": "2"}),
        (' {"A": "1", "B": "x\\ny"}', {"A": "1", "B": "x\ny"}),
    ],
)
def test_what_a_file_says(text: str, expected: dict[str, str]) -> None:
    assert env_file.parse(text, "app.env") == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("A=1\nA=2\n", "Line 2 of app.env sets A once more"),
        ("A=1\n\nnot a pair\n", "Line 3 of app.env is not NAME=value"),
        ("1A=1", "Line 1 of app.env is not NAME=value"),
        ("A='open\n", "Line 1 of app.env opens a quote that it does not close"),
        ('A="a" b', "Line 1 of app.env opens a quote"),
        ('{"A": 1}', "app.env is not a JSON object of strings"),
    ],
)
def test_what_says_nothing_is_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        env_file.parse(text, "app.env")


@pytest.mark.parametrize(
    "name",
    [
        "LD_PRELOAD", "LD_LIBRARY_PATH", "DYLD_INSERT_LIBRARIES", "PATH", "PYTHONPATH", "KMS_SERVICE_URL",
        "BASH_ENV", "GIT_SSH_COMMAND", "NODE_OPTIONS", "RUBYOPT", "IFS", "GLIBC_TUNABLES",
        "HOME", "PS4", "PROMPT_COMMAND", "GIT_CONFIG_COUNT", "GIT_ASKPASS", "EDITOR", "PAGER", "LESSOPEN",
        "_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "CLASSPATH", "OPENSSL_CONF", "CORECLR_PROFILER_PATH",
        "DOTNET_STARTUP_HOOKS", "COR_ENABLE_PROFILING", "LUA_INIT_5_4",
    ],
)  # fmt: skip
def test_a_name_that_steers_programs_needs_leave(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"allow it with --allow {name}"):
        env_file.check(name, "1", "app.env", NOBODY)

    env_file.check(name, "1", "app.env", frozenset({name}))


@pytest.mark.parametrize(("name", "value"), [("A-B", "1"), ("", "1"), ("A=B", "1"), ("A", "1\0")])
def test_what_no_environment_holds_is_refused(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest):
        env_file.check(name, value, "app.env", frozenset({name}))


@pytest.mark.parametrize("name", ["DB_PASSWORD", "PATHS", "OLD_PATH", "ENVIRONMENT", "_x", "GIT_TOKEN"])
def test_other_names_are_free(name: str) -> None:
    env_file.check(name, "1", "app.env", NOBODY)
