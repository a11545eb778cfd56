"""The page at ``/docs``: an OpenAPI document of ours, for people. Knows no route.

No script and nothing of another host: the page works where the service has no way out.
"""

import shlex
from dataclasses import dataclass
from typing import Any, Final

import msgspec

Json = dict[str, Any]
_JSON: Final = frozenset({"application/json", "application/problem+json"})
_MAKES: Final = {"integer": "number"}
_BASE: Final = "http://localhost:8082"


@dataclass(frozen=True, slots=True)
class Type:
    """A type in words; ``shape`` is one of the shapes below the operations, or empty."""

    words: str
    shape: str = ""


@dataclass(frozen=True, slots=True)
class Field:
    """A parameter of an operation or a field of a shape."""

    name: str
    type: Type
    required: bool
    about: str


@dataclass(frozen=True, slots=True)
class RouteAnswer:
    """What an operation answers under one status."""

    status: str
    about: str
    types: tuple[Type, ...]


@dataclass(frozen=True, slots=True)
class RouteEntry:
    """One method of one path."""

    name: str
    method: str
    path: str
    about: str
    scope: str
    is_open: bool
    parameters: tuple[Field, ...]
    takes: tuple[Type, ...]
    example: str
    replies: tuple[RouteAnswer, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """The operations under one tag."""

    name: str
    about: str
    operations: tuple[RouteEntry, ...]


@dataclass(frozen=True, slots=True)
class SchemaEntry:
    """A JSON object that is asked for or answered."""

    name: str
    about: str
    fields: tuple[Field, ...]


def groups(document: Json) -> tuple[Group, ...]:
    """All operations, in the order of the document's tags."""
    operations = [
        (operation["tags"][0], _operation(document, method, path, operation))
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return tuple(
        Group(
            tag["name"], tag["description"], tuple(each for name, each in operations if name == tag["name"])
        )
        for tag in document["tags"]
    )


def shapes(document: Json) -> tuple[SchemaEntry, ...]:
    """All shapes that have a field, or say what they are."""
    return tuple(
        SchemaEntry(name, schema.get("description", ""), _fields(schema))
        for name, schema in document["components"]["schemas"].items()
        if schema.get("properties") or "anyOf" in schema
    )


def _operation(document: Json, method: str, path: str, operation: Json) -> RouteEntry:
    content = operation.get("requestBody", {}).get("content", {})
    return RouteEntry(
        operation["operationId"],
        method.upper(),
        path,
        operation["summary"],
        operation.get("x-kms-scope", ""),
        operation.get("security") == [],
        tuple(
            Field(
                each["name"],
                Type(f"{_type(each['schema']).words}, {each['in']}"),
                each["required"],
                each.get("description", ""),
            )
            for each in operation.get("parameters", ())
        ),
        _types(content),
        _curl(method, path, content),
        tuple(_reply(document, status, given) for status, given in operation["responses"].items()),
    )


def _reply(document: Json, status: str, given: Json) -> RouteAnswer:
    if "$ref" in given:
        given = document["components"]["responses"][_last(given["$ref"])]
    return RouteAnswer(status, given["description"], _types(given.get("content", {})))


def _types(content: Json) -> tuple[Type, ...]:
    return tuple(
        _type(media["schema"]) if name in _JSON else Type(name, _type(media.get("x-kms-line", {})).shape)
        for name, media in content.items()
    )


def _fields(schema: Json) -> tuple[Field, ...]:
    required = schema.get("required", ())
    return tuple(
        Field(name, _type(field), name in required, field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    )


def _type(schema: Json) -> Type:
    if "$ref" in schema:
        name = _last(schema["$ref"])
        return Type(name, name)
    if "anyOf" in schema:
        made = [_type(each) for each in schema["anyOf"]]
        return Type(
            " or ".join(each.words for each in made), next((each.shape for each in made if each.shape), "")
        )
    if "enum" in schema:
        return Type(" | ".join(map(str, schema["enum"])))
    kind: str = schema.get("type", "any value")
    if kind == "array":
        of = _type(schema["items"])
        return Type(f"list of {of.words}", of.shape)
    encoded: str = schema.get("contentEncoding", "")
    return Type(encoded or _MAKES.get(kind, kind))


def _curl(method: str, path: str, content: Json) -> str:
    """A command that works as it stands, but for what is in braces and an install that asks who calls."""
    words = ["curl", *(() if method == "get" else ("-X", method.upper())), f"{_BASE}{path}"]
    if "application/octet-stream" in content:
        words += ["--data-binary", "@file"]
    for name, media in content.items():
        if "example" in media and name == "application/json":
            words += ["-d", msgspec.json.encode(media["example"]).decode()]
    return shlex.join(words)


def _last(ref: str) -> str:
    return ref.rpartition("/")[2]
