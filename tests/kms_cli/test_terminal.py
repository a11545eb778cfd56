"""Output of the command: names that others wrote are shown as text."""

import io
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import click
import msgspec
import pytest

from kms_cli import terminal
from kms_cli.commands import audit
from kms_cli.commands.files import shown_in
from kms_cli.commands.migrate import Lines, Migration, TransitLine, read_line
from kms_cli.main import BROKEN_PIPE
from kms_cli.session import AS_JSON
from kms_cli.terminal import Step
from kms_core.age.x25519 import X25519Identity
from kms_core.audit.query import RecordedOperation
from kms_core.audit.verification.scan import ChainProblem, Note, VerificationReport
from kms_protocol.errors import Unavailable
from kms_protocol.wire import JobOut
from support.audit_logs import AuditFolder
from support.cli.at_terminal import at_terminal
from support.cli.fixtures import environment
from support.contract_server import ContractServer, Job
from support.openapi_check import example_of

HOSTILE = "\x1b]0;owned\x07\x9b2J\r\u202e"


def test_records_that_others_wrote_are_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    """A program that can write to an audit folder, or to a copy, chooses all texts of its lines."""
    event = RecordedOperation(seq=1, chain=HOSTILE, time=HOSTILE, principal=HOSTILE, operation=HOSTILE)
    event.file_id = event.new_file_id = HOSTILE
    problem, note = ChainProblem("misplaced", HOSTILE, HOSTILE), Note("late", HOSTILE, HOSTILE)
    with click.Context(audit.tail_command):
        audit._line(event)  # noqa: SLF001 -- what the commands print with
        audit._show_findings(VerificationReport(trusted=True, problems=[problem], notes=[note]))  # noqa: SLF001 -- as above

    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert (out + err).replace("\n", "").isprintable()
    assert "owned" in out


def test_hosts_that_others_named_are_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Any user of Redis can write the note of a host; a copy of a log can have any name."""
    hosts = [audit._Host(HOSTILE, None), audit._Host(HOSTILE, None, why=HOSTILE)]  # noqa: SLF001 -- as above
    with click.Context(audit.verify_command):
        audit._show_hosts(hosts, {HOSTILE: HOSTILE})  # noqa: SLF001 -- as above

    out, err = capsys.readouterr()
    assert (out + err).replace("\n", "").isprintable()
    assert out.count("owned") == 5


def test_a_message_is_one_line_whatever_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    """As the host that the manifest of a backup names."""
    terminal.say(f"restored the backup of {HOSTILE}\nkms: the service is running")

    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()


def test_json_has_escapes_for_what_a_terminal_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"name": f"größe {HOSTILE}\n\x7f\U000e0001"}
    terminal.in_json(msgspec.json.encode(answer).decode())
    with click.Context(click.Command("kms")) as ctx:
        ctx.meta[AS_JSON] = True
        terminal.record(answer)
    terminal.failed(Unavailable(answer["name"]), as_json=True)

    out, err = capsys.readouterr()
    lines = [*out.splitlines(), *err.splitlines()]
    assert all(line.isprintable() and "größe" in line for line in lines)
    assert [json.loads(line) for line in lines[:2]] == [answer] * 2
    assert json.loads(lines[2])["error"]["detail"] == answer["name"]


# -- rows --------------------------------------------------------------------------------------------

ID: Final = "0b7c1d2e-4f5a-4b6c-8d7e-9f0a1b2c3d4e"
HEAD: Final = ("JOB", "KIND", "STATE")
WORDS: Final = "and so on until the end of the line is reached"
LONG: Final = "failed attempts_exhausted after a long time"


@pytest.fixture
def print_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[str]]:
    """A table of two rows and a record, on a terminal whose width COLUMNS gives."""

    def printed(columns: str) -> list[str]:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setattr(
            os, "get_terminal_size", lambda _: os.terminal_size((0, 0))
        )  # as one that hides it
        monkeypatch.setenv("COLUMNS", columns)
        terminal.table(HEAD, [(ID, "encrypt", LONG), (ID[::-1], "漢字", "")])
        terminal.record({"state": f"queued {WORDS}", "labels": f"owner={'x' * 200}, run=漢字"})
        return capsys.readouterr().out.splitlines()

    return printed


@pytest.mark.parametrize("columns", ["1", "10", "36", "40", "57", "60", "80", "94", "95", "300"])
def test_rows_fit_the_terminal_and_no_word_is_cut(
    print_rows: Callable[[str], list[str]], columns: str
) -> None:
    lines = print_rows(columns)

    words = [*HEAD, ID, "encrypt", *LONG.split(), ID[::-1], "漢字", "state", "queued", *WORDS.split()]
    assert " ".join(lines).split() == [*words, "labels", f"owner={'x' * 200},", "run=漢字"]
    wide = [line for line in lines if len(line) + line.count("漢字") * 2 > int(columns)]
    assert [line for line in wide if len(line.split()) > 1] == []


def test_columns_without_room_go_on_in_the_next_line(print_rows: Callable[[str], list[str]]) -> None:
    assert print_rows("60") == [
        f"{'JOB':<36}  KIND",
        "  STATE",
        f"{ID}  encrypt",
        f"  {LONG}",
        f"{ID[::-1]}  漢字",
        "state   queued and so on until the end of the line is",
        "  reached",
        "labels",
        f"  owner={'x' * 200},",
        "  run=漢字",
    ]


@pytest.mark.parametrize("columns", ["0", "-1", "junk", "1e3", ""])
def test_the_width_is_that_of_the_terminal_unless_columns_is_one(
    print_rows: Callable[[str], list[str]], columns: str
) -> None:
    """One that hides its width counts as 80 columns."""
    assert print_rows(columns) == print_rows("80")


def test_wide_characters_take_two_columns(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table(("A", "B"), [("漢字", "1"), ("größe", "2"), ("e\u0301", "3")])

    assert capsys.readouterr().out.splitlines() == ["A      B", "漢字   1", "größe  2", "e\u0301      3"]


def test_a_row_in_a_pipe_is_one_line(stand_in: ContractServer, tmp_path: Path) -> None:
    name = "n" * 500
    stand_in.jobs[name] = Job("encrypt", b"")
    env = environment(tmp_path, KMS_SERVICE_URL=stand_in.url, COLUMNS="40")
    code, shown = at_terminal("kms job list | cat", tmp_path, env, columns=40)

    assert (code, shown.splitlines()[1].split()[:2]) == (0, [name, "encrypt"])
    assert len(shown.splitlines()) == 2
    code, shown = at_terminal("kms job list", tmp_path, {**env, "COLUMNS": ""}, columns=40)
    assert (code, "".join(shown.split())[:500]) == (0, "JOBKINDAGESTATE" + name[:485])
    code, _ = at_terminal("kms job list | head -c 1; exit ${PIPESTATUS[0]}", tmp_path, env)
    assert code in {0, BROKEN_PIPE}


# -- progress ----------------------------------------------------------------------------------------

GIB: Final = 1024**3


QUEUED, ITEMS = Step("queued"), Step("running", "items")
OF_4_GIB: Final = (Step("sending"), GIB, 4 * GIB, 100 * 1024**2)
OF_4000: Final = (ITEMS, 1000, 4000, 12.0)
OF_MANY: Final = (ITEMS, 1000, None, 12.0)
EMPTY, FULL = "." * 24, "#" * 24


@pytest.mark.parametrize(
    ("columns", "given", "line"),
    [
        (120, OF_4_GIB, "sending [######..................]  25% 1.0 GiB of 4.0 GiB 100.0 MiB/s 0:31 left"),
        (79, OF_4_GIB, "sending 25% 1.0 GiB of 4.0 GiB 100.0 MiB/s 0:31 left"),
        (50, OF_4_GIB, "sending 25% 1.0 GiB 100.0 MiB/s 0:31 left"),
        (40, OF_4_GIB, "25% 1.0 GiB 100.0 MiB/s 0:31 left"),
        (30, OF_4_GIB, "1.0 GiB 100.0 MiB/s 0:31 left"),
        (20, OF_4_GIB, "25% 1.0 GiB"),
        (10, OF_4_GIB, "25%"),
        (3, OF_4_GIB, "25"),
        (120, OF_4000, "running [######..................]  25% 1,000 of 4,000 items 12/s 4:10 left"),
        (60, OF_4000, "running 25% 1,000 of 4,000 items 12/s 4:10 left"),
        (40, OF_4000, "running 25% 1,000 items 12/s 4:10 left"),
        (30, OF_4000, "1,000 items 12/s 4:10 left"),
        (10, OF_4000, "25% 1,000"),
        (9, OF_4000, "25%"),
        (40, OF_MANY, "running 1,000 items 12/s"),
        (20, OF_MANY, "1,000 items 12/s"),
        (10, OF_MANY, "1,000"),
        (80, (QUEUED, 0, None, 0.0), "queued"),
        (80, (QUEUED, 3 * 1024**2, None, 1024.0), "queued 3.0 MiB 1.0 KiB/s"),
        (80, (QUEUED, 0, 10, 0.0), f"queued [{EMPTY}]   0% 0 B of 10 B"),
        (80, (QUEUED, 12, 10, 2.0), f"queued [{FULL}] 100% 12 B of 10 B 2 B/s 0:00 left"),
        (80, (QUEUED, 0, 36_000, 1.0), f"queued [{EMPTY}]   0% 0 B of 35.2 KiB 1 B/s 10:00:00 left"),
        (80, (ITEMS, 5, None, 0.3), "running 5 items 0.3/s"),
        (80, (ITEMS, 5, None, 3.0), "running 5 items 3/s"),
        (80, (ITEMS, 5, None, 1234.5), "running 5 items 1,234/s"),
    ],
)
def test_a_progress_line_has_what_is_known_in_any_width(
    columns: int, given: tuple[Step, int, int | None, float], line: str
) -> None:
    assert terminal.progress_line(*given, columns) == line


@pytest.mark.parametrize("label", ["receiving", "committing"])
@pytest.mark.parametrize("exponent", range(51))
def test_forty_columns_hold_bytes_rate_and_time_left(label: str, exponent: int) -> None:
    done, total = 2**exponent - 1, 2**51
    line = terminal.progress_line(Step(label), done, total, total / 359_999, 40)

    assert len(line) < 40
    assert re.search(r"\d (B|[KMGT]iB) .*/s \d+:\d\d:\d\d left$", line)


def drawn(shown: str) -> list[str]:
    """The lines that were drawn, one above the other."""
    return [text for text in shown.split("\r\x1b[K") if text]


def test_a_transfer_at_a_terminal_is_drawn_in_its_width_and_erased(
    stand_in: ContractServer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"x" * 4_000_000)
    env = environment(tmp_path, KMS_SERVICE_URL=stand_in.url)
    code, shown = at_terminal("kms encrypt-file file", tmp_path, env, columns=40)
    *lines, report = drawn(shown)

    assert (code, report) == (0, "kms: encrypted file to file.age (3.8 MiB)\n")
    assert {"sending", "receiving"} <= {line.split()[0] for line in lines}
    assert all(0 < len(line) < 40 and line.isprintable() for line in lines)
    assert shown.count("\n") == 1


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stderr, which ``capsys`` keeps, pass for a terminal of 80 columns."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((80, 24)))
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)


def test_a_message_replaces_the_progress_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted download says what is kept while its line is drawn."""
    make_terminal(monkeypatch)
    with terminal.Meter() as line:
        line.show("sending", 0, None)
        terminal.say("one\ntwo")
        terminal.say("three")

    assert capsys.readouterr().err == "\r\x1b[Ksending\r\x1b[Kkms: one?two\nkms: three\n"


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        ("encrypt-file file --json", set()),
        ("encrypt-file file 2> said; code=$?; cat said; exit $code", set()),
        (f"seal -r {X25519Identity.generate().recipient} file | cat > sealed", {"sealing"}),
    ],
    ids=["json", "redirected", "a pipe for the result"],
)
def test_progress_is_drawn_for_people_only(
    stand_in: ContractServer, tmp_path: Path, words: str, labels: set[str]
) -> None:
    (tmp_path / "file").write_bytes(b"x" * 4_000_000)
    env = environment(tmp_path, KMS_SERVICE_URL=stand_in.url)
    code, shown = at_terminal(f"kms {words}", tmp_path, env)

    assert code == 0
    assert ("\x1b" in shown) == bool(labels)
    assert not labels or {line.split()[0] for line in drawn(shown)} == labels


@pytest.mark.parametrize(("items", "shown"), [(1, "50% 5 B of 10 B"), (4, "75% 3 of 4 items")])
def test_a_job_of_several_items_shows_items(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, items: int, shown: str
) -> None:
    make_terminal(monkeypatch)
    progress = {"items": items, "items_done": items - 1, "items_failed": 0, "bytes": 10, "bytes_done": 5}
    job = msgspec.convert(example_of(JobOut) | {"state": "running", "progress": progress}, JobOut)
    with terminal.Meter() as line:
        shown_in(line)(job)

    (text,) = drawn(capsys.readouterr().err)
    assert re.fullmatch(rf"running \[[#.]+\]  {shown}", text)


def test_a_migration_shows_lines_in_turn_with_its_messages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_terminal(monkeypatch)
    read = partial(read_line, shape=TransitLine, options={})
    with terminal.Meter() as line:
        moving = Migration(read, lambda _: b"plaintext", None, Lines(io.BytesIO()), line)
        moving.run([b"vault:v1:x", b"{"])

    lines = drawn(capsys.readouterr().err)
    (failed,) = [at for at, text in enumerate(lines) if text.startswith("kms: line 2: invalid_request: ")]
    assert lines[failed - 1] == "migrating 1 lines"


@pytest.mark.parametrize("columns", [10, 40])
def test_a_verification_shows_bytes_in_the_width_there_is(tmp_path: Path, columns: int) -> None:
    place = AuditFolder(tmp_path)
    place.written(50)
    words = f"kms audit verify --no-anchors '{place.folder}' > report"
    code, shown = at_terminal(words, tmp_path, environment(tmp_path), columns=columns)

    text, *_ = drawn(shown)
    assert code == 0
    assert "0%" in text
    assert 0 < len(text) < columns


def test_a_wait_is_shown_before_the_service_answers(stand_in: ContractServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    env = environment(tmp_path, KMS_SERVICE_URL=stand_in.url)
    words = "kms encrypt-file file --json --priority normal > report; kms job wait job-1 > job"
    code, shown = at_terminal(words, tmp_path, env, columns=40)

    assert (code, drawn(shown)[0]) == (0, "waiting")


def test_a_message_that_cannot_be_written_ends_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where stderr is a file of a full disk: the token that was made is still printed."""
    said = False
    with suppress(OSError), Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        terminal.say("created")
        said = True

    assert said
