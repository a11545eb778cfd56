"""Messages on a terminal while a call of the service takes long: what is waited for, and further attempts."""

from threading import Timer
from typing import Final

from kms_cli import terminal
from kms_client import Client, Options
from kms_client.http_client import HttpAnswer, HttpRequest
from kms_client.settings import ClientSettings
from kms_client.sync import SyncTransport
from kms_protocol.errors import KmsError

SAY_AFTER_S: Final = 3.0
_WAITING: Final = "waiting for an answer of {}, which may wait for a key server or for Redis"


class ReportingTransport(SyncTransport):
    """Connections that report on stderr once an answer takes more than ``SAY_AFTER_S``.

    They do not for uploads, which have a meter, and for requests that ask the service to wait.
    """

    async def open(self, request: HttpRequest) -> HttpAnswer:
        if request.silence_s > request.timeout_s or not isinstance(request.body, bytes | None):
            return await super().open(request)
        timer = Timer(SAY_AFTER_S, terminal.say, [_WAITING.format(self._url)])
        timer.daemon = True
        timer.start()
        try:
            return await super().open(request)
        finally:
            timer.cancel()


def client(url: str, options: Options) -> Client:
    """Return a client that reports its waits on stderr. Raises ConfigurationError."""
    settings = ClientSettings.of(url, {**options, "on_retry": report_retry})
    return Client.over(settings, ReportingTransport(settings))


def report_retry(error: KmsError, wait_s: float, left: int) -> None:
    """Print why a call is made again, when, and how many attempts are left; nothing for waits below 1 s."""
    if wait_s >= 1:
        why = terminal.plain(error.summary)
        terminal.say(f"{why}: trying again in {wait_s:.0f} s (attempts left: {left})")
