"""Environment files: ``NAME=value`` lines or a JSON object; knows no key and opens nothing."""

import re
from collections.abc import Iterator
from typing import Final

import msgspec

from kms_protocol.errors import InvalidRequest

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LINE: Final = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")
_SINGLE: Final = re.compile(r"'([^']*)'\s*(?:#.*)?")
_DOUBLE: Final = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(?:#.*)?')
_ESCAPED: Final = re.compile(r"\\(.)")
_MEANING: Final = {"n": "\n", "r": "\r", "t": "\t"}
_STEERS: Final = re.compile(
    r"LD_.*|DYLD_.*|PATH|HOME|IFS|GCONV_PATH|GLIBC_TUNABLES|MALLOC_.*|OPENSSL_(CONF|ENGINES|MODULES)|KMS_.*"
    r"|ENV|SHELL|SHELLOPTS|BASH_ENV|BASH_FUNC.*|BASHOPTS|PS4|PROMPT_COMMAND|ZDOTDIR|MAKEFLAGS"
    r"|EDITOR|VISUAL|PAGER|BROWSER|LESS(OPEN|CLOSE)|SSH_ASKPASS"
    r"|GIT_(SSH.*|EXEC_PATH|CONFIG.*|ASKPASS|EDITOR|SEQUENCE_EDITOR|PAGER|EXTERNAL_DIFF|PROXY_COMMAND|DIR)"
    r"|PYTHON.*|PERL5.*|PERLLIB|RUBY(OPT|LIB)|GEM_(HOME|PATH)|BUNDLE_GEMFILE|NODE_OPTIONS|NODE_PATH"
    r"|_?JAVA_(TOOL_)?OPTIONS|JDK_JAVA_OPTIONS|CLASSPATH|DOTNET_STARTUP_HOOKS|COR(ECLR)?_.*PROFIL.*"
    r"|LUA_(INIT|C?PATH).*|PHPRC|PHP_INI_SCAN_DIR"
)
"""Names that say which code a program loads or runs, or where ``kms`` itself asks."""


def parse(text: str, where: str) -> dict[str, str]:
    """Names and values, in order. Raises InvalidRequest, naming ``where`` and the line, never a value."""
    if text.lstrip().startswith("{"):
        return _json(text, where)
    values: dict[str, str] = {}
    for number, name, value in _lines(text, where):
        if name in values:
            raise InvalidRequest(f"Line {number} of {where} sets {name} once more")
        values[name] = value
    return values


def check(name: str, value: str, where: str, allowed: frozenset[str]) -> None:
    """Refuse what must not come out of a sealed file, which others may have written.

    Raises InvalidRequest for a name that steers programs, unless it is ``allowed``, and for a NUL.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{where} sets a name that no shell would take")
    if _STEERS.fullmatch(name) and name not in allowed:
        raise InvalidRequest(
            f"{where} sets {name}, which steers what programs load or run: allow it with --allow {name}"
        )
    if "\0" in value:
        raise InvalidRequest(f"The value of {name} in {where} holds a NUL, and no environment can")


def _json(text: str, where: str) -> dict[str, str]:
    try:
        return msgspec.json.decode(text, type=dict[str, str])
    except msgspec.DecodeError:
        raise InvalidRequest(f"{where} is not a JSON object of strings") from None


def _lines(text: str, where: str) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines ends them at much else, too
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        found = _LINE.fullmatch(stripped)
        if found is None:
            raise InvalidRequest(f"Line {number} of {where} is not NAME=value")
        yield number, found[1], _value(found[2], f"Line {number} of {where}")


def _value(text: str, place: str) -> str:
    """Bare up to `` #``; in single quotes as it is; in double quotes with backslash escapes."""
    if text[:1] == "'":
        found = _SINGLE.fullmatch(text)
        if found is not None:
            return found[1]
    elif text[:1] == '"':
        found = _DOUBLE.fullmatch(text)
        if found is not None:
            return _ESCAPED.sub(lambda escaped: _MEANING.get(escaped[1], escaped[1]), found[1])
    else:
        return text.split(" #", 1)[0].rstrip()
    raise InvalidRequest(f"{place} opens a quote that it does not close")
