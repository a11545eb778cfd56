"""The writer of the audit trail: lines, keys, chains of several processes, times and checkpoints."""

import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kms_core import audit
from kms_core.audit import chain
from kms_core.audit.keys import Concealer, PublicKeys, Signer, public_path
from kms_core.auth.policy import Principal
from kms_protocol.context import Context
from kms_protocol.errors import ConfigurationError
from support.audit_logs import PROGRAM_PREAMBLE, AuditFolder, audit_section, chain_name, notes, record

APPEND_MANY = f"""{PROGRAM_PREAMBLE}
trail = place.trail(role=sys.argv[2])
trail.append(record(0))
sys.stdin.read()  # both begin at once
for number in range(1, 300):
    trail.append(record(number))
trail.close()
"""


# -- lines -------------------------------------------------------------------------------------------


def test_a_record_is_one_line_and_its_id_names_it(audit_folder: AuditFolder) -> None:
    """Whatever its fields hold; what is not known is left out."""
    names = ["ada", 'ada\n{"principal":"eve","head":"']
    trail = audit_folder.trail()
    ids = [trail.append(record(principal=name)) for name in names]
    lines = audit_folder.operations()

    assert [line["principal"] for line in lines] == names
    assert ids == [f"{line['chain']}:{line['seq']}" for line in lines]
    known = {"operation", "principal", "tenant", "credential", "result"}
    assert lines[0].keys() == {"seq", "chain", "time", "head", *known}


def test_files_and_keys_are_private(audit_folder: AuditFolder) -> None:
    path = audit_folder.written(1)

    private = (path, audit_folder.root / "audit.key", audit_folder.signing_key)
    assert [stat.S_IMODE(each.stat().st_mode) for each in private] == [0o600] * 3
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_time_of_a_line_is_utc_to_the_microsecond(audit_folder: AuditFolder) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    audit_folder.written(1)
    text = str(audit_folder.operations()[0]["time"])

    assert len(text) == len("2026-11-24T16:00:00.000000Z")
    assert before <= datetime.fromisoformat(text) <= datetime.now(UTC)


def test_each_line_stands_for_all_before_it(audit_folder: AuditFolder) -> None:
    raw = audit_folder.written(3).read_bytes().splitlines()
    head = chain.ZERO
    for line in raw:
        assert chain.is_sound(head, line)
        head = bytes.fromhex(json.loads(line)["head"])

    assert [json.loads(line)["seq"] for line in raw] == [0, 1, 2, 3, 4]


def test_the_note_of_a_request_gets_the_id(audit_folder: AuditFolder) -> None:
    note = audit.Noted()
    token = audit.noted.set(note)
    try:
        name = audit_folder.trail().append(record())
    finally:
        audit.noted.reset(token)

    assert note.audit_id == name


# -- context values ----------------------------------------------------------------------------------


def test_context_values_are_keyed_hashes(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    one = trail.conceal("acme", Context.parse("row=7,patient=ada"))
    again = audit_folder.trail().conceal("acme", Context.parse("row=7,patient=bob"))

    assert one.keys() == {"row", "patient"}
    assert one["row"] == again["row"]
    assert one["patient"] != again["patient"]
    assert all(len(value) == 32 for value in one.values())


def test_tenants_installs_and_keys_have_hashes_of_their_own(tmp_path: Path) -> None:
    """A boundary between key and value cannot be moved."""
    trail, other = AuditFolder(tmp_path / "a").trail(), AuditFolder(tmp_path / "b").trail()
    found = [
        trail.conceal("acme", Context((("ab", "c"),))),
        trail.conceal("acme", Context((("a", "bc"),))),
        trail.conceal("umbrella", Context((("ab", "c"),))),
        other.conceal("acme", Context((("ab", "c"),))),
    ]

    assert len({value for each in found for value in each.values()}) == 4


# -- keys --------------------------------------------------------------------------------------------


def test_keys_are_made_once_also_by_processes_that_start_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: Signer.at(tmp_path / "k.key").public, range(16)))
        hidden = list(pool.map(lambda _: Concealer.at(tmp_path / "a.key"), range(16)))

    assert {Signer.at(tmp_path / "k.key").public} == made
    assert [*PublicKeys.read(public_path(tmp_path / "k.key")).keys.values()] == [*made]
    assert len({each.conceal("t", Context((("a", "b"),)))["a"] for each in hidden}) == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".key", ".pub"}


def test_what_a_former_key_signed_stays_verifiable(audit_folder: AuditFolder) -> None:
    audit_folder.written(2)
    audit_folder.signing_key.unlink()
    audit_folder.written(2)

    assert len(audit_folder.keys().keys) == 2
    assert audit_folder.verified().verdict == "intact"


@pytest.mark.parametrize("content", [b"", b"nonsense", b"AAAA"])
def test_a_broken_key_file_is_a_wrong_configuration(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)

    for kind in (Concealer, Signer):
        with pytest.raises(ConfigurationError, match=str(path)):
            kind.at(path)


def test_keys_open_to_others_are_refused_in_prod(audit_folder: AuditFolder) -> None:
    audit_folder.trail()
    for path, kind in ((audit_folder.root / "audit.key", Concealer), (audit_folder.signing_key, Signer)):
        path.chmod(0o644)
        kind.at(path)

        with pytest.raises(ConfigurationError, match="chmod 600"):
            kind.at(path, strict=True)


def test_a_file_that_holds_no_public_key_says_so(tmp_path: Path) -> None:
    path = tmp_path / "k.pub"
    path.write_text("nonsense")

    with pytest.raises(ConfigurationError, match="no public keys"):
        PublicKeys.read(path)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        PublicKeys.read(public_path(tmp_path / "absent.key"))


# -- several writers ---------------------------------------------------------------------------------


def test_two_processes_have_a_chain_each(audit_folder: AuditFolder) -> None:
    audit_folder.trail()  # makes the keys
    start, gun = os.pipe()
    writers = [
        subprocess.Popen([sys.executable, "-c", APPEND_MANY, str(audit_folder.root), role], stdin=start)
        for role in ("api", "worker")
    ]
    os.close(start)
    os.close(gun)
    for writer in writers:
        writer.wait()

    assert [writer.returncode for writer in writers] == [0, 0]
    for role in ("api", "worker"):
        names = [line["principal"] for line in audit_folder.operations() if line["chain"].startswith(role)]
        assert names == [f"ada-{number}" for number in range(300)]
    assert audit_folder.verified().verdict == "intact"


def test_a_forked_child_begins_a_chain_of_its_own(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    trail.append(record(1))
    child = os.fork()
    if not child:
        trail.append(record(2))
        trail.close()
        os._exit(0)
    os.waitpid(child, 0)
    trail.append(record(3))
    trail.close()

    assert len({line["chain"] for line in audit_folder.lines()}) == 2
    assert sorted(audit_folder.principals()) == ["ada-1", "ada-2", "ada-3"]
    assert audit_folder.verified().verdict == "intact"


def test_the_first_line_names_the_ends_of_others_that_none_has_named(audit_folder: AuditFolder) -> None:
    for _ in range(4):
        audit_folder.written(3)
    openings = [line for line in audit_folder.lines() if line.get("kind") == "open"]
    ends = [line for line in audit_folder.lines() if line.get("kind") == "closed"]

    assert [{name: end[:2] for name, end in line["heads"].items()} for line in openings] == [
        {},
        *({end["chain"]: [end["seq"], end["head"]]} for end in ends[:-1]),
    ]


# -- the clock ---------------------------------------------------------------------------------------


def test_times_never_go_back_and_a_clock_that_did_is_told(audit_folder: AuditFolder) -> None:
    at = [1_900_000_000_000_000_000]
    trail = audit_folder.trail(clock=lambda: at[0])
    trail.append(record(1))
    at[0] -= 3600 * 1_000_000_000
    trail.append(record(2))
    at[0] += 7200 * 1_000_000_000
    trail.append(record(3))
    trail.close()
    first, second, third = audit_folder.operations()

    assert first["time"] == second["time"] < third["time"]
    assert second["clock"] == "2030-03-17T16:46:40.000000Z"
    assert "clock" not in third
    assert audit_folder.verified().verdict == "intact"
    assert notes(audit_folder.verified()) == ["clock_behind"]


# -- rotation and checkpoints --------------------------------------------------------------------------


def test_a_chain_goes_on_in_further_files(audit_folder: AuditFolder) -> None:
    audit_folder.written(80, rotate_bytes=4096)

    assert len(audit_folder.files()) > 3
    assert [line["seq"] for line in audit_folder.lines()] == list(range(len(audit_folder.lines())))
    assert all(path.stat().st_size < 4096 + 1500 for path in audit_folder.files())
    assert audit_folder.verified().verdict == "intact"


def test_a_checkpoint_stands_after_so_many_lines(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail(audit_section(checkpoint_lines=5))
    for number in range(23):
        trail.append(record(number))
    kinds = [line.get("kind", "") for line in audit_folder.lines()]

    assert kinds.count("checkpoint") == 4
    assert audit_folder.verified().chains[0].signed_seq == max(
        number for number, kind in enumerate(kinds) if kind == "checkpoint"
    )


def test_a_checkpoint_stands_some_time_after_a_line(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail(audit_section(checkpoint_s=0))
    trail.append(record(1))
    trail.checkpoint_if_due()
    trail.checkpoint_if_due()

    assert [line.get("kind") for line in audit_folder.lines()] == ["open", None, "checkpoint"]


def test_a_checkpoint_in_time_names_the_live_chains(audit_folder: AuditFolder) -> None:
    trail, other = (
        audit_folder.trail(audit_section(checkpoint_s=0), role=role) for role in ("api", "worker")
    )
    trail.append(record(1))
    other.append(record(2))
    other.checkpoint_if_due()
    other.append(record(3))
    trail.checkpoint_if_due()
    checkpoint = audit_folder.files()[0].read_bytes().splitlines()[-1]

    opening, _, signed, _ = map(json.loads, audit_folder.files()[1].read_bytes().splitlines())
    end = [2, signed["head"], opening["time"]]
    assert json.loads(checkpoint)["heads"] == {chain_name(other): end}


def test_a_record_after_the_closing_one_begins_a_further_file(audit_folder: AuditFolder) -> None:
    trail = audit_folder.trail()
    trail.append(record(1))
    trail.close()
    trail.append(record(2))
    trail.close()

    assert audit_folder.principals() == ["ada-1", "ada-2"]
    assert len(audit_folder.files()) == 2
    assert audit_folder.verified().verdict == "intact"


def test_a_process_that_recorded_nothing_leaves_nothing(audit_folder: AuditFolder) -> None:
    audit_folder.trail().close()

    assert not audit_folder.folder.exists()


def test_a_filter_is_recorded_up_to_500_characters(audit_folder: AuditFolder) -> None:
    """A caller chooses it, and each page of the log leaves a line with it."""
    trail = audit_folder.trail()
    audit.read(trail, Principal("ada"), {"principal": "x" * 2_000}, 1)

    assert audit_folder.operations()[-1]["filter"] == "principal=" + "x" * 490
