"""``kms config``: shows and checks the settings without starting the service, and begins a file."""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import click
import msgspec

from kms_cli import terminal
from kms_cli.local import installation, instances
from kms_cli.local.valkey import with_embedded
from kms_core.backends import SCHEMES, table_of
from kms_core.settings.lint import Weakness, unaccepted, weaknesses
from kms_core.settings.load import load as load_settings
from kms_core.settings.load import origins
from kms_core.settings.model import Settings
from kms_core.settings.validation import BUILT_IN_ENVIRONMENTS, check_exposure
from kms_protocol.errors import EXIT_OTHER, ConfigurationError

_HIDDEN: Final = "(hidden)"
# A URL of another form is hidden as a whole, since its password may be anywhere: one with an @ in its path.
_HOST: Final = r"(?:[\w.*-]+|\[[\w:.%]+\])(?::\d{1,5})?"
_URL: Final = re.compile(
    rf"(?i)((?:age:|uri:)?[a-z][a-z\d+-]*://)([^/?#@]*@)?((?:{_HOST}(?:,{_HOST})*)?)"
    r"((?:/(?:[\w.,~+:*/ -]|%2f)*)?)(\?[^#@]*)?(#[^@]*)?"
)
_KEY: Final = re.compile(rf"(?i)((?:{'|'.join(SCHEMES)}):)()()((?!//)[\w.,~+:*/ -]*)(\?[^#@]*)?()")
_HOLDS_URL: Final = re.compile(r'keys\.(".*"|[^.]*)|(.*[._])?(url|uri|endpoint|address)')
_HARMLESS: Final = re.compile(
    r"(db|virtual_host|master|public|native|mount|share|seal|region|profile)=[\w.,~+:/-]*"
    r"|([a-z_]*timeout|[a-z_]*interval|heartbeat|max_connections|protocol)=[\d.]*"
)
_NAMED: Final = re.compile(r"((?:sentinel_)?(?:username|password)=).*", re.DOTALL)
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")


@click.command("show")
@click.argument("setting", required=False)
@click.option("--changed", is_flag=True, help="Leave out settings that have their default.")
def show_command(setting: str | None, *, changed: bool) -> None:
    """Print the settings in use as TOML, each with where it comes from. Credentials are hidden.

    With the name of a SETTING, such as redis.broker_url, print its value and nothing else. Without options
    that name another, the settings are those of the kms up of this user that runs. A default may depend on
    the environment and the state directory. Settings that are not set are left out.
    """
    running = instances.running(os.environ)
    environ = instances.environ_of(running, os.environ)
    file = installation.settings_file(environ)
    origin = origins(file, environ, overrides=installation.overrides())
    loaded = load_settings(file, environ, overrides=installation.overrides())
    for text, advice in instances.doubts(running):
        terminal.say(f"warning: {terminal.plain(text)}: {terminal.plain(advice)}")
    used = with_embedded(loaded, environ)
    embedded = {
        f"redis.{name}"
        for name in ("url", "broker_url")
        if getattr(used.kms.redis, name) != getattr(loaded.kms.redis, name)
    }
    place = ""
    shown = {_dotted(*names): (names, value) for names, value in _settings(used)}
    if setting is not None:
        terminal.shown(_one(shown, setting, origin))
        return
    for key, (names, value) in shown.items():
        table = _dotted("kms", *names[:-1])
        source = origin(names)
        if key in embedded or (source in environ and source not in os.environ):
            source = "kms up, which runs"
        if changed and source == "default":
            continue
        if terminal.printed_as_json({"setting": key, "value": value, "from": source}):
            continue
        if table != place:
            terminal.shown(f"[{table}]")
            place = table
        terminal.shown(f"{_dotted(names[-1])} = {json.dumps(value, ensure_ascii=False)}  # {source}")


def _one(
    shown: Mapping[str, tuple[Sequence[str], object]], setting: str, origin: Callable[[Sequence[str]], str]
) -> str:
    """Return one value as text. Raises UsageError if it is not set, ConfigurationError for a credential."""
    if setting not in shown:
        near = difflib.get_close_matches(setting, shown, n=1)
        raise click.UsageError(f'no setting "{setting}" is set{f", did you mean {near[0]}?" if near else ""}')
    names, value = shown[setting]
    if _HIDDEN in str(value):
        raise ConfigurationError(f"{setting} has a credential, which is not printed: see {origin(names)}")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _settings(settings: Settings) -> Iterator[tuple[Sequence[str], object]]:
    """The names of keys below ``[kms]`` with their values; those of a table directly after each other."""
    tables: dict[str, object] = msgspec.to_builtins(settings.kms, enc_hook=str)
    hidden = {f"{table_of(scheme)}.{shape.CREDENTIAL}" for scheme, shape in SCHEMES.items()}
    for scheme, section in settings.backends.items():
        tables[table_of(scheme)] = msgspec.to_builtins(section, enc_hook=str)
    for names, value in _flat(tables):
        yield names, _HIDDEN if _dotted(*names) in hidden else _redacted(_dotted(*names), value)


def _flat(tables: Mapping[str, object], *above: str) -> Iterator[tuple[Sequence[str], object]]:
    for name, value in sorted(tables.items(), key=lambda named: isinstance(named[1], dict)):  # tables last
        if isinstance(value, dict):
            yield from _flat(value, *above, name)
        elif value is not None:
            yield (*above, name), value


def _dotted(*names: str) -> str:
    return ".".join(name if _BARE.fullmatch(name) else json.dumps(name, ensure_ascii=False) for name in names)


def _redacted(key: str, value: object) -> object:
    """A value, of a URL the parts that hold no credentials. The path of a receiver may be one."""
    if isinstance(value, list | tuple):
        return [_redacted(key, item) for item in value]
    if not isinstance(value, str) or not ("://" in value or _HOLDS_URL.fullmatch(key)):
        return value
    found = _URL.fullmatch(value) or _KEY.fullmatch(value)
    if found is None:
        return _HIDDEN
    scheme, login, hosts, path, query, fragment = found.groups("")
    if key.startswith(("jobs.endpoints.", "traces.")) and path.strip("/") not in {"", "v1/traces"}:
        path = f"/{_HIDDEN}"
    return "".join((
        f"{scheme}{login and f'{_HIDDEN}@'}{hosts}{path}",
        query and f"?{'&'.join(map(_option, query[1:].split('&')))}",
        fragment and f"#{_HIDDEN}",
    ))  # fmt: skip


def _option(text: str) -> str:
    if _HARMLESS.fullmatch(text):
        return text
    named = _NAMED.fullmatch(text)
    return f"{named[1] if named else ''}{_HIDDEN}"


@click.command("init")
@click.option(
    "--environment",
    type=click.Choice(BUILT_IN_ENVIRONMENTS),
    default="dev",
    show_default=True,
    help="Its use.",
)
def init_command(environment: str) -> None:
    """Print a settings file to begin with: ``kms config init > kms.toml``."""
    file = Path(__file__).with_name(f"kms.{environment}.toml")
    terminal.result(file.read_text("utf-8").rstrip("\n"))


@click.command("lint")
def lint_command() -> int:
    """Read the settings as the service would, and list those that weaken security.

    Those that [kms] accept_weak names are listed as accepted, on stderr. Exit code 0 if there are no others,
    1 if there are, 78 if the service would not start.
    """
    loaded = installation.settings()
    check_exposure(loaded)
    found = unaccepted(loaded)
    for weakness in weaknesses(loaded):
        _show(weakness, is_accepted=weakness.setting not in found)
    if not found:
        terminal.say(f"no setting weakens security ({loaded.environment})")
    return EXIT_OTHER if found else 0


def _show(weakness: Weakness, *, is_accepted: bool) -> None:
    shown = {"setting": weakness.setting, "risk": weakness.risk, "advice": weakness.advice}
    if terminal.printed_as_json({**shown, "accepted": is_accepted}):
        return
    if is_accepted:
        terminal.say(f"accepted: {weakness.setting}: {weakness.risk}")
    else:
        terminal.shown(f"{weakness.setting}: {weakness.risk}: {weakness.advice}")
