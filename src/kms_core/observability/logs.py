"""Logging: one pipeline for events of the service and lines of its libraries, with secrets redacted.

Events have names and fields: ``log.info("key.opened", key_id=…, scheme=…)``. Fields with the names of secrets
are blanked, and bytes appear as their length. A last pass over the finished line removes text that looks like
an age identity, a token or a password in a URL.
"""

import logging
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Final, TextIO

import structlog
from structlog.stdlib import BoundLogger, ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

from kms_protocol.errors import ConfigurationError

REDACTED: Final = "[redacted]"
SECRET_FIELDS: Final = frozenset(
    {
        "api_key",
        "authorization",
        "ciphertext",
        "context",
        "cookie",
        "data_key",
        "file_key",
        "identity",
        "password",
        "plaintext",
        "private_key",
        "secret",
        "token",
    }
)
OFF: Final = logging.CRITICAL + 10
LEVELS: Final = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": OFF,
}
ACCESS: Final = "uvicorn.access"
TARGETS: Final = {  # names of Rust crates, as of the first version of the service
    "kms_service": ("kms_core", "kms_api", "kms_worker", "kms_client", "kms_cli"),
    "tower_http": (ACCESS,),
}
UNLESS_NAMED: Final = {
    ACCESS: logging.WARNING,
    "celery.worker.strategy": logging.WARNING,  # a line for each message; our events have the job's id
    "httpcore2": logging.WARNING,
}
AT_LEAST: Final = {
    "celery.app.trace": logging.WARNING,  # at INFO it prints what a task returns
    "botocore": logging.INFO,  # at DEBUG it prints AWS session tokens
    "botocore.auth": logging.INFO,
}

_IDS: Final[dict[str, ContextVar[str]]] = {}
# A failed match of a password or a JWT would be tried again from every position in the same run of
# characters. So the whole run is matched, and searched once for other secrets: time is linear in the text.
_OF_ONE_WORD: Final = r"AGE-SECRET-KEY-[0-9A-Z-]+|kms_[a-z2-7]{10}_[\w-]{43}|kmsl_[\w-]++(?:\.[\w-]*+)?"
_JWT: Final = r"(?P<word>eyJ[\w-]++)(?P<rest>\.eyJ[\w-]++\.[\w-]*+)?"
_LOGIN: Final = r"(?<=://)(?P<login>[^/:@\s\"']*+:[^@\s\"']++)(?P<at>(?=@))?"
_WORDS: Final = re.compile(_OF_ONE_WORD, re.IGNORECASE)
_TOKENS: Final = re.compile(f"{_OF_ONE_WORD}|{_JWT}", re.IGNORECASE)
_IN_TEXT: Final = re.compile(
    rf"(?<=bearer )[^\s\"',]+|{_LOGIN}|{_OF_ONE_WORD}|{_JWT}",
    re.IGNORECASE,
)


def identify(**ids: ContextVar[str]) -> None:
    """Add the values of these variables to every later line, as fields with these names."""
    _IDS.update(ids)


def configure(level_spec: str, *, json: bool, stream: TextIO | None = None) -> None:
    """Write the lines of all loggers to ``stream`` (stderr), as JSON or in a format for people.

    Raises as ``parse_levels`` for its ``level_spec``. A later call replaces the configuration.
    """
    levels = parse_levels(level_spec)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_formatter(json=json, colors=handler.stream.isatty()))
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in {"uvicorn", "celery"}:
            logger.handlers.clear()  # or every line would be written a second time, with secrets
            logger.propagate = True
    logging.root.handlers[:] = [handler]
    structlog.configure(
        processors=_PIPELINE,
        wrapper_class=BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def parse_levels(spec: str) -> dict[str, int]:
    """Logger names to levels; ``""`` is the root.

    The grammar is that of ``RUST_LOG``: directives separated by commas, each a level for all loggers or
    ``target=level``, for example ``warn,kms_service=debug``. A target is the name of a logger, with ``::`` or
    ``.``; ``kms_service`` stands for all packages of the service, ``tower_http`` for the access log. Levels:
    trace (as debug), debug, info, warn, error, off. The default is info.

    Raises ConfigurationError for an unknown level.
    """
    named: dict[str, int] = {}
    for number, directive in enumerate(filter(None, map(str.strip, spec.split(","))), start=1):
        target, _, word = directive.rpartition("=")
        if word.strip().lower() not in LEVELS:
            raise ConfigurationError(
                f"Part {number} of the log level: expected {', '.join(LEVELS)}, or logger=level "
                "(KMS_LOG, RUST_LOG or [kms.log] level)"
            )
        target = target.strip().replace("::", ".")
        named |= dict.fromkeys(TARGETS.get(target, (target,)), LEVELS[word.strip().lower()])
    levels = {"": logging.INFO, **UNLESS_NAMED, **named}
    return levels | {name: max(level, levels.get(name, levels[""])) for name, level in AT_LEAST.items()}


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Blank fields with the name of a secret, at any depth, and replace bytes by their length."""
    return {name: _redacted(name, value) for name, value in event.items()}


def scrub(text: str) -> str:
    """Remove age identities, bearer tokens and passwords in URLs from a text."""
    return _IN_TEXT.sub(_scrubbed_login, text)


def _scrubbed_login(found: re.Match[str]) -> str:
    if found["login"] and found["at"] is None:
        return _TOKENS.sub(_scrubbed_token, found["login"])
    return _scrubbed_token(found)


def _scrubbed_token(found: re.Match[str]) -> str:
    if found["word"] and not found["rest"]:
        return _WORDS.sub(REDACTED, found["word"])
    return REDACTED


def _redacted(name: str, value: object) -> object:
    if _names_a_secret(name):
        return REDACTED
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{memoryview(value).nbytes} bytes>"
    if isinstance(value, Mapping):
        return {str(key): _redacted(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted("", item) for item in value]
    return value


def _names_a_secret(name: str) -> bool:
    plain = name.lower().replace("-", "_")
    return plain in SECRET_FIELDS or any(plain.endswith(f"_{secret}") for secret in SECRET_FIELDS)


def _identified(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for name, variable in _IDS.items():
        if held := variable.get():
            event.setdefault(name, held)
    return event


_ABOUT: Final[list[Processor]] = [
    structlog.contextvars.merge_contextvars,
    _identified,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
]
_PIPELINE: Final[list[Processor]] = [
    structlog.stdlib.filter_by_level,
    *_ABOUT,
    redact,
    ProcessorFormatter.wrap_for_formatter,
]


def _formatter(*, json: bool, colors: bool) -> logging.Formatter:
    render: Processor = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.dev.ConsoleRenderer(
            colors=colors,
            timestamp_key="time",
            exception_formatter=structlog.dev.plain_traceback,  # the pretty ones print local variables
        )
    )

    def line(logger: WrappedLogger, method: str, event: EventDict) -> str:
        return scrub(str(render(logger, method, event)))

    return ProcessorFormatter(
        foreign_pre_chain=[*_ABOUT, redact],
        processors=[ProcessorFormatter.remove_processors_meta, structlog.processors.format_exc_info, line],
    )
