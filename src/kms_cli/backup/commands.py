"""``kms backup`` and ``kms restore``."""

import os
import shlex
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tarfile import TarInfo
from tempfile import TemporaryDirectory
from typing import Final

import click

from kms_cli import age_files, terminal
from kms_cli.age_files import RequiredBinding
from kms_cli.backup.files import SETTINGS, ArchiveWriter, InstalledFiles, KeepFile, Manifest, read_archive
from kms_cli.commands.offline import recipient_option, recipients_file_option
from kms_cli.local import directories, installation
from kms_cli.options import FILE, STDIO, OutputExists, force_option, writing
from kms_cli.session import global_options
from kms_core.audit import segments
from kms_core.secure_files import make_folders
from kms_core.settings import load
from kms_core.settings.files import for_command
from kms_protocol import __version__, small_files
from kms_protocol.errors import ConfigurationError, Conflict, TargetExists
from kms_protocol.units import size_text, time_text
from kms_protocol.whole_files import sync_folder

_MOUNTED: Final = frozenset({"lost+found"})


class NotEmpty(TargetExists):
    """The state directory to restore to has files."""

    hint = "name an empty or new directory with --to; --force renames the old one and keeps it"


@click.command("backup", epilog="Example: kms backup -r age1… -o kms-backup.age")
@recipient_option
@recipients_file_option
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    required=True,
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Output file (0600), or - for stdout.",
)
@click.option("--without-spool", is_flag=True, help="Leave out uploads, items and results of jobs.")
@force_option
def backup_command(
    recipients: tuple[str, ...],
    recipients_files: tuple[Path, ...],
    output: Path,
    *,
    without_spool: bool,
    force: bool,
) -> None:
    """Back up keys, settings, tokens, audit log, jobs and spool of this machine to one age file.

    The service may run. The file decrypts all that the keys of the service do: keep its identity elsewhere.
    """
    from kms_cli import audited  # noqa: PLC0415 -- the rest of the service, which takes a second

    if not recipients and not recipients_files:
        raise click.UsageError("name who can restore it: -r age1…, or -R FILE (`kms keygen` makes a key)")
    begun = age_files.for_recipients(age_files.recipients(recipients, recipients_files))
    settings = installation.settings()
    if output != STDIO and output.absolute().is_relative_to(settings.state_dir.absolute()):
        raise click.UsageError("a backup in the state directory is lost with it: name another directory")
    if output.exists() and not force:
        raise OutputExists(f"{output} exists")
    config = installation.settings_file(os.environ)
    files = InstalledFiles(settings, os.environ, config, with_spool=not without_spool)
    with (
        audited.effect(settings, "backup.create", str(output)),
        writing(output, overwrite=force) as target,
        terminal.Meter(on_stdout=output == STDIO) as line,
    ):
        began, made_at = time.monotonic(), datetime.now(UTC)
        shown = age_files.with_progress(line, "backing up", None)
        writer = ArchiveWriter(begun, target, shown.progress)
        for source in files.all():
            writer.add(source, files.origins.get(source.name, ""))
        took_s = time.monotonic() - began
        manifest = Manifest(
            service=__version__,
            made_at=made_at,
            host=socket.gethostname(),
            install_id=_install_id(settings.kms.jobs.spool_dir),
            state_dir=str(settings.state_dir.absolute()),
            files=tuple(writer.files),
            left_out=tuple(files.notes),
        )
        writer.finish(manifest)
    grace_s = settings.kms.jobs.input_grace_s
    if took_s > grace_s and not without_spool:
        terminal.say(
            f"warning: this took {took_s:.0f} s, longer than [kms.jobs] input_grace_s ({grace_s} s): inputs "
            "of jobs that ended since may be missing. Raise it above the time of a backup"
        )
    _report(f"backed up to {output} in {took_s:.1f} s", manifest)


def _install_id(spool: Path) -> str:
    try:
        return small_files.read(spool / "hosts/install", 4096).decode("ascii", "replace").strip()
    except OSError:
        return ""


@click.command("restore", epilog="Example: kms restore kms-backup.age -i key.txt --to /var/lib/kms-service")
@click.argument("file", type=FILE)
@click.option(
    "-i",
    "--identity",
    "identities",
    multiple=True,
    required=True,
    type=FILE,
    help="Age key file; repeatable.",
)
@click.option(
    "--to",
    "folder",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="New state directory.",
)
@click.option("--check", "only_check", is_flag=True, help="Verify all of FILE, and restore nothing.")
@click.option(
    "--force", "-f", is_flag=True, help="Rename a state directory that has files, and take its place."
)
def restore_command(
    file: Path, identities: tuple[Path, ...], folder: Path | None, *, only_check: bool, force: bool
) -> None:
    """Verify FILE, a backup of `kms backup`, and put it in place as the state directory DIR.

    Run it as the user of the service, while the service does not run.
    """
    folder = None if only_check else folder or global_options().state_dir
    if folder is None and not only_check:
        raise click.UsageError("name the new state directory with --to DIR, or verify only with --check")
    known = age_files.identities(identities)
    with age_files.source(file) as source, terminal.Meter() as line:
        sealed = age_files.read(source)
        key = age_files.by_identities(sealed.head, known, RequiredBinding())
        shown = age_files.with_progress(line, "verifying", file.stat().st_size)
        read = partial(read_archive, sealed, key, advance=shown.progress)
        with age_files.damaged_errors():
            if folder is None:
                manifest = read(lambda *_: None)
            else:
                manifest = _place(read, folder.absolute(), force=force)
    if folder is None:
        _report(f"{file} is complete and unchanged: a backup of {_origin(manifest)}", manifest)
        return
    _report(f"restored the backup of {_origin(manifest)} to {folder}", manifest)
    _print_next_steps(manifest, folder.absolute())


def _place(read: Callable[[KeepFile], Manifest], folder: Path, *, force: bool) -> Manifest:
    """Write all of an archive beside ``folder``, and rename it once it is verified.

    A mount point cannot be renamed: there each name is, from a folder within. Raises NotEmpty, Conflict.
    """
    is_mount = folder.is_mount()
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names - _MOUNTED and (is_mount or not force):
        raise NotEmpty(f"{folder} is not empty")
    owner = folder.stat() if folder.exists() else None
    make_folders(folder.parent)
    beside = folder if is_mount else folder.parent
    prefix = f".{folder.name}.restoring-"
    with _stopped(folder), TemporaryDirectory(prefix=prefix, dir=beside, ignore_cleanup_errors=True) as name:
        made = Path(name)
        manifest = read(partial(_write, made))
        if owner is not None and os.geteuid() == 0:
            for path in (made, *made.rglob("*")):
                os.chown(path, owner.st_uid, owner.st_gid)
        os.sync()
        if is_mount:
            for path in made.iterdir():
                path.rename(folder / path.name)
        else:
            if names:
                _check_stopped(folder)
                own = _install_id(folder / "spool")
                kept = folder.with_name(f"{folder.name}.replaced-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
                folder.rename(kept)
                other = f", of another install ({own})" if own not in {"", manifest.install_id} else ""
                terminal.say(f"kept what was there as {kept}{other}")
            made.rename(folder)
    sync_folder(beside)
    return manifest


@contextmanager
def _stopped(folder: Path) -> Iterator[None]:
    """Keep ``kms up`` from starting with a state directory. Raises Conflict while a service runs with it."""
    lock = folder / "run/lock"
    with directories.locked(lock, f"kms up runs with {folder}") if lock.exists() else nullcontext():
        _check_stopped(folder)
        yield


def _check_stopped(folder: Path) -> None:
    """Raise Conflict while a process writes an audit log of a state directory."""
    for audit in _audit_logs(folder):
        live = [each.chain.split("-") for each in segments.listed(audit) if segments.is_live(each.path)]
        if live:
            programs = ", ".join(f"{role} (process {pid})" for role, *_, pid in live)
            raise Conflict(f"{programs} of a service runs with {folder} and writes {audit}: stop it first")


def _audit_logs(folder: Path) -> Iterator[Path]:
    """The audit log in a state directory, and the one elsewhere that its settings name, if they are read."""
    yield folder / "audit"
    with suppress(ConfigurationError):
        file = for_command(global_options().config, os.environ, folder, lambda _: None)
        found = load.load(file, os.environ)
        if found.state_dir.resolve() == folder.resolve():
            yield found.kms.audit.path


def _write(folder: Path, entry: TarInfo, content: Iterable[bytes]) -> None:
    path = folder / entry.name
    for above in reversed(Path(entry.name).parents):  # mkdir gives no mode to parents
        (folder / above).mkdir(mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:  # noqa: PTH123 -- a descriptor, not a path
        file.writelines(content)
    os.utime(path, (entry.mtime, entry.mtime))


def _origin(manifest: Manifest) -> str:
    return f"{time_text(manifest.made_at)} of {manifest.host}"


def _report(done: str, manifest: Manifest) -> None:
    if terminal.printed_as_json(
        {
            "made_at": time_text(manifest.made_at),
            "host": manifest.host,
            "install": manifest.install_id,
            "files": len(manifest.files),
            "bytes": manifest.size,
            "left_out": list(manifest.left_out),
        }
    ):
        return
    terminal.say(f"{done}: {len(manifest.files)} files, {size_text(manifest.size)}")
    for note in manifest.left_out:
        terminal.say(f"not included: {note}")


def _print_next_steps(manifest: Manifest, folder: Path) -> None:
    age_s = max(0.0, (datetime.now(UTC) - manifest.made_at).total_seconds())
    terminal.say(
        f"warning: this is the state of {age_s / 3600:.1f} hours ago. Tokens that were revoked since are "
        "valid again: revoke them once more. Key versions made since are not in it"
    )
    for file in manifest.files:
        if file.origin and file.name != SETTINGS and file.origin != str(folder / file.name):
            terminal.say(f"{folder / file.name} was {file.origin}: the settings may name it there")
    config = ["--config", str(folder / SETTINGS)] if (folder / SETTINGS).exists() else []
    options = shlex.join([*config, "--state-dir", str(folder)])
    terminal.say(f"next: start the service with {options}, for example `kms up`")
    terminal.say(f"then: kms doctor {options}; kms audit verify {options}")
