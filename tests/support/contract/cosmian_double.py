"""A double of a Cosmian KMS server: real HTTP and AES-GCM, in the dialects of 5.x (with JOSE) and of 4.x.

It answers what our backend asks as the servers did whose exchanges are in ``cosmian_exchanges/``. What they
were never asked it does not know. ``faults`` says how the next requests fail instead.
"""

import json
import signal
import socket
import ssl
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Self

from support.contract.cosmian_jose_double import Jose, jose
from support.contract.cosmian_kmip_double import Kmip, Node, OldKmip, find, node, text
from support.contract.cosmian_store import Refused, Store

ADMIN: Final = "admin"
HTML: Final = "text/html; charset=utf-8"
JSON: Final = "application/json"
NEW: Final = "5.26.0 (OpenSSL 3.0.22 25 Aug 2026-non-FIPS)"
OLD: Final = "4.24.0 (OpenSSL 3.0.22 25 Aug 2026)"
Json = Any
Fault = Callable[["Handler"], bool]
"""Answers instead, or goes silent; True if it did."""


class CosmianDouble:
    """One server, on a port of its own until ``close``. Keys outlive ``stop`` and ``start``."""

    def __init__(self, version: str = NEW, users: dict[str, str] | None = None) -> None:
        """``users``: bearer token to user. None means that everybody is ``admin``, as the real one does."""
        self.version = version
        self.users = users
        self.store = Store(old=version.startswith("4."))
        self.kmip = OldKmip(self.store) if version.startswith("4.") else Kmip(self.store)
        self.requests: list[tuple[str, Any]] = []
        self.faults: deque[Fault] = deque()
        self.tls: ssl.SSLContext | None = None
        self._server: _Server | None = None
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"https://localhost:{self._port}" if self.tls else f"http://127.0.0.1:{self._port}"

    @property
    def batch_counts(self) -> list[int]:
        """How many operations each message held."""
        return [
            sum(each["tag"] == "BatchItem" for each in body["value"])
            for _, body in self.requests
            if isinstance(body, dict) and body.get("tag") == "RequestMessage"
        ]

    def upgrade(self) -> None:
        """Be of 5.26 from now on, with the same keys."""
        self.version, self.kmip = NEW, Kmip(self.store)
        self.store.old = False

    def start(self) -> None:
        """Listen, at the same port as before. Nothing happens if it does."""
        if self._server is None:
            handler = type("OwnHandler", (Handler,), {"double": self})
            self._server = _Server(("127.0.0.1", self._port), handler)
            self._port = self._server.server_address[1]
            threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Hang up on everybody. Nothing happens if it has."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.hang_up()
            server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class HttpRefusal(Exception):
    """Nobody, or a path that is not there: no words, or these."""

    def __init__(self, status: int, words: str = "") -> None:
        super().__init__(words)
        self.status, self.words = status, words


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    double: CosmianDouble
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one piece

    def do_GET(self) -> None:
        self._serve(None)

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers["Content-Length"] or 0)))

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        if kind:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _serve(self, body: bytes | None) -> None:
        document = json.loads(body) if body else None
        self.double.requests.append((self.path, document))
        if self.double.faults and self.double.faults.popleft()(self):
            return
        try:
            answer = self.answer(document)
            self.reply(200, JSON, json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode())
        except HttpRefusal as exc:
            self.reply(exc.status, "", exc.words.encode())
        except Jose as exc:
            self.reply(exc.status, JSON, json.dumps(exc.body, separators=(",", ":")).encode())
        except Refused as exc:
            self.reply(exc.status, HTML, exc.words.encode())

    def answer(self, document: Json) -> Json:
        """What would be answered."""
        old, path = self.double.store.old, self.path
        if path == "/version":
            return self.double.version
        user = self._user()
        if path == "/me" and not old:
            return {"user": user}
        if path.startswith("/access/"):
            return access(self.double.store, path, document, user)
        if path == "/kmip/2_1":
            return kmip(self.double.kmip, document, user)
        if path.startswith("/v1/crypto/") and not old:
            return jose(self.double.store, path, document, user)
        raise HttpRefusal(404)

    def _user(self) -> str:
        users = self.double.users
        if users is None and self.double.tls is None:
            return ADMIN
        scheme, _, token = (self.headers["Authorization"] or "").partition(" ")
        if users and scheme == "Bearer" and token in users:
            return users[token]
        if isinstance(self.connection, ssl.SSLSocket) and (shown := self.connection.getpeercert()):
            return common_name(shown)
        raise HttpRefusal(401, "" if self.double.store.old else "No authentication provided.")


def common_name(shown: Any) -> str:  # noqa: ANN401 -- ``getpeercert`` has no better type
    """Of the subject of a client's certificate."""
    names: dict[str, str] = dict(pair for name in shown["subject"] for pair in name)
    return names["commonName"]


def access(store: Store, path: str, document: Json, user: str) -> Json:
    """Who may use a key; only its owner sees that, and lends it."""
    if path == "/access/grant":
        lent = store.owned(document["unique_identifier"], user).lent
        lent.setdefault(document["user_id"], set()).update(document["operation_types"])
        return {"success": f"Access for {document['user_id']} successfully added"}
    lent = store.owned(path.removeprefix("/access/list/"), user).lent
    return [{"user_id": each, "operations": sorted(operations)} for each, operations in lent.items()]


# -- KMIP --------------------------------------------------------------------------------------------


def kmip(operations: Kmip, document: Node, user: str) -> Node:
    """One operation, or a message of several."""
    name, fields = document["tag"], document["value"]
    if name != "RequestMessage" or isinstance(operations, OldKmip):
        return operations.structure(f"{name}Response", *operations.run(name, fields, user))
    items = [each["value"] for each in fields if each["tag"] == "BatchItem"]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    header = operations.structure(
        "ResponseHeader",
        operations.structure("ProtocolVersion", *find(find(fields, "RequestHeader"), "ProtocolVersion")),
        node("TimeStamp", "DateTime", now),
        node("BatchCount", "Integer", len(items)),
    )
    done = (operations.structure("BatchItem", *_done(operations, item, user)) for item in items)
    return operations.structure("ResponseMessage", header, *done)


def _done(operations: Kmip, item: list[Node], user: str) -> list[Node]:
    name = find(item, "Operation")
    named = (each for each in item if each["tag"] == "UniqueBatchItemID")
    outcome = [node("Operation", "Enumeration", name), *named]
    try:
        answer = operations.run(name, find(item, "RequestPayload"), user)
    except Refused as exc:
        return [
            *outcome,
            node("ResultStatus", "Enumeration", "OperationFailed"),
            node("ResultReason", "Enumeration", exc.reason),
            text("ResultMessage", exc.message),
        ]
    success = node("ResultStatus", "Enumeration", "Success")
    return [*outcome, success, operations.structure("ResponsePayload", *answer)]


# -- connections -------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    """Knows its connections, so that it can hang up; shakes hands in the thread of each."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[Handler]) -> None:
        super().__init__(address, handler)
        self._handler = handler
        self._open: set[socket.socket] = set()

    def finish_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 -- as the base has it
        tls = self._handler.double.tls
        connection = tls.wrap_socket(request, server_side=True) if tls else request
        self._open.add(connection)
        try:
            super().finish_request(connection, client_address)
        finally:
            self._open.discard(connection)
            if connection is not request:
                connection.close()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 -- as the base has it
        """A client that hung up is no news."""

    def hang_up(self) -> None:
        for each in list(self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    with CosmianDouble() as served:
        sys.stdout.write(f"{served.url}\n")
        sys.stdout.flush()
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
