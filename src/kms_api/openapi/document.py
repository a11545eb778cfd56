"""The OpenAPI page: made of the route table, of what routes say of themselves, and of the wire's shapes."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import msgspec
from fastapi.routing import APIRouter

from kms_api.openapi import describe, examples
from kms_api.openapi.describe import EVERYWHERE, HEADERS, Json
from kms_api.routing import METRICS, Rule, ScopedRoute
from kms_protocol import __version__, errors, wire
from kms_protocol.context import MAX_BYTES, MAX_PAIRS

TITLE: Final = "kms-service"
VERSION: Final = "3.1.0"
_REF: Final = "#/components/{}/{}"
_ANYONE: Final = (errors.Forbidden, errors.AuditUnavailable, errors.KmsError)
_CALLERS: Final = (
    *_ANYONE,
    errors.Unauthenticated,
    errors.RateLimited,
    errors.Unavailable,
)
_NOT_FOUND: Final = {"not_found": "No such endpoint: a value in the path holds a slash"}
_OF_STATUS: Final = {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After",)}
_BASE64: Final = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
_ABOUT: Final = (
    "Seal and open secrets and files of any size under keys that the service alone holds. Every ciphertext "
    "is an age v1 file, bound to its encryption context. Bytes in JSON are standard base64, padded. `null` "
    "and absent mean the same. Every refusal is a problem of RFC 9457 with a stable `code`.\n\n"
    "One credential for each request, by whichever of the four doors; an install whose `auth.mode` is `none` "
    "asks for no credential. `x-kms-scope` names what the credential must allow; where it is absent, that "
    "depends on the key and the context."
)
_TAGS: Final = {
    "secrets": "Single calls on bytes, answered at once.",
    "jobs": "Work that survives: many items, files, whole trees of files.",
    "files": "Streams of any size, in and out.",
    "keys": "Keys and their versions.",
    "audit": "What was done, by whom.",
    "operations": "What operators look at.",
    "probes": "What orchestrators and Prometheus look at.",
}
_TOKEN: Final = "An API token (`kms token create`) or a JWT of a configured issuer"  # noqa: S105 -- words
_DOORS: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": _TOKEN},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": _TOKEN},
    "vaultToken": {"type": "apiKey", "in": "header", "name": "X-Vault-Token", "description": _TOKEN},
    "certificate": {"type": "mutualTLS", "description": "A client certificate that the settings know"},
}

_SECURITY: Final[list[dict[str, list[str]]]] = [{door: []} for door in _DOORS]


def page(routers: Mapping[str, Iterable[APIRouter]]) -> Json:
    """The whole document of these routers, by the prefix of their paths.

    Raises TypeError for a route that is in the schema and does not describe itself.
    """
    shared: dict[str, Json] = {}
    paths: dict[str, Json] = {}
    for prefix, parts in routers.items():
        for route in _routes(parts):
            for method, rule in route.rules.items():
                made = _operation(route, rule, shared)
                paths.setdefault(prefix + route.path_format, {})[method.lower()] = made
    return {
        "openapi": VERSION,
        "info": {
            "title": TITLE,
            "version": __version__,
            "summary": "Encrypt, decrypt and run encryption jobs",
            "description": _ABOUT,
        },
        "servers": [{"url": "/"}],
        "security": _SECURITY,
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": schemas(),
            "responses": dict(sorted(shared.items())),
            "headers": HEADERS,
            "securitySchemes": _DOORS,
        },
    }


def _routes(routers: Iterable[APIRouter]) -> Iterator[ScopedRoute]:
    for router in routers:
        for route in router.routes:
            if isinstance(route, ScopedRoute) and route.include_in_schema:
                yield route


def _operation(route: ScopedRoute, rule: Rule, shared: dict[str, Json]) -> Json:
    said = route.openapi_extra
    if not said or "x-kms-refuses" not in said:
        raise TypeError(f"{route.path} says nothing of itself: see describe.py")
    summary, _, text = route.description.partition("\n\n")
    made: Json = {
        "operationId": route.operation_id,
        "tags": list(route.tags),
        "summary": " ".join(summary.split()),
    }
    if text:
        made["description"] = text
    if rule.open:
        made["security"] = []
    elif route.path == METRICS:  # [kms.server] metrics may let Prometheus in without one
        made["security"] = [*_SECURITY, {}]
    if rule.operation:
        made["x-kms-scope"] = rule.operation
    parameters = [*_of_path(route.path_format), *said.get("parameters", ())]
    if parameters:
        made["parameters"] = parameters
    if "requestBody" in said:
        made["requestBody"] = said["requestBody"]
    made["responses"] = _responses(route, rule, said, shared)
    return made


def _of_path(path: str) -> Iterator[Json]:
    for part in path.split("/"):
        if part.startswith("{"):
            name = part.strip("{}")
            yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _responses(route: ScopedRoute, rule: Rule, said: Json, shared: dict[str, Json]) -> Json:
    """Its own answers, and each status of a refusal once in the components, for all that share it."""
    everywhere = {name: describe.header_ref(name) for name in EVERYWHERE}
    made = {
        status: {**answer, "headers": everywhere | answer["headers"]}
        for status, answer in said["responses"].items()
    }
    found = describe.codes([*said["x-kms-refuses"], *(_ANYONE if rule.open else _CALLERS)])
    if "{" in route.path:
        found.setdefault(404, {}).update(_NOT_FOUND)
    for status, means in sorted(found.items()):
        if str(status) in made:  # a health check's 503 is an answer, and may be a refusal
            refusal = describe.refusal(status, means)
            made[str(status)] |= {
                "content": made[str(status)]["content"] | refusal["content"],
                "x-kms-codes": refusal["x-kms-codes"],
            }
            continue
        name = ".".join((str(status), *sorted(means)))
        headers = (*EVERYWHERE, *_OF_STATUS.get(status, ()))
        shared.setdefault(name, describe.refusal(status, dict(sorted(means.items())), *headers))
        made[str(status)] = {"$ref": _REF.format("responses", name)}
    return dict(sorted(made.items()))


# -- shapes --------------------------------------------------------------------------------------------


def schemas() -> Json:
    """Every shape of the wire, with examples; what JSON Schema can say of contexts and base64 besides."""
    shapes = [
        shape for shape in vars(wire).values() if isinstance(shape, type) and issubclass(shape, wire.Shape)
    ]
    template = _REF.format("schemas", "{name}")
    _, found = msgspec.json.schema_components(shapes, ref_template=template)
    made: Json = {"Context": _context()}
    for name, schema in sorted(found.items()):
        if "properties" not in schema:  # the bases of all shapes
            continue
        fields = {key: _property(name, key, text) for key, text in schema["properties"].items()}
        made[name] = {**schema, "properties": fields}
        if "description" in schema:  # a docstring, which Python before 3.13 leaves indented
            made[name]["description"] = inspect.cleandoc(schema["description"])
        if name in examples.OF_SHAPES:
            made[name]["examples"] = examples.OF_SHAPES[name]
    return made


def _property(shape: str, name: str, schema: Json) -> Json:
    if name in {"context", "new_context"} and shape != "AuditEvent":
        return {"$ref": _REF.format("schemas", "Context")}
    exact: Json = _exact(schema)
    return exact


def _exact(schema: Any) -> Any:  # noqa: ANN401 -- any JSON
    """With the alphabet of base64 wherever bytes are."""
    if isinstance(schema, list):
        return [_exact(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _exact(value) for key, value in schema.items()}
    return made | {"pattern": _BASE64} if made.get("contentEncoding") == "base64" else made


def _context() -> Json:
    """The grammar of DESIGN §4, but for repeated keys, reserved ones and the sum of bytes."""
    pair = r" *(?!kms:)[^\x00-\x20=,\x7f-\x9f][^\x00-\x1f=,\x7f-\x9f]*=[^\x00-\x1f,\x7f-\x9f]*"
    key = r"^(?!kms:)[^\x00-\x1f\x7f-\x9f]+$"
    value = {"type": "string", "pattern": r"^[^\x00-\x1f\x7f-\x9f]*$", "maxLength": MAX_BYTES}
    return {
        "title": "Context",
        "description": (
            f"Pairs that are bound to a ciphertext: as text, or as an object where a value holds a comma. At "
            f"most {MAX_PAIRS} pairs and {MAX_BYTES} bytes; no key twice. Keys beginning with `kms:` are the "
            "service's own. `not_after` (RFC 3339) is when decryption ends."
        ),
        "anyOf": [
            {"type": "string", "pattern": f"^({pair}(,{pair})*)?$", "maxLength": MAX_BYTES},
            {
                "type": "object",
                "additionalProperties": value,
                "propertyNames": {"pattern": key, "maxLength": MAX_BYTES},
                "maxProperties": MAX_PAIRS,
            },
            {"type": "null"},
        ],
        "default": None,
        "examples": ["env=prod,service=api", {"team": "payroll, Berlin"}],
    }
