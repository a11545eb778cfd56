"""Server-sent events from bytes (WHATWG HTML §9.2.6); knows neither jobs nor transports."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from kms_client.problems import UnexpectedAnswer

MAX_LINE_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One dispatched event: its name and its data lines joined by newlines."""

    name: str
    data: str


@dataclass(slots=True)
class EventParser:
    """Feed pieces as they come; events leave when their blank line has arrived.

    Comments (keep-alives) and fields other than event, data and id are passed over. ``last_id`` is what a
    new connection sends as Last-Event-ID. Raises UnexpectedAnswer at a line above 1 MiB.
    """

    last_id: str = ""
    _rest: bytes = b""
    _name: str = ""
    _data: list[str] = field(default_factory=list)

    def feed(self, piece: bytes) -> Iterator[ServerSentEvent]:
        *lines, self._rest = (self._rest + piece).replace(b"\r\n", b"\n").split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise UnexpectedAnswer("A line of the event stream has no end")
        for line in lines:
            if line:
                self._take(line.decode("utf-8", "replace"))
            elif self._data:
                yield ServerSentEvent(self._name or "message", "\n".join(self._data))
                self._name, self._data = "", []
            else:
                self._name = ""

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        elif name == "id" and "\0" not in value:
            self.last_id = value
