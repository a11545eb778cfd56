import contextvars
import io
import json
import logging
import re
from collections.abc import Iterator
from functools import partial
from typing import Literal

import pytest
import structlog
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from kms_core import audit
from kms_core.observability import logs
from kms_core.settings.model import LogSection
from kms_protocol.errors import ConfigurationError
from support.waiting import RealTime

IDENTITY = "AGE-SECRET-KEY-1" + "Q" * 58
HUNTER = "hunter2"
AS_JSON_AND_TEXT = pytest.mark.parametrize("json_lines", [True, False], ids=["json", "text"])


def fail(text: object, _secret: str = "") -> None:
    raise ValueError(text)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where the lines go; afterwards logging is as it was."""
    handlers, level = logging.root.handlers[:], logging.root.level
    levels = {
        name: logging.getLogger(name).level for name in logs.parse_levels("kms_service=info,celery=info")
    }
    yield io.StringIO()
    logging.root.handlers[:] = handlers
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
    logging.root.setLevel(level)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


# -- levels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", {"": "INFO", "kms_core": None}),
        ("info", {"": "INFO", "uvicorn.access": "WARNING", "httpcore2": "WARNING"}),
        (" WARN , kms_core = trace", {"": "WARNING", "kms_core": "DEBUG"}),
        ("kms_service=debug", {"": "INFO", "kms_core": "DEBUG", "kms_api": "DEBUG", "kms_worker": "DEBUG"}),
        ("kms_service=debug,tower_http=debug", {"uvicorn.access": "DEBUG"}),
        ("kms_core::envelope=error", {"kms_core.envelope": "ERROR"}),
        ("kms_service=debug,kms_api=off", {"kms_core": "DEBUG", "kms_api": "Level 60"}),  # the last wins
        ("error", {"celery.app.trace": "ERROR", "botocore": "ERROR"}),
        ("debug", {"celery.worker.strategy": "WARNING"}),  # a line for each message
        ("celery.worker.strategy=info", {"celery.worker.strategy": "INFO"}),
        ("celery.app.trace=debug", {"celery.app.trace": "WARNING"}),  # at INFO, what tasks return
        ("celery.app.trace=error", {"celery.app.trace": "ERROR"}),
    ],
    ids=str,
)
def test_levels(spec: str, expected: dict[str, str | None]) -> None:
    levels = logs.parse_levels(spec)

    assert {
        name: logging.getLevelName(levels[name]) if name in levels else None for name in expected
    } == expected


@pytest.mark.parametrize("spec", ["loud", "info,kms_core=loud", "info,kms_core", "kms_core="])
def test_a_word_that_is_no_level_is_refused(spec: str) -> None:
    with pytest.raises(ConfigurationError, match=r"Part \d of the log level: expected trace, debug"):
        logs.parse_levels(spec)


def test_levels_hold_per_logger(stream: io.StringIO) -> None:
    logs.configure("warn,kms_core=debug", json=True, stream=stream)
    structlog.get_logger("kms_core.envelope").debug("shown")
    structlog.get_logger("kms_api.app").info("hidden")
    logging.getLogger("kombu").info("hidden")

    assert [line["event"] for line in lines(stream)] == ["shown"]


# -- one pipeline ------------------------------------------------------------------------------------


def test_events_and_library_lines_have_one_shape(stream: io.StringIO) -> None:
    log = structlog.get_logger("kms_core.service")  # taken before configure, as modules do
    logs.configure("info", json=True, stream=stream)
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        log.info("key.opened", key_id="payroll")
        logging.getLogger("celery.worker").warning("%s tasks", 3)
    ours, theirs = lines(stream)

    assert ours.pop("time")
    assert ours == {
        "event": "key.opened",
        "key_id": "payroll",
        "level": "info",
        "logger": "kms_core.service",
        "request_id": "r1",
    }
    assert (theirs["event"], theirs["logger"], theirs["request_id"]) == ("3 tasks", "celery.worker", "r1")


def test_every_line_says_for_which_request_and_job_it_was_written(stream: io.StringIO) -> None:
    logs.configure("info", json=True, stream=stream)
    in_request, nowhere = contextvars.Context(), contextvars.Context()
    in_request.run(audit.request_id.set, "r1")
    in_request.run(audit.job_id.set, "j1")
    in_request.run(structlog.get_logger("kms_core").info, "ours")
    in_request.run(logging.getLogger("celery.worker").info, "theirs")
    in_request.run(partial(structlog.get_logger("kms_core").info, "named", job_id="j2"))
    nowhere.run(structlog.get_logger("kms_core").info, "outside")

    ours, theirs, named, outside = lines(stream)
    assert (ours["request_id"], ours["job_id"]) == (theirs["request_id"], theirs["job_id"]) == ("r1", "j1")
    assert named["job_id"] == "j2"
    assert not {"request_id", "job_id"} & outside.keys()


def test_each_line_is_written_once_whatever_handlers_a_library_brought(stream: io.StringIO) -> None:
    theirs = logging.getLogger("uvicorn.error")
    theirs.addHandler(logging.StreamHandler(stream))
    theirs.propagate = False
    logs.configure("info", json=True, stream=stream)
    logs.configure("info", json=True, stream=stream)
    theirs.info("started")

    assert [line["event"] for line in lines(stream)] == ["started"]


def test_text_for_people_has_no_colours_off_a_terminal(stream: io.StringIO) -> None:
    logs.configure("info", json=False, stream=stream)
    structlog.get_logger("kms_core.x").info("key.opened", key_id="payroll")

    assert "key.opened" in stream.getvalue()
    assert "key_id=payroll" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_lines_go_to_stderr(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", json=True)
    structlog.get_logger("kms_core.x").info("here")
    out, err = capsys.readouterr()

    assert (out, json.loads(err)["event"]) == ("", "here")
    assert not stream.getvalue()


@pytest.mark.parametrize(
    ("given", "terminal", "expected"),
    [("auto", True, False), ("auto", False, True), ("json", True, True), ("text", False, False)],
)
def test_format_follows_the_terminal_unless_told(
    given: Literal["auto", "json", "text"], *, terminal: bool, expected: bool
) -> None:
    assert LogSection(format=given).as_json(terminal=terminal) is expected


# -- redaction ---------------------------------------------------------------------------------------


@AS_JSON_AND_TEXT
@pytest.mark.parametrize(
    "fields",
    [
        *({name: "hunter2"} for name in sorted(logs.SECRET_FIELDS)),
        {"Authorization": "hunter2"},
        {"X-Vault-Token": "hunter2"},
        {"body": {"items": [{"plaintext": "hunter2"}]}},
        {"headers": ({"api-key": "hunter2"},)},
        {"chunk": b"hunter2"},
        {"chunk": memoryview(b"hunter2")},
        {"url": "redis://:hunter2@localhost/0"},
        {"url": "https://user:hunter2@kms.test"},
        {"header": "Bearer hunter2"},
    ],
    ids=lambda fields: str(fields).partition(" at 0x")[0],
)
def test_secrets_do_not_reach_a_line(
    stream: io.StringIO, fields: dict[str, object], *, json_lines: bool
) -> None:
    logs.configure("info", json=json_lines, stream=stream)
    structlog.get_logger("kms_core.x").info("event", **fields)

    assert "event" in stream.getvalue()
    assert HUNTER not in stream.getvalue()


@pytest.mark.parametrize("name", ["key_id", "ciphertext_bytes", "context_keys", "token_count"])
def test_names_near_those_of_secrets_stay(stream: io.StringIO, name: str) -> None:
    logs.configure("info", json=True, stream=stream)
    structlog.get_logger("kms_core.x").info("event", **{name: "shown"})

    assert lines(stream)[0][name] == "shown"


@AS_JSON_AND_TEXT
def test_an_age_identity_reaches_no_line_from_anywhere(stream: io.StringIO, *, json_lines: bool) -> None:
    class Holder:
        def __repr__(self) -> str:
            return f"Holder({IDENTITY.lower()})"

    logs.configure("info", json=json_lines, stream=stream)
    log = structlog.get_logger("kms_core.x")
    log.info("event", text=IDENTITY, holder=Holder(), nested=[{"x": IDENTITY}])
    logging.getLogger("uvicorn.error").info("read %s", IDENTITY)
    try:
        fail(IDENTITY)
    except ValueError:
        log.exception("failed")
        logging.getLogger("celery").exception("failed")

    assert stream.getvalue().count(logs.REDACTED) >= 6
    assert "AGE-SECRET-KEY" not in stream.getvalue().upper()


@AS_JSON_AND_TEXT
def test_tracebacks_show_no_local_variables(stream: io.StringIO, *, json_lines: bool) -> None:
    logs.configure("info", json=json_lines, stream=stream)
    try:
        fail(len(HUNTER), HUNTER)
    except ValueError:
        structlog.get_logger("kms_core.x").exception("failed")

    assert "ValueError: 7" in stream.getvalue()
    assert HUNTER not in stream.getvalue()


def test_what_botocore_signs_is_not_logged(stream: io.StringIO) -> None:
    logs.configure("debug,botocore=debug,botocore.auth=debug", json=True, stream=stream)
    request = AWSRequest("POST", "https://kms.eu-west-1.amazonaws.com/", data=b"")
    SigV4Auth(Credentials("AKID", "secret", "hunter2"), "kms", "eu-west-1").add_auth(request)

    assert request.headers["X-Amz-Security-Token"] == "hunter2"
    assert not stream.getvalue()


# -- secrets in text ---------------------------------------------------------------------------------------

PLAINLY = re.compile(
    r"(?<=bearer )[^\s\"',]+|(?<=://)[^/@\s\"']*:[^@\s\"']+(?=@)|AGE-SECRET-KEY-[0-9A-Z-]+"
    r"|kms_[a-z2-7]{10}_[\w-]{43}|eyJ[\w-]+\.eyJ[\w-]+\.[\w-]*",
    re.IGNORECASE,
)
"""What is taken out of text, said in one expression; it takes quadratic time where a look for it fails."""
PIECES = (
    *("://", ":", "/", "@", " ", '"', "x", "-", ".", "bearer ", "eyJ", "eyJh.eyJi.c", "age-secret-key-1Q"),
    "AGE-SECRET-KEY-1" + "Q" * 8,
    "kms_" + "a" * 10 + "_" + "b" * 43,
    "b" * 43,
)


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_what_is_taken_out_of_text_is_what_one_expression_says(text: str) -> None:
    assert logs.scrub(text) == PLAINLY.sub(logs.REDACTED, text)


@pytest.mark.parametrize(
    "piece",
    ["://a", "://a:", "://:", ":", "eyJ", "eyJa.", "eyJa.eyJ", "kms_", "AGE-SECRET-KEY-", "bearer ", "@"],
)
def test_no_text_takes_long_to_be_scrubbed(piece: str) -> None:
    seconds: list[float] = []
    for size in (1_000, 10_000, 100_000):
        text = "://" + piece * (size // len(piece))
        begun = RealTime.processor_s()
        for _ in range(3):
            logs.scrub(text)
        seconds.append(RealTime.processor_s() - begun)
        assert seconds[-1] <= max(seconds[0], 1e-3) * size / 1_000 * 3, seconds
