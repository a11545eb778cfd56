"""The OpenAPI document, without a service: whole, valid, and the same as the copy in docs."""

import json
import re
from typing import Any

import msgspec
import pytest
from fastapi.routing import APIRouter
from openapi_spec_validator import OpenAPIV31SpecValidator

from documented import FILE
from kms_api import app, routing
from kms_api.errors.problems import MEDIA_TYPE
from kms_api.openapi import document, examples
from kms_api.routing import RULES, ScopedRoute
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import InvalidContext

Json = dict[str, Any]
PAGE: Json = document.page(app.DOCUMENTED)
OPERATIONS = [
    (method.upper(), path, operation)
    for path, operations in PAGE["paths"].items()
    for method, operation in operations.items()
]
IDS = [f"{method} {path}" for method, path, _ in OPERATIONS]
each_operation = pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=IDS)


def response(operation: Json, status: str) -> Json:
    said = operation["responses"][status]
    found: Json = PAGE["components"]["responses"][said["$ref"].rpartition("/")[2]] if "$ref" in said else said
    return found


def test_document_is_valid_openapi() -> None:
    assert list(OpenAPIV31SpecValidator(PAGE).iter_errors()) == []


def test_copy_in_docs_is_the_document() -> None:
    assert json.loads(FILE.read_text()) == json.loads(json.dumps(PAGE)), "run scripts/openapi"


def test_every_route_of_the_table_is_documented_and_no_other() -> None:
    hidden = {
        (method, route.path)
        for routers in app.DOCUMENTED.values()
        for router in routers
        for route in router.routes
        if isinstance(route, ScopedRoute) and not route.include_in_schema
        for method in route.methods or ()
    }

    documented = {(method, path.removeprefix(wire.PREFIX)) for method, path, _ in OPERATIONS}

    assert documented == RULES.keys() - hidden


def test_route_that_says_nothing_of_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScopedRoute, "table", {("GET", "/silent"): routing.OPEN})
    router = APIRouter(route_class=ScopedRoute)

    @router.get("/silent")
    async def silent() -> None: ...

    with pytest.raises(TypeError, match="/silent says nothing of itself"):
        document.page({"": [router]})


def test_operation_ids_differ() -> None:
    ids = [operation["operationId"] for _, _, operation in OPERATIONS]

    assert len(ids) == len(set(ids))


def test_every_shape_of_the_wire_is_in_it() -> None:
    shapes = {
        name
        for name, shape in vars(wire).items()
        if isinstance(shape, type) and issubclass(shape, wire.Answer | wire.Body)
    } - {"Answer", "Body"}

    assert shapes <= PAGE["components"]["schemas"].keys()


def test_descriptions_of_shapes_are_not_indented_on_any_python() -> None:
    said = {name: shape.get("description", "") for name, shape in PAGE["components"]["schemas"].items()}

    assert "\n\n" in said["JobIn"]
    assert [name for name, text in said.items() if re.search(r"^ ", text, re.MULTILINE)] == []


@pytest.mark.parametrize("name", examples.OF_SHAPES)
def test_examples_of_an_answer_are_answers(name: str) -> None:
    for example in examples.OF_SHAPES[name]:
        decoded = msgspec.json.decode(json.dumps(example), type=getattr(wire, name))

        assert example.items() <= json.loads(wire.encode(decoded)).items()


@each_operation
def test_success_and_its_shape_are_documented(method: str, path: str, operation: Json) -> None:
    del method, path
    good = [status for status in operation["responses"] if status.startswith("2")]

    assert good
    assert all(response(operation, status)["content"] for status in good)


@each_operation
def test_refusals_name_their_codes_and_show_each(method: str, path: str, operation: Json) -> None:
    del method, path
    said = {status: response(operation, status) for status in operation["responses"]}
    refused = {status: answer for status, answer in said.items() if MEDIA_TYPE in answer["content"]}

    assert {"403", "500"} <= refused.keys()
    for one in refused.values():
        assert one["content"][MEDIA_TYPE]["examples"].keys() == set(one["x-kms-codes"])


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
        "mutualTLS",
    }
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
    pattern = PAGE["components"]["schemas"]["Context"]["anyOf"][0]["pattern"]

    assert bool(re.search(pattern.replace("$", r"\Z"), text)) == is_one
    if is_one:
        Context.parse(text)
    else:
        with pytest.raises(InvalidContext):
            Context.parse(text)
