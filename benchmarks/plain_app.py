"""What HTTP alone costs: an ASGI application that stores and serves bytes as they are, under bare uvicorn.

    uvicorn benchmarks.plain_app:app     (PLAIN_DIR names the directory of the files)

PUT /files/NAME stores the body and has it on disk before it answers, GET /files/NAME sends it back. POST
/answer/N reads a body and answers with N bytes of JSON, as an encrypt call would, without doing anything.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Final

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_PIECE: Final = 1024 * 1024


async def app(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        raise RuntimeError("only HTTP is spoken here")
    _, kind, name = scope["path"].split("/")
    if kind == "answer":
        await _drain(receive)
        await _reply(send, b'"' + b"A" * (int(name) - 2) + b'"')
    elif scope["method"] == "PUT":
        await _store(_place(name), receive)
        await _reply(send, b"{}")
    else:
        await _serve(_place(name), send)


def _place(name: str) -> Path:
    return Path(os.environ["PLAIN_DIR"], name)


async def _drain(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass


async def _store(path: Path, receive: Receive) -> None:
    more = True
    with path.open("wb", 0) as file:
        while more:
            message = await receive()
            file.write(message.get("body", b""))
            more = message.get("more_body", False)
        await asyncio.to_thread(os.fsync, file.fileno())


async def _serve(path: Path, send: Send) -> None:
    with path.open("rb", 0) as file:
        size = os.fstat(file.fileno()).st_size
        headers = [(b"content-length", str(size).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while piece := file.read(_PIECE):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _reply(send: Send, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
