"""What ``age-plugin-kms`` says to an age tool: transcripts of the protocol, and what no tool should send."""

import io
import subprocess
import sys
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_cli.age_files import Identities
from kms_cli.plugin.main import KeysOfTargets
from kms_cli.plugin.names import IDENTITY_PREFIX, RECIPIENT_PREFIX, PluginTarget
from kms_cli.plugin.state_machines import MAX_ATTEMPTS, PluginKeys, identity_v1, recipient_v1
from kms_core.age import bech32, header, mlkem768x25519, x25519
from kms_core.age.header import Stanza, parse_stanzas, render_stanza
from kms_core.age.plugin_protocol import Broken, PluginConnection
from kms_core.age.recipients import Recipient
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef, version_of
from kms_protocol.context import Context
from kms_protocol.errors import BackendUnavailable, DecryptFailed, KmsError
from support.age_kms import forged, head_of, write_pair

FILE_KEY: Final = bytes(range(16))
OTHER_KEY: Final = bytes(range(16, 32))
ENV: Final = Context.parse("env=prod")
HERE: Final = PluginTarget("payroll", ENV)
OK: Final = b"-> ok\n\n"
HERE_TOO: Final = f"add-identity {HERE.identity()}"


@dataclass
class Sealer:
    """Age keys in memory that wrap as the service does; ``trouble`` is raised instead."""

    identities: Identities
    trouble: KmsError | None = None
    asked: list[PluginTarget] = field(default_factory=list)

    def wrap(self, file_key: bytes, target: PluginTarget) -> bytes:
        self._note(target)
        stanza = sealing.wrap_for_plugin(
            file_key, [(self.identities, self._ref(target.key_id))], target.context
        )
        return render_stanza(stanza)

    def unwrap(self, stanzas: bytes, target: PluginTarget) -> bytes:
        self._note(target)
        given = header.unbundled(parse_stanzas(stanzas, header.FILE_LIMITS), header.FILE_LIMITS)
        bound = binding.read(given)
        assert bound is not None
        ref = self._ref(bound.key_id)
        return sealing.unwrap_for_plugin(given, self.identities, ref, context=target.context).file_key

    def _note(self, target: PluginTarget) -> None:
        self.asked.append(target)
        if self.trouble:
            raise self.trouble

    def _ref(self, key_id: str | None) -> KeyRef:
        return KeyRef("default", key_id or "default", next(iter(self.identities.native)), "age")


@pytest.fixture
def sealer() -> Sealer:
    return Sealer(Identities({"v1": x25519.X25519Identity.generate()}))


def said(*stanzas: Stanza | str) -> bytes:
    """What a tool sends: a stanza, or words without a body."""
    made = [Stanza(tuple(each.split(" ")), b"") if isinstance(each, str) else each for each in stanzas]
    return b"".join(map(render_stanza, made))


def wrap_key(file_key: bytes = FILE_KEY) -> Stanza:
    return Stanza(("wrap-file-key",), file_key)


def answer(machine: object, incoming: bytes, keys: PluginKeys) -> list[Stanza]:
    """What the plugin says, when every command of its own is answered with ok."""
    outgoing = io.BytesIO()
    assert callable(machine)
    machine(PluginConnection(io.BytesIO(incoming + OK * 50), outgoing), keys)
    return list(parse_stanzas(outgoing.getvalue(), header.FILE_LIMITS))


def wrapped(keys: PluginKeys, *recipients: str, file_key: bytes = FILE_KEY) -> list[Stanza]:
    """The stanzas of a file for these recipients."""
    words = [f"add-recipient {each}" for each in recipients]
    found = answer(recipient_v1, said(*words, wrap_key(file_key), "done"), keys)
    assert found.pop().args == ("done",)
    return [Stanza(each.args[2:], each.body) for each in found]


def offered(file: int, *stanzas: Stanza) -> list[Stanza]:
    return [Stanza(("recipient-stanza", str(file), *each.args), each.body) for each in stanzas]


def opened(keys: PluginKeys, stanzas: Sequence[Stanza], *identities: str) -> list[Stanza]:
    """What comes of a file with these stanzas and identities, else the one of the key and context."""
    words = [f"add-identity {each}" for each in identities or [HERE.identity()]]
    return answer(identity_v1, said(*words, *offered(0, *stanzas), "done"), keys)


# -- recipient-v1 ----------------------------------------------------------------------------------------


def test_one_stanza_for_each_file_key_and_recipient(sealer: Sealer) -> None:
    other = PluginTarget("backup", ENV)
    incoming = said(
        wrap_key(), f"add-recipient {HERE.recipient()}", "grease-1 2 3", wrap_key(OTHER_KEY),
        f"add-identity {other.identity()}", Stanza(("unknown",), b"x" * 100), "done",
    )  # fmt: skip

    *stanzas, done = answer(recipient_v1, incoming, sealer)

    assert [each.args for each in stanzas] == [
        ("recipient-stanza", file, "kms-service/bundle", "1") for file in ("0", "1", "0", "1")
    ]
    assert done == Stanza(("done",), b"")
    assert sealer.asked == [HERE, HERE, other, other]


def test_the_same_recipient_twice_is_wrapped_for_once(sealer: Sealer) -> None:
    assert len(wrapped(sealer, HERE.recipient(), HERE.recipient())) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("age1kms1qqqqqqqq", "checksum"),
        (HERE.identity(), "does not begin with age1kms1"),
        (bech32.encode("age1kms", b"\x02{}"), "later version"),
        (bech32.encode("age1kms", b'\x01{"token":"x"}'), "damaged"),
        (bech32.encode("age1kms", b'\x01{"key":"a b"}'), "damaged"),
        (bech32.encode("age1kms", b'\x01{"url":"ftp://x"}'), "damaged"),
        (
            bech32.encode("age1kms", b'\x01{"url":"http://x","local":true}'),
            "both a service and the keys in process",
        ),
        (bech32.encode("age1kms", b'\x01{"ctx":{"kms:x":"1"}}'), "damaged"),
        ("age1kms1" + "q" * 40_000, "too long"),
    ],
)
def test_a_recipient_that_cannot_be_used_is_named_by_its_index(sealer: Sealer, text: str, why: str) -> None:
    incoming = said(f"add-recipient {HERE.recipient()}", f"add-recipient {text}", wrap_key(), "done")

    error, done = answer(recipient_v1, incoming, sealer)

    assert (error.args, done.args) == (("error", "recipient", "1"), ("done",))
    assert why in error.body.decode()
    assert not sealer.asked


@pytest.mark.parametrize(
    ("labels", "hybrids", "expected"),
    [(True, True, ["labels", "postquantum"]), (True, False, []), (False, True, [])],
    ids=["asked and so", "asked and classic", "not asked"],
)
def test_post_quantum_keys_label_themselves(labels: bool, hybrids: bool, expected: list[str]) -> None:
    keys = Sealer(
        Identities({"v1": (mlkem768x25519.HybridIdentity if hybrids else x25519.X25519Identity).generate()})
    )
    asking = ("extension-labels",) if labels else ()
    incoming = said(f"add-recipient {HERE.recipient()}", wrap_key(), *asking, "done")

    found = answer(recipient_v1, incoming, keys)

    assert [word for each in found for word in each.args if each.type == "labels"] == expected


def test_post_quantum_and_classic_keys_do_not_mix() -> None:
    class Mixed(Sealer):
        def _ref(self, key_id: str | None) -> KeyRef:
            return KeyRef("default", "default", key_id or "", "age")

    keys = Mixed(
        Identities({"old": x25519.X25519Identity.generate(), "new": mlkem768x25519.HybridIdentity.generate()})
    )
    both = [PluginTarget("old").recipient(), PluginTarget("new").recipient()]
    incoming = said(*(f"add-recipient {each}" for each in both), wrap_key(), "done")

    error, done = answer(recipient_v1, incoming, keys)

    assert (error.args, done.args) == (("error", "internal"), ("done",))


# -- identity-v1 -----------------------------------------------------------------------------------------


def test_every_file_gets_its_key(sealer: Sealer) -> None:
    first = wrapped(sealer, HERE.recipient())
    second = wrapped(sealer, HERE.recipient(), file_key=OTHER_KEY)
    native = Stanza(("X25519", "a"), bytes(32))
    incoming = said(
        *offered(0, native), HERE_TOO, *offered(0, *first), "grease", *offered(3, *second),
        *offered(7, native), "done",
    )  # fmt: skip

    found = answer(identity_v1, incoming, sealer)

    assert [(each.args, each.body) for each in found] == [
        (("file-key", "0"), FILE_KEY), (("file-key", "3"), OTHER_KEY), (("done",), b"")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("identities", "words"),
    [
        ([PluginTarget("other", ENV)], ["done"]),
        ([PluginTarget("payroll")], ["msg", "done"]),
        ([PluginTarget(None, ENV)], ["file-key", "done"]),
        ([PluginTarget("payroll"), PluginTarget("other", ENV), HERE], ["file-key", "done"]),
    ],
    ids=["of another key", "of another context", "of any key", "the last of three"],
)
def test_identities_open_what_they_name(
    sealer: Sealer, identities: list[PluginTarget], words: list[str]
) -> None:
    found = opened(sealer, wrapped(sealer, HERE.recipient()), *(each.identity() for each in identities))

    assert [each.type for each in found] == words


@pytest.mark.parametrize(
    "stanza",
    [
        Stanza(("kms-service/bundle", "2"), b""),
        Stanza(("kms-service/bundle", "1"), b"-> no end"),
        Stanza(("kms-service/bundle", "1"), b"-> kms-service/wrap x\n\n"),
        Stanza(("kms-service/wrap", "x"), b""),
        Stanza(("kms-service/unheard-of",), b""),
    ],
)
def test_a_stanza_of_ours_that_is_none_spoils_its_file_alone(sealer: Sealer, stanza: Stanza) -> None:
    good = wrapped(sealer, HERE.recipient())
    files = [*offered(0, Stanza(("X25519", "a"), b""), stanza, *good), *offered(1, *good)]

    error, key, _ = answer(identity_v1, said(HERE_TOO, *files, "done"), sealer)

    assert error.args == ("error", "stanza", "0", "1")
    assert key.args == ("file-key", "1")


def test_a_file_that_others_made_is_refused_in_process(tmp_path: Path) -> None:
    """By who knows the recipient alone; a wrap beside the native stanza proves nothing of it."""
    identity = x25519.X25519Identity.generate()
    files = write_pair(tmp_path / "age", identity)
    (tmp_path / "kms.toml").write_text(
        f'[kms.age]\nprivate_key_path = "{files.private}"\npublic_key_path = "{files.public}"\n'
        "accept_foreign = false\n"
    )
    keys = KeysOfTargets({"HOME": str(tmp_path), "KMS_CONFIG": str(tmp_path / "kms.toml")})
    here = PluginTarget(None, ENV, None, in_process=True)
    key = KeyRef("default", "default", version_of(identity.recipient), "age")
    made = head_of(forged(identity, key, ENV, binding.wrap_stanza(key, b"!"))).stanzas

    assert keys.unwrap(keys.wrap(FILE_KEY, here), here) == FILE_KEY
    for stanzas in (made, [header.bundle(made)]):
        error, done = opened(keys, stanzas, here.identity())
        assert (error.args, done.args) == (("error", "identity", "0"), ("done",))
        assert b"origin" in error.body


def test_a_broken_identity_means_that_nothing_is_opened(sealer: Sealer) -> None:
    stanzas = wrapped(sealer, HERE.recipient())
    broken = HERE.identity()[:-1] + ("Q" if HERE.identity()[-1] != "Q" else "P")

    error, done = opened(sealer, stanzas, HERE.identity(), broken)

    assert (error.args, done.args) == (("error", "identity", "1"), ("done",))
    assert broken.encode() not in error.body


def test_a_header_of_many_wraps_costs_a_bounded_number_of_calls(sealer: Sealer) -> None:
    (stanza,) = wrapped(sealer, PluginTarget("payroll").recipient())
    sealer.asked.clear()

    error, done = opened(sealer, [stanza] * (MAX_ATTEMPTS + 1))

    assert len(sealer.asked) == MAX_ATTEMPTS
    assert (error.args, done.args) == (("error", "internal"), ("done",))


@pytest.mark.parametrize("operation", ["wrap", "unwrap"])
def test_what_a_service_refuses_with_is_the_error_and_plain_text(sealer: Sealer, operation: str) -> None:
    stanzas = wrapped(sealer, HERE.recipient())
    sealer.trouble = BackendUnavailable("Down\x1b]0;owned\x07\nage: warning: trust me")
    wrapping = said(HERE_TOO, wrap_key(), "done")

    error, done = answer(recipient_v1, wrapping, sealer) if operation == "wrap" else opened(sealer, stanzas)

    assert (error.args, done.args) == (("error", "identity", "0"), ("done",))
    assert error.body.startswith(b"down ]0;owned  age: warning: trust me (")
    assert error.body.decode().isprintable()


# -- what no tool should send ----------------------------------------------------------------------------


BOTH: Final = [
    b"",
    b"-> done\n",
    b"-> done",
    b"done\n\n",
    b"->\n\n",
    b"-> a  b\n\n",
    b"-> grease\nAA==\n-> done\n\n",
    b"-> grease\nAB\n-> done\n\n",
    b"-> add-identity\n\n-> done\n\n",
    b"-> add-identity a b\n\n-> done\n\n",
    b"-> x " + b"y" * (1 << 19) + b"\n\n-> done\n\n",
    b"-> x\n" + (b"A" * 64 + b"\n") * 20_000 + b"\n-> done\n\n",
    b"-> grease\n\n" * 20_001 + b"-> done\n\n",
    (b"-> grease " + b"x" * 200_000 + b"\n\n") * 100 + b"-> done\n\n",
]
WRAPPING: Final = [
    b"-> wrap-file-key\n" + b64encode(bytes(15)).rstrip(b"=") + b"\n-> done\n\n",
    b"-> wrap-file-key 1\n" + b64encode(bytes(16)).rstrip(b"=") + b"\n-> done\n\n",
    b"-> add-recipient\n\n-> done\n\n",
]
UNWRAPPING: Final = [b"-> recipient-stanza\n\n-> done\n\n", b"-> recipient-stanza 0\n\n-> done\n\n"]
OF_A_FILE: Final = "-> recipient-stanza {} X25519 a\n\n"
BACK: Final = [  # file indices are numbers that do not go back
    f"{OF_A_FILE.format(2)}{OF_A_FILE.format(index)}-> done\n\n".encode()
    for index in ("-1", "x", "1.0", "٣", "9" * 10, "1")
]


@pytest.mark.parametrize(
    ("machine", "incoming"),
    [(recipient_v1, each) for each in BOTH + WRAPPING]
    + [(identity_v1, each) for each in BOTH + UNWRAPPING + BACK],
)
def test_what_is_no_protocol_ends_the_talk(sealer: Sealer, machine: object, incoming: bytes) -> None:
    with pytest.raises(Broken):
        answer(machine, incoming, sealer)


@pytest.mark.parametrize(
    "replies", [b"", b"-> fail\n\n", b"-> unsupported\n\n"], ids=["gone", "fail", "unsupported"]
)
def test_a_tool_that_takes_no_stanza_is_left(sealer: Sealer, replies: bytes) -> None:
    incoming = said(f"add-recipient {HERE.recipient()}", wrap_key(), "done") + replies

    with pytest.raises(Broken):
        recipient_v1(PluginConnection(io.BytesIO(incoming), io.BytesIO()), sealer)


words = st.text(st.characters(codec="ascii", min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20)
telling = st.sampled_from(["0", "1", "kms-service/bundle", HERE.recipient(), HERE.identity()])
commands = st.sampled_from(
    ["add-recipient", "add-identity", "wrap-file-key", "recipient-stanza", "extension-labels", "done"]
)
stanza_texts = st.builds(
    lambda kind, args, body: render_stanza(Stanza((kind, *args), body)),
    commands | words,
    st.lists(words | telling, max_size=4),
    st.binary(max_size=100),
)  # fmt: skip
SEALER: Final = Sealer(Identities({"v1": x25519.X25519Identity.generate()}))


@given(
    st.lists(stanza_texts | st.binary(max_size=80), max_size=12).map(b"".join),
    st.sampled_from([recipient_v1, identity_v1]),
)
def test_whatever_comes_is_answered_or_ends_the_talk(incoming: bytes, machine: object) -> None:
    try:
        found = answer(machine, incoming + said("done"), SEALER)
    except Broken:
        return
    assert found[-1].args == ("done",)


def test_an_identity_without_data_is_the_one_of_no_context() -> None:
    assert PluginTarget.parse(bech32.encode("AGE-PLUGIN-KMS-", b""), IDENTITY_PREFIX) == PluginTarget()
    with pytest.raises(ValueError, match="later version"):
        PluginTarget.parse(bech32.encode("age1kms", b""), RECIPIENT_PREFIX)


@given(st.binary(max_size=400))
def test_no_text_of_a_recipient_is_beyond_a_plain_refusal(data: bytes) -> None:
    try:
        target = PluginTarget.parse(bech32.encode("age1kms", data), RECIPIENT_PREFIX)
    except ValueError:
        return
    assert PluginTarget.parse(target.recipient(), RECIPIENT_PREFIX) == target


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=12), max_size=5))
def test_a_recipient_says_key_context_and_place_again(pairs: dict[str, str]) -> None:
    try:
        context = Context.parse(pairs)
    except KmsError:
        return
    for target in (PluginTarget("k", context), PluginTarget(None, context, "https://kms.example.com"), PluginTarget("k", context, None, True)):  # noqa: E501, FBT003 -- one each  # fmt: skip
        assert (
            PluginTarget.parse(target.recipient(), RECIPIENT_PREFIX)
            == PluginTarget.parse(target.identity(), IDENTITY_PREFIX)
            == target
        )


# -- the program -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, "found it on the PATH"),
        (["--age-plugin=recipient-v2"], 2, "unknown state machine recipient-v2"),
        (["--age-plugin=recipient-v1", "x"], 2, "unknown state machine recipient-v1"),
        (["--age-plugin=identity-v1"], 1, "the age tool has exited"),
    ],
)
def test_the_program_refuses_what_it_does_not_know(argv: Sequence[str], code: int, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "kms_cli.plugin.main", *argv],
        input=b"",
        capture_output=True,
        check=False,
        timeout=60,
    )

    assert (done.returncode, done.stdout) == (code, b"")
    assert words.replace("found it", "find it") in done.stderr.decode()


# -- bundles ---------------------------------------------------------------------------------------------


def file_of(stanzas: Sequence[Stanza]) -> bytes:
    return header.render(stanzas, FILE_KEY) + bytes(16)


def test_the_stanzas_of_a_bundle_stand_in_its_place() -> None:
    inner = [Stanza(("a", "b"), b""), Stanza(("c",), bytes(48)), Stanza(("d",), bytes(100))]

    found = head_of(file_of([Stanza(("x",), b""), header.bundle(inner), Stanza(("y",), b"")]))

    assert [each.type for each in found.stanzas] == ["x", "a", "c", "d", "y"]
    assert list(found.stanzas[1:4]) == inner
    found.check_mac(FILE_KEY)


INNER: Final = header.bundle([Stanza(("a",), b"")])


@pytest.mark.parametrize(
    "stanza",
    [
        header.bundle([INNER]),
        Stanza((header.BUNDLE, "2"), INNER.body),
        Stanza((header.BUNDLE, "1", "x"), INNER.body),
        Stanza((header.BUNDLE,), INNER.body),
    ],
    ids=["within a bundle", "later version", "more words", "no version"],
)
def test_a_bundle_of_another_version_or_shape_spoils_its_file(stanza: Stanza) -> None:
    with pytest.raises(DecryptFailed):
        binding.read(head_of(file_of([stanza])).stanzas)


def test_who_hands_over_for_an_age_key_proves_it_without_a_nonce(sealer: Sealer) -> None:
    ref = KeyRef("default", "payroll", "v1", "age")
    given = header.unbundled(wrapped(sealer, HERE.recipient()), header.FILE_LIMITS)
    stranger: Recipient = sealer.identities.native["v1"].recipient
    bound = binding.context_stanza(FILE_KEY, ref, ENV)
    forged = [stranger.wrap(FILE_KEY), bound, Stanza((binding.ORIGIN, "2"), bytes(32))]
    found = sealing.unwrap_for_plugin(given, sealer.identities, ref, context=ENV)

    assert (found.file_key, found.is_proven) == (FILE_KEY, True)
    with pytest.raises(DecryptFailed):
        sealing.unwrap_for_plugin(forged, sealer.identities, ref, context=ENV)
