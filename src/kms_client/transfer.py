"""The two ends of a streamed body: a source that can be sent again, a target that can be resumed.

Knows file objects and header values, no transport.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import BinaryIO, Final

from kms_client.problems import ServiceUnreachable, UnexpectedAnswer
from kms_protocol.errors import InvalidRequest

Progress = Callable[[int, int | None], None]

PIECE_BYTES: Final = 1024 * 1024
CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", re.ASCII)


class Upload:
    """A source from where it stands to its end; ``size_bytes`` is None for one that cannot tell."""

    def __init__(self, source: BinaryIO, progress: Progress | None) -> None:
        self._source = source
        self._progress = progress
        self._sent = 0
        self._start: int | None = None
        self.size_bytes: int | None = None
        if source.seekable():
            self._start = source.tell()
            self.size_bytes = source.seek(0, io.SEEK_END) - self._start
            source.seek(self._start)

    def pieces(self) -> Iterator[bytes]:
        """The body in pieces of at most 1 MiB; of a file that grows meanwhile, what was there at first.

        ``progress`` gets bytes sent, and in all if known. Raises InvalidRequest if the file shrinks.
        """
        while piece := self._source.read(self._next_bytes()):
            yield piece
            self._sent += len(piece)
            if self._progress is not None:
                self._progress(self._sent, self.size_bytes)
        if self.size_bytes is not None and self._sent != self.size_bytes:
            raise InvalidRequest("The source became shorter while it was being sent")

    def _next_bytes(self) -> int:
        return PIECE_BYTES if self.size_bytes is None else min(PIECE_BYTES, self.size_bytes - self._sent)

    def rewind(self) -> bool:
        """Whether the body can be sent from its start again, and go there."""
        if self._start is not None:
            self._source.seek(self._start)
            self._sent = 0
            return True
        return self._sent == 0


class Download:
    """A target that is filled by one answer, or by several after broken connections (RFC 9110 §14)."""

    def __init__(self, target: BinaryIO, progress: Progress | None) -> None:
        self._target = target
        self._progress = progress
        self._start = target.tell() if target.seekable() else 0
        self._etag = ""
        self._total: int | None = None
        self.offset = 0
        self.complete = False

    def headers(self) -> Mapping[str, str]:
        """What to ask for: everything, or what is missing of the same result."""
        if not self.offset:
            return {}
        asked = {"Range": f"bytes={self.offset}-"}
        return {**asked, "If-Range": self._etag} if self._etag else asked

    def begin(self, status: int, headers: Mapping[str, str]) -> bool:
        """Take the head of an answer; False when it is a problem instead."""
        if status == HTTPStatus.PARTIAL_CONTENT:
            self._resume(headers)
        elif status == HTTPStatus.OK:
            self._restart()
            length = headers.get("content-length", "")
            self._total = int(length) if length.isdecimal() else None
            self._etag = headers.get("etag", "")
        else:
            return False
        return True

    def write(self, piece: bytes) -> None:
        self._target.write(piece)
        self.offset += len(piece)
        if self._progress is not None:
            self._progress(self.offset, self._total)

    def end(self) -> None:
        """The answer is over. Raises ServiceUnreachable if bytes are missing, so that they are fetched."""
        if self._total is not None and self.offset != self._total:
            raise ServiceUnreachable(f"The result broke off at {self.offset} of {self._total} bytes")
        self.complete = True

    def _resume(self, headers: Mapping[str, str]) -> None:
        match = CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
        if match is None or match[1] is None or int(match[1]) != self.offset:
            raise UnexpectedAnswer("The service answered with another part of the result than asked for")
        if match[2] != "*":
            self._total = int(match[2])

    def _restart(self) -> None:
        """A whole answer: the first one, or the result is another than before and all is taken again."""
        if self.offset:
            if not self._target.seekable():
                raise UnexpectedAnswer(
                    "The result changed while it was fetched, and the target cannot go back"
                )
            self._target.seek(self._start)
            self._target.truncate()
            self.offset = 0
