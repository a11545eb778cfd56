"""The transport of the client that commands use: it shows at a terminal what a request waits for."""

from kms_cli import terminal
from kms_client.http_client import HttpAnswer, HttpRequest
from kms_client.sync import SyncTransport


class WaitingTransport(SyncTransport):
    """Names the service once its answer takes more than 2 s. An upload shows its own progress."""

    async def open(self, request: HttpRequest) -> HttpAnswer:
        if not isinstance(request.body, bytes | None):
            return await super().open(request)
        with terminal.Meter().waiting(f"waiting for {terminal.printable(self._url)}"):
            return await super().open(request)
