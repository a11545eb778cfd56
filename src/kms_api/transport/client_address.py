"""The outermost ASGI layer where proxies are trusted: the client's address goes into ``scope["client"]``.

Everything else reads the address there and no header: audit records, failed attempts, logs, metrics.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from kms_core.proxies import Proxies


class ClientAddress:
    """Wraps the application. A forwarded client has port 0, since headers seldom name one."""

    def __init__(self, app: ASGIApp, proxies: Proxies) -> None:
        self._app = app
        self._proxies = proxies
        self._header = proxies.header.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["client"] and self._proxies.trust(scope["client"][0]):
            lines = [value.decode("latin-1") for name, value in scope["headers"] if name == self._header]
            if lines:
                scope["client"] = self._proxies.client(scope["client"][0], ",".join(lines)), 0
        await self._app(scope, receive, send)
