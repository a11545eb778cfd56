"""Campaigns: many files moved to the newest version of their key; what is left alone, what is reported."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyrage
import pytest

from kms_api.routes.job_answers import shape
from kms_core.container import Core
from kms_core.jobs.execution.tree import PATIENCE
from kms_core.jobs.model import part_id
from kms_core.jobs.storage.locations import JobSource, Locations
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import Unavailable
from support.core_jobs import (
    CONTEXT,
    WHO,
    done,
    end_of,
    lines,
    now,
    run_after_lease_expiry,
    run_job,
    split_into_parts,
    submit,
)
from support.failing_store import run_until_killed, worker_calling_at_each_step
from support.job_stores import TENANT, forge

FILES = ("a", "b/c", "b/d")


@pytest.fixture
def root(core: Core, files: Path) -> Path:
    """Three files on the first version of the key; the key has a newer one by now."""
    folder = files / "tree"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(sealed(core, name.encode()))
    rotate(core)
    return folder


def sealed(core: Core, plaintext: bytes) -> bytes:
    return core.kms.encrypt(WHO, plaintext, CONTEXT).ciphertext


def rotate(core: Core) -> str:
    return core.kms.rotate(WHO, "default").version


def newest(core: Core) -> str:
    return core.kms.keyring.default.ref(TENANT).version


def campaign(
    core: Core,
    root: Path,
    kind: wire.JobKind = "rewrap",
    target: str | None = None,
    **more: Any,  # noqa: ANN401 -- of ``submit``
) -> str:
    """The id of a job over the tree that was run."""
    return done(core, kind, f"file://{root}/**", target, **{"overwrite": True} | more).job_id


def report(core: Core, job_id: str) -> dict[str, object]:
    told: dict[str, object] = json.loads(wire.encode(shape(now(core, job_id))))["report"]
    return told


def outcomes(core: Core, job_id: str, root: Path) -> dict[str, str]:
    return {
        line["source"].removeprefix(f"file://{root}/"): line.get("outcome") or line["error"]["code"]
        for line in lines(core, job_id)
    }


def version(core: Core, path: Path) -> str:
    return core.kms.decrypt(WHO, path.read_bytes(), CONTEXT).key.version


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def payload(data: bytes) -> bytes:
    return data[data.index(b"\n--- ") + 49 :]


# -- in place ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rewrap", "reseal"])
def test_tree_is_moved_in_place_and_again_is_left_alone(core: Core, root: Path, kind: wire.JobKind) -> None:
    first, before = version(core, root / "a"), tree(root)

    job_id = campaign(core, root, kind)
    moved = tree(root)
    again = campaign(core, root, kind)

    assert outcomes(core, job_id, root) == dict.fromkeys(FILES, "changed")
    assert report(core, job_id) == {
        "dry_run": False, "changed": 3, "newest": 0, "foreign": 0, "failed": 0,
        "older": [{"key_id": "default", "key_version": first, "found": 3, "left": 0}],
    }  # fmt: skip
    assert now(core, job_id).state == "succeeded"
    assert {name: core.kms.decrypt(WHO, data, CONTEXT).plaintext for name, data in moved.items()} == {
        name: name.encode() for name in FILES
    }
    assert {version(core, root / name) for name in FILES} == {newest(core)} != {first}
    same = [payload(before[name]) == payload(moved[name]) for name in FILES]
    assert same == [kind == "rewrap"] * 3
    assert outcomes(core, again, root) == dict.fromkeys(FILES, "newest")
    assert report(core, again) == report(core, again) | {"changed": 0, "newest": 3, "older": []}
    assert tree(root) == moved


def states(root: Path) -> dict[Path, tuple[int, int, bytes]]:
    """Inode, time of the last change in ns, and content of each file; reading changes its access time."""
    found = ((path, path.stat(), path.read_bytes()) for path in root.rglob("*") if path.is_file())
    return {path: (stat.st_ino, stat.st_mtime_ns, content) for path, stat, content in found}


def test_dry_run_counts_by_version_and_touches_nothing(core: Core, root: Path) -> None:
    first = version(core, root / "a")
    second = newest(core)
    (root / "b" / "d").write_bytes(sealed(core, b"second"))
    rotate(core)
    (root / "new").write_bytes(sealed(core, b"third"))
    (root / "text").write_bytes(b"no age file")
    before = states(root)

    job_id = campaign(core, root, dry_run=True, overwrite=None)

    assert report(core, job_id) == {
        "dry_run": True, "changed": 3, "newest": 1, "foreign": 0, "failed": 1,
        "older": sorted(
            [
                {"key_id": "default", "key_version": first, "found": 2, "left": 2},
                {"key_id": "default", "key_version": second, "found": 1, "left": 1},
            ],
            key=lambda one: str(one["key_version"]),
        ),
    }  # fmt: skip
    assert outcomes(core, job_id, root) == {
        "a": "would_change", "b/c": "would_change", "b/d": "would_change",
        "new": "newest", "text": "not_a_ciphertext",
    }  # fmt: skip
    assert states(root) == before


def test_what_fails_and_what_is_foreign_is_told_and_left(core: Core, root: Path, tmp_path: Path) -> None:
    first = version(core, root / "a")
    recipient = (tmp_path / "state" / "age" / "public_key.txt").read_text().split()[-1]
    foreign = pyrage.encrypt(b"x", [pyrage.x25519.Recipient.from_str(recipient)])
    (root / "foreign").write_bytes(foreign)
    (root / "b" / "c").write_bytes(core.kms.encrypt(WHO, b"x", Context.parse("other=1")).ciphertext)
    damaged = bytearray((root / "a").read_bytes())
    at = damaged.index(b"\n--- ") + 8
    damaged[at] = ord("B" if damaged[at] == ord("A") else "A")  # still base64: a header that names its key
    (root / "a").write_bytes(damaged)
    (root / "junk").write_bytes(b"age-encryption.org/v1\njunk")

    job_id = campaign(core, root)

    assert outcomes(core, job_id, root) == {
        "a": "decrypt_failed", "b/c": "newest", "b/d": "changed",
        "foreign": "foreign", "junk": "decrypt_failed",
    }  # fmt: skip
    assert report(core, job_id) == {
        "dry_run": False, "changed": 1, "newest": 1, "foreign": 1, "failed": 2,
        "older": [{"key_id": "default", "key_version": first, "found": 2, "left": 1}],
    }  # fmt: skip
    assert end_of(core, job_id) == ("failed", "items_failed")
    assert (root / "foreign").read_bytes() == foreign
    assert (root / "a").read_bytes() == damaged


def test_new_context_moves_every_file(core: Core, root: Path) -> None:
    campaign(core, root)

    job_id = campaign(core, root, new=Context.parse("env=prod"))

    assert outcomes(core, job_id, root) == dict.fromkeys(FILES, "changed")
    assert report(core, job_id)["older"] == []
    assert core.kms.decrypt(WHO, (root / "a").read_bytes(), Context.parse("env=prod")).plaintext == b"a"


def test_campaign_may_leave_its_source_and_write_elsewhere(core: Core, root: Path) -> None:
    before = tree(root)
    out = root.parent / "out"

    job_id = campaign(core, root, target=f"file://{out}/", overwrite=None)

    assert now(core, job_id).state == "succeeded"
    assert tree(root) == before
    assert {version(core, out / name) for name in FILES} == {newest(core)}


def test_file_keeps_its_owner_and_mode_in_place(core: Core, root: Path) -> None:
    (root / "a").chmod(0o640)
    if os.getuid() == 0:
        os.chown(root / "a", 12345, 54321)
    before = (root / "a").stat()

    campaign(core, root)

    after = (root / "a").stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


@pytest.mark.parametrize("replaced", [True, False], ids=["changed", "removed"])
@pytest.mark.parametrize("many", [True, False], ids=["of-many", "one"])
def test_file_that_somebody_changes_meanwhile_is_theirs(
    core: Core, root: Path, *, replaced: bool, many: bool
) -> None:
    def write(step: str) -> None:
        """Somebody else, once the commit is recorded."""
        if step == "finish":
            return
        if replaced:
            (root / "a").write_bytes(b"written meanwhile")
        else:
            (root / "a").unlink(missing_ok=True)

    job_id = submit(core, "rewrap", f"file://{root}/a" + "*" * many, None, overwrite=True)
    if many:
        run_job(job_id, core.worker_context, "w")
    run_job(part_id(job_id, 0) if many else job_id, worker_calling_at_each_step(core, write, after=True), "w")

    error = outcomes(core, job_id, root)["a"] if many else now(core, job_id).error
    assert error == "target_exists"
    assert (root / "a").exists() == replaced
    assert not replaced or (root / "a").read_bytes() == b"written meanwhile"
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


# -- cancelled -----------------------------------------------------------------------------------------------


def test_cancelled_job_tells_what_it_has_put_in_place(core: Core, root: Path) -> None:
    job_id = submit(core, "rewrap", f"file://{root}/**", None, overwrite=True)
    (part,) = split_into_parts(core, job_id)
    run_until_killed(core, part, 1, after=True)  # once its first file is settled and on record

    core.worker_context.store.cancel(job_id, TENANT)
    asked = now(core, job_id)
    assert (asked.state, asked.cancel) == ("running", 1), "a worker may be at work"
    run_after_lease_expiry(core, part)

    first, *others = lines(core, job_id)
    assert [line["error"]["code"] for line in others] == ["cancelled"] * (len(FILES) - 1)
    assert report(core, job_id)[first["outcome"]] == 1


# -- what is away --------------------------------------------------------------------------------------------


class Unreadable(Locations):
    """One file lies on a bad block."""

    @contextmanager
    def open_source(self, url: str) -> Iterator[JobSource]:
        if url.endswith("/b/c"):
            raise Unavailable("The file system answered EIO")
        with super().open_source(url) as source:
            yield source


def test_file_that_the_disk_cannot_give_is_given_up_in_the_end_and_holds_up_no_other(
    core: Core, root: Path
) -> None:
    found, store = core.worker_context.places, core.worker_context.store
    places = Unreadable(*(getattr(found, one.name) for one in fields(found)))
    worker_context = replace(core.worker_context, places=places)
    job_id = submit(core, "rewrap", f"file://{root}/**", None, overwrite=True)
    (part,) = split_into_parts(core, job_id)
    for _ in range(PATIENCE):
        run_job(part, worker_context, "w")
        assert store.part(part).job.state == "queued"
        forge(store, part, not_before="0")

    run_job(part, worker_context, "w")

    assert outcomes(core, job_id, root) == {"a": "changed", "b/c": "unavailable", "b/d": "changed"}
