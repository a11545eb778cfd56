"""What stands behind the last signed line of a chain has no witness, and behind a closed end it is damage."""

import os
import re
from pathlib import Path
from typing import Final

import pytest

from kms_core.audit import chain, segments
from kms_core.audit.keys import PublicKeys, Signer
from kms_core.audit.verification.scan import VerificationReport
from kms_core.audit.verification.verify import AuditMonitor
from support.audit_logs import Place, audit_section, chain_name, codes, notes, record, rewrite

SMALL: Final = audit_section(checkpoint_lines=5)
LATER: Final = "2999-01-01T00:00:00.000000Z"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def append_forged(path: Path, count: int = 1) -> None:
    """Lines with heads that fit, as anybody can add them who writes to the folder and has no key."""
    for _ in range(count):
        last = path.read_bytes().splitlines()[-1]
        found, head = chain.read(last), chain.claimed_head(last)
        assert found is not None
        assert head is not None
        body = (
            f'{{"seq":{found.seq + 1},"chain":"{found.chain}","time":"{LATER}","operation":"decrypt",'
            '"principal":"eve","tenant":"acme","result":"ok"'
        )
        with path.open("ab") as file:
            file.write(chain.seal(head, body.encode())[0])


def crashed(place: Place, records: int = 5) -> Path:
    """A chain that was killed: lines 0 to 4 are signed by line 5, and line 6 is not."""
    path = place.written(records, SMALL)
    rewrite(path, lambda lines: lines[:-1])
    return path


def forged_file(place: Place, name: str, heads: str = "{}") -> Path:
    """The first file of a chain that no process wrote."""
    body = (
        f'{{"seq":0,"chain":"{name}","time":"{LATER}","kind":"open","version":1,"segment":1,"reason":"started",'
        f'"service":"x","public_key":"{"00" * 32}","heads":{heads}'
    )
    path = segments.path_of(place.folder, name, 1)
    path.write_bytes(chain.seal(chain.ZERO, body.encode())[0])
    return path


def tips(place: Place) -> dict[str, int]:
    return {name: tip.seq for name, tip in segments.chain_heads(place.folder, place.keys(), but="").items()}


def said(report: VerificationReport, code: str) -> str:
    (text,) = [note.text for note in report.notes if note.code == code]
    return text


# -- behind a closed end -----------------------------------------------------------------------------


@pytest.mark.parametrize("later", [0, 2], ids=["alone", "other chains after it"])
def test_lines_behind_a_closed_end_are_damage(place: Place, later: int) -> None:
    """Also once a checkpoint of another chain could have named them."""
    path = place.written(3)
    append_forged(path, 2)
    for _ in range(later):
        place.written(2)
    report = place.verified()

    assert (report.verdict, codes(report)) == ("damaged", ["after_closed"])
    assert (report.problems[0].file, report.problems[0].seq) == (path.name, 5)
    assert "2 lines after line 4" in report.problems[0].text


def test_lines_behind_the_end_of_a_full_file_are_damage(place: Place) -> None:
    """The process was killed before it began the next one."""
    trail = place.trail(rotate_bytes=1)
    trail.append(record(1))
    (path,) = place.files()
    append_forged(path)

    assert codes(place.verified()) == ["after_closed"]


def test_a_forged_line_behind_a_closed_end_is_named_by_no_chain_and_can_be_taken_out(place: Place) -> None:
    path = place.written(3)
    whole = path.read_bytes()
    append_forged(path)
    place.written(2)
    assert codes(place.verified()) == ["after_closed"]
    path.write_bytes(whole)

    assert place.verified().verdict == "intact"


def test_unsigned_lines_in_a_further_file_behind_a_closed_end_are_no_intact_log(place: Place) -> None:
    """A process may go on after it closed its chain; so may anybody else."""
    trail = place.trail()
    trail.append(record(1))
    trail.close()
    trail.append(record(2))
    path = place.files()[-1]
    content = path.read_bytes()
    trail.close()
    place.written(1)
    assert place.verified().verdict == "intact"
    path.write_bytes(content)
    for file in place.files():
        if not file.name.startswith(f"{chain_name(trail)}."):
            file.unlink()
    place.written(1)

    report = place.verified()
    assert (report.verdict, codes(report)) == ("open end", [])
    assert "its last 2 lines are not signed" in said(report, "cut_or_crashed")


@pytest.mark.parametrize("looked", [True, False], ids=["read before", "read at first"])
def test_a_line_behind_a_closed_end_is_seen_while_the_service_runs(place: Place, looked: bool) -> None:
    path = place.written(3)
    watch = AuditMonitor(place.folder, place.signing_key)
    if looked:
        watch.round()
        assert watch.condition.problems == ()
    append_forged(path)
    watch.round()
    watch.round()

    assert [(problem.code, problem.seq) for problem in watch.condition.problems] == [("after_closed", 5)]


# -- ends without a closing line ---------------------------------------------------------------------


def test_a_tail_without_signature_is_counted_and_said(place: Place) -> None:
    append_forged(crashed(place), 2)
    place.written(1)
    report = place.verified()

    assert (report.verdict, report.chains[0].witness) == ("intact", report.chains[1].chain)
    text = said(report, "cut_or_crashed")
    assert "its last 3 lines are not signed" in text
    assert "any program that can write to the folder" in text


def test_an_end_that_is_signed_is_said_to_have_no_such_tail(place: Place) -> None:
    path = place.written(5, SMALL)
    rewrite(path, lambda lines: lines[:6])

    assert "not signed" not in said(place.verified(), "cut_or_crashed")


@pytest.mark.parametrize(("count", "verdict"), [(1_099, "intact"), (1_100, "open end")])
def test_a_witness_counts_for_one_checkpoint_interval(place: Place, count: int, verdict: str) -> None:
    """Behind line 5, which is signed, stands line 6 already."""
    append_forged_fast(crashed(place), count)
    place.written(1)
    report = place.verified()

    assert (report.verdict, codes(report)) == (verdict, [])


def append_forged_fast(path: Path, count: int) -> None:
    """The same for many lines: the file is read once."""
    last = path.read_bytes().splitlines()[-1]
    found, head = chain.read(last), chain.claimed_head(last)
    assert found is not None
    assert head is not None
    lines = []
    for seq in range(found.seq + 1, found.seq + 1 + count):
        body = f'{{"seq":{seq},"chain":"{found.chain}","time":"{LATER}","operation":"decrypt"'
        line, head = chain.seal(head, body.encode())
        lines.append(line)
    path.write_bytes(path.read_bytes() + b"".join(lines))


def test_the_interval_is_that_of_the_chain_where_it_signed_less_often(place: Place) -> None:
    """Line 3,000 is the first that is signed; behind the second as many may follow."""
    path = place.written(3_100, audit_section(checkpoint_lines=3_000, checkpoint_s=1e9))
    rewrite(path, lambda lines: lines[:-1])
    append_forged_fast(path, 1_200)
    place.written(1)
    report = place.verified()
    assert report.verdict == "open end", "one signed line tells of no interval"

    for file in place.files():
        file.unlink()
    path = place.written(6_100, audit_section(checkpoint_lines=3_000, checkpoint_s=1e9))
    rewrite(path, lambda lines: lines[:-1])
    append_forged_fast(path, 1_200)
    place.written(1)
    assert place.verified().verdict == "intact"


def seen_early(place: Place) -> tuple[Path, bytes]:
    """A chain that goes on, signed, after another saw its beginning; its file, and an anchor of the other."""
    trail, other = place.trail(SMALL), place.trail(role="worker")
    trail.append(record(1))
    other.append(record(1))
    other.close()
    for number in range(6):
        trail.append(record(number))
    trail.close()
    return segments.listed(place.folder)[0].path, other.last_signed


def test_who_saw_the_beginning_of_a_chain_is_no_witness_of_its_end(place: Place) -> None:
    path, _ = seen_early(place)
    rewrite(path, lambda lines: lines[:-1])
    report = place.verified()

    assert (report.verdict, report.chains[0].witness) == ("open end", "")


def test_an_end_that_was_seen_by_no_chain_and_has_no_anchor_is_noted(place: Place) -> None:
    _, anchor = seen_early(place)

    assert notes(place.verified(anchor)) == ["not_anchored"]


def test_an_anchor_is_a_witness_of_its_own_line_alone(place: Place) -> None:
    path = crashed(place)
    anchor = path.read_bytes().splitlines()[5]
    assert (place.verified(anchor).verdict, place.verified(anchor).chains[0].witness) == ("open end", "")
    rewrite(path, lambda lines: lines[:6])

    report = place.verified(anchor)
    assert (report.verdict, report.chains[0].witness) == ("intact", "the anchor in here")


def test_a_chain_that_no_key_signed_bears_no_witness(place: Place) -> None:
    path = crashed(place)
    last = chain.read(path.read_bytes().splitlines()[-1])
    assert last is not None
    heads = f'{{"{last.chain}":[{last.seq},"{last.head}","{last.time}"]}}'
    forged_file(place, "worker-29990101T000000.000000Z-1", heads)
    report = place.verified()

    assert report.verdict == "open end"
    assert not report.chains[0].witness


# -- what chains name of each other ------------------------------------------------------------------


def test_only_signed_ends_are_named(place: Place) -> None:
    path = crashed(place)
    append_forged(path)
    name = segments.listed(place.folder)[0].chain

    assert tips(place) == {name: 5}


def test_a_chain_does_not_name_itself(place: Place) -> None:
    crashed(place)
    name = segments.listed(place.folder)[0].chain

    assert segments.chain_heads(place.folder, place.keys(), but=name) == {}


@pytest.mark.parametrize("torn", [b"", b'{"seq":7,"chain"', b"x" * 5_000])
def test_a_search_that_finds_no_line_ends_behind_the_last_whole_one(place: Place, torn: bytes) -> None:
    path = place.written(20)
    whole = path.stat().st_size
    with path.open("ab") as out:
        out.write(torn)

    assert segments.offset_of(path, lambda _: False) == whole


def test_a_line_with_the_signature_of_another_is_no_end(place: Place) -> None:
    path = crashed(place)
    lines = path.read_bytes().splitlines(keepends=True)
    forged = re.sub(rb'"seq":5,', b'"seq":8,', lines[5])
    path.write_bytes(b"".join([*lines, forged]))
    name = segments.listed(place.folder)[0].chain

    assert tips(place) == {name: 5}


def test_a_signed_line_of_another_chain_is_no_end(place: Place) -> None:
    path = crashed(place)
    other = place.written(1)
    path.write_bytes(path.read_bytes() + other.read_bytes().splitlines(keepends=True)[-1])
    name = segments.listed(place.folder)[0].chain

    assert tips(place).get(name) in {None, 0}


def test_a_chain_without_signed_lines_is_named_by_its_first(place: Place) -> None:
    """That it is there, and no more: a process that is killed at once leaves one."""
    trail = place.trail()
    for number in range(3):
        trail.append(record(number))

    assert tips(place) == {chain_name(trail): 0}


def test_the_signed_end_may_be_in_the_file_before(place: Place) -> None:
    trail = place.trail(rotate_bytes=1)
    trail.append(record(1))
    trail.rotate_bytes = 1 << 20  # the next file does not fill up
    trail.append(record(2))

    assert len(place.files()) == 2
    assert tips(place) == {chain_name(trail): 2}


def test_an_end_signed_by_a_former_key_is_named(place: Place) -> None:
    crashed(place)
    name = segments.listed(place.folder)[0].chain
    place.signing_key.rename(place.at / "former.key")
    place.written(1)
    opening = place.lines()[-3]

    assert (opening["kind"], {each: tip[0] for each, tip in opening["heads"].items()}) == ("open", {name: 5})


def test_an_end_is_named_once(place: Place) -> None:
    crashed(place)
    place.written(1)
    place.written(1)
    first, second, third = (
        {line["chain"]: line for line in place.lines() if line.get("kind") == "open"}[each.chain]
        for each in segments.listed(place.folder)
    )

    assert first["heads"] == {}
    assert [*second["heads"]] == [first["chain"]]
    assert [*third["heads"]] == [second["chain"]]


def test_a_forged_chain_keeps_no_end_from_being_named(place: Place) -> None:
    """Its first line names the end, as if that were on record already."""
    path = crashed(place)
    signed = chain.read(path.read_bytes().splitlines()[5])
    assert signed is not None
    forged_file(
        place, "worker-29990101T000000.000000Z-1", f'{{"{signed.chain}":[5,"{signed.head}","{signed.time}"]}}'
    )

    assert tips(place)[signed.chain] == 5


def test_at_most_256_ends_are_named_those_written_last(place: Place) -> None:
    signer = Signer.at(place.signing_key)
    place.folder.mkdir()
    names = [signed_chain(place, signer, number) for number in range(300)]

    assert [*tips(place)] == names[: 300 - 257 : -1]
    assert len(tips(place)) == 256
    keys = Counting(place.keys().keys.values())
    segments.chain_heads(place.folder, keys, but="")
    assert keys.asked == 256, "older chains are not even read"


class Counting(PublicKeys):
    """Counts the lines whose signatures are checked."""

    asked = 0

    def signed(self, line: bytes) -> chain.ChainLine | None:
        self.asked += 1
        return super().signed(line)


def test_chains_that_were_not_written_to_of_late_can_be_left_out(place: Place) -> None:
    signer = Signer.at(place.signing_key)
    place.folder.mkdir()
    names = [signed_chain(place, signer, number) for number in range(4)]

    found = segments.chain_heads(place.folder, place.keys(), but="", since=1_700_000_002)
    assert {*found} == {*names[2:]}


def test_forged_chains_crowd_out_no_signed_one(place: Place) -> None:
    signer = Signer.at(place.signing_key)
    place.folder.mkdir()
    name = signed_chain(place, signer, 1)
    for number in range(300):
        forged_file(place, f"worker-29990101T000000.000000Z-{number}")

    found = tips(place)
    assert (len(found), next(iter(found))) == (256, name)


def signed_chain(place: Place, signer: Signer, number: int) -> str:
    """A chain of an opening line and a checkpoint; written so many seconds after chain 0."""
    name = f"api-20260101T000000.000000Z-{number}"
    path = forged_file(place, name)
    opening = path.read_bytes()
    head = chain.claimed_head(opening[:-1])
    assert head is not None
    unsigned = (
        f'{{"seq":1,"chain":"{name}","time":"{LATER}","kind":"checkpoint","previous":"{head.hex()}",'
        f'"opened":"{LATER}","heads":{{}},"key":"{signer.key_id}"'
    ).encode()
    body = b'%b%b%b"' % (unsigned, chain.SIGNATURE, signer.sign(chain.text_to_sign(unsigned)))
    path.write_bytes(opening + chain.seal(head, body)[0])
    os.utime(path, (1_700_000_000 + number, 1_700_000_000 + number))
    return name


# -- names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".old", ".bak"])
def test_a_renamed_file_is_read_and_said(place: Place, suffix: str) -> None:
    """The service, its pages and commands pass over it."""
    path = place.written(3)
    path.rename(path.with_name(path.name + suffix))
    report = place.verified()

    assert (report.verdict, codes(report), notes(report)) == ("intact", [], ["misplaced"])
    assert path.name + suffix in said(report, "misplaced")
    assert report.chains[0].lines == 5
