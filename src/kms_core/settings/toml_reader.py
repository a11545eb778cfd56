"""Convert a TOML file to typed sections: expand ``${VAR}``, refuse unknown keys and wrong types.

Errors contain the key, the expected type and the nearest known name, never the value.
"""

import difflib
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

import msgspec

from kms_core.secure_files import in_shell
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError

Tree = dict[str, object]
Shape = TypeVar("Shape", bound=msgspec.Struct)

_VARIABLE: Final = re.compile(
    r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|(?P<bad>\$\{)"
)


@dataclass(frozen=True, slots=True)
class FromEnvironment:
    """Text from the variables ``names``, in which ``"8082"`` may be a number."""

    text: str = field(repr=False)
    names: str


@dataclass(frozen=True, slots=True)
class Unset:
    """A string with a ``${VAR}`` that has no value, an error only if it is used."""

    name: str


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean "…"?``, or nothing without a similar name."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


# -- the file ----------------------------------------------------------------------------------------


def read_toml(path: Path) -> Tree:
    """The tables of a TOML file. Raises ConfigurationError, which names the file and, if known, the line."""
    try:
        return tomllib.loads(small_files.text(path))
    except FileNotFoundError as exc:
        text = f"{path} does not exist: correct its name, or make it: kms config init > {in_shell(path)}"
        raise ConfigurationError(text) from exc
    except OSError as exc:
        raise ConfigurationError(f"Cannot read {path}: {exc.strerror}; check the path and its mode") from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{path} is not UTF-8 text") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigurationError(f"{path} is not valid TOML: {exc}") from exc
    except (ValueError, RecursionError):  # of tomllib too: its own of int(), and where nesting has no end
        raise ConfigurationError(f"{path}: a number is too long, or tables are nested too deep") from None


def table(tree: Tree, name: str, where: str) -> Tree:
    """The table ``name`` of ``tree``, created if absent, for changes in place."""
    found = tree.setdefault(name, {})
    if not isinstance(found, dict):
        raise ConfigurationError(f"{where}{name}: expected a table")
    return found


# -- variables ---------------------------------------------------------------------------------------


def expand(value: object, environ: Mapping[str, str], where: str) -> object:
    """A copy with ``${VAR}`` and ``${VAR:-default}`` replaced in every string; ``$${`` means ``${``.

    An empty variable counts as unset (POSIX ``:-``). Values are not expanded again.
    """
    if isinstance(value, dict):
        return {name: expand(item, environ, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [expand(item, environ, f"{where}[{index}]") for index, item in enumerate(value)]
    return _expand_text(value, environ, where) if isinstance(value, str) else value


def _expand_text(text: str, environ: Mapping[str, str], where: str) -> object:
    found = list(_VARIABLE.finditer(text))
    if any(match["bad"] for match in found):
        raise ConfigurationError(f"{where}: write ${{NAME}} or ${{NAME:-default}}, and $${{ for a plain ${{")
    names = [match["name"] for match in found if match["name"]]
    for match in found:
        if match["name"] and match["default"] is None and not environ.get(match["name"]):
            return Unset(match["name"])

    def value(match: re.Match[str]) -> str:
        return environ.get(match["name"]) or match["default"] or "" if match["name"] else "${"

    expanded = _VARIABLE.sub(value, text)
    return FromEnvironment(expanded, ", ".join(names)) if names else expanded


# -- types -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SectionReader:
    """Converts tables to sections, strictly. ``home`` replaces ``~``; None if it is unknown."""

    home: str | None

    def section(
        self, shape: type[Shape], value: object, where: str, *, elsewhere: Collection[str] = ()
    ) -> Shape:
        """A table as a section; ``elsewhere`` are known keys that are read by another call.

        Raises ConfigurationError for an unknown or missing key and for a wrong type.
        """
        fields = {item.encode_name: item for item in msgspec.structs.fields(shape)}
        given = {name: item for name, item in _as_table(value, where).items() if name not in elsewhere}
        for name in given.keys() - fields.keys():
            raise ConfigurationError(f"{where}.{name} is not a setting{nearest(name, (*fields, *elsewhere))}")
        for name, item in fields.items():
            if item.required and name not in given:
                raise ConfigurationError(f"{where}.{name} is missing")
        return shape(
            **{name: self.value(fields[name].type, item, f"{where}.{name}") for name, item in given.items()}
        )

    def value(self, kind: Any, value: object, where: str) -> Any:  # noqa: ANN401 - kinds are run-time types
        """``value`` as ``kind``: a section, a table of them, an array or a single value."""
        if get_origin(kind) is dict:
            key_kind, item_kind = get_args(kind)
            return {
                self._single(key_kind, key, f"{where}: the name of an entry"): self.value(
                    item_kind, item, f"{where}.{key}"
                )
                for key, item in _as_table(value, where).items()
            }
        shape = _section_of(kind)
        if shape is not None and (shape is kind or isinstance(value, Mapping)):
            return self.section(shape, value, where)
        if get_origin(kind) is tuple and isinstance(value, list | tuple):
            item_kind, _ = get_args(kind)
            return tuple(self.value(item_kind, item, f"{where}[{at}]") for at, item in enumerate(value))
        return self._single(kind, value, where)

    def _single(self, kind: Any, value: object, where: str) -> Any:  # noqa: ANN401 - as above
        if isinstance(value, Unset):
            raise ConfigurationError(
                f"{where} uses ${{{value.name}}}, which is not set: export {value.name}, or write "
                f"${{{value.name}:-default}}"
            )
        from_environment = isinstance(value, FromEnvironment)
        if isinstance(value, FromEnvironment):
            where, value = f"{where} (from {value.names})", value.text
        try:
            return msgspec.convert(value, kind, strict=not from_environment, dec_hook=self._path)
        except msgspec.ValidationError as exc:
            raise ConfigurationError(f"{where}: {_expectation(kind, value, str(exc))}") from None
        except UnicodeEncodeError:  # bytes of the environment that are no text
            raise ConfigurationError(f"{where}: expected text in UTF-8") from None

    def _path(self, _kind: type, value: object) -> Path:
        """Decoding hook for paths: msgspec puts the text of a ValueError into its ValidationError."""
        if isinstance(value, Path):
            return value
        if not isinstance(value, str) or not value:
            raise ValueError("Expected a path")
        if value != "~" and not value.startswith("~/"):
            return Path(value)
        if not self.home:
            raise ValueError("Expected a path without ~, since HOME is not set")
        return Path(self.home, value[2:])


def _section_of(kind: Any) -> type[msgspec.Struct] | None:  # noqa: ANN401 - as above
    """The section that a table becomes: ``kind`` itself, or among the members of a union."""
    members = (each for each in (kind, *get_args(kind)) if isinstance(each, type))
    return next((each for each in members if issubclass(each, msgspec.Struct)), None)


def _as_table(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{where}: expected a table")
    return value


def _expectation(kind: Any, value: object, message: str) -> str:  # noqa: ANN401 - as above
    """The expected type, from msgspec's message unless that quotes the value."""
    if message.startswith("Expected "):
        return "e" + message[1:].replace("`", "")
    choices = [str(choice) for choice in _choices(kind)]
    return f"expected one of {', '.join(choices)}{nearest(str(value), choices)}"


def _choices(kind: Any) -> Iterable[object]:  # noqa: ANN401 - as above
    if get_origin(kind) is Literal:
        return get_args(kind)
    return [choice for member in get_args(kind) for choice in _choices(member)]
