"""What schemathesis does not know of this API: lines of JSON, bytes as they are, and codes of problems."""

import json
from typing import Any

import schemathesis

from support import openapi_check


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:  # noqa: ANN401 -- of schemathesis
    """What was encrypted is decrypted again. The document has no such link: openapi-generator refuses it."""
    del context
    body = {"ciphertext": "$response.body#/ciphertext", "context": "$request.body#/context"}
    answer = raw_schema["paths"]["/api/v1/kms/encrypt"]["post"]["responses"]["200"]
    answer["links"] = {"decrypt": {"operationId": "decrypt", "requestBody": body}}


@schemathesis.serializer("application/x-ndjson")
def lines(ctx: Any, value: Any) -> bytes:  # noqa: ANN401 -- schemathesis passes whatever it made up
    """What was made up is sent as one line; a text is sent as it is."""
    del ctx
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()


@schemathesis.deserializer("application/octet-stream", "application/x-ndjson")
def unread(ctx: Any, response: Any) -> str:  # noqa: ANN401 -- as above
    """No shape to hold them to."""
    del ctx, response
    return ""


@schemathesis.check
def problem_code_is_documented(ctx: Any, response: Any, case: Any) -> None:  # noqa: ANN401 -- as above
    """``x-kms-codes`` of the status names every code that it is answered with."""
    del ctx
    said = openapi_check.documented_answers(case.operation.path, case.method).get(str(response.status_code))
    if said and openapi_check.PROBLEM in response.headers.get("content-type", [""])[0]:
        code = response.json()["code"]
        codes = openapi_check.resolved(said).get("x-kms-codes", [])
        assert code in codes, f"{response.status_code} with code {code}, which is not documented"
