"""How the command speaks: results to stdout, words to stderr, an exit code for each error."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from kms_protocol.errors import EXIT_UNAVAILABLE, EXIT_USAGE, KmsError

if TYPE_CHECKING:
    import click

HINTS: Final[Mapping[str, str]] = {
    "decrypt_failed": 'give the --context it was encrypted with; "kms inspect FILE" shows the key it names',
    "not_a_ciphertext": 'give what "kms encrypt" or "kms encrypt-file" made',
    "invalid_context": 'write it as --context "env=prod,service=api"',
    "context_required": 'add one, as --context "env=prod,service=api"',
    "body_timeout": "send the body without pauses, or over a faster line",
    "too_large": 'use "kms encrypt-file" or "kms decrypt-file", which take files of any size',
    "unauthenticated": "name the file that holds your token with --token-file or KMS_TOKEN_FILE; if you did, "
    "ask the operator for a new one",
    "forbidden": "ask the operator for a token whose scope allows this operation, key, context and path",
    "unknown_key": "check --key-id, or leave it out to use the default key",
    "unknown_job": '"kms job list" shows your jobs',
    "result_expired": "hand the job in again, and fetch its result sooner",
    "job_not_finished": 'wait for it with "kms job wait"',
    "backend_unavailable": '"kms status" and "kms doctor" say more; it may help to try again',
    "jobs_unavailable": 'start redis and a worker, or all of it with "kms up"',
    "audit_unavailable": "make room on the disk of the audit trail, or run this as the user of the service",
    "unavailable": "it may help to try again in a while",
    "rate_limited": "try again in a while",
    "spool_full": "let finished jobs expire, or ask the operator for a larger spool",
    "items_failed": '"kms job result" shows which items and why',
    "attempts_exhausted": "ask the operator what the worker's log says",
    "record_refused": "ask the operator: somebody changed what is stored for the job, or keys differ",
    "unexpected_answer": "check --url and KMS_SERVICE_URL: is it this service, of the same version",
}

PUZZLING: Final = frozenset({"internal", "unexpected_answer"})  # the operator will ask for the request id


def say(text: str) -> None:
    """A line of words on stderr."""
    sys.stderr.write(f"kms: {text}\n")
    sys.stderr.flush()


def result(text: str) -> None:
    """A line of results on stdout."""
    sys.stdout.write(f"{text}\n")


def record(values: Mapping[str, object], *, as_json: bool) -> None:
    """Named values: a line each for people, one line of JSON for programs."""
    if as_json:
        result(json.dumps(values, ensure_ascii=False))
        return
    width = max(map(len, values))
    for name, value in values.items():
        result(f"{name.replace('_', ' '):<{width}}  {_printable(str(value))}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows in columns for people, whose terminal obeys control characters; programs ask for JSON."""
    rows = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        result("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _printable(text: str) -> str:
    """Text that a terminal shows and does not obey."""
    return "".join(char if char.isprintable() else "?" for char in text)


def plain(text: str) -> str:
    """A sentence as the command says it: lower case at the start, no full stop at the end."""
    text = text.strip().removesuffix(".")
    if len(text) > 1 and text[0].isupper() and not text[1].isupper():
        return text[0].lower() + text[1:]
    return text


def failed(error: KmsError, *, as_json: bool = False) -> int:
    """Say what went wrong and what to do next; return the exit code."""
    hint = getattr(error, "hint", "") or HINTS.get(error.code, "")
    puzzling = error.exit_code == EXIT_UNAVAILABLE or error.code in PUZZLING
    notes = getattr(error, "__notes__", []) if puzzling else []
    if as_json:
        words = {"code": error.code, "detail": error.detail, "hint": hint, "notes": notes}
        sys.stderr.write(json.dumps({"error": words}, ensure_ascii=False) + "\n")
        return error.exit_code
    say(f"error: {plain(error.detail)}")
    if hint:
        say(f"hint: {hint}")
    for note in notes:
        say(f"note: {note}")
    return error.exit_code


def misused(error: "click.UsageError") -> int:
    """Say what is wrong with the command line and what was meant."""
    command = error.ctx.command_path if error.ctx else "kms"
    meant = getattr(error, "possibilities", None)
    text = error.message if meant else error.format_message()
    say(f"error: {plain(text).replace(chr(39), chr(34))}")
    say(f'hint: did you mean "{meant[0]}"?' if meant else f'hint: "{command} --help" shows how to use it')
    return EXIT_USAGE


def size(size_bytes: float) -> str:
    """Bytes for people: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:  # noqa: PLR2004  # the step between units
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
