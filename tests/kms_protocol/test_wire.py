import io
from collections.abc import Iterator
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_core.jobs.submission.celery_intake import Submission
from kms_protocol import admin, wire
from kms_protocol.wire import (
    Answer,
    BatchIn,
    Body,
    DecryptIn,
    EncryptIn,
    EncryptOut,
    GenerateKeyIn,
    JobIn,
    Shape,
)

SECRET = "hunter2"
PLAIN_NAMES = ["a", "a" * 80, "provisioning-master-key", "A.b_C-9", "-", "."]
OTHER_NAMES = ["", "a b", "a/b", "ü", "a" * 81, "../x", "transit://v"]


def shapes(kind: type[Shape]) -> Iterator[type[Shape]]:
    for child in kind.__subclasses__():
        yield child
        yield from shapes(child)


EVERY = sorted(set(shapes(Shape)) - {Body, Answer}, key=lambda shape: shape.__name__)
assert {admin.AuditOut, Submission} < set(EVERY)
every_shape = pytest.mark.parametrize("shape", EVERY, ids=lambda shape: shape.__name__)


def filled(shape: type[Shape]) -> Shape:
    """A shape with something secret in every field, types aside."""
    return shape(**dict.fromkeys(shape.__struct_fields__, SECRET))


def refusal(body: bytes, shape: type[Shape] = EncryptIn) -> str:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(body, type=shape)
    return str(caught.value)


# -- nothing is shown --------------------------------------------------------------------------------


@every_shape
def test_no_shape_shows_its_values_or_changes(shape: type[Shape]) -> None:
    body = filled(shape)

    for text in (repr(body), str(body), f"{body!r:>5}", repr([body])):
        assert SECRET not in text
    assert shape.__name__ in repr(body)
    assert body.__rich_repr__() == []
    with pytest.raises(AttributeError):
        setattr(body, shape.__struct_fields__[0], "")


# -- bodies are read strictly ------------------------------------------------------------------------


@every_shape
def test_bodies_refuse_unknown_fields_and_answers_pass_them_over(shape: type[Shape]) -> None:
    assert shape.__struct_config__.forbid_unknown_fields == issubclass(shape, Body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"plaintext":"","context":null,"key_id":null}', EncryptIn(plaintext=b"")),
        (b'{"plaintext":"","context":"a=b"}', EncryptIn(plaintext=b"", context="a=b")),
        (b'{"plaintext":"","context":{"a":"b"}}', EncryptIn(plaintext=b"", context={"a": "b"})),
    ],
)
def test_null_is_absent_and_a_context_is_text_or_an_object(body: bytes, expected: EncryptIn) -> None:
    assert msgspec.json.decode(body, type=EncryptIn) == expected


@pytest.mark.parametrize(
    "body",
    [
        b'{"plaintext":"hunter2!"}',
        b'{"plaintext":"hunter2hunter2="}',
        b'{"plaintext":"aHVudGVyMg"}',
        b'{"plaintext":7}',
        b'{"plaintext":"","key_id":"hunter2/../x"}',
        b'{"plaintext":"","context":{"a":{"hunter2":1}}}',
        b'{"plaintext":"","context":["hunter2"]}',
        b'{"context":"hunter2"}',
        b'["hunter2"]',
    ],
    ids=["alphabet", "length", "unpadded", "number", "key id", "nested", "list", "missing", "array"],
)
def test_a_wrong_body_is_refused_and_not_quoted(body: bytes) -> None:
    assert SECRET not in refusal(body)


@pytest.mark.parametrize(
    ("shape", "fields", "fits"),
    [
        *[(DecryptIn, {"ciphertext": "", "key_id": key_id}, True) for key_id in PLAIN_NAMES],
        *[(DecryptIn, {"ciphertext": "", "key_id": key_id}, False) for key_id in OTHER_NAMES],
        *[(GenerateKeyIn, {"number_of_bytes": size}, 1 <= size <= 1024) for size in (0, 1, 1024, 1025)],
        (GenerateKeyIn, {"key_spec": "AES_256"}, True),
        (GenerateKeyIn, {"key_spec": "AES_192"}, False),
        (JobIn, {"kind": "encrypt", "ttl_s": 59}, False),
        (JobIn, {"kind": "encrypt", "ttl_s": 60}, True),
        (JobIn, {"kind": "encrypt", "ttl_s": 2_592_000}, True),
        (JobIn, {"kind": "encrypt", "ttl_s": 2_592_001}, False),
        *[(BatchIn, {"operation": "encrypt", "items": [{}] * n}, n in {1, 1000}) for n in (0, 1, 1000, 1001)],
    ],
)
def test_names_sizes_and_counts_have_bounds(
    shape: type[Shape], fields: dict[str, object], *, fits: bool
) -> None:
    body = msgspec.json.encode(fields)
    if fits:
        assert isinstance(msgspec.json.decode(body, type=shape), shape)
    else:
        assert refusal(body, shape)


# -- bytes -------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=100))
def test_bytes_travel_as_padded_standard_base64(data: bytes) -> None:
    body = wire.encode(EncryptOut(ciphertext=data, key_id="k", key_version="1", backend="age"))

    assert msgspec.json.decode(body, type=EncryptOut).ciphertext == data


def test_base64_is_the_standard_alphabet() -> None:
    body = wire.encode(EncryptOut(ciphertext=b"\xfb\xff", key_id="k", key_version="1", backend="age"))

    assert b'"ciphertext":"+/8="' in body


# -- answers -----------------------------------------------------------------------------------------


def test_unset_fields_do_not_appear() -> None:
    assert wire.encode(wire.ItemResult(index=3, ciphertext=b"x")) == b'{"index":3,"ciphertext":"eA=="}'


def test_links_name_themselves_self() -> None:
    links = wire.JobLinks(self_="/j/1", result="/j/1/result")

    assert io.BytesIO(wire.encode(links)).read() == (b'{"self":"/j/1","result":"/j/1/result"}')


def test_states_are_those_of_the_type() -> None:
    assert set(wire.STATES) >= wire.ENDED
    assert set(wire.KEY_SPEC_BYTES) == set(get_args(wire.KeySpec))
