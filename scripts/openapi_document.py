"""Builds the OpenAPI 3.1 document from the route table, the descriptions of routes and the API's shapes."""

import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_type_hints

import msgspec

from kms_api import app, json_body, problems
from kms_api.openapi import describe
from kms_api.openapi.describe import STRING, Json, choice
from kms_api.routes import operations
from kms_api.routing import METRICS, Route, Routes, RouteSource
from kms_protocol import __version__, admin, errors, wire
from kms_protocol.context import MAX_BYTES, MAX_PAIRS

VERSION: Final = "3.1.0"
DOCUMENTED: Final[Mapping[str, Iterable[Routes]]] = {wire.PREFIX: app.ROUTERS, "": (operations.probes,)}
"""The routers of the document, by the prefix of their paths."""
EXAMPLES: Final[Mapping[str, Json]] = json.loads(
    Path(__file__).with_name("openapi_examples.json").read_text()
)
"""A JSON object of a shape, by its name. Not each shape has one."""
_REF: Final = "#/components/{}/{}"
_ANYONE: Final = (errors.Forbidden, errors.AuditUnavailable, errors.KmsError)
_CALLERS: Final = (*_ANYONE, errors.Unauthenticated, errors.RateLimited, errors.Unavailable)
_NO_RANGE: Final = {"invalid_request": "No byte in that range"}
_NOT_FOUND: Final = {"not_found": "No such endpoint: a value in the path contains a slash"}
_OF_STATUS: Final = {401: ("WWW-Authenticate",), **dict.fromkeys((429, 503, 507), ("Retry-After",))}
_BASE64: Final = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
_ABOUT: Final = (
    "Encrypt and decrypt secrets and files of any size with keys that never leave the service. Every "
    "ciphertext is an age v1 file, bound to its encryption context. Bytes in JSON are padded standard base64."
    " `null` equals an absent field. Every error is a problem (RFC 9457) with a stable `code`.\n\n"
    "Each request carries one credential, in any of three headers or as the client certificate of its "
    "connection, unless `auth.mode` is `none`. `x-kms-scope` is the scope that the credential needs; where "
    "it is absent, the scope depends on the key and the context."
)
_FIRST: Final = (f"{wire.PREFIX}/encrypt", f"{wire.PREFIX}/decrypt")
_TAGS: Final = {
    "secrets": "Encrypt and decrypt bytes in a single call.",
    "jobs": "Asynchronous work on many items, on files and on trees of files.",
    "files": "Uploads and downloads of any size.",
    "keys": "Keys and their versions.",
    "audit": "The audit log.",
    "operations": "Health and status for operators.",
    "probes": "Probes and metrics for orchestrators and Prometheus.",
}
_TOKEN: Final = "An API token (`kms token create`) or a JWT of a configured issuer"  # noqa: S105 -- a description
_METHODS: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": _TOKEN},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": _TOKEN},
    "vaultToken": {"type": "apiKey", "in": "header", "name": "X-Vault-Token", "description": _TOKEN},
}

_HEADERS: Final[Json] = {
    "X-Request-Id": {
        "description": "From the request if it is 1 to 64 of `A-Za-z0-9_.-`, else a new one",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
    },
    "X-KMS-Audit-Id": {
        "description": "The audit record of this call, if any: `kms audit receipt` proves it",
        "schema": STRING,
    },
    "Cache-Control": {"description": "Always `no-store`", "required": True, "schema": STRING},
    "Idempotency-Replayed": {
        "description": "`true` if the job was submitted before, with the same Idempotency-Key",
        "schema": choice(("true",)),
    },
    "Retry-After": {
        "description": "Seconds until the next attempt",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Location": {
        "description": "The path of the job",
        "required": True,
        "schema": {"type": "string", "format": "uri-reference"},
    },
    "WWW-Authenticate": {
        "description": "Always `Bearer`",
        "required": True,
        "schema": choice(("Bearer",)),
    },
    "ETag": {"description": "Identifies the bytes of the result, for `If-Range`", "schema": STRING},
    "Accept-Ranges": {"description": "Byte ranges are supported", "schema": choice(("bytes",))},
    "Content-Range": {"description": "The range and the total size in bytes", "schema": STRING},
    "Content-Disposition": {
        "description": "Browsers save the result",
        "schema": choice(("attachment",)),
    },
    "X-KMS-File-Id": {"description": "The id of the one file of an upload", "schema": STRING},
    "X-Accel-Buffering": {"description": "Proxies do not buffer events", "schema": choice(("no",))},
}
_EVERYWHERE: Final = ("X-Request-Id", "X-KMS-Audit-Id", "Cache-Control")
_SECURITY: Final[list[dict[str, list[str]]]] = [{method: []} for method in _METHODS]


def page(routers: Mapping[str, Iterable[Routes]]) -> Json:
    """The OpenAPI document of routers, which are given by the prefix of their paths.

    Raises TypeError for a route without a description.
    """
    shared: dict[str, Json] = {}
    paths: dict[str, Json] = {}
    for prefix, parts in routers.items():
        for route in (route for part in parts for route in part.declared):
            paths.setdefault(prefix + route.path, {})[route.method.lower()] = _operation(route, shared)
    made = schemas()
    used = _used(made, json.dumps([paths, shared]))
    return {
        "openapi": VERSION,
        "info": {
            "title": "kms-service",
            "version": __version__,
            "summary": "Encrypt, decrypt and run encryption jobs",
            "description": _ABOUT,
            "contact": {"name": "Provisioning Team"},
            "license": {"name": "See NOTICE", "identifier": "LicenseRef-NOTICE"},
        },
        "servers": [{"url": "/"}],
        "security": _SECURITY,
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": dict(
            sorted(paths.items(), key=lambda item: (item[0] not in _FIRST, item[0] != _FIRST[0], item[0]))
        ),
        "components": {
            "schemas": {name: schema for name, schema in made.items() if name in used},
            "responses": dict(sorted(shared.items())),
            "headers": _HEADERS,
            "securitySchemes": _METHODS,
        },
    }


@dataclass(frozen=True)
class Description:
    """What the document says of a route. ``answers`` are by status, success first."""

    name: str
    text: str
    body: Json | None
    answers: Mapping[int, Json]
    parameters: Iterable[Json]
    refuses: Iterable[type[errors.KmsError]]


def described(  # noqa: PLR0913 -- the parts of an operation
    source: RouteSource,
    *,
    body: Json | None = None,
    gives: str = "",
    answers: Mapping[int, Json] | None = None,
    parameters: Iterable[Json] = (),
    refuses: Iterable[type[errors.KmsError]] = (),
) -> Description:
    """The description of an operation of the handler's name.

    A JSON ``body`` is that of ``source.read``. ``gives`` describes the one answer, of status 200, whose shape
    is the return annotation. ``refuses`` are the errors of this route only.
    """
    if isinstance(source.read, json_body.JsonBody):
        required = any(field.required for field in msgspec.structs.fields(source.read.shape))
        schema = describe.ref(source.read.shape)
        body = {"required": required, "content": {describe.JSON: {"schema": schema}}}
        refuses = (*describe.BODY, *refuses)
    if answers is None:
        answers = {200: describe.gives(get_type_hints(source.handler)["return"], gives)}
    text = inspect.getdoc(source.handler) or ""
    return Description(source.handler.__name__, text, body, answers, parameters, refuses)


def _operation(route: Route, shared: dict[str, Json]) -> Json:
    rule = route.rule
    if route.source is None or not route.source.more:
        raise TypeError(f"{route.path} has no description: see describe.py")
    says = described(route.source, **route.source.more)
    summary, _, text = says.text.partition("\n\n")
    made: Json = {
        "operationId": says.name,
        "tags": [route.source.tag],
        "summary": " ".join(summary.replace("`", "").split()),
    }
    scope = f"Requires the scope `{rule.operation}`." if rule.operation else ""
    made["description"] = "\n\n".join(filter(None, (text, scope))) or made["summary"]
    if rule.open:
        made["security"] = []
    elif route.path == METRICS:  # without a credential where [kms.server] metrics allows it
        made["security"] = [*_SECURITY, {}]
    made |= {
        "x-kms-scope": rule.operation,
        "parameters": [*_of_path(route.path), *says.parameters],
        "requestBody": says.body,
        "responses": _responses(route, says, shared),
    }
    return {name: value for name, value in made.items() if value or name == "security"}


def _codes(refuses: Iterable[type[errors.KmsError]]) -> dict[int, dict[str, str]]:
    """Error codes and their summaries, by status."""
    by_status: dict[int, dict[str, str]] = {}
    for kind in refuses:
        by_status.setdefault(problems.answer_of(kind).status, {})[kind.code] = kind.summary
    return by_status


def _of_path(path: str) -> Iterator[Json]:
    for part in path.split("/"):
        if part.startswith("{"):
            name = part.strip("{}")
            yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _responses(route: Route, says: Description, shared: dict[str, Json]) -> Json:
    """Answers of a route by status. Errors refer to the ``shared`` components, which are extended."""
    everywhere = {name: describe.header_ref(name) for name in _EVERYWHERE}
    answers = dict(says.answers)
    if any(each["name"] == "Range" for each in says.parameters):
        answers[416] = _refusal(416, _NO_RANGE, "Content-Range")
    made = {
        str(status): {**answer, "headers": everywhere | answer["headers"]}
        for status, answer in answers.items()
    }
    refuses = sorted({*says.refuses}, key=lambda kind: kind.code)
    found = _codes([*refuses, *(_ANYONE if route.rule.open else _CALLERS)])
    if "{" in route.path:
        found.setdefault(404, {}).update(_NOT_FOUND)
    for status, means in sorted(found.items()):
        if str(status) in made:  # the 503 of a health check is an answer or an error
            refused = _refusal(status, means)
            made[str(status)] |= {
                "content": made[str(status)]["content"] | refused["content"],
                "x-kms-codes": refused["x-kms-codes"],
            }
            continue
        name = ".".join((str(status), *sorted(means)))
        headers = (*_EVERYWHERE, *_OF_STATUS.get(status, ()))
        shared.setdefault(name, _refusal(status, dict(sorted(means.items())), *headers))
        made[str(status)] = {"$ref": _REF.format("responses", name)}
    return dict(sorted(made.items()))


def _refusal(status: int, summaries: Mapping[str, str], *headers: str) -> Json:
    """The answer for the errors of one status; ``x-kms-codes`` lists their codes."""
    examples = {code: {"summary": text, "value": _problem(status, code)} for code, text in summaries.items()}
    text = ". ".join(f"`{code}`: {text}" for code, text in summaries.items())
    content = {problems.MEDIA_TYPE: {"schema": describe.ref(wire.Problem), "examples": examples}}
    return {**describe.raw(text, content, *headers), "x-kms-codes": list(summaries)}


def _problem(status: int, code: str) -> Json:
    return {
        "type": f"urn:kms-service:problem:{code}",
        "title": "A short summary",
        "status": status,
        "detail": "The cause and the next step",
        "code": code,
        "request_id": "5f0d6a9c1b7e4d2f8a3c0e9b7d6f5a41",
    }


# -- shapes --------------------------------------------------------------------------------------------


def schemas() -> Json:
    """JSON Schemas of all shapes by name, with examples and the grammars of contexts and base64."""
    shapes = {
        shape
        for module in (admin, wire)
        for shape in vars(module).values()
        if isinstance(shape, type) and issubclass(shape, wire.Shape)
    }
    template = _REF.format("schemas", "{name}")
    _, found = msgspec.json.schema_components(shapes, ref_template=template)
    made: Json = _context()
    for name, schema in sorted(found.items()):
        fields = {key: _property(name, key, text) for key, text in schema["properties"].items()}
        made[name] = {**schema, "properties": fields}
        if "description" in schema:  # Python before 3.13 leaves docstrings indented
            made[name]["description"] = inspect.cleandoc(schema["description"])
        if name in EXAMPLES:
            made[name]["examples"] = [EXAMPLES[name]]
    return made


def _used(made: Json, text: str) -> set[str]:
    """Names of the schemas that ``text`` refers to, and of those that these refer to."""
    named = set(re.findall(_REF.format("schemas", r"(\w+)"), text))
    for name in [*named]:
        named |= _used(made, json.dumps(made[name]))
    return named


def _property(shape: str, name: str, schema: Json) -> Json:
    if name in {"context", "new_context"} and shape != "AuditEvent":
        return {"$ref": _REF.format("schemas", "Context")}
    typed: Json = _typed(schema)
    return typed


def _typed(schema: Any) -> Any:  # noqa: ANN401 -- any JSON
    """A schema as generators of clients read it: with a type at each value, and the pattern of base64.

    ``null`` is one more type, not a schema of its own. Empty defaults are left out: fields with one are taken
    for required.
    """
    if isinstance(schema, list):
        return [_typed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made: Json = {key: _typed(value) for key, value in schema.items() if value or key != "default"}
    if "enum" in made:
        made.setdefault("type", "string")
    if made.get("contentEncoding") == "base64":
        made |= {"format": "byte", "pattern": _BASE64}
    if "anyOf" in made and made["anyOf"][1:] == [{"type": "null"}] and "type" in made["anyOf"][0]:
        made.update(made.pop("anyOf")[0])
        made["type"] = [made["type"], "null"]
        if "enum" in made:
            made["enum"].append(None)
    return made


def _context() -> Json:
    """Grammar of a context, without the checks for repeated keys and for the total size."""
    pair = r" *(?!kms:)[^\x00-\x20=,\x7f-\x9f][^\x00-\x1f=,\x7f-\x9f]*=[^\x00-\x1f,\x7f-\x9f]*"
    key = r"^(?!kms:)[^\x00-\x1f\x7f-\x9f]+$"
    value = {"type": "string", "pattern": r"^[^\x00-\x1f\x7f-\x9f]*$", "maxLength": MAX_BYTES}
    return {
        "Context": {
            "title": "Context",
            "description": (
                "Key-value pairs bound to a ciphertext, as text or, if a value contains a comma, as an "
                f"object. At most {MAX_PAIRS} pairs and {MAX_BYTES} bytes. Keys are unique; `kms:` begins "
                "reserved ones. `not_after` (RFC 3339) is the time at which the ciphertext expires."
            ),
            "anyOf": [
                {"$ref": _REF.format("schemas", "ContextText")},
                {"$ref": _REF.format("schemas", "ContextPairs")},
                {"type": "null"},
            ],
            "examples": ["env=prod,service=api", {"team": "payroll, Berlin"}],
        },
        "ContextPairs": {  # with a property, generators make a class of it; Java has none for a map
            "type": "object",
            "properties": {"not_after": value | {"description": "RFC 3339: the ciphertext expires then"}},
            "additionalProperties": value,
            "propertyNames": {"pattern": key, "maxLength": MAX_BYTES},
            "maxProperties": MAX_PAIRS,
        },
        "ContextText": {"type": "string", "pattern": f"^({pair}(,{pair})*)?$", "maxLength": MAX_BYTES},
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(page(DOCUMENTED), indent=1, ensure_ascii=False) + "\n")
