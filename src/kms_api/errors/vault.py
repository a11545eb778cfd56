"""Errors as Vault's clients read them: ``{"errors": […]}``, under a status that keeps them from retrying.

Those clients try 412, 429 and 5xx again, so what the caller did wrong is 400, 403, 404, 405, 408 or 413, and
503 stands for what may be otherwise in a moment.
"""

from typing import Any, Final

import msgspec
from starlette.responses import Response

from kms_api.errors import problems
from kms_protocol import errors, wire
from kms_protocol.errors import KmsError

_STATUS: Final = {
    "unauthenticated": 403,
    "invalid_request": 400,
    "invalid_context": 400,
    "context_required": 400,
    "not_a_ciphertext": 400,
    "foreign_refused": 400,
    "unknown_key": 400,
    "data_keys_unsupported": 400,
}
"""Where another status says it to these clients; else as ``problems`` has it."""
_WORDS: Final = {  # some clients tell errors apart by Vault's own words
    "unauthenticated": "permission denied",
    "forbidden": "permission denied",
    "decrypt_failed": "cipher: message authentication failed",
    "not_a_ciphertext": "invalid ciphertext",
    "foreign_refused": "invalid ciphertext",
    "unknown_key": "encryption key not found",
    "backend_unavailable": "unavailable",
}
NO_KEY: Final = (
    "no such key for this caller; encrypting makes none here, whoever runs the service adds it to [kms.keys]"
)
_DETAILS: Final = {
    "unknown_key": NO_KEY,
    "decrypt_failed": "wrong key, version prefix, context or associated_data, or a damaged ciphertext",
}


class _Errors(msgspec.Struct):
    errors: list[str]


def answer(error: KmsError, status: int | None = None) -> Response:
    """An error as such an answer. A denial is on record before; ``status`` instead of the usual one."""
    return _translated(problems.answer(error), status)


def expected(error: Exception) -> Response:
    """As ``problems.expected``."""
    return _translated(problems.expected(error))


def turned_away(status: int, code: str, detail: str) -> Response:
    """As ``problems.problem``."""
    return _translated(problems.problem(status, code, detail))


def plain(status: int, text: str) -> Response:
    """One that concerns no caller and no record."""
    return Response(wire.encode(_Errors([text])), status, media_type="application/json")


def text(error: KmsError) -> str:
    """An error in words: of one item of several, for which no answer is sent."""
    if isinstance(error, errors.BackendUnavailable):
        return _text(error.code, problems.AWAY)
    return _text(error.code, error.detail)


def _translated(made: Response, status: int | None = None) -> Response:
    problem = msgspec.json.decode(made.body, type=wire.Problem)
    body = _Errors([_text(problem.code, problem.detail)])
    headers: dict[str, Any] = {
        name: value for name, value in made.headers.items() if name in {"retry-after", "allow"}
    }
    return Response(
        wire.encode(body),
        status or _STATUS.get(problem.code, problem.status),
        headers,
        media_type="application/json",
    )


def _text(code: str, detail: str) -> str:
    words = _WORDS.get(code)
    detail = _DETAILS.get(code, detail)
    return f"{words}: {detail}" if words else detail
