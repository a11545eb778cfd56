"""Output of the command: results on stdout, messages and progress on stderr, an exit code for each error."""

import codecs
import contextlib
import errno
import io
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO, ClassVar, Final, NamedTuple, Self, cast

from kms_cli.session import global_options
from kms_protocol.errors import EXIT_OTHER, EXIT_UNAVAILABLE, EXIT_USAGE, InvalidRequest, KmsError
from kms_protocol.units import size_text

if TYPE_CHECKING:
    import click
    from _typeshed import ReadableBuffer

    from kms_protocol.wire import Answer

OS_HINTS: Final[Mapping[int, str]] = {  # of outputs, by errno
    errno.ENOSPC: "free space on that disk, or write to another",
    errno.EDQUOT: "free space of your quota, or write to another disk",
    errno.EFBIG: "write to another disk, or raise the limit of `ulimit -f`",
}

INTERRUPTED: Final = 130  # the exit code of a shell after Ctrl-C
WITH_NOTES: Final = frozenset({"internal", "unexpected_answer"})  # the operator will ask for the request id
INCOMPLETE: Final = "the output is incomplete: discard what was written"
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_AGE_START: Final = b"age-encryption.org/"
BAR_COLUMNS: Final = 24
REDRAW_EVERY_S: Final = 0.1
WAIT_SHOWN_AFTER_S: Final = 2.0
_SMALL: Final = 10  # rates below it are shown with a decimal


def say(text: str) -> None:
    """Print a message on stderr, if that can be written, on one line: it may quote what others wrote."""
    _write(f"kms: {printable(text)}")


def _write(line: str) -> None:
    with contextlib.suppress(OSError):  # as on a full disk: it ends no work
        Meter.erase()
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def result(text: str) -> None:
    """Print a line of results on stdout. ``shown`` and ``in_json`` are for what others may have written."""
    sys.stdout.write(f"{text}\n")


def shown(text: str) -> None:
    """Print a line on stdout that names what others may have written."""
    result(printable(text))


def record(values: Mapping[str, object]) -> None:
    """Print named values on stdout: one a line, or with --json all as one line of JSON."""
    if printed_as_json(values):
        return
    width = max(map(len, values))
    for name, value in values.items():
        row((name.replace("_", " "), str(value)), (width, 0))


def in_json(text: str) -> None:
    """Print a line of JSON on stdout, with escapes for the control characters in its texts."""
    result(_escaped(text))


def _json(values: object) -> str:
    import json  # noqa: PLC0415 -- not needed without --json

    return _escaped(json.dumps(values, ensure_ascii=False))


def _escaped(text: str) -> str:
    """JSON without characters that a terminal would obey: encoders leave those above U+007E as they are."""
    import json  # noqa: PLC0415 -- as above

    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in aligned columns on stdout, each as ``row``."""
    shown = [[printable(cell) for cell in cells] for cells in (head, *rows)]
    widths = [max(map(columns_of, column)) for column in zip(*shown, strict=True)]
    for cells in shown:
        row(cells, widths)


_GAP: Final = "  "  # between columns, and before the further lines of a row


def row(cells: Sequence[str], widths: Sequence[int]) -> None:
    """Print cells on stdout, in columns of at least these widths.

    On a terminal, columns for which a line has no room follow on further lines. A cell whose column has the
    width 0, or one that is wider than the terminal, is broken at its spaces. No word is cut.
    """
    import shutil  # noqa: PLC0415 -- not needed by commands that print no rows

    room, line = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize, ""
    for cell, width in zip(map(printable, cells), widths, strict=True):
        used = columns_of(cell)
        fits = columns_of(_GAP if width else line) + used <= room
        padded = used if width + len(_GAP) > room else max(width, used)
        for part in [cell + " " * (padded - used)] if fits else cell.split():
            if line.strip() and cell and columns_of(line + part) > room:
                result(line.rstrip())
                line = _GAP
            line += part + (_GAP if fits else " ")
    result(line.rstrip())


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for each wide character of East Asia."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width  # noqa: PLC0415 -- as above

    return len(text) + sum((east_asian_width(char) in "WF") - (combining(char) > 0) for char in text)


def printable(text: str) -> str:
    """Replace control characters, which a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in text)


def plain(text: str) -> str:
    """Return a sentence with a lower case start and no full stop, as messages of the command are written."""
    text = text.strip().removesuffix(".")
    if len(text) > 1 and text[0].isupper() and not text[1].isupper():
        return text[0].lower() + text[1:]
    return text


def hint_of(error: KmsError) -> str:
    """Return what to do about an error: its own ``hint``, or that of its code, or an empty text."""
    from kms_protocol.error_texts import NO_TEXT, TEXTS  # noqa: PLC0415 -- for an error alone

    return error.hint or TEXTS.get(error.code, NO_TEXT).hint


def failed(error: BaseException, *, as_json: bool = False) -> int:
    """Print why the command failed on stderr, with hint and notes. Return the exit code.

    It is a KmsError, a UsageError, an OSError, or else Ctrl-C. ``as_json``: print one object.
    """
    code, detail, hint, exit_code = _described(error)
    with_notes = exit_code == EXIT_UNAVAILABLE or code in WITH_NOTES
    notes = [n for n in getattr(error, "__notes__", []) if with_notes or n == INCOMPLETE]
    if as_json:
        _write(_json({"error": {"code": code, "detail": detail, "hint": hint, "notes": notes}}))
        return exit_code
    text = detail if isinstance(error, OSError) else plain(detail)  # a file is named as it is
    say(text if exit_code == INTERRUPTED else f"error: {text}")
    for label, more in (("hint", hint), *(("note", note) for note in notes)):
        if more:
            say(f"{label}: {more}")
    return exit_code


def _described(error: BaseException) -> tuple[str, str, str, int]:
    """Return the code, the detail, the hint and the exit code of an error."""
    if isinstance(error, KmsError):
        return error.code, error.detail, hint_of(error), error.exit_code
    if isinstance(error, OSError):
        path = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        text = "stdin or stdout is closed" if error.errno == errno.EBADF else error.strerror
        hint = OS_HINTS.get(error.errno or 0, "")
        return "os_error", f"{path}{plain(text or type(error).__name__)}", hint, EXIT_OTHER
    if not hasattr(error, "format_message"):
        return "interrupted", "interrupted", "", INTERRUPTED
    usage, similar = cast("click.UsageError", error), getattr(error, "possibilities", None)
    text = (usage.message if similar else usage.format_message()).replace("'", '"')
    command = usage.ctx.command_path if usage.ctx else "kms"
    hint = getattr(error, "hint", "") or f"`{command} --help` shows how to use it"
    return "usage", text, f'did you mean "{similar[0]}"?' if similar else hint, EXIT_USAGE


# -- bytes on stdout ---------------------------------------------------------------------------------


class BinaryOutput(InvalidRequest):
    """Binary data would be written to a terminal, which may obey it."""

    summary = "The output is binary, and stdout is a terminal"
    exit_code = EXIT_USAGE
    hint = "name a file with --output, or force it with `--output -`"


class Stdout(io.RawIOBase):
    """Writes bytes to stdout, to a terminal only text unless they were ``forced``. Raises BinaryOutput."""

    def __init__(self, *, forced: bool) -> None:
        super().__init__()
        self._text = None if forced or not sys.stdout.isatty() else codecs.getincrementaldecoder("utf-8")()
        self.begun = False

    def writable(self) -> bool:
        return True

    def write(self, data: "ReadableBuffer", /) -> int:
        if self._text is not None:
            self._check(bytes(data), self._text)
        self.begun = True
        return sys.stdout.buffer.write(data)

    def flush(self) -> None:
        sys.stdout.buffer.flush()

    def _check(self, data: bytes, decoder: codecs.IncrementalDecoder) -> None:
        try:
            is_text = not _CONTROL.search(decoder.decode(data))
        except UnicodeDecodeError:
            is_text = False
        if not is_text or (not self.begun and data.startswith(_AGE_START)):
            raise BinaryOutput


@contextlib.contextmanager
def stdout(*, forced: bool) -> Iterator[BinaryIO]:
    """Open stdout for bytes. If the block fails, the error says that bytes were written."""
    writer = Stdout(forced=forced)
    try:
        yield cast("BinaryIO", writer)
        writer.flush()
    except BrokenPipeError:
        raise
    except BaseException as exc:
        if writer.begun:
            exc.add_note(INCOMPLETE) if isinstance(exc, KmsError) else say(INCOMPLETE)
        with contextlib.suppress(OSError):
            writer.flush()
        raise


def refuse_binary(hint: str = BinaryOutput.hint) -> None:
    """Raise BinaryOutput if stdout is a terminal."""
    if sys.stdout.isatty():
        error = BinaryOutput()
        error.hint = hint
        raise error


# -- progress ----------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A step of some work. Its amounts are in bytes, or count what ``unit`` names, as ``files``."""

    label: str
    unit: str = ""


class Meter:
    """A progress line on stderr, redrawn in place and erased at the end; nothing unless it is a terminal.

    Nothing with --json either, nor where results go to a terminal as well: ``on_stdout``.
    """

    _is_drawn: ClassVar = False

    def __init__(self, *, on_stdout: bool = False) -> None:
        hidden = global_options().as_json or (on_stdout and sys.stdout.isatty())
        self._shown = sys.stderr.isatty() and not hidden
        self._drawn_at = 0.0
        self._step = Step("")
        self._began, self._began_at = time.monotonic(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.erase()

    @classmethod
    def erase(cls) -> None:
        """Erase the line, if one is drawn."""
        if cls._is_drawn:
            cls._is_drawn = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    @contextlib.contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Draw what the block waits for after 2 s, unless a line is drawn already; erase it at the end."""
        if not self._shown:
            yield
            return
        timer = threading.Timer(WAIT_SHOWN_AFTER_S, self._show_wait, (label,))
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            if self._drawn_at:
                self.erase()

    def _show_wait(self, label: str) -> None:
        if not Meter._is_drawn:
            self.show(label, 0, None)

    def show(self, label: str, done: int, total: int | None, unit: str = "") -> None:
        """Draw at most ten times a second. ``done`` and ``total`` are in bytes, or count things: ``unit``."""
        now, step = time.monotonic(), Step(label, unit)
        if step != self._step:
            self._step, self._began, self._began_at, redraw_at = step, now, done, now
        else:
            redraw_at = self._drawn_at + REDRAW_EVERY_S
        if not self._shown or now < redraw_at:
            return
        self._drawn_at, Meter._is_drawn = now, True
        rate = (done - self._began_at) / (now - self._began) if now > self._began else 0.0
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        sys.stderr.write(f"\r\x1b[K{progress_line(step, done, total, rate, columns)}")
        sys.stderr.flush()


def progress_line(step: Step, done: int, total: int | None, rate: float, columns: int) -> str:
    """Return what is done, its rate a second and the time left, and further figures as ``columns`` allow.

    A rate of 0 is not known yet.
    """
    label, unit = step
    amount, noun = (count_text, f" {unit}") if unit else (size_text, "")
    speed = f" {amount(rate)}/s" if rate > 0 else ""
    if not total:
        texts = [f"{label} {amount(done)}{noun}{speed}", f"{amount(done)}{noun}{speed}", amount(done)]
        return _fitting(texts if done else [label], columns)
    part = min(1.0, done / total)
    end = f"{speed} {_clock(max(0, total - done) / rate)} left" if rate > 0 else ""
    bar = f"[{'#' * round(part * BAR_COLUMNS):.<{BAR_COLUMNS}}]"
    amounts = f"{amount(done)} of {amount(total)}{noun}"
    texts = [
        f"{label} {bar} {part:4.0%} {amounts}{end}",
        f"{label} {part:.0%} {amounts}{end}",
        f"{label} {part:.0%} {amount(done)}{noun}{end}",
        f"{part:.0%} {amount(done)}{noun}{end}",
        f"{amount(done)}{noun}{end}",
        f"{part:.0%} {amount(done)}",
        f"{part:.0%}",
    ]
    return _fitting(texts, columns)


def _fitting(texts: Sequence[str], columns: int) -> str:
    """Return the first text that leaves a column free, else the last one, cut."""
    return next((text for text in texts if len(text) < columns), texts[-1][: max(0, columns - 1)])


def count_text(number: float) -> str:
    """Return a count or a rate of counts: ``1,200``, and small rates with a decimal, ``0.3``."""
    return f"{number:,.1f}" if number < _SMALL and number % 1 else f"{number:,.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def printed_as_json(answer: "Answer | Mapping[str, object]") -> bool:
    """Print an answer as one line of JSON if --json is given. Return whether it was printed."""
    if not global_options().as_json:
        return False
    if isinstance(answer, Mapping):
        result(_json(answer))
    else:
        from kms_protocol import wire  # noqa: PLC0415 -- most commands print no answer

        in_json(wire.encode(answer).decode())
    return True
