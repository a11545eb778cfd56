"""Holds answers of the service to its OpenAPI document: status, media type, shape, headers and problem code.

``Service.http`` of service.py passes every answer through ``check``, so each integration test is also one of
the document.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import jsonschema_rs

Json = dict[str, Any]
FILE: Final = Path(__file__).parents[2] / "src/kms_api/openapi/openapi.json"
PROBLEM: Final = "application/problem+json"
JSON_TYPES: Final = frozenset({"application/json", PROBLEM})
NO_REQUEST_STATUS: Final = frozenset({400})  # of the HTTP parser: what was sent is no request


@cache
def document() -> Json:
    found: Json = json.loads(FILE.read_text())
    return found


def example_of(shape: type) -> Json:
    """The example of a shape of the API, as JSON."""
    found: Json = document()["components"]["schemas"][shape.__name__]["examples"][0]
    return found


@cache
def paths() -> list[tuple[re.Pattern[str], str]]:
    """Templates as expressions, those without parameters first."""
    found = sorted(document()["paths"], key=lambda path: path.count("{"))
    return [(re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), path) for path in found]


def template_of(path: str) -> str | None:
    return next((template for pattern, template in paths() if pattern.fullmatch(path)), None)


@cache
def validator(ref: str) -> jsonschema_rs.Validator:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$ref": ref}
    return jsonschema_rs.validator_for(schema | {"components": document()["components"]})


def resolved(part: Json) -> Json:
    """What a reference within the document points to."""
    at: Any = document()
    if "$ref" not in part:
        return part
    for name in part["$ref"].removeprefix("#/").split("/"):
        at = at[name]
    found: Json = at
    return found


def documented_answers(template: str, method: str) -> Json:
    """The documented answers of an operation by status; empty for a method that is not documented."""
    found: Json = document()["paths"].get(template, {}).get(method.lower(), {}).get("responses", {})
    return found


def check(answer: httpx.Response) -> None:
    """Fail if the document does not say that this may be answered."""
    template = template_of(answer.request.url.raw_path.partition(b"?")[0].decode())
    answers = documented_answers(template or "", answer.request.method)
    if not answers or (answer.status_code in NO_REQUEST_STATUS and "x-request-id" not in answer.headers):
        return
    what = f"{answer.request.method} {template} {answer.status_code}"
    said = answers.get(str(answer.status_code))
    assert said is not None, f"{what}: not a documented status"
    check_answer(answer, resolved(said), what)


def check_answer(answer: httpx.Response, said: Json, what: str) -> None:
    media_type = answer.headers.get("content-type", "").partition(";")[0]
    assert media_type in said["content"], f"{what}: not a documented media type: {media_type}"
    for name, header in said["headers"].items():
        if resolved(header).get("required"):
            assert name in answer.headers, f"{what}: without {name}"
    if media_type not in JSON_TYPES:
        return
    answer.read()
    media = said["content"][media_type]
    shape = media.get("x-kms-shape", media["schema"])["$ref"]
    problem = next(validator(shape).iter_errors(answer.json()), None)
    assert problem is None, f"{what}: {problem}"
    if media_type == PROBLEM:
        code = answer.json()["code"]
        assert code in said["x-kms-codes"], f"{what}: not a documented code: {code}"
