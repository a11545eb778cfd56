"""The worker's ``/metrics``: one small HTTP server in the parent that sums the files of all its children."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import structlog
from prometheus_client import CONTENT_TYPE_LATEST

from kms_core import metrics
from kms_core.auth.scraping import Scraping

_log = structlog.get_logger(__name__)


def serve(bind: str, port: int, scraping: Scraping) -> ThreadingHTTPServer | None:
    """Serve until ``shutdown``. A taken port costs the metrics, not the jobs, and is logged."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in {"/metrics", "/livez"}:
                self.send_error(404)
                return
            if self.path == "/metrics" and not self._may_scrape():
                self.send_error(401, "See [kms.server] metrics")
                return
            text = metrics.exposition() if self.path == "/metrics" else b"ok\n"
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_LATEST)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _may_scrape(self) -> bool:
            if scraping.is_open_to(self.client_address[0], self.headers.keys()):
                return True
            scheme, _, token = self.headers.get("Authorization", "").partition(" ")
            return scheme.lower() == "bearer" and scraping.knows(token.strip())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class names it so
            del format, args

    try:
        server = ThreadingHTTPServer((bind, port), Handler)
    except OSError as exc:
        _log.warning("metrics.not_served", port=port, reason=exc.strerror)
        return None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
