"""The files that a backup takes, the order in which it does, and what it leaves out and says so."""

import os
from pathlib import Path
from typing import Final

import msgspec
import pytest

from kms_cli.backup.files import FilesKeepChanging, InstalledFiles, Source
from kms_core.settings.load import load

AOF: Final = "valkey/appendonlydir"
FIRST: Final = "file appendonly.aof.1.base.aof seq 1 type b\nfile appendonly.aof.1.incr.aof seq 1 type i\n"
SECOND: Final = "file appendonly.aof.2.base.aof seq 2 type b\nfile appendonly.aof.2.incr.aof seq 2 type i\n"
STATE: Final = (
    "age/private_key.txt",
    "age/public_key.txt",
    "spool.key",
    "intake.key",
    "audit.key",
    "audit-signing.key",
    "audit-signing.pub",
    "tokens.json",
    "documents/tokens.anchor",
    "documents/tokens.copy",
    "audit/api-20270131T000000.000000Z-1.0001.jsonl",
    "spool/hosts/install",
    "spool/job-1/input",
)
ELSEWHERE: Final = (
    "run/api.pid",
    "log/valkey.log",
    "prometheus/data/wal/00000000",
    "files/of-a-caller",
    "tokens.json.lock",
    ".tokens.json.4711",
)


def install(folder: Path, settings: str = "") -> InstalledFiles:
    state = folder / "state"
    for name in (*STATE, *ELSEWHERE):
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_text(name)
    (state / AOF).mkdir(parents=True)
    write_valkey(state / AOF, "1", FIRST)
    config = folder / "kms.toml"
    config.write_text(f"[kms]\n{settings}")
    environ = {"KMS_STATE_DIR": str(state), "HOME": str(folder)}
    return InstalledFiles(load(config, environ), environ, config)


def write_valkey(folder: Path, number: str, manifest: str) -> None:
    for kind in ("base", "incr"):
        (folder / f"appendonly.aof.{number}.{kind}.aof").write_text(f"{kind} {number}")
    (folder / "new").write_text(manifest)
    (folder / "new").rename(folder / "appendonly.aof.manifest")


def content(source: Source) -> str:
    return source.file.read(source.size).decode()


def taken(files: InstalledFiles) -> dict[str, str]:
    return {source.name: content(source) for source in files.all()}


def test_all_of_an_install_is_taken_and_nothing_that_only_lives(tmp_path: Path) -> None:
    found = taken(install(tmp_path))

    valkey = [f"{AOF}/appendonly.aof.{name}" for name in ("manifest", "1.base.aof", "1.incr.aof")]
    assert set(found) == {*STATE, *valkey, "kms.toml"}
    assert all(found[name] == name for name in STATE)


def test_what_refers_to_others_is_taken_before_them(tmp_path: Path) -> None:
    """Redis before all, anchors before documents, recipients before identities, audit log, spool."""
    names = list(taken(install(tmp_path)))

    order = (
        f"{AOF}/appendonly.aof.manifest",
        f"{AOF}/appendonly.aof.1.incr.aof",
        "documents/tokens.anchor",
        "age/public_key.txt",
        "age/private_key.txt",
        "documents/tokens.copy",
        "audit/api-20270131T000000.000000Z-1.0001.jsonl",
        "spool/job-1/input",
    )
    assert [name for name in names if name in order] == list(order)


def test_the_files_of_valkey_are_those_of_one_moment(tmp_path: Path) -> None:
    """A rewrite replaces and deletes them while they are read, and commands are appended."""
    files = install(tmp_path)
    folder, found = tmp_path / "state" / AOF, dict[str, str]()
    for source in files.all():
        if not found:
            with (folder / "appendonly.aof.1.incr.aof").open("a") as file:
                file.write(" and later commands")
            write_valkey(folder, "2", SECOND)
            (folder / "appendonly.aof.1.base.aof").unlink()
            (folder / "appendonly.aof.1.incr.aof").unlink()
        found[source.name] = content(source)

    assert {name: text for name, text in found.items() if name.startswith(AOF)} == {
        f"{AOF}/appendonly.aof.manifest": FIRST,
        f"{AOF}/appendonly.aof.1.base.aof": "base 1",
        f"{AOF}/appendonly.aof.1.incr.aof": "incr 1",
    }


def test_files_of_valkey_that_are_missing_end_the_backup(tmp_path: Path) -> None:
    files = install(tmp_path)
    (tmp_path / "state" / AOF / "appendonly.aof.1.base.aof").unlink()

    with pytest.raises(FilesKeepChanging):
        taken(files)


def test_files_that_valkey_replaced_are_not_taken(tmp_path: Path) -> None:
    files = install(tmp_path)
    folder = tmp_path / "state" / AOF
    write_valkey(folder, "2", f"file appendonly.aof.1.base.aof seq 1 type h\n{SECOND}")

    assert f"{AOF}/appendonly.aof.1.base.aof" not in taken(files)


def test_keys_elsewhere_get_their_default_names(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    for name in ("spool_key", "private", "public"):
        (tmp_path / "secrets" / name).write_text(f"{name} elsewhere")
    at = tmp_path / "secrets"
    files = install(
        tmp_path,
        f'[kms.age]\nprivate_key_path = "{at}/private"\npublic_key_path = "{at}/public"\n'
        f'[kms.jobs]\nspool_identity_path = "{at}/spool_key"\n',
    )
    for name in ("spool.key", "age/private_key.txt"):
        (tmp_path / "state" / name).unlink()

    found = taken(files)

    assert found["spool.key"] == "spool_key elsewhere"
    assert found["age/private_key.txt"] == "private elsewhere"
    assert found["age/public_key.txt"] == "age/public_key.txt"  # a file of the state directory keeps its name
    assert found[f"outside{at}/public"] == "public elsewhere"
    assert files.origins["spool.key"] == f"{at}/spool_key"


def test_a_token_file_elsewhere_is_found_by_its_url(tmp_path: Path) -> None:
    (tmp_path / "of this host").write_text("tokens")
    files = install(
        tmp_path, f'[kms.auth]\nmode = "required"\ntokens = "file://{tmp_path}/of%20this%20host"\n'
    )

    assert taken(files)[f"outside{tmp_path}/of this host"] == "tokens"


def test_what_else_the_settings_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret")
    files = install(
        tmp_path,
        'dev_backend = "transit"\n[kms.transit]\naddress = "https://vault.example.com"\n'
        'key_name = "k"\ntoken = "t"\n[kms.redis]\nurl = "redis://kms@redis.example.com/0"\n'
        f'password_file = "{tmp_path}/password"\n[kms.jobs]\nroots = ["{tmp_path}/state/files"]\n',
    )

    found = taken(files)

    assert "secret" not in found.values()
    assert not any(name.startswith("valkey/") for name in found)
    assert any(note.startswith("Redis, which is not the embedded Valkey") for note in files.notes)
    assert f"{tmp_path}/password, which the settings name" in files.notes
    assert f"{tmp_path}/state/files, files of callers" in files.notes
    assert "keys of transit, in its server" in files.notes


def test_without_the_spool_the_install_id_stays(tmp_path: Path) -> None:
    """Otherwise the restored service takes its Redis for that of another install and does not start."""
    files = install(tmp_path)
    files.with_spool = False

    assert [name for name in taken(files) if name.startswith("spool/")] == ["spool/hosts/install"]
    assert any(note.startswith("the spool") for note in files.notes)


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    """And a name that could not be restored is left out and said."""
    files = install(tmp_path)
    (tmp_path / "other").write_text("of another user")
    os.mkfifo(tmp_path / "state/spool/job-1/pipe")
    (tmp_path / "state/spool/job-1/link").symlink_to(tmp_path / "other")
    (tmp_path / "state/spool/linked").symlink_to(tmp_path)
    (tmp_path / "state/spool/job-1/a\nb").write_text("x")
    (tmp_path / "state/spool/job-1" / os.fsdecode(b"caf\xe9")).write_text("x")

    found = taken(files)

    assert "of another user" not in found.values()
    assert [name for name in found if name.startswith("spool/job-1")] == ["spool/job-1/input"]
    notes = [note for note in files.notes if "whose name" in note]
    assert len(notes) == 2
    assert msgspec.json.decode(msgspec.json.encode(notes)) == notes  # in the manifest
