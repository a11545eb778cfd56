"""The service as commands see it: a client with the global options, and its answers as JSON."""

from kms_cli import terminal
from kms_cli.session import session
from kms_client import Client
from kms_protocol import wire


def connect(*, retries: int = 2, timeout_s: float = 30.0) -> Client:
    """A client of the service. Raises ConfigurationError on a wrong address, or one in clear."""
    given = session()
    return Client(
        given.url,
        token_file=given.token_file,
        allow_http=given.allow_http,
        retries=retries,
        timeout_s=timeout_s,
    )


def show(answer: wire.Answer) -> None:
    """An answer of the service as one line of JSON."""
    terminal.result(wire.encode(answer).decode())
