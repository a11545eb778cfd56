"""The two state machines of an age plugin: ``recipient-v1`` wraps file keys, ``identity-v1`` unwraps them.

Source: C2SP age-plugin specification; "IPC protocol" for the stanzas on stdin and stdout. A file for a key of
the service names that key: stanzas of other tools, and of keys that no identity names, are ignored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from kms_cli import terminal
from kms_cli.plugin.names import IDENTITY_PREFIX, RECIPIENT_PREFIX, PluginTarget
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
from kms_core.age.plugin_protocol import Broken, PluginConnection
from kms_core.envelope import binding
from kms_protocol.errors import DecryptFailed, KmsError, TooLarge, UnknownKey

POSTQUANTUM: Final = "postquantum"
MAX_ATTEMPTS: Final = 100
"""The maximum for one file, since the author of its header determines the number of calls."""
_INDEX_DIGITS: Final = 9


class PluginKeys(Protocol):
    """Wraps and unwraps file keys. Stanzas are text, as in a header. Methods raise KmsError."""

    def wrap(self, file_key: bytes, target: PluginTarget) -> bytes:
        """Return a stanza that wraps the 16 bytes."""

    def unwrap(self, stanzas: bytes, target: PluginTarget) -> bytes:
        """Return the 16 bytes."""


class PluginError(Exception):
    """An ``error`` command: its text, and its subject (``recipient 0``, ``internal``)."""

    def __init__(self, text: str, *about: object) -> None:
        super().__init__(text)
        self.about = tuple(map(str, about))

    @classmethod
    def of(cls, error: KmsError, *about: object) -> "PluginError":
        hint = terminal.hint_of(error)
        text = terminal.plain(error.detail)
        shown = f"{text} ({hint})" if hint else text
        # the service may be untrusted, and age tools print this in a terminal
        return cls("".join(char if char.isprintable() else " " for char in shown), *about)


# -- recipient-v1 --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _WrapRequest:
    """The commands of the age tool in its phase."""

    given: list[tuple[str, int, str]] = field(default_factory=list)  # kind, index among its kind, text
    file_keys: list[bytes] = field(default_factory=list, repr=False)
    labels: bool = False


def recipient_v1(line: PluginConnection, keys: PluginKeys) -> None:
    """Wrap each file key for each recipient and identity, or report the errors. Raises Broken."""
    request = _wrap_request(line)
    stanzas, errors = _wrapped(request, keys)
    _send_errors(line, errors)
    for file, stanza in stanzas:
        if line.ask("recipient-stanza", str(file), *stanza.args, body=stanza.body) != "ok":
            raise Broken("the age tool rejects a stanza")
    if request.labels and any(_is_postquantum(stanza) for _, stanza in stanzas):
        line.ask("labels", POSTQUANTUM)
    line.send("done")


def _wrap_request(line: PluginConnection) -> _WrapRequest:
    request = _WrapRequest()
    counts = {"recipient": 0, "identity": 0}
    for stanza in line.phase():
        match stanza:
            case Stanza(args=("add-recipient" | "add-identity" as command, text)):
                kind = command.removeprefix("add-")
                request.given.append((kind, counts[kind], text))
                counts[kind] += 1
            case Stanza(args=("wrap-file-key",), body=body) if len(body) == FILE_KEY_BYTES:
                request.file_keys.append(body)
            case Stanza(args=("extension-labels", *_)):
                request.labels = True
            case Stanza(args=("add-recipient" | "add-identity" | "wrap-file-key", *_)):
                raise Broken(f"{stanza.type} is malformed")
            case _:  # grease, and commands of later versions
                pass
    return request


def _targets(
    given: Iterable[tuple[str, int, str]],
) -> tuple[Mapping[PluginTarget, tuple[str, int]], list[PluginError]]:
    """Return each target with the first argument that names it, and the errors of invalid ones."""
    targets: dict[PluginTarget, tuple[str, int]] = {}
    errors: list[PluginError] = []
    for kind, index, text in given:
        try:
            prefix = RECIPIENT_PREFIX if kind == "recipient" else IDENTITY_PREFIX
            targets.setdefault(PluginTarget.parse(text, prefix), (kind, index))
        except ValueError as exc:
            errors.append(PluginError(f"invalid {kind}: {exc}", kind, index))
    return targets, errors


def _wrapped(request: _WrapRequest, keys: PluginKeys) -> tuple[list[tuple[int, Stanza]], list[PluginError]]:
    """Return a stanza and the index of its file key for each key and target, or only the errors."""
    targets, errors = _targets(request.given)
    if errors:
        return [], errors
    stanzas: list[tuple[int, Stanza]] = []
    for target, (kind, index) in targets.items():
        try:
            for file, file_key in enumerate(request.file_keys):
                stanzas.append((file, parse_stanzas(keys.wrap(file_key, target), FILE_LIMITS)[0]))
        except KmsError as exc:
            errors.append(PluginError.of(exc, kind, index))
    if len({_is_postquantum(stanza) for _, stanza in stanzas}) > 1:
        text = "post-quantum and classic keys do not mix: the file would be as weak as the classic ones"
        errors.append(PluginError(text, "internal"))
    return [] if errors else stanzas, errors


def _is_postquantum(stanza: Stanza) -> bool:
    """Return whether only post-quantum stanzas wrap the file key."""
    inner = unbundled([stanza], FILE_LIMITS)
    wraps = {each.type for each in inner if each.type not in {binding.CONTEXT, binding.ORIGIN}}
    return wraps == {mlkem768x25519.STANZA_TYPE}


# -- identity-v1 ---------------------------------------------------------------------------------------


def identity_v1(line: PluginConnection, keys: PluginKeys) -> None:
    """Return the file key of each file that an identity can decrypt. Raises Broken."""
    given, files = _received(line)
    targets, errors = _targets(given)
    _send_errors(line, errors)
    if not errors:
        for file, stanzas in files.items():
            try:
                _open_file(line, keys, targets, file, list(_parts(file, stanzas)))
            except PluginError as exc:
                _send_errors(line, [exc])
    line.send("done")


def _open_file(
    line: PluginConnection,
    keys: PluginKeys,
    targets: Mapping[PluginTarget, tuple[str, int]],
    file: int,
    parts: Iterable[tuple[str, bytes]],
) -> None:
    """Send the first file key that an identity gives, or the errors unless the file is for other keys."""
    errors: list[PluginError] = []
    refused: set[str] = set()
    tries = [(*part, target) for part in parts for target in targets if target.key_id in {None, part[0]}]
    for key_id, stanzas, target in tries[:MAX_ATTEMPTS]:
        try:
            file_key = keys.unwrap(stanzas, target)
        except (DecryptFailed, UnknownKey):
            refused.add(key_id)
        except KmsError as exc:
            errors.append(PluginError.of(exc, *targets[target]))
        else:
            line.ask("file-key", str(file), body=file_key)
            return
    if len(tries) > MAX_ATTEMPTS:
        text = (
            f"none of the first {MAX_ATTEMPTS} attempts succeeds: give fewer identities, or one with a key id"
        )
        errors.append(PluginError(text, "internal"))
    _send_errors(line, errors)
    if refused and not errors:  # a file does not name its context, so another identity may decrypt it
        names = ", ".join(sorted(refused))
        why = f"the file is for key {names}: in another context, expired, or of another service"
        line.ask("msg", body=why.encode())


def _received(line: PluginConnection) -> tuple[list[tuple[str, int, str]], dict[int, list[Stanza]]]:
    identities: list[tuple[str, int, str]] = []
    files: dict[int, list[Stanza]] = {}
    for stanza in line.phase():
        match stanza.args:
            case ("add-identity", text):
                identities.append(("identity", len(identities), text))
            case ("recipient-stanza", index, kind, *args) if _is_index(index):
                if files and int(index) < max(files):
                    raise Broken("file indices decrease")
                files.setdefault(int(index), []).append(Stanza((kind, *args), stanza.body))
            case ("add-identity" | "recipient-stanza", *_):
                raise Broken(f"{stanza.type} is malformed")
            case _:  # grease, and commands of later versions
                pass
    return identities, files


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _INDEX_DIGITS


def _parts(file: int, stanzas: list[Stanza]) -> Iterable[tuple[str, bytes]]:
    """Yield the stanzas of a file that belong together, as text, each with the id of their key.

    Those are the stanzas of a bundle, or all outside of bundles. Raises PluginError for a malformed header.
    """
    outside = [stanza for stanza in stanzas if stanza.type != BUNDLE]
    first = next((place for place, each in enumerate(stanzas) if each.type.startswith(binding.OWN_PREFIX)), 0)
    groups = [(place, [each]) for place, each in enumerate(stanzas) if each.type == BUNDLE]
    for place, group in [*groups, (first, outside)]:
        try:
            bound = binding.read(unbundled(group, FILE_LIMITS))
        except (DecryptFailed, TooLarge) as exc:
            text = "the header is damaged, or of a later version of kms"
            raise PluginError(text, "stanza", file, place) from exc
        if bound is not None:
            yield bound.key_id, b"".join(map(render_stanza, group))


# -- both ----------------------------------------------------------------------------------------------


def _send_errors(line: PluginConnection, errors: Iterable[PluginError]) -> None:
    for error in errors:
        line.ask("error", *error.about, body=str(error).encode())
