"""The OpenAPI document, without a service: whole, valid, and the same as the one that is served."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from fastapi import Response
from openapi_spec_validator import OpenAPIV31SpecValidator

from kms_api.problems import MEDIA_TYPE
from kms_api.routing import OPEN, Call, Router
from kms_protocol import admin, wire
from kms_protocol.context import Context
from kms_protocol.errors import InvalidContext
from support.openapi_check import FILE
from support.routes import RULES

ROOT: Final = Path(__file__).parents[2]
Json = dict[str, Any]
SCRIPT: Final = runpy.run_path(str(ROOT / "scripts/openapi_document.py"))
page, DOCUMENTED, EXAMPLES = SCRIPT["page"], SCRIPT["DOCUMENTED"], SCRIPT["EXAMPLES"]
PAGE: Json = page(DOCUMENTED)
OPERATIONS = [
    (method.upper(), path, operation)
    for path, operations in PAGE["paths"].items()
    for method, operation in operations.items()
]
EVERY = {
    shape
    for module in (admin, wire)
    for shape in vars(module).values()
    if isinstance(shape, type) and issubclass(shape, wire.Shape)
} - {wire.Shape, wire.Body, wire.Answer, wire.UsedKey}  # no bodies over HTTP
IDS = [f"{method} {path}" for method, path, _ in OPERATIONS]
each_operation = pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=IDS)


def response(operation: Json, status: str) -> Json:
    said = operation["responses"][status]
    found: Json = PAGE["components"]["responses"][said["$ref"].rpartition("/")[2]] if "$ref" in said else said
    return found


def test_document_is_valid_openapi() -> None:
    assert list(OpenAPIV31SpecValidator(PAGE).iter_errors()) == []


def test_the_service_serves_the_document() -> None:
    assert json.loads(FILE.read_text()) == json.loads(json.dumps(PAGE)), "run scripts/openapi"


def test_every_route_of_the_table_is_documented_and_no_other() -> None:
    documented = {(method, path.removeprefix(wire.PREFIX)) for method, path, _ in OPERATIONS}

    assert documented == RULES.keys()


def test_route_without_a_description_is_refused() -> None:
    router = Router("silent")

    @router.stream("GET", "/silent", OPEN)
    async def silent(call: Call[None]) -> Response:
        raise NotImplementedError

    with pytest.raises(TypeError, match="/silent has no description"):
        page({"": [router]})


def test_operation_ids_differ() -> None:
    ids = [operation["operationId"] for _, _, operation in OPERATIONS]

    assert len(ids) == len(set(ids))


def test_every_shape_of_the_wire_is_in_it() -> None:
    assert {shape.__name__ for shape in EVERY} <= PAGE["components"]["schemas"].keys()


def test_descriptions_of_shapes_are_not_indented_on_any_python() -> None:
    said = {name: shape.get("description", "") for name, shape in PAGE["components"]["schemas"].items()}

    assert "\n\n" in said["JobIn"]
    assert [name for name, text in said.items() if re.search(r"^ ", text, re.MULTILINE)] == []


def test_each_example_is_that_of_a_shape() -> None:
    assert EXAMPLES.keys() <= {shape.__name__ for shape in EVERY}


@pytest.mark.parametrize(
    "shape",
    sorted((shape for shape in EVERY if shape.__name__ in EXAMPLES), key=str),
    ids=lambda shape: shape.__name__,
)
def test_example_of_a_shape_has_that_shape(shape: type[wire.Shape]) -> None:
    example = EXAMPLES[shape.__name__]
    decoded = msgspec.json.decode(json.dumps(example), type=shape)

    if issubclass(shape, wire.Answer):
        assert example.items() <= json.loads(wire.encode(decoded)).items()
    assert PAGE["components"]["schemas"][shape.__name__]["examples"] == [example]


def test_answers_of_operations_have_examples() -> None:
    answers = {
        media["schema"]["$ref"].rpartition("/")[2]
        for _, _, operation in OPERATIONS
        for status, answer in operation["responses"].items()
        if status.startswith("2")
        for media in answer["content"].values()
        if "$ref" in media["schema"]
    }

    assert {name for name in answers if "examples" not in PAGE["components"]["schemas"][name]} == set()


def test_each_value_has_a_type_as_generators_need_it() -> None:
    parts = [*parts_of(PAGE["components"]["schemas"]), *parts_of(PAGE["paths"])]
    untyped = [part for part in parts if part.keys() & {"enum", "const"} and "type" not in part]

    assert untyped == []
    assert [part for part in parts if "default" in part and part["default"] is None] == []
    assert all(part.get("format") == "byte" for part in parts if part.get("contentEncoding") == "base64")


def test_good_answers_of_an_operation_have_one_type() -> None:
    """Clients of openapi-generator have one return type for an operation."""
    for _, path, operation in OPERATIONS:
        good = [
            answer["content"] for status, answer in operation["responses"].items() if status.startswith("2")
        ]
        assert {json.dumps(one.get("application/json", {}).get("schema")) for one in good} == {
            json.dumps(good[0].get("application/json", {}).get("schema"))
        }, path


def parts_of(part: Any) -> Iterator[Json]:  # noqa: ANN401 -- any JSON
    """All objects in a part of the document, itself included."""
    if isinstance(part, dict):
        yield part
    for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from parts_of(each)


@each_operation
def test_answers_are_documented_with_their_shapes_and_codes(method: str, path: str, operation: Json) -> None:
    del method, path
    said = {status: response(operation, status)["content"] for status in operation["responses"]}
    refused = {status: content for status, content in said.items() if MEDIA_TYPE in content}

    assert any(status.startswith("2") for status in said)
    assert all(said.values())
    assert {"403", "500"} <= refused.keys()
    for status, content in refused.items():
        assert content[MEDIA_TYPE]["examples"].keys() == set(response(operation, status)["x-kms-codes"])


@each_operation
def test_credential_is_asked_for_as_the_route_table_says(method: str, path: str, operation: Json) -> None:
    rule = RULES[method, path.removeprefix(wire.PREFIX)]

    assert ("401" in operation["responses"]) != rule.open
    assert (operation.get("security") == []) == rule.open
    assert operation.get("x-kms-scope") == rule.operation


def test_doors_are_those_of_the_gate() -> None:
    schemes = PAGE["components"]["securitySchemes"]

    assert {scheme.get("name", scheme.get("scheme", scheme["type"])) for scheme in schemes.values()} == {
        "bearer",
        "X-API-Key",
        "X-Vault-Token",
    }
    assert (
        "client certificate" in PAGE["info"]["description"]
    )  # of the connection: nothing that a caller sends
    assert PAGE["security"] == [{name: []} for name in schemes]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("", True),
        ("env=prod,service=api", True),
        ("env=, service = a b", True),
        ("a=b=c", True),
        ("env", False),
        ("=prod", False),
        ("kms:x=1", False),
        ("a=b,", False),
        ("a=\n", False),
    ],
)
def test_pattern_of_a_context_is_the_grammar(text: str, is_one: bool) -> None:
    pattern = PAGE["components"]["schemas"]["ContextText"]["pattern"]

    assert bool(re.search(pattern.replace("$", r"\Z"), text)) == is_one
    if is_one:
        Context.parse(text)
    else:
        with pytest.raises(InvalidContext):
            Context.parse(text)
