"""Checks of what this machine shares with other hosts of its install: spool, Redis, keys, clocks."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

from kms_cli.doctor import Finding
from kms_cli.local import installation
from kms_core import container
from kms_core.jobs.hosts.install import CLOCK_BOUND_S, Facts, differences, mismatch
from kms_core.jobs.hosts.notes import Host, HostNote, HostNotes, SpoolMarks
from kms_core.redis_client import connect
from kms_core.settings.model import Settings
from kms_protocol.errors import BackendUnavailable, ConfigurationError, JobsUnavailable

_HOW = "see docs/hosts.md"


def hosts(settings: Settings) -> Iterator[Finding]:
    """Compare the install id and each live host. Without Redis there is nothing to compare with."""
    marks = container.marks(settings, makes=False)
    here = Host.here(settings.state_dir, settings.kms.jobs.spool_dir)
    try:
        with suppress(JobsUnavailable), connect(installation.redis_section(settings, os.environ)) as client:
            notes = HostNotes(client)
            live = notes.live(notes.now()[0])
            yield _install(marks, notes.install_id())
            others = [note for note in live.values() if note.id != here.id and note.serving]
            yield from _compared(settings, marks, others)
    except ConfigurationError:  # the check of Redis tells of it
        return


def _install(marks: SpoolMarks, stored: str | None) -> Finding:
    own_id = marks.install_id()
    if wrong := mismatch(own_id, stored):
        code, _, text = wrong.partition(": ")
        return Finding("FAIL", "install", f"{code}: {text}")
    if own_id and stored:
        return Finding("ok", "install", f"{stored}, the same in the spool and in Redis")
    if not stored:
        return Finding("ok", "install", "Redis has no id yet: the next start writes it")
    return Finding(
        "warn", "install", f"Redis has {stored}, the spool has none", f"mount the spool, or {_HOW}"
    )


def _compared(settings: Settings, marks: SpoolMarks, others: Sequence[HostNote]) -> Iterator[Finding]:
    if not others:
        yield Finding("ok", "hosts", "no other host of this install is seen")
        return
    own = Facts({}, {})
    with suppress(ConfigurationError, BackendUnavailable):  # other checks tell of it
        own = container.facts(settings)
    for note in others:
        yield from _host(own, note, has_mark=not marks.lacks_host(note.id))


def _host(own: Facts, note: HostNote, *, has_mark: bool) -> Iterator[Finding]:
    if not has_mark:
        text = f"{note.name} uses another spool: its mark is not in this one"
        yield Finding("FAIL", "hosts", text, f"mount the same directory on both, {_HOW}")
    different = differences(own, note)
    if different:
        text = f"{note.name} differs: {'; '.join(different)}"
        yield Finding("warn", "hosts", text, f"set the same on all hosts, {_HOW}")
    if abs(note.clock_s) > CLOCK_BOUND_S:
        text = f"the clock of {note.name} is {note.clock_s:+.0f} s off the clock of Redis"
        yield Finding("warn", "hosts", text, "use NTP on all hosts", away=True)
    if has_mark and not different:
        separate = [
            key_id for key_id, place in own.key_places.items() if note.key_places.get(key_id, place) != place
        ]
        files = f"; key files of its own: {', '.join(sorted(separate))}" if separate else ""
        yield Finding("ok", "hosts", f"{note.name} shares spool, Redis, keys and settings{files}")
