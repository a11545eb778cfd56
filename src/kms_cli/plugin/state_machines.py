"""The two state machines of an age plugin: ``recipient-v1`` wraps file keys, ``identity-v1`` unwraps them.

Source: C2SP age-plugin specification. Who wraps is a parameter. A file for a key of the service, whoever made
it, names that key: stanzas of other tools, and of keys that no identity names, are passed over in silence.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from kms_cli import terminal
from kms_cli.plugin.keys import PluginKeys
from kms_cli.plugin.names import PluginTarget
from kms_cli.plugin.protocol import Broken, PluginConnection
from kms_core.age import mlkem768x25519
from kms_core.age.header import (
    BUNDLE,
    FILE_KEY_BYTES,
    FILE_LIMITS,
    Stanza,
    parse_stanzas,
    render_stanza,
    unbundled,
)
from kms_core.envelope import binding
from kms_protocol.errors import DecryptFailed, KmsError, TooLarge, UnknownKey

KeysFor = Callable[[PluginTarget], PluginKeys]
POSTQUANTUM: Final = "postquantum"
MOST_TRIES: Final = 100
"""Of one file: each is a call with the caller's token, and whoever writes the header says how many."""
_INDEX_DIGITS: Final = 9


@dataclass(frozen=True, slots=True)
class Trouble:
    """An ``error`` command: what it is about (``recipient 0``, ``internal``), and the words."""

    about: tuple[str, ...]
    text: str

    @classmethod
    def of(cls, error: KmsError, *about: str) -> "Trouble":
        hint = getattr(error, "hint", "") or terminal.HINTS.get(error.code, "")
        text = terminal.plain(error.detail)
        said = f"{text} ({hint})" if hint else text
        # a service that a recipient names is anybody's, and age tools show this in a terminal
        return cls(about, "".join(char if char.isprintable() else " " for char in said))


# -- recipient-v1 --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Wanted:
    """What the age tool asks for in its phase."""

    given: list[tuple[str, int, str]] = field(default_factory=list)  # kind, index among its kind, text
    file_keys: list[bytes] = field(default_factory=list, repr=False)
    labels: bool = False


def recipient_v1(line: PluginConnection, keys_for: KeysFor) -> None:
    """Wrap every file key for every recipient and identity, or say what stands against it. Raises Broken."""
    wanted = _wanted(line)
    stanzas, troubles = _wrapped(wanted, keys_for)
    if troubles:
        _complain(line, troubles)
        return
    for file, stanza in stanzas:
        if line.ask("recipient-stanza", str(file), *stanza.args, body=stanza.body) != "ok":
            raise Broken("the age tool does not take a stanza")
    if wanted.labels and any(_is_postquantum(stanza) for _, stanza in stanzas):
        line.ask("labels", POSTQUANTUM)
    line.done()


def _wanted(line: PluginConnection) -> _Wanted:
    wanted = _Wanted()
    counts = {"recipient": 0, "identity": 0}
    for stanza in line.phase():
        match stanza:
            case Stanza(args=("add-recipient" | "add-identity" as command, text)):
                kind = command.removeprefix("add-")
                wanted.given.append((kind, counts[kind], text))
                counts[kind] += 1
            case Stanza(args=("wrap-file-key",), body=body) if len(body) == FILE_KEY_BYTES:
                wanted.file_keys.append(body)
            case Stanza(args=("extension-labels", *_)):
                wanted.labels = True
            case Stanza(args=("add-recipient" | "add-identity" | "wrap-file-key", *_)):
                raise Broken(f"{stanza.type} has another shape")
            case _:  # grease, and what a later version may add
                pass
    return wanted


def _targets(
    given: Iterable[tuple[str, int, str]],
) -> tuple[Mapping[PluginTarget, tuple[str, int]], list[Trouble]]:
    """Each target once, with who names it first; and those texts that name none."""
    targets: dict[PluginTarget, tuple[str, int]] = {}
    troubles: list[Trouble] = []
    for kind, index, text in given:
        try:
            read = PluginTarget.of_recipient if kind == "recipient" else PluginTarget.of_identity
            targets.setdefault(read(text), (kind, index))
        except ValueError as exc:
            troubles.append(Trouble((kind, str(index)), f"not usable as {kind}: {exc}"))
    return targets, troubles


def _wrapped(wanted: _Wanted, keys_for: KeysFor) -> tuple[list[tuple[int, Stanza]], list[Trouble]]:
    """A stanza, with the index of its file key, for each file key and target; or why there is none."""
    targets, troubles = _targets(wanted.given)
    if troubles:
        return [], troubles
    stanzas: list[tuple[int, Stanza]] = []
    for target, (kind, index) in targets.items():
        try:
            keys = keys_for(target)
            for file, file_key in enumerate(wanted.file_keys):
                stanzas.append((file, parse_stanzas(keys.wrap(file_key, target), FILE_LIMITS)[0]))
        except KmsError as exc:
            troubles.append(Trouble.of(exc, kind, str(index)))
    if len({_is_postquantum(stanza) for _, stanza in stanzas}) > 1:
        text = "post-quantum and classic keys do not mix: the file would be as weak as the classic ones"
        troubles.append(Trouble(("internal",), text))
    return stanzas, troubles


def _is_postquantum(stanza: Stanza) -> bool:
    """Whether nothing but post-quantum stanzas lead to the file key."""
    inner = unbundled([stanza], FILE_LIMITS)
    wraps = {each.type for each in inner if each.type not in {binding.CONTEXT, binding.ORIGIN}}
    return wraps == {mlkem768x25519.STANZA_TYPE}


# -- identity-v1 ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StanzaBundle:
    """Stanzas of one file that belong together: a bundle, or all that stand outside of any."""

    file: int
    stanza: int
    text: bytes
    key_id: str


def identity_v1(line: PluginConnection, keys_for: KeysFor) -> None:
    """Say the file key of every file that an identity opens. Raises Broken."""
    given, files = _offered(line)
    targets, troubles = _targets(given)
    if troubles:
        _complain(line, troubles)
        return
    for file, stanzas in files.items():
        try:
            parts = list(_parts(file, stanzas))
        except _Misshapen as exc:
            _complain(line, [exc.trouble], last=False)
            continue
        _open_file(line, keys_for, targets, parts)
    line.done()


def _open_file(
    line: PluginConnection,
    keys_for: KeysFor,
    targets: Mapping[PluginTarget, tuple[str, int]],
    parts: Iterable[StanzaBundle],
) -> None:
    """The first key that an identity gives; else why not, where that is not just another's file."""
    troubles: list[Trouble] = []
    refused: set[str] = set()
    tries = [(part, target) for part in parts for target in targets if target.key_id in {None, part.key_id}]
    for part, target in tries[:MOST_TRIES]:
        try:
            file_key = keys_for(target).unwrap(part.text, target)
        except (DecryptFailed, UnknownKey):
            refused.add(part.key_id)
        except KmsError as exc:
            troubles.append(Trouble.of(exc, "identity", str(targets[target][1])))
        else:
            line.ask("file-key", str(part.file), body=file_key)
            return
    if len(tries) > MOST_TRIES:
        text = f"none of the first {MOST_TRIES} wraps opens: give fewer identities, or one with a key id"
        troubles.append(Trouble(("internal",), text))
    if troubles:
        _complain(line, troubles, last=False)
    elif refused:  # of its context a file says nothing, so another identity may well open it
        names = ", ".join(sorted(refused))
        why = f"the file is for key {names}, in another context, past its time or of another service"
        line.ask("msg", body=why.encode())


def _offered(line: PluginConnection) -> tuple[list[tuple[str, int, str]], dict[int, list[Stanza]]]:
    identities: list[tuple[str, int, str]] = []
    files: dict[int, list[Stanza]] = {}
    for stanza in line.phase():
        match stanza.args:
            case ("add-identity", text):
                identities.append(("identity", len(identities), text))
            case ("recipient-stanza", index, kind, *args) if _is_index(index):
                if files and int(index) < max(files):
                    raise Broken("file indices go back")
                files.setdefault(int(index), []).append(Stanza((kind, *args), stanza.body))
            case ("add-identity" | "recipient-stanza", *_):
                raise Broken(f"{stanza.type} has another shape")
            case _:  # grease, and what a later version may add
                pass
    return identities, files


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _INDEX_DIGITS


class _Misshapen(Exception):
    def __init__(self, file: int, stanza: int) -> None:
        text = "the file's header is damaged, or of a later version of kms"
        self.trouble = Trouble(("stanza", str(file), str(stanza)), text)


def _parts(file: int, stanzas: list[Stanza]) -> Iterable[StanzaBundle]:
    """Raises _Misshapen for stanzas of ours that are none."""
    outside = [stanza for stanza in stanzas if stanza.type != BUNDLE]
    first = next((place for place, each in enumerate(stanzas) if each.type.startswith(binding.OWN_PREFIX)), 0)
    groups = [(place, [each]) for place, each in enumerate(stanzas) if each.type == BUNDLE]
    for place, group in [*groups, (first, outside)]:
        try:
            bound = binding.read_stanzas(unbundled(group, FILE_LIMITS))
        except (DecryptFailed, TooLarge) as exc:
            raise _Misshapen(file, place) from exc
        if bound is not None:
            yield StanzaBundle(file, place, b"".join(map(render_stanza, group)), bound.key_id)


# -- both ----------------------------------------------------------------------------------------------


def _complain(line: PluginConnection, troubles: Iterable[Trouble], *, last: bool = True) -> None:
    for trouble in troubles:
        line.ask("error", *trouble.about, body=trouble.text.encode())
    if last:
        line.done()
