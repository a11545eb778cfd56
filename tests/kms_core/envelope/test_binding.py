"""Our stanzas: which are read, and what they bind; tests/golden holds the tags of origin and remote wraps."""

from typing import Final

import pytest
from msgspec.structs import replace

from kms_core.age import header
from kms_core.age.header import Stanza
from kms_core.envelope import binding
from kms_core.envelope.binding import CONTEXT, ORIGIN, PAD, WRAP, BoundStanzas, KeyRef
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed
from support.age_kms import NO_CONTEXT, ROW_7, head_of

FILE_KEY: Final = bytes(range(16))
NONCE: Final = bytes(range(16, 32))
KEY: Final = KeyRef("acme", "payroll", "0a1b2c3d", "age")
SALT: Final = "AAAAAAAAAAAAAAAAAAAAAA"
NATIVE: Final = Stanza(("X25519", "share"), bytes(32))
BOUND: Final = Stanza((CONTEXT, "1", "payroll", "0a1b2c3d", SALT), bytes(32))
MADE: Final = Stanza((ORIGIN, "1"), bytes(32))
FILLER: Final = Stanza((PAD, "000"), b"")


def bound_by(context: Stanza) -> BoundStanzas:
    bound = binding.read(parsed(NATIVE, context))
    assert bound
    return bound


def parsed(*stanzas: Stanza) -> tuple[Stanza, ...]:
    return head_of(header.render(stanzas, FILE_KEY) + NONCE).stanzas


# -- what our stanzas say ----------------------------------------------------------------------------


def test_a_file_without_our_stanzas_is_foreign() -> None:
    assert binding.read(parsed(NATIVE, Stanza(("kms-service",), b""), Stanza(("x-grease", "1"), b""))) is None


def test_names_are_read() -> None:
    bound = binding.read(parsed(NATIVE, BOUND, MADE, FILLER))

    assert bound is not None
    assert (bound.key_id, bound.key_version, bound.origin) == ("payroll", "0a1b2c3d", MADE.body)


@pytest.mark.parametrize(
    "stanzas",
    [(BOUND,), (BOUND, MADE), (NATIVE, BOUND), (BOUND, Stanza((WRAP, "transit", "payroll", "1"), bytes(48)))],
    ids=["alone", "with origin", "with native", "with wrap"],
)
def test_origin_and_pad_may_be_absent(stanzas: tuple[Stanza, ...]) -> None:
    assert binding.read(parsed(*stanzas)) is not None


@pytest.mark.parametrize(
    "stanzas",
    [
        (BOUND, BOUND),
        (BOUND, MADE, MADE),
        (BOUND, FILLER, FILLER),
        (MADE,),
        (FILLER,),
        (Stanza((WRAP, "transit", "payroll", "1"), bytes(48)),),
        (BOUND, Stanza(("kms-service/", "1"), b"")),
        (BOUND, Stanza(("kms-service/other", "1"), b"")),
        (BOUND, Stanza(("kms-service/context2", "1"), b"")),
        (BOUND, Stanza(("kms-service/Context", *BOUND.args[1:]), bytes(32))),
        (Stanza(("kms-service/context/1", *BOUND.args[1:]), bytes(32)),),
        (BOUND, *(Stanza((WRAP, f"transit-{number}", "payroll", "1"), bytes(48)) for number in range(5))),
    ],
    ids=[
        "context twice", "origin twice", "pad twice", "origin alone", "pad alone", "wrap alone", "no name",
        "unknown", "unknown, alike", "case", "unknown alone", "five wraps",
    ],
)  # fmt: skip
def test_unknown_doubled_and_orphaned_stanzas_are_refused(stanzas: tuple[Stanza, ...]) -> None:
    with pytest.raises(DecryptFailed):
        binding.read(parsed(NATIVE, *stanzas))


@pytest.mark.parametrize(
    "context",
    [
        replace(BOUND, args=BOUND.args[:4]),
        replace(BOUND, args=(*BOUND.args, "x")),
        replace(BOUND, args=(CONTEXT,)),
        replace(BOUND, args=(CONTEXT, "2", *BOUND.args[2:])),
        replace(BOUND, args=(CONTEXT, "01", *BOUND.args[2:])),
        replace(BOUND, args=(CONTEXT, "1", "pay/roll", "0a1b2c3d", SALT)),
        replace(BOUND, args=(CONTEXT, "1", "p" * 81, "0a1b2c3d", SALT)),
        replace(BOUND, args=(CONTEXT, "1", "payroll", "transit://x", SALT)),
        replace(BOUND, args=(CONTEXT, "1", "payroll", "v" * 81, SALT)),
        replace(BOUND, args=(CONTEXT, "1", "payroll", "0a1b2c3d", SALT[:-1])),
        replace(BOUND, args=(CONTEXT, "1", "payroll", "0a1b2c3d", SALT[:-2])),
        replace(BOUND, args=(CONTEXT, "1", "payroll", "0a1b2c3d", SALT + "AA")),
        replace(BOUND, args=(CONTEXT, "1", "payroll", "0a1b2c3d", SALT + "==")),
        replace(BOUND, body=b""),
        replace(BOUND, body=bytes(31)),
        replace(BOUND, body=bytes(33)),
    ],
    ids=[
        "no salt", "argument too many", "no arguments", "version 2", "version 01", "key id", "long key id",
        "key version", "long key version", "cut salt", "short salt", "long salt", "padded salt", "no tag",
        "short tag", "long tag",
    ],
)  # fmt: skip
def test_a_context_stanza_of_another_shape_is_refused(context: Stanza) -> None:
    with pytest.raises(DecryptFailed):
        binding.read(parsed(NATIVE, context, MADE))


@pytest.mark.parametrize(
    "stanza",
    [
        replace(MADE, args=(ORIGIN,)),
        replace(MADE, args=(ORIGIN, "3")),
        replace(MADE, args=(ORIGIN, "1", "x")),
        replace(MADE, body=b""),
        replace(MADE, body=bytes(31)),
        replace(MADE, body=bytes(33)),
        Stanza((PAD,), b""),
        Stanza((PAD, "1"), b""),
        Stanza((PAD, "0001"), b""),
        Stanza((PAD, "0", "0"), b""),
        Stanza((PAD, "0"), b"x"),
    ],
    ids=lambda stanza: f"{' '.join(stanza.args)}, {len(stanza.body)} bytes",
)
def test_an_origin_or_pad_stanza_of_another_shape_is_refused(stanza: Stanza) -> None:
    with pytest.raises(DecryptFailed):
        binding.read(parsed(NATIVE, BOUND, stanza))


# -- tags --------------------------------------------------------------------------------------------


def test_the_context_of_the_sealing_fits_the_file_key_of_it_alone() -> None:
    bound = bound_by(binding.context_stanza(FILE_KEY, KEY, ROW_7))

    binding.check_context(bound, FILE_KEY, KEY.tenant, ROW_7)
    with pytest.raises(DecryptFailed):
        binding.check_context(bound, bytes(16), KEY.tenant, ROW_7)


@pytest.mark.parametrize(
    ("names", "context"),
    [
        ({"tenant": "evil"}, ROW_7),
        ({"key_id": "other"}, ROW_7),
        ({"version": "0"}, ROW_7),
        ({"tenant": "acmepayroll", "key_id": ""}, ROW_7),
        ({}, NO_CONTEXT),
        ({}, Context.parse("row=8")),
        ({}, Context.parse("row=7,x=")),
    ],
    ids=["tenant", "key id", "version", "shifted", "no context", "other", "extra"],
)
def test_no_other_context_or_name_fits(names: dict[str, str], context: Context) -> None:
    key = replace(KEY, **names)
    tag = binding.context_stanza(FILE_KEY, KEY, ROW_7)
    bound = replace(bound_by(tag), key_id=key.key_id, key_version=key.version)

    with pytest.raises(DecryptFailed):
        binding.check_context(bound, FILE_KEY, key.tenant, context)


def test_one_context_looks_different_in_every_file() -> None:
    """Equal tags would tell which files share a context."""
    stanzas = [binding.context_stanza(FILE_KEY, KEY, ROW_7) for _ in range(2)]

    assert stanzas[0].args != stanzas[1].args
    assert stanzas[0].body != stanzas[1].body


def test_no_context_value_leaves_with_a_wrap() -> None:
    context = Context.parse("patient=hunter2")

    assert b"hunter2" not in binding.wrap_aad(KEY, binding.context_stanza(FILE_KEY, KEY, context))


@pytest.mark.parametrize(("size", "taken"), [(0, False), (1, True), (4096, True), (4097, False)])
def test_a_remote_wrap_is_4096_bytes_at_most(size: int, *, taken: bool) -> None:
    stanza = Stanza((WRAP, "transit", "payroll", "1"), bytes(size))
    if taken:
        assert len(binding.read_wrap(stanza).body) == size
        return

    with pytest.raises(DecryptFailed):
        binding.read_wrap(stanza)


# -- padding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [*range(3970, 3990), 100, 4096, 8190, 20_000])
def test_filler_rounds_a_header_up(taken: int) -> None:
    spare = taken - len(header.render([Stanza(("x",), b"")], FILE_KEY))
    stanza = Stanza(("x" * max(1, 1 + spare),), b"")
    pad = binding.pad_stanza(len(header.render([stanza], FILE_KEY)), 4096)
    rendered = header.render([stanza, pad], FILE_KEY)

    assert len(rendered) % 4096 == 0
    assert len(rendered) - len(header.render([stanza], FILE_KEY)) < 4096 + len("-> kms-service/pad 0\n\n")
